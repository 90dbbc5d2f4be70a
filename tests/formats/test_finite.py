"""Numbers that are finite alone and not together: load and save name the part that overflows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ffnlab import tree
from ffnlab.errors import FormatError
from ffnlab.formats import load, save
from ffnlab.formats.huggingface.finite import not_finite
from ffnlab.models import Decoder, DecoderConfig, stack
from quantized_models import int4, quantized, rewrite

CONFIG = DecoderConfig(
    vocab=32,
    width=64,
    hidden=64,
    layers=3,
    heads=2,
    kv_heads=1,
    head_dim=32,
    windows=(4, None, 4),
    bos=5,
    tie_embeddings=False,
    family="gemma2",
    activation="gelu_tanh",
    norm_offset=1.0,
    sandwich_norms=True,
    embed_scale=8.0,
    query_scale=16**-0.5,
    attn_softcap=50.0,
    logit_softcap=30.0,
    eps=1e-6,
)


@pytest.fixture(scope="module")
def model():
    return Decoder(CONFIG, key=jax.random.key(0))


def with_value(model, path, value):
    """The model with a parameter filled with one value."""

    def change(node):
        leaves, treedef = jax.tree.flatten(node)
        leaves[0] = jnp.full_like(leaves[0], value)
        return jax.tree.unflatten(treedef, leaves)

    return tree.map_at(model, tree.at(path), change)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("path", "where"),
    [
        ("embed", "embed"),
        ("layers[1].ffn.up", "layers[1]"),
        ("layers[2].attn_norm", "layers[2]"),
        ("norm", "head"),
    ],
)
def test_the_first_part_that_overflows_is_named(model, path, where, tied):
    if tied:
        config = dataclasses.replace(CONFIG, tie_embeddings=True)
        model = Decoder(config, key=jax.random.key(0))
    assert not_finite(model) is None
    value = 1e38 if path == "embed" else 3e38
    assert not_finite(with_value(model, path, value)) == where


@pytest.mark.parametrize("piece", [64, 1000, 2**24])
def test_every_logit_is_looked_at(model, monkeypatch, piece):
    monkeypatch.setattr("ffnlab.formats.huggingface.finite.PIECE", piece)
    for token in (0, 17, 31):
        w = model.head.weight.w.at[:, token].set(3e38)
        head = model.head.replace(dataclasses.replace(model.head.weight, w=w))
        assert not_finite(tree.map_at(model, tree.at("head"), lambda _, head=head: head)) == "head"
    assert not_finite(model) is None


def test_saving_and_loading_name_it(tmp_path, model):
    good = tmp_path / "m"
    save(model, good)
    before = {file.name: file.read_bytes() for file in good.iterdir()}
    for bad in (
        with_value(model, "layers[1].ffn.up", 3e38),
        stack(with_value(model, "norm", 3e38)),
    ):
        with pytest.raises(FormatError, match=r"model: (layers\[1\]|head) gives NaN or infinity"):
            save(bad, good)
        assert {file.name: file.read_bytes() for file in good.iterdir()} == before
    rewrite(good, lambda arrays: arrays["model.layers.1.mlp.up_proj.weight"].fill(3e38))
    with pytest.raises(FormatError, match=r"m: layers\[1\] gives NaN or infinity for one token"):
        load(good)
    assert load(good, check_finite=False) is not None
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    assert load(good, sharding=one) is not None  # where sharded, only values are looked at


def test_scales_and_divisors_of_quantized_weights(tmp_path):
    config = DecoderConfig(
        vocab=32, width=64, hidden=64, layers=2, heads=2, kv_heads=1, head_dim=32
    )
    packed = quantized(Decoder(config, key=jax.random.key(0)), int4)
    save(packed, tmp_path / "m", format="compressed-tensors")
    name = "model.layers.1.mlp.down_proj.weight_scale"

    def change(arrays):
        arrays[name] = np.full(arrays[name].shape, 3e38, np.float32)

    (tmp_path / "m" / "ffnlab.json").unlink(missing_ok=True)
    rewrite(tmp_path / "m", change)
    with pytest.raises(FormatError, match=r"layers\[1\] gives NaN or infinity"):
        load(tmp_path / "m")
    tiny = quantized(packed, lambda w: dataclasses.replace(w, divisor=jnp.float32(1e-40)))
    with pytest.raises(FormatError, match="NaN or infinity"):
        save(tiny, tmp_path / "n", format="compressed-tensors")
    assert not (tmp_path / "n").exists()


@pytest.mark.parametrize(
    ("value", "dtype"), [(np.nan, None), (np.inf, None), (1e6, jnp.float16), (3.4e38, jnp.bfloat16)]
)
def test_values_that_load_would_refuse_are_not_saved(tmp_path, model, value, dtype):
    bad = with_value(model, "layers[0].attn.q", value)
    save(model, tmp_path / "m")
    before = (tmp_path / "m" / "model.safetensors").read_bytes()
    with pytest.raises(FormatError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight holds NaN"):
        save(bad, tmp_path / "m", dtype=dtype)
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["m"]


def test_what_the_sidecar_would_refuse_is_not_saved(tmp_path, model):
    bad = jax.tree.map(lambda leaf: leaf, model)
    bad.layers[0].attn.post_scale = nnx.data(nnx.Param(-jnp.ones((1, 32)), axes=(None, None)))
    with pytest.raises(FormatError, match="post_scale holds a number that is not positive"):
        save(bad, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []
