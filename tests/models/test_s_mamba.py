"""S-Mamba: the authors' forecasts, what it is equal under, which token reads which."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from ffnlab import transform, tree
from ffnlab.errors import ConfigError, FormatError
from ffnlab.formats import load_s_mamba
from ffnlab.layers import Mamba
from ffnlab.models import SMambaConfig
from ffnlab.models.s_mamba import moments
from ffnlab.quantization import nearest

FIXTURE = Path(__file__).parents[1] / "fixtures" / "s_mamba"
SMALL = SMambaConfig(length=6, horizon=3, width=8, hidden=5, states=2)
X = 2 + 3 * jax.random.normal(jax.random.key(1), (2, 6, 4))
run = jax.jit(lambda model, *given: model(*given))


def official(case):
    """(arrays of a case, those of them that are weights, the configuration)."""
    spec = importlib.util.spec_from_file_location("record", FIXTURE / "record.py")
    record = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(record)
    with np.load(FIXTURE / "expected.npz") as file:
        found = {n.removeprefix(f"{case}/"): file[n] for n in file.files if n.startswith(case)}
    weights = {n.removeprefix("weights/"): v for n, v in found.items() if n.startswith("weights/")}
    sizes, (states, _) = record.SIZES, record.CASES[case]
    config = SMambaConfig(
        sizes["seq_len"], sizes["pred_len"], sizes["d_model"], sizes["d_ff"], states=states
    )
    return found, weights, config


@pytest.mark.parametrize("case", ["two states", "sixteen states"])
def test_the_authors_forecasts(case, tmp_path):
    found, weights, config = official(case)
    dead = {"encoder.attn_layers.1.man.D": np.zeros(11, np.float32)}
    save_file(weights | dead, tmp_path / "w.safetensors")
    model = load_s_mamba(tmp_path / "w.safetensors", config)
    given = [jnp.asarray(found[name]) for name in ("x", "marks") if name in found]
    np.testing.assert_allclose(run(model, *given), found["y"], rtol=1e-5, atol=1e-5)


def test_files_that_are_no_such_model(tmp_path):
    _, weights, config = official("two states")
    file = tmp_path / "w.safetensors"
    for change, message in (
        ({"projector.bias": np.zeros(3, np.float32)}, "projector.bias is float32"),
        ({"other": np.zeros(3, np.float32)}, "other is not part of the model"),
        ({"encoder.norm.bias": np.full(32, np.nan, np.float32)}, "NaN or infinity"),
    ):
        save_file(weights | change, file)
        with pytest.raises(FormatError, match=message):
            load_s_mamba(file, config)
    save_file({n: v for n, v in weights.items() if n != "encoder.norm.bias"}, file)
    with pytest.raises(FormatError, match="has no tensor 'encoder.norm.bias'"):
        load_s_mamba(file, config)
    file.write_bytes(b"nothing")
    with pytest.raises(FormatError, match="cannot be read"):
        load_s_mamba(file, config)


def test_a_series_scaled_and_shifted_is_forecast_so():
    model = SMALL.make(key=jax.random.key(0))
    scale, shift = jnp.array([0.5, 1.0, 7.0, 30.0]), jnp.array([-3.0, 0.0, 5.0, 100.0])
    y = run(model, X)
    np.testing.assert_allclose(run(model, X * scale + shift), y * scale + shift, atol=2e-3)
    flat = run(model, X.at[..., 1].set(4.0))
    assert np.isfinite(flat).all()


def test_the_mean_of_a_window_is_no_part_of_the_derivative():
    """As in the authors' code; the deviation's is that of the whole variance."""
    random = jax.random.normal(jax.random.key(5), X.shape)
    (mean, deviation), (of_mean, of_deviation) = jax.jvp(moments, (X,), (random,))
    assert not np.asarray(of_mean).any()
    wanted = jnp.mean((X - mean) * random, axis=1, keepdims=True) / deviation
    np.testing.assert_allclose(of_deviation, wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(deviation, np.sqrt(np.var(X, axis=1, keepdims=True) + 1e-5), 1e-5)


def test_tokens_are_read_in_both_directions():
    model = SMALL.make(key=jax.random.key(0))
    mambas = [path for path, node in tree.walk(model) if isinstance(node, Mamba)]
    nodes = dict(tree.walk(model))

    def times(factor, name):
        names = [f"{path}.{name}" for path in mambas]
        return {n: jax.tree.map(lambda leaf: factor * leaf, nodes[n]) for n in names}

    # Steps of .7, and what is written in them, so that tokens carry far.
    model = tree.replace(model, times(0, "step.b") | times(6, "input.w") | times(6, "select.w"))
    moved = X.at[:, 3, -1].add(2.0)  # the last token's shape changes
    reads = lambda model: float(np.abs(run(model, moved) - run(model, X))[..., 0].max())  # noqa: E731
    assert reads(model) > 1e-3
    off = {path: new for path, new in times(0, "output.w").items() if "reverse" in path}
    assert reads(tree.replace(model, off)) == 0


def test_marks_are_tokens_behind_the_series():
    model = SMALL.make(key=jax.random.key(0))
    marks = jax.random.normal(jax.random.key(2), (2, 6, 2))
    y = run(model, X, marks)
    assert y.shape == (2, 3, 4)
    assert np.abs(y - run(model, X, marks.at[:, 0].add(1.0))).max() > 1e-5


def test_dropout_is_drawn_by_the_key():
    model = SMALL.make(key=jax.random.key(0))
    drop = jax.jit(lambda key: model(X, key=key))
    one, same, other = (drop(jax.random.key(i)) for i in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 1e-3 and np.abs(one - run(model, X)).max() > 1e-3


def test_captured_and_quantized():
    model = SMALL.make(key=jax.random.key(0))
    _, seen = tree.capture(model, tree.of_type(Mamba), X)
    assert len(seen) == 4
    small, _ = transform.apply(nearest(format="int8", group=None), model)
    far = np.abs(run(small, X) - run(model, X)).max() / np.abs(run(model, X)).max()
    assert 0 < far < 0.05


def test_what_is_refused():
    for change, message in (
        ({"horizon": 0}, "horizon=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"activation": "other"}, "activation='other'"),
    ):
        with pytest.raises(ConfigError, match=message):
            SMambaConfig(**{"length": 6, "horizon": 3, "width": 8, "hidden": 5} | change)
    model = SMALL.make(key=jax.random.key(0))
    with pytest.raises(ConfigError, match=r"\[b, 6, n\] are accepted"):
        model(X[:, :5])
    with pytest.raises((ConfigError, TypeError), match="marks"):
        model(X, jnp.zeros((2, 5, 1)))
