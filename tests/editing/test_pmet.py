"""PMET as a transform: what it measures and writes, by hand; forms, files, what it refuses."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from edited_models import FACTS, rows_of, seen_of, small, text
from ffnlab import models, transform, tree
from ffnlab.editing import Fact, pmet, usual_layers
from ffnlab.errors import ConfigError, FormatError, NumericalError
from ffnlab.formats import Tokenizer
from ffnlab.layers import MLP
from ffnlab.pruning import finercut
from ffnlab.quantization import nearest
from ffnlab.recipes import parse_recipe
from ffnlab.routing import duo
from ffnlab.sparsity import chess
from ffnlab.testing import counted, equal, tiny_encoder
from ffnlab.transform import apply, calibrate
from ffnlab.weights import Dense, Int4

PREFIXES = ("A. ", "Then b. ")
FEW = {"steps": 3, "rate": 0.1}
run = jax.jit(lambda model, tokens: model(tokens))


@functools.cache
def edited(**options):
    """(transform, new model, stats) of the small model."""
    given = {"layers": (0, 1), "prefixes": PREFIXES, "preserve": 3.0} | FEW | options
    made = pmet(FACTS, **given)
    return made, *apply(made, small(), text(), progress=False)


def test_the_second_moment_is_a_mean_over_tokens_that_are_there():
    made, valid = edited()[0], np.ones((2, 3, 16), np.int32)
    valid[0, 0, 11:], valid[0, 1, :5], valid[1, 2, :2], valid[1, 0] = 0, 0, 0, 0
    stats, keys = made.init(small()), {0: [], 1: []}
    for tokens, there in zip(text(), valid, strict=True):
        stats = made.observe(stats, small(), {"tokens": tokens, "segments": there})
        for row, mask in zip(np.asarray(tokens), there.astype(bool), strict=True):
            # Rotary positions are relative: those of a text that begins later do not matter.
            seen = seen_of(small(), row[mask])
            [found.append(seen.keys[i, : mask.sum()]) for i, found in keys.items()]
    assert stats.tokens == valid.sum()
    for i, found in keys.items():
        k = np.concatenate(found).astype(np.float64)
        moment = stats.moments[f"layers[{i}].ffn.down"]
        np.testing.assert_allclose(moment, k.T @ k / len(k), rtol=1e-4, atol=1e-5)


def by_hand(stats, spread):
    """The deltas of both layers, from what step 1 found, a row at a time."""
    model, deltas = tree.copy(small()), []
    for i in range(2):
        keys, missing = [], []
        for n, fact in enumerate(FACTS):
            found = []
            for row in rows_of(fact, PREFIXES):
                seen = seen_of(model, row.ids)
                found.append(seen.keys[i, row.place].astype(np.float64))
                if len(found) == 1:
                    missing.append(stats.targets[n] - seen.ffn[1, row.place].astype(np.float64))
            keys.append((found[0] + np.mean(found[1:], axis=0)) / 2)
        k, r = np.stack(keys).T, np.stack(missing).T
        left = 2 - i
        r = r / (np.sqrt(left) if spread == "root" else left)
        c = np.asarray(stats.moments[f"layers[{i}].ffn.down"], np.float64)
        delta = (r @ k.T @ np.linalg.inv(k @ k.T + 3.0 * c)).T.astype(np.float32)
        down = model.layers[i].ffn.down
        model.layers[i].ffn.down = down.replace(Dense(down.weight.w + delta))
        deltas.append(delta)
    return deltas


SLOW = pytest.mark.slow


@pytest.mark.parametrize("spread", ["root", pytest.param("linear", marks=SLOW)])
def test_the_deltas_by_hand(spread):
    _, new, stats = edited(spread=spread)
    for i, delta in enumerate(by_hand(stats, spread)):
        path = f"layers[{i}].ffn.down"
        size = np.abs(delta).max()
        np.testing.assert_allclose(stats.deltas[path], delta, atol=2e-3 * size, rtol=2e-2)
        was = small().layers[i].ffn.down.weight.w
        np.testing.assert_array_equal(new.layers[i].ffn.down.weight.w, was + stats.deltas[path])
    rest = jax.tree_util.tree_leaves_with_path(new), jax.tree.leaves(small())
    changed = [jax.tree_util.keystr(p) for (p, a), b in zip(*rest, strict=True) if not equal(a, b)]
    assert changed == [f".layers[{i}].ffn.down.w.value.w" for i in range(2)]


@pytest.mark.parametrize("kind", ["plain", pytest.param("gated", marks=SLOW)])
def test_one_fact_in_one_layer_is_written_exactly(kind):
    fact = FACTS[1]
    made = pmet([fact], layers=[1], prefixes=(), preserve=1e-7, **FEW)
    new, stats = apply(made, small(kind), text(), progress=False)
    row, *_ = rows_of(fact, ())
    np.testing.assert_allclose(seen_of(new, row.ids).ffn[1, row.place], stats.targets[0], atol=1e-4)
    before = np.asarray(stats.before.ffn[0])
    assert np.abs(stats.targets[0] - before).max() > 0.01


@SLOW
def test_facts_go_through_in_chunks():
    whole, parts = edited()[2], edited(chunk=2)[2]
    np.testing.assert_allclose(parts.targets, whole.targets, rtol=1e-4, atol=1e-5)
    assert parts.steps.tolist() == whole.steps.tolist()
    for path, delta in whole.deltas.items():
        np.testing.assert_allclose(parts.deltas[path], delta, rtol=1e-2, atol=1e-4)


def test_other_facts_and_numbers_compile_nothing():
    edited()
    others = [
        Fact("Ed", "{} is", "z"),
        Fact("Fi Ray", "Now {} plays", " ax"),
        Fact("Gy", "{}", "?!"),
    ]
    options = {"layers": (0, 1), "prefixes": PREFIXES, "preserve": 7.0, "steps": 2, "rate": 0.3}
    with counted() as count:
        calibrate(pmet(others, **options), small(), text(), progress=False)
    assert count.programs == 0


def test_stats_from_a_file_have_their_layers_in_order():
    """A tree of names is sorted as texts when it comes back, `layers[10]` before `layers[9]`."""
    made, _, stats = edited()
    back = stats._replace(moments=dict(reversed(stats.moments.items())))
    again, done = made.advance(small(), back)
    assert done and list(again.deltas) == list(stats.deltas)
    for path, delta in stats.deltas.items():
        np.testing.assert_array_equal(again.deltas[path], delta)


@SLOW
def test_quantized_matrices_become_dense_where_they_are_edited():
    packed, _ = apply(nearest(group=4), small())
    made = pmet(FACTS, layers=[1], prefixes=(), **FEW)
    stats = calibrate(made, packed, text(), progress=False)
    with pytest.warns(UserWarning, match=r"dense .*: layers\[1\]\.ffn\.down \(Int4\)"):
        new = made.rewrite(packed, stats)
    kinds = [type(block.ffn.down.weight) for block in new.layers]
    assert kinds == [Int4, Dense, Int4] and isinstance(new.layers[1].ffn.up.weight, Int4)
    was = packed.layers[1].ffn.down.weight.dense()
    np.testing.assert_array_equal(
        new.layers[1].ffn.down.weight.w, was + stats.deltas["layers[1].ffn.down"]
    )


@SLOW
def test_what_is_edited_is_saved_pruned_and_quantized(tmp_path):
    new = edited()[1]
    models.save(new, tmp_path / "hf")
    assert (tmp_path / "hf" / "config.json").exists()
    tokens = text()[0]
    np.testing.assert_array_equal(run(models.load(tmp_path / "hf"), tokens), run(new, tokens))
    for step in (finercut(remove=1), nearest(format="int8", group=None)):
        further, _ = apply(step, new, text(), progress=False)
        models.save(further, tmp_path / step.name, format="ffnlab")
        back = models.load(tmp_path / step.name)
        np.testing.assert_array_equal(run(back, tokens), run(further, tokens))


def test_recipes_name_it(tmp_path):
    (tmp_path / "facts.toml").write_text(
        '[[fact]]\nsubject = "Al"\nprompt = "{} is"\nnew = "x"\n', encoding="utf-8"
    )
    stage = f"""[[stage]]
        transform = "pmet"
        facts = "{tmp_path / "facts.toml"}"
        layers = [0, 1]
        prefixes = []
        steps = 2
        preserve = 10"""
    made = parse_recipe(stage).stages[0].build()
    stats = made.init(small())
    assert made.name == "pmet" and len(stats.nats) == 1
    assert list(stats.deltas) == ["layers[0].ffn.down", "layers[1].ffn.down"]
    with pytest.raises(ConfigError, match=r"stage 1 \(pmet\): .*none.toml: cannot be read"):
        parse_recipe(stage.replace("facts.toml", "none.toml"))
    Tokenizer.bytes().save(tmp_path)
    parse_recipe(f'{stage}\ntokenizer = "{tmp_path}"')
    with pytest.raises(ConfigError, match="no tokenizer.json"):
        parse_recipe(f'{stage}\ntokenizer = "{tmp_path / "nowhere"}"')


def test_it_waits_for_its_pass():
    made = edited()[0]
    with pytest.raises(ConfigError, match="calibrate until done"):
        made.rewrite(small(), made.init(small()))
    with pytest.raises(ConfigError, match="no token of the calibration batches is valid"):
        made.advance(small(), made.init(small()))


def test_models_that_cannot_be_edited():
    def refused(said, model=None, **options):
        given = {"layers": [1], "prefixes": ()} | options
        with pytest.raises(ConfigError, match=said):
            pmet(FACTS, **given).init(small() if model is None else model)

    refused("Encoder; a Decoder", tiny_encoder())
    refused("MLP; a Decoder", MLP((2, 3), key=jax.random.key(0)))
    refused(r"layers=\[3\]; the model has layers 0\.\.2", layers=[3])
    refused(r"layers=\[-1, 0\]", layers=[-1, 0])
    refused("layer 1 has ByChoice", apply(duo(ratio=4), small())[0])
    sparse, _ = apply(chess(), small(), text(), progress=False)
    refused("layer 1 has SparseGatedFFN.*plain or gated", sparse)
    bare = tree.copy(small())
    bare.layers[1] = bare.layers[1].without("attn")
    refused("layer 1 has no attention", bare)
    pmet(FACTS, layers=[1], prefixes=(), vectors="ffn").init(bare)
    bare.layers[1] = small().layers[1].without("ffn")
    refused("layer 1 has NoneType", bare)
    with pytest.raises(ConfigError, match="the model has a context of 64"):
        pmet([Fact("a", "{}" + "b" * 80, "c")], layers=[1]).init(small())
    long = [Fact("a", "{}" + "b" * 42, "c")]
    with pytest.raises(ConfigError, match="44 tokens, and the model's own prefixes have 21"):
        pmet(long, layers=[1]).init(small())
    pmet(long, layers=[1], prefixes=()).init(small())


def test_bad_options(tmp_path):
    for options, said in (
        ({"layers": []}, r"layers=\[\]"),
        ({"layers": [2, 1]}, r"layers=\[2, 1\]"),
        ({"preserve": -1.0}, "preserve=-1.0"),
        ({"preserve": float("inf")}, "preserve=inf"),
        ({"chunk": 0}, "chunk=0"),
        ({"seed": -1}, "seed=-1"),
        ({"steps": 0}, "steps=0"),
    ):
        with pytest.raises(ConfigError, match=said):
            pmet(FACTS, **options)
    with pytest.raises(ConfigError, match="no facts"):
        pmet([])
    with pytest.raises(ConfigError, match="contradict"):
        pmet([FACTS[0], Fact("Al", "{} is", "y")])
    with pytest.raises(FormatError, match="cannot be read"):
        pmet(str(tmp_path / "none.toml"))


def test_numbers_that_are_none():
    same = {"layers": (0, 1), "prefixes": PREFIXES} | FEW  # as `edited`, of which programs are left
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, small())
    with pytest.raises(NumericalError, match="not finite"):
        calibrate(pmet(FACTS, **same), broken, text(), progress=False)
    with pytest.raises(NumericalError, match="preserve=0: of 3 keys over 20 channels"):
        calibrate(pmet(FACTS, preserve=0.0, **same), small(), text(), progress=False)


def test_the_usual_layers_lie_where_they_do_in_gpt_j():
    assert usual_layers(28) == (3, 4, 5, 6, 7, 8) and usual_layers(2) == (0, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(pmet(FACTS).init(small()).deltas) == [f"layers[{i}].ffn.down" for i in (0, 1)]


@SLOW
def test_prefixes_are_the_model_s_own_unless_given():
    stats = transform.calibrate(pmet(FACTS, layers=[1], **FEW), small(), text(), progress=False)
    again = transform.calibrate(pmet(FACTS, layers=[1], **FEW), small(), text(), progress=False)
    other = pmet(FACTS, layers=[1], seed=1, **FEW)
    assert equal(stats, again)
    assert not equal(stats.targets, calibrate(other, small(), text(), progress=False).targets)
