"""Quantized experts in the formats of compressed-tensors: a map each, as vLLM reads a mixture."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import transform, tree
from ffnlab.errors import FormatError
from ffnlab.formats import load, save
from ffnlab.formats.compressed_tensors.writing import Encoder
from ffnlab.layers import GroupedLinear, MoESpec
from ffnlab.models import Decoder, DecoderConfig, remove
from ffnlab.quantization import nearest
from ffnlab.testing import equal
from ffnlab.weights import Float8, Int4, Int8
from quantized_models import rewrite, tensors

E = 3
MIXTRAL = DecoderConfig(
    family="mixtral",
    vocab=16,
    width=64,
    hidden=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
    mixture=MoESpec(E, 2, 32),
)
QWEN = dataclasses.replace(
    MIXTRAL,
    family="qwen3_moe",
    hidden=96,
    qk_norm=True,
    mixture=MoESpec(E, 2, 32, normalize=False),
    ffns=("gated", "mixture"),
)
HEADS = {
    "mixtral": ("model.layers.{n}.block_sparse_moe.experts.{e}.", ("w1", "w3", "w2")),
    "qwen3_moe": (
        "model.layers.{n}.mlp.experts.{e}.",
        ("gate_proj", "up_proj", "down_proj"),
    ),
}
DIVISORS = (1.0, 2.0, 4.0)


def with_scales(model, dtype, divisors=(1.0,) * E, where="**"):
    """The model with the scales of its experts drawn in a dtype, divided by a number for each."""

    def changed(linear):
        weight = linear.weight
        drawn = np.random.default_rng(0).uniform(0.02, 0.2, weight.scales.shape)
        scales = jnp.asarray(drawn, dtype)
        divisor = jnp.asarray(divisors, jnp.float32)
        return linear.replace(dataclasses.replace(weight, scales=scales, divisor=divisor))

    return tree.map_at(model, tree.at(where) & tree.of_type(GroupedLinear), changed)


def quantized(config, **options):
    """A random model with its linear maps rounded to nearest."""
    options = {"format": "int4", "group": 32} | options
    return transform.apply(nearest(**options), Decoder(config, key=jax.random.key(0)), [])[0]


CASES = {
    "mixtral": lambda: quantized(MIXTRAL),
    "qwen": lambda: quantized(QWEN),
    "e4m3 scales": lambda: with_scales(quantized(QWEN), "float8_e4m3fn"),
    "unlike divisors": lambda: with_scales(quantized(MIXTRAL), "float8_e4m3fn", DIVISORS),
    "int8": lambda: quantized(MIXTRAL, format="int8", group=None, activations="e4m3"),
    "float8": lambda: quantized(QWEN, format="float8", group=None, activations="e4m3"),
    "removed": lambda: remove(quantized(MIXTRAL), [3]),
}


@pytest.mark.parametrize("name", CASES)
def test_packed_experts_come_back_bit_for_bit(tmp_path, name):
    model = CASES[name]()
    save(model, tmp_path / "m", format="compressed-tensors")
    back = load(tmp_path / "m")
    assert equal(back, model)
    assert isinstance(back.layers[0].attn.q.weight, Int4 | Int8 | Float8)


@pytest.mark.parametrize("name", ["mixtral", "qwen", "unlike divisors", "float8"])
def test_each_expert_is_written_as_a_linear_map_of_its_own_is(tmp_path, name):
    model = CASES[name]()
    save(model, tmp_path / "m", format="compressed-tensors")
    found = tensors(tmp_path / "m")
    head, parts = HEADS[model.config.family]
    for e in range(E):
        for ours, theirs in zip(("gate", "up", "down"), parts, strict=True):
            weight = getattr(model.layers[1].ffn.experts, ours).weight
            one = jax.tree.map(lambda leaf, e=e: leaf[e], weight)
            expected = Encoder()(head.format(n=1, e=e) + theirs, (one,))
            for tensor, entry in expected.tensors(np.dtype(np.float32)).items():
                np.testing.assert_array_equal(found[tensor], entry.make(), err_msg=tensor)
    router = head.format(n=1, e=0).removesuffix("experts.0.") + "gate"
    config = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    assert router in config["ignore"] and found[f"{router}.weight"].shape == (E, 64)
    assert not any("experts" in ignored for ignored in config["ignore"])


def test_experts_whose_scales_need_unlike_dtypes_share_the_wider(tmp_path):
    model = Decoder(MIXTRAL, key=jax.random.key(0), dtype=jnp.bfloat16)
    small, _ = transform.apply(nearest(format="int4", group=32), model, [])
    small = with_scales(small, "bfloat16")
    # Scales divided by 3 are no numbers of bfloat16.
    small = with_scales(small, "bfloat16", (1.0, 1.0, 3.0), "layers[0].ffn.experts.up")
    notes = save(small, tmp_path / "m", format="compressed-tensors")
    assert any("float32 scales" in note for note in notes)
    found = tensors(tmp_path / "m")
    head = HEADS["mixtral"][0]
    kinds = {found[head.format(n=0, e=e) + "w3.weight_scale"].dtype for e in range(E)}
    assert kinds == {np.dtype(np.float32)}
    assert found[head.format(n=0, e=2) + "w1.weight_scale"].dtype == jnp.bfloat16
    assert equal(load(tmp_path / "m"), small)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, name: t.pop(name + ".weight_scale"), "weight_scale is missing"),
        (
            lambda t, name: t.update({name + ".weight_packed": np.zeros((1, 1), np.int32)}),
            "weight_packed has shape",
        ),
    ],
)
def test_a_damaged_expert_is_named(tmp_path, change, message):
    save(quantized(MIXTRAL), tmp_path / "m", format="compressed-tensors")
    name = "model.layers.1.block_sparse_moe.experts.2.w1"
    rewrite(tmp_path / "m", lambda held: change(held, name))
    with pytest.raises(FormatError, match=name.replace(".", r"\.") + f".*{message}"):
        load(tmp_path / "m")


def test_an_expert_that_is_dense_among_packed_ones_is_refused(tmp_path):
    save(quantized(MIXTRAL), tmp_path / "m", format="compressed-tensors")
    name = "model.layers.1.block_sparse_moe.experts.2.w1"
    file = tmp_path / "m" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["ignore"].append(name)
    file.write_text(json.dumps(config))
    with pytest.raises(FormatError, match="its experts are not quantized alike"):
        load(tmp_path / "m")


@pytest.mark.parametrize("divisor", [[1.0, 2.0], [1.0, 2.0, 0.0], [], "x"])
def test_divisors_that_are_not_the_experts_are_refused(tmp_path, divisor):
    save(CASES["unlike divisors"](), tmp_path / "m", format="compressed-tensors")
    file = tmp_path / "m" / "ffnlab.json"
    said = json.loads(file.read_text())
    scales = said["linears"]["layers[0].ffn.experts.gate"]["scales"]
    assert scales["divisor"] == [1.0, 2.0, 4.0]
    scales["divisor"] = divisor
    file.write_text(json.dumps(said))
    with pytest.raises(FormatError, match=r"divisor|number"):
        load(tmp_path / "m")
