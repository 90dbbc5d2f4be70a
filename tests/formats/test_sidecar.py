"""ffnlab.json: runtime parts come back, others see the dense model, hostile content is refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as hs

from ffnlab import tree
from ffnlab.errors import FormatError
from ffnlab.formats import ignored_by_others
from ffnlab.formats.huggingface.load import load
from ffnlab.formats.huggingface.save import save
from ffnlab.formats.huggingface.sidecar_schema import Sidecar, parse
from ffnlab.layers import Linear, SparseGatedFFN, Statistic
from ffnlab.models import Decoder, DecoderConfig, remove
from ffnlab.weights import Dense, Float8, Int4, LoRA, LowRank, Masked, SparseInput, Transposed

CONFIG = DecoderConfig(vocab=32, width=16, hidden=24, layers=4, heads=4, kv_heads=2, head_dim=8)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 9)), jnp.int32)


@pytest.fixture(scope="module")
def model():
    return Decoder(CONFIG, key=jax.random.key(0))


def with_weight(model, path, fn):
    """The model with `fn(weight)` in the linear map at `path`."""
    return tree.map_at(model, tree.at(path), lambda linear: linear.replace(fn(linear.weight)))


def compressed(model):
    """Every runtime part at once."""
    model = remove(model, [2, 3, 4])
    codes = np.random.default_rng(1).integers(-8, 8, (16, 24)).astype(np.int8)
    scales = jnp.asarray(np.random.default_rng(2).uniform(0.01, 0.1, (2, 24)), jnp.float32)
    int4 = Int4.from_codes(jnp.asarray(codes), scales, group=8, divisor=1.7, act="e4m3")
    model = with_weight(model, "layers[0].ffn.gate", lambda _: int4)
    model = with_weight(model, "layers[0].ffn.down", lambda w: Float8.quantize(w.w, act="e4m3"))
    model = with_weight(model, "layers[3].attn.q", lambda w: SparseInput(w, jnp.float32(0.3)))
    model = with_weight(
        model, "layers[3].attn.k", lambda w: SparseInput(Dense(w.w, "e4m3"), jnp.float32(0.1))
    )
    model = with_weight(model, "layers[0].attn.v", lambda w: Masked(w, w.w > 0))
    model = with_weight(model, "layers[0].attn.o", lambda w: LowRank.truncate(w.w, 3))
    ffn, attn = model.layers[3].ffn, model.layers[0].attn
    threshold = jnp.asarray(np.random.default_rng(3).uniform(0, 0.3, 24), jnp.float32)
    threshold = threshold.at[:2].set(jnp.asarray([jnp.inf, -1.0]))
    up = ffn.up.replace(Transposed(ffn.up.weight.transpose()))
    model.layers[3].ffn = SparseGatedFFN(
        ffn.gate, up, ffn.down, threshold, activation="silu", strict=False
    )
    attn.spec = dataclasses.replace(attn.spec, kv_format="int4", query_format="e4m3")
    scale = jnp.asarray(np.random.default_rng(4).uniform(0.5, 2, (2, 8)), jnp.float32)
    attn.post_scale = nnx.data(nnx.Param(scale, axes=("kv_heads", "head_dim")))
    return model


def test_a_compressed_model_gives_the_same_logits(tmp_path, model):
    small = compressed(tree.copy(model))
    save(small, tmp_path / "m")
    back = load(tmp_path / "m")
    assert back.config == small.config
    # INT4 and FP8 come back as the dense matrices they stand for: other sums, same numbers.
    difference = np.abs(np.asarray(back(TOKENS)) - np.asarray(small(TOKENS))).max()
    assert difference < 1e-5
    sparse, attn = back.layers[3].ffn, back.layers[0].attn
    assert isinstance(sparse, SparseGatedFFN) and not sparse.strict
    assert isinstance(sparse.up.weight, Transposed)
    assert np.array_equal(sparse.threshold.get_value(), small.layers[3].ffn.threshold.get_value())
    assert np.array_equal(attn.post_scale.get_value(), small.layers[0].attn.post_scale.get_value())
    assert (attn.spec.kv_format, attn.spec.query_format) == ("int4", "e4m3")
    assert back.layers[0].ffn.gate.weight.act == "e4m3"
    assert float(back.layers[3].attn.k.weight.threshold) == pytest.approx(0.1)
    assert back.layers[1].attn is None and back.layers[1].ffn is None
    # A second round trip changes nothing any more.
    save(back, tmp_path / "n")
    again = load(tmp_path / "n")
    assert jax.tree.structure(again) == jax.tree.structure(back)
    assert all(map(np.array_equal, jax.tree.leaves(again), jax.tree.leaves(back)))


def test_without_the_sidecar_the_runtime_parts_are_off(tmp_path, model):
    small = compressed(tree.copy(model))
    save(small, tmp_path / "m")
    (tmp_path / "m" / "ffnlab.json").unlink()
    others = load(tmp_path / "m")
    assert others.config.layers == 3
    plain = tree.map_at(
        small,
        tree.of_type(Linear),
        lambda linear: linear.replace(Dense(linear.weight.dense().astype(jnp.float32))),
    )
    plain.layers[0].attn.spec = others.layers[0].attn.spec
    plain.layers[0].attn.post_scale = nnx.data(None)
    plain.layers[3].ffn.threshold = Statistic(jnp.full((24,), -1.0), axes=("mlp",))
    assert np.abs(np.asarray(others(TOKENS)) - np.asarray(plain(TOKENS))).max() < 1e-5


def test_what_others_ignore_is_said_in_words(model):
    assert ignored_by_others(model) == []
    found = "\n".join(ignored_by_others(compressed(tree.copy(model))))
    for part in [
        "rounding the input of linear maps to e4m3: in 3 linear maps",
        "thresholds on the input of linear maps: in 2 linear maps",
        "thresholds on FFN activations: in 1 block",
        "post-RoPE scales of keys and queries: in 1 block",
        "rounding of queries to e4m3: in 1 block",
        "int4 keys and values: in 1 block",
        "removal of 1 sublayer",
        "the Int4 format: 1 linear map",
        "the Masked format: 1 linear map",
    ]:
        assert part in found


def test_a_lora_over_a_runtime_part_is_refused(tmp_path, model):
    plain = with_weight(model, "layers[0].attn.q", lambda w: LoRA.init(w, 2, jax.random.key(1)))
    save(plain, tmp_path / "m")
    assert np.abs(np.asarray(load(tmp_path / "m")(TOKENS)) - np.asarray(plain(TOKENS))).max() < 1e-5
    rounding = with_weight(
        model,
        "layers[0].attn.q",
        lambda w: LoRA.init(Dense(w.w, "e4m3"), 2, jax.random.key(1)),
    )
    with pytest.raises(FormatError, match=r"layers\[0\]\.attn\.q: a LoRA"):
        save(rounding, tmp_path / "n")


@pytest.fixture(scope="module")
def saved(tmp_path_factory, model):
    """A directory with every runtime part."""
    folder = tmp_path_factory.mktemp("saved") / "m"
    save(compressed(tree.copy(model)), folder)
    return folder


BAD = {
    "format": ("format", "gguf", "'ffnlab' and 1"),
    "version": ("version", 2, "'ffnlab' and 1"),
    "unknown key": ("more", 1, "unknown key 'more'"),
    "many blocks": ("blocks", 10**9, "0..1024"),
    "fewer blocks": ("blocks", 2, "removed"),
    "unit out of range": ("removed", [2, 3, 8], "0..7"),
    "unit twice": ("removed", [2, 3, 3], "ascending"),
    "no removal": ("removed", [], "4 blocks are left"),
    "windows too short": ("windows", [1], "1 entries for 4 blocks"),
    "windows differ": ("windows", [5, 5, 5, 5], "contradict"),
    "block": ("by_block", {"9": {}}, "not a block"),
    "block number": ("by_block", {"01": {}}, "not a block"),
    "block list": ("by_block", [], "must be an object"),
    "kv format": ("by_block", {"0": {"kv_format": "fp3"}}, "not one of"),
    "scale shape": ("by_block", {"0": {"post_scale": [[1.0] * 8]}}, "2 are expected"),
    "scale sign": ("by_block", {"0": {"post_scale": [[0.0] * 8] * 2}}, "not positive"),
    "threshold length": ("by_block", {"0": {"threshold": [1.0]}}, "24 are expected"),
    "threshold text": ("by_block", {"0": {"threshold": ["x"] * 24}}, "not a number"),
    "threshold huge": ("by_block", {"0": {"threshold": [10**400] * 24}}, "float32"),
    "strict": ("by_block", {"0": {"strict": 1}}, "true or false"),
    "path": ("linears", {"layers[0].ffn.router": {}}, "not the path"),
    "path out of range": ("linears", {"layers[7].ffn.up": {}}, "not the path"),
    "act": ("linears", {"head": {"act": "int2"}}, "not one of"),
    "stored": ("linears", {"head": {"stored": 3}}, "short name"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_content_is_named(tmp_path, saved, case):
    shutil.copytree(saved, tmp_path / "m")
    raw = json.loads((saved / "ffnlab.json").read_text())
    key, value, text = BAD[case]
    (tmp_path / "m" / "ffnlab.json").write_text(json.dumps(raw | {key: value}))
    with pytest.raises(FormatError, match=r"ffnlab\.json") as error:
        load(tmp_path / "m")
    assert text in str(error.value)


JUNK = hs.recursive(
    hs.one_of(
        hs.none(), hs.booleans(), hs.integers(), hs.floats(), hs.text(max_size=4), hs.just(10**400)
    ),
    lambda inner: hs.one_of(
        hs.lists(inner, max_size=3), hs.dictionaries(hs.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=hs.data())
def test_mutated_content_is_parsed_or_refused(saved, data):
    raw = json.loads((saved / "ffnlab.json").read_text())
    node = raw
    while isinstance(node, dict | list) and node:
        key = data.draw(hs.sampled_from(sorted(node) if isinstance(node, dict) else [0]))
        if not isinstance(node[key], dict | list) or data.draw(hs.booleans()):
            node[key] = data.draw(JUNK)
            break
        node = node[key]
    try:
        found = parse(raw, dataclasses.replace(CONFIG, layers=3), Path("ffnlab.json"))
    except FormatError as error:
        assert "ffnlab.json" in str(error)
    else:
        assert isinstance(found, Sidecar)
