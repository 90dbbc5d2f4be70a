"""Quantized directories: what the compressed-tensors package wrote is read, what we write it reads.

The fixtures are the package's own files with what it makes of them; test_compressed_parity compares
live.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as hs
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ffnlab import compat
from ffnlab.errors import ConfigError
from ffnlab.formats import load, save
from ffnlab.formats.compressed_tensors import packing
from ffnlab.formats.compressed_tensors.schemes import read_schemes
from ffnlab.models import Decoder, DecoderConfig, remove, stack
from ffnlab.weights import Dense, Float8, Int4, Int8, LowRank, SparseInput, Transposed
from quantized_models import (
    config_of,
    float8,
    int4,
    int8,
    matrices,
    quantized,
    rewrite,
    same,
    tensors,
)

READABLE = {
    "w4a16": (Int4, "float32", None),
    "w4a16_bf16": (Int4, "bfloat16", None),
    "w4a16_columns": (Int4, "float16", None),
    "w4afp8": (Int4, "bfloat16", "e4m3"),
    "w4afp8_inferred": (Int4, "float32", "e4m3"),
    "w8a16_fused": (Int8, "float32", None),
    "fp8": (Float8, "float32", "e4m3"),
    "fp8_tensor": (Float8, "bfloat16", None),
    "mixed": (Int4, "float32", None),
}
# Logits are of order 1, both sides compute in float32. Sums are taken in another order; where
# inputs are rounded to e4m3, such a difference can move one to the neighbouring code.
TOLERANCES = {None: 1e-5, "e4m3": 0.02}
CONFIG = DecoderConfig(vocab=32, width=64, hidden=96, layers=2, heads=4, kv_heads=2, head_dim=16)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 9)), jnp.int32)


@pytest.fixture(scope="module")
def folder(fixtures):
    return fixtures / "compressed_tensors"


@pytest.fixture(scope="module")
def model():
    return Decoder(CONFIG, key=jax.random.key(0))


@pytest.mark.parametrize("name", READABLE)
def test_the_packages_files_are_read_bit_for_bit(folder, name):
    kind, dtype, act = READABLE[name]
    loaded = load(folder / name)
    with np.load(folder / name / "expected.npz") as expected:
        want = dict(expected)
    tokens, logits = want.pop("tokens"), want.pop("logits")
    found = matrices(loaded)
    assert set(want) == set(found) - {"lm_head"} and len(want) >= 4
    for module, weight in want.items():
        # Theirs are rounded to the dtype of the scales, ours are exact.
        assert np.array_equal(found[module].astype(dtype), weight.astype(dtype)), module
    weight = loaded.layers[0].attn.q.weight
    assert type(weight) is kind and weight.act == act
    if name == "mixed":
        assert loaded.layers[0].ffn.up.weight.act == "e4m3"
        act = "e4m3"
    assert np.abs(np.asarray(loaded(jnp.asarray(tokens))) - logits).max() < TOLERANCES[act]


@pytest.mark.parametrize("name", READABLE)
def test_read_and_written_again_the_packages_tensors_are_the_same(tmp_path, folder, name):
    notes = save(load(folder / name), tmp_path / "m", format="compressed-tensors")
    theirs, ours = tensors(folder / name), tensors(tmp_path / "m")
    if name == "w4afp8_inferred":  # codes one per byte: we write them packed
        theirs = {key: array for key, array in theirs.items() if array.dtype != np.int8}
        ours = {key: array for key, array in ours.items() if key in theirs}
    if name == "fp8_tensor":  # one scale: we write it once per column
        for key in theirs:
            if key.endswith("weight_scale"):
                theirs[key] = np.broadcast_to(theirs[key], ours[key].shape)
    assert set(ours) == set(theirs)
    for key, array in theirs.items():
        assert ours[key].dtype == array.dtype and np.array_equal(ours[key], array), key
    told = read_schemes(config_of(folder / name)["quantization_config"], "theirs")
    again = read_schemes(config_of(tmp_path / "m")["quantization_config"], "ours")
    if name not in ("w4afp8_inferred", "fp8_tensor"):
        for path in [*ours, "lm_head"]:
            assert again.of(path.rpartition(".")[0]) == told.of(path.rpartition(".")[0])
    assert any("vLLM takes" in note for note in notes) == (kind_of_groups(name) == "odd")
    assert same(load(folder / name), load(tmp_path / "m"))


def kind_of_groups(name):
    return "odd" if READABLE[name][0] is not Float8 and "columns" not in name else "usual"


FORMS = {
    "fireq": lambda w: int4(w, act="e4m3"),
    "divisor that no dtype holds": lambda w: int4(w, divisor=1.7),
    "float32 scales": lambda w: int4(w, dtype=np.float32, divisor=1.0),
    "bfloat16 scales": lambda w: int4(w, dtype=ml_dtypes.bfloat16, divisor=2.0),
    "last group shorter": lambda w: int4(w, group=64),
    "whole columns": lambda w: int4(w, group=w.shape[0]),
    "one padded group": lambda w: int4(w, group=128),
    "int8": lambda w: int8(w, 32),
    "int8, last group shorter": lambda w: int8(w, 64),
    "int8 columns": lambda w: int8(w, act="e4m3"),
    "float8": lambda w: float8(w),
    "float8 inputs": lambda w: float8(w, "e4m3"),
}
CASES = [(form, "float32") for form in FORMS]
CASES += [(form, "bfloat16") for form in ("fireq", "float32 scales", "float8")]
CASES += [(form, "float16") for form in ("fireq", "bfloat16 scales", "last group shorter")]


@pytest.mark.parametrize(("form", "dtype"), CASES)
def test_every_form_comes_back_as_it_was(tmp_path, model, form, dtype):
    narrow = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf).astype(dtype)), model)
    small = quantized(narrow, FORMS[form])
    before = jax.tree.map(np.asarray, small)
    save(small, tmp_path / "m", format="compressed-tensors")
    assert same(before, small)
    assert same(small, load(tmp_path / "m"))
    assert config_of(tmp_path / "m")["dtype"] == dtype
    # What others see: the same values, of which only an odd divisor costs the last bit.
    plain = load(tmp_path / "m", extras=False)
    theirs = matrices(plain)
    for name, ours in matrices(small).items():
        if "divisor" in form:
            np.testing.assert_allclose(theirs[name], ours, rtol=2**-23, err_msg=name)
        else:
            assert np.array_equal(ours, theirs[name]), name
    assert [w.act for w in acts(plain)] == [w.act for w in acts(small)]


def acts(model):
    return [layer.weight for layer in (model.layers[0].attn.q, model.layers[1].ffn.down)]


def test_logits_stay_and_stacked_models_are_written_too(tmp_path, model):
    small = quantized(model, FORMS["fireq"])
    save(stack(small), tmp_path / "m", format="compressed-tensors", max_shard_bytes=20_000)
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) > 1
    assert np.array_equal(load(tmp_path / "m")(TOKENS), small(TOKENS))


def test_the_config_is_the_one_of_vllm(tmp_path, model):
    save(quantized(model, FORMS["fireq"]), tmp_path / "m", format="compressed-tensors")
    assert config_of(tmp_path / "m")["quantization_config"] == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "format": "pack-quantized",
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": 32,
                    "dynamic": False,
                },
                "input_activations": {
                    "num_bits": 8,
                    "type": "float",
                    "symmetric": True,
                    "strategy": "token",
                    "group_size": None,
                    "dynamic": True,
                },
                "output_activations": None,
            }
        },
        "ignore": ["lm_head"],
    }


def test_several_formats_in_one_model(tmp_path, model):
    small = quantized(model, FORMS["fireq"], "layers[*].attn.*")
    small = quantized(small, FORMS["float8 inputs"], "layers[*].ffn.*")
    small = quantized(small, lambda w: LowRank.truncate(w.dense(), 3), "layers[1].ffn.up")
    small = remove(small, [2])
    notes = save(small, tmp_path / "m", format="compressed-tensors")
    written = config_of(tmp_path / "m")["quantization_config"]
    assert written["format"] == "mixed-precision"
    one, two = written["config_groups"].values()
    assert (one["format"], two["format"]) == ("pack-quantized", "float-quantized")
    attention = [f"model.layers.{i}.self_attn.{part}_proj" for i in (0, 1) for part in "koqv"]
    assert sorted(one["targets"]) == attention
    assert len(two["targets"]) == 5
    assert sorted(written["ignore"]) == ["lm_head", "model.layers.1.mlp.up_proj"]
    said = "\n".join(notes)
    assert "fuses maps that differ in format here: model.layers.1.mlp.gate_proj/up_proj" in said
    assert "the LowRank format: 1 linear map written as dense matrices" in said
    assert "removal of 1 sublayer" in said and "Int4 format" not in said
    back = load(tmp_path / "m")
    for name, matrix in matrices(small).items():
        assert np.array_equal(matrices(back)[name], matrix), name
    assert back.layers[1].attn is None
    # The zeros of the removed sublayer are packed as the other block's weights are.
    plain = load(tmp_path / "m", extras=False).layers[1].attn
    for linear, other in ((plain.q, small.layers[0].attn.q), (plain.o, small.layers[0].attn.o)):
        assert type(linear.weight) is type(other.weight)
        assert linear.weight.act == other.weight.act and not linear.weight.dense().any()


def unchecked(function):
    """A function without the type checks of the test run, as users call it."""
    return getattr(function, "__wrapped__", function)


def test_a_width_that_the_group_does_not_divide_has_a_remedy(tmp_path):
    """Dense tensors of quantized values are float32, twice a source in bfloat16; groups that fit
    are packed and smaller than it."""
    config = DecoderConfig(vocab=8, width=84, hidden=84, layers=2, heads=2, kv_heads=1, head_dim=42)
    source = Decoder(config, key=jax.random.key(0), dtype=jnp.bfloat16)

    def written(name, model, **options):
        notes = save(model, tmp_path / name, **options)
        return (tmp_path / name / "model.safetensors").stat().st_size, notes

    plain, notes = written("plain", source)
    assert notes == ()
    large, notes = written("large", quantized(source, lambda w: int8(w, group=32)))
    remedy = "groups of 32 do not divide 84 rows; quantize with groups of 28, or with whole columns"
    assert f"14 linear maps written dense: {remedy} (as float32)" in notes and large > plain
    for group in (28, None):
        fitting = quantized(source, lambda w, group=group: int8(w, group=group))
        small, _ = written(f"small{group}", fitting, format="compressed-tensors")
        assert small < 0.75 * plain


def test_what_does_not_fit_is_written_dense_and_said(tmp_path, model):
    small = quantized(model, lambda w: int4(w, group=56, dtype=np.float32, divisor=1.0))
    with pytest.raises(ConfigError, match="groups of 56 do not divide 64 rows"):
        save(small, tmp_path / "m", format="compressed-tensors")
    small = quantized(small, FORMS["whole columns"], "layers[0].attn.q")
    notes = save(small, tmp_path / "m", format="compressed-tensors")
    remedy = "; quantize with groups of 32, or with whole columns"
    assert f"11 linear maps written dense: groups of 56 do not divide 64 rows{remedy}" in notes
    remedy = "; quantize with groups of 48, or with whole columns"
    assert f"2 linear maps written dense: groups of 56 do not divide 96 rows{remedy}" in notes
    back = load(tmp_path / "m")
    assert same(back.layers[0].attn.q, small.layers[0].attn.q)
    assert np.array_equal(back.layers[0].ffn.up.weight.w, small.layers[0].ffn.up.weight.dense())
    with pytest.raises(ConfigError, match="quantize the model, or use format='dense'"):
        save(model, tmp_path / "n", format="compressed-tensors")
    with pytest.raises(ConfigError, match="'dense', 'compressed-tensors'"):
        unchecked(save)(model, tmp_path / "n", format="gguf")
    assert not (tmp_path / "n").exists()


def test_notes_on_what_vllm_takes(tmp_path):
    sizes = {"width": 128, "hidden": 128, "head_dim": 32, "layers": 1}
    config = dataclasses.replace(CONFIG, tie_embeddings=False, **sizes)
    model = Decoder(config, key=jax.random.key(0), dtype=jnp.bfloat16)

    def notes(fn, where="layers**"):
        small = quantized(model, fn, where)
        return "\n".join(save(small, tmp_path / "m", format="compressed-tensors"))

    assert notes(lambda w: int4(w, group=128, act="e4m3")) == ""
    assert notes(lambda w: int4(w, group=64)) == ""
    assert "groups of 128 only: others in 7" in notes(lambda w: int4(w, group=64, act="e4m3"))
    assert "32, 64, 128 or whole columns: others in 7" in notes(lambda w: int4(w, group=16))
    wide = notes(lambda w: int4(w, group=128, dtype=np.float32))
    assert wide == "float32 scales, which bfloat16 does not hold: in 7 linear maps"
    assert notes(lambda w: int4(w, group=128), "head").startswith("lm_head is quantized")
    assert isinstance(load(tmp_path / "m").head.weight, Int4)


def test_fused_maps(tmp_path, model):
    config = dataclasses.replace(CONFIG, family="phi3", eps=1e-5, windows=None, layers=1)
    phi = Decoder(config, key=jax.random.key(0))
    small = quantized(phi, lambda w: int4(w, divisor=float(w.shape[1])))  # q, k, v have their own
    save(small, tmp_path / "m", format="compressed-tensors")
    stored = tensors(tmp_path / "m")
    assert stored["model.layers.0.self_attn.qkv_proj.weight_packed"].shape == (128, 8)
    assert same(small, load(tmp_path / "m"))
    mixed = quantized(small, FORMS["float8"], "layers[0].attn.k")
    notes = save(mixed, tmp_path / "m", format="compressed-tensors")
    assert "1 linear map written dense: the maps that are one in this family differ in format" in (
        notes
    )
    assert type(load(tmp_path / "m").layers[0].attn.q.weight) is Dense


def test_the_sidecar_is_honoured_beside_the_codes(tmp_path, model):
    from ffnlab.layers import SparseGatedFFN

    small = quantized(model, FORMS["fireq"])
    block, other = small.layers
    block.attn.spec = dataclasses.replace(block.attn.spec, kv_format="int4", query_format="e4m3")
    block.attn.q = block.attn.q.replace(SparseInput(block.attn.q.weight, jnp.float32(0.3)))
    threshold = jnp.linspace(0, 0.1, 96)
    ffn = other.ffn
    other.ffn = SparseGatedFFN(ffn.gate, ffn.up, ffn.down, threshold, activation="silu")
    notes = save(small, tmp_path / "m", format="compressed-tensors")
    back = load(tmp_path / "m")
    assert same(small, back) and np.array_equal(small(TOKENS), back(TOKENS))
    assert "int4 keys and values: in 1 block" in notes
    assert not any("rounding the input" in note for note in notes)
    # A dense `up` beside them keeps its transposed form.
    dense = Transposed(Dense(ffn.up.weight.dense().T))
    other.ffn = SparseGatedFFN(
        ffn.gate, ffn.up.replace(dense), ffn.down, threshold, activation="silu"
    )
    save(small, tmp_path / "m", format="compressed-tensors")
    assert same(small, load(tmp_path / "m"))


def test_codes_go_straight_to_their_shardings(tmp_path, model):
    small = quantized(model, FORMS["fireq"])
    save(small, tmp_path / "m", format="compressed-tensors")
    mesh = compat.make_mesh((2, 4), ("data", "model"))

    def layout(path, axes, shape):
        found = {"mlp": "model", "heads": "model"}
        sides = zip(axes, shape, strict=True)
        return NamedSharding(mesh, P(*(None if n % 4 else found.get(axis) for axis, n in sides)))

    loaded = load(tmp_path / "m", sharding=layout)
    assert same(small, loaded)
    weight = loaded.layers[0].ffn.gate.weight
    assert weight.codes.addressable_shards[0].data.shape == (32, 24)
    assert weight.scales.sharding.spec == P(None, "model")


def test_a_wrapped_text_model(tmp_path, fixtures):
    source = load(fixtures / "models" / "gemma3")
    small = quantized(source, lambda w: int4(w, group=8))
    save(small, tmp_path / "m", format="compressed-tensors")

    def wrap(arrays):
        for name in list(arrays):
            arrays[f"language_model.{name}"] = arrays.pop(name)

    rewrite(tmp_path / "m", wrap)
    config = config_of(tmp_path / "m")
    outer = {"model_type": "gemma3", "quantization_config": config.pop("quantization_config")}
    (tmp_path / "m" / "config.json").write_text(json.dumps(outer | {"text_config": config}))
    assert same(small, load(tmp_path / "m"))


# ---------------------------------------------------------------- layouts


@settings(max_examples=50)
@given(rows=hs.integers(1, 33), columns=hs.integers(1, 5), seed=hs.integers(0, 99))
def test_words_hold_element_i_at_its_bits(rows, columns, seed):
    draw = np.random.default_rng(seed)
    for bits, codes in ((4, draw.integers(-8, 8, (rows, columns))), (8, None)):
        codes = draw.integers(-128, 128, (rows, columns)) if codes is None else codes
        codes = codes.astype(np.int8)
        want = np.zeros((columns, -(-rows * bits // 32)), np.uint64)
        for i in range(rows):
            unsigned = (codes[i].astype(np.int64) + 2 ** (bits - 1)).astype(np.uint64)
            want[:, i * bits // 32] |= unsigned << np.uint64(i * bits % 32)
        if bits == 4:
            nibbles = np.pad(codes, ((0, 34 - rows), (0, 0))).view(np.uint8) & 15
            packed = nibbles[::2] | nibbles[1::2] << 4
            words = packing.int4_words(packed, rows)
            assert np.array_equal(packing.int4_codes(words, rows, 34), packed)
        else:
            words = packing.int8_words(codes)
            assert np.array_equal(packing.int8_codes(words, rows), codes)
        assert words.dtype == np.int32
        assert np.array_equal(words.view(np.uint32), want.astype(np.uint32))


@pytest.mark.parametrize("shape", [(1, 1), (63, 2), (64, 3), (130, 65)])
def test_turning(shape):
    array = np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8)
    turned = packing.turn(array)
    assert np.array_equal(turned, array.T) and turned.flags.c_contiguous
