"""Model directories: what is saved comes back, what does not fit is told at once."""

import dataclasses
import functools
import json
import os
import re
import shutil
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ffnlab import compat, transform
from ffnlab.errors import ConfigError, FormatError
from ffnlab.formats import safetensors as st
from ffnlab.formats.huggingface.load import load
from ffnlab.formats.huggingface.plan import variables
from ffnlab.formats.huggingface.save import save
from ffnlab.layers import MoESpec, Rope
from ffnlab.models import Decoder, DecoderConfig, remove, stack
from ffnlab.models.decoder import abstract
from ffnlab.quantization import nearest

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 9)), jnp.int32)
LLAMA = DecoderConfig(
    vocab=32, width=16, hidden=24, layers=3, heads=4, kv_heads=2, head_dim=8, eos=(2, 3), bos=1
)
GEMMA = dataclasses.replace(
    LLAMA,
    family="gemma3_text",
    activation="gelu_tanh",
    qk_norm=True,
    norm_offset=1.0,
    sandwich_norms=True,
    embed_scale=4.0,
    query_scale=24**-0.5,
    windows=(4, None, 4),
    rope=Rope(theta=1e6),
    local_rope=Rope(theta=1e4),
    eps=1e-6,
)
CONFIGS = {
    "llama": LLAMA,
    "untied": dataclasses.replace(LLAMA, tie_embeddings=False, qkv_bias=True, o_bias=True),
    "gemma": GEMMA,
    "phi": dataclasses.replace(
        LLAMA, family="phi3", eps=1e-5, head_dim=4, rope=Rope(fraction=0.5), windows=(5, 5, 5)
    ),
    "mixtral": dataclasses.replace(LLAMA, family="mixtral", mixture=MoESpec(4, 2, 24)),
    "qwen3_moe": dataclasses.replace(
        LLAMA,
        family="qwen3_moe",
        qk_norm=True,
        ffns=("mixture", "gated", "mixture"),
        mixture=MoESpec(5, 2, 6, normalize=False),
    ),
}


def randomized(model, seed=1):
    """Norms and biases too are drawn, so that every tensor matters."""
    leaves, treedef = jax.tree.flatten(model)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noisy = [
        leaf + 0.2 * jax.random.normal(key, leaf.shape, leaf.dtype)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(treedef, noisy)


@functools.cache  # no test changes a model
def build(name, **options):
    return randomized(Decoder(CONFIGS[name], key=jax.random.key(0), **options))


def same(a, b):
    x, y = jax.tree.leaves(a), jax.tree.leaves(b)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        p.dtype == q.dtype and np.array_equal(p, q) for p, q in zip(x, y, strict=True)
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_model_comes_back_bit_for_bit(tmp_path, name):
    model = build(name)
    save(model, tmp_path / "m")
    assert sorted(os.listdir(tmp_path / "m")) == ["config.json", "model.safetensors"]
    back = load(tmp_path / "m")
    assert same(model, back)
    assert back.config == model.config


def test_shards_stacks_and_dtypes(tmp_path):
    model = build("llama", dtype=jnp.bfloat16)
    save(stack(model), tmp_path / "m", max_shard_bytes=3000)
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) > 3
    assert same(model, load(tmp_path / "m"))
    wide = load(tmp_path / "m", dtype=jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(wide)} == {jnp.dtype(jnp.float32)}
    save(wide, tmp_path / "n", dtype=jnp.bfloat16)
    assert same(model, load(tmp_path / "n"))
    with pytest.raises(ConfigError, match="float type"):
        load(tmp_path / "m", dtype=jnp.int8)
    with pytest.raises(ConfigError, match="dtype=float8"):
        save(model, tmp_path / "x", dtype=jnp.float8_e4m3fn)


def test_saving_again_replaces_the_model_and_keeps_the_rest(tmp_path):
    folder = tmp_path / "m"
    save(build("llama"), folder, max_shard_bytes=3000)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_text("mine")
    save(build("untied"), folder)
    assert sorted(os.listdir(folder)) == [
        "config.json",
        "model.safetensors",
        "notes",
        "tokenizer.json",
    ]
    assert (folder / "notes" / "a.txt").read_text() == "mine"
    assert same(build("untied"), load(folder))
    assert os.listdir(tmp_path) == ["m"]


def test_a_failed_save_changes_nothing(tmp_path, monkeypatch):
    folder = tmp_path / "m"
    save(build("llama"), folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(sys.modules["ffnlab.formats.huggingface.save"], "write_json", fail)
    with pytest.raises(OSError, match="disk full"):
        save(build("untied"), folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert os.listdir(tmp_path) == ["m"]


def test_values_go_straight_to_their_shardings(tmp_path):
    model = build("phi")
    save(model, tmp_path / "m")
    mesh = compat.make_mesh((2, 4), ("data", "model"))
    seen = {}

    def layout(path, axes, shape):
        seen[path] = (axes, shape)
        table = {"mlp": "model", "heads": "model", "embed": "data"}
        names = [table.get(axis) for axis in axes]
        return NamedSharding(mesh, P(*names))

    loaded = load(tmp_path / "m", sharding=layout)
    assert same(model, loaded)
    assert seen["layers[1].ffn.gate.w"] == (("embed", "mlp"), (16, 24))
    gate = loaded.layers[1].ffn.gate.weight.w
    assert gate.sharding.spec == P("data", "model")
    assert gate.addressable_shards[0].data.shape == (8, 6)
    replicated = NamedSharding(mesh, P())
    assert all(
        leaf.sharding.is_fully_replicated and len(leaf.devices()) == 8
        for leaf in jax.tree.leaves(load(tmp_path / "m", sharding=replicated))
    )


def test_loaded_arrays_may_be_donated(tmp_path):
    save(build("llama"), tmp_path / "m")
    model = load(tmp_path / "m")
    want = jax.tree.map(lambda x: np.asarray(x) * 2, model)
    doubled = jax.jit(lambda m: jax.tree.map(lambda x: x * 2, m), donate_argnums=0)(model)
    assert same(jax.tree.map(jnp.asarray, want), doubled)


def rewrite(folder, change):
    """Applies `change` to the tensors of a directory."""
    checkpoint = st.open_directory(folder)
    arrays = {name: checkpoint.read(name) for name in checkpoint.tensors}
    change(arrays)
    st.write_directory(folder, {name: st.entry(array) for name, array in arrays.items()})


def test_all_problems_are_told_at_once(tmp_path):
    save(build("llama"), tmp_path / "m")

    def change(arrays):
        del arrays["model.layers.0.self_attn.q_proj.weight"]
        arrays["model.layers.1.mlp.up_proj.weight"] = np.zeros((16, 24), np.float32)
        arrays["model.norm.weight"] = np.ones(16, np.int32)
        arrays["model.layers.9.mlp.up_proj.weight"] = np.zeros((24, 16), np.float32)

    rewrite(tmp_path / "m", change)
    with pytest.raises(FormatError) as error:
        load(tmp_path / "m")
    message = str(error.value)
    assert "4 problems" in message and str(tmp_path / "m") in message
    for part in [
        "'model.layers.0.self_attn.q_proj.weight' is missing",
        "'model.layers.1.mlp.up_proj.weight' has shape [16, 24], config.json asks for [24, 16]",
        "'model.norm.weight' is int32",
        "'model.layers.9.mlp.up_proj.weight' is not part of the model",
    ]:
        assert part in message


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_values_that_are_not_finite_name_their_tensor(tmp_path, value, dtype):
    save(build("llama"), tmp_path / "m", dtype=dtype)

    def change(arrays):
        arrays["model.layers.1.mlp.up_proj.weight"][3, 4] = value

    rewrite(tmp_path / "m", change)
    with pytest.raises(FormatError, match=r"model\.safetensors: tensor .*1\.mlp\.up_proj.* NaN"):
        load(tmp_path / "m")
    assert load(tmp_path / "m", check_finite=False) is not None


@pytest.mark.parametrize(
    ("value", "stored", "dtype"),
    [
        (1e6, np.float32, jnp.float16),
        (1e300, np.float64, None),
        (-1e300, np.float64, jnp.bfloat16),
        (3.4e38, np.float32, jnp.bfloat16),
    ],
)
def test_values_that_a_cast_makes_infinite_name_their_tensor(tmp_path, value, stored, dtype):
    save(build("llama"), tmp_path / "m")

    def change(arrays):
        for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.2.input_layernorm.weight"):
            arrays[name] = arrays[name].astype(stored)
        arrays["model.layers.1.mlp.up_proj.weight"][3, 4] = value

    rewrite(tmp_path / "m", change)
    with pytest.raises(FormatError, match=r"tensor .*1\.mlp\.up_proj.* holds numbers that .*float"):
        load(tmp_path / "m", dtype=dtype)
    gate = load(tmp_path / "m", dtype=dtype, check_finite=False).layers[1].ffn.up.weight.w
    assert not np.isfinite(gate[4, 3])
    rewrite(tmp_path / "m", lambda arrays: arrays["model.layers.1.mlp.up_proj.weight"].fill(2.0))
    assert load(tmp_path / "m", dtype=dtype).layers[1].ffn.up.weight.w[4, 3] == 2


def test_tensors_that_follow_from_the_rest_are_ignored(tmp_path):
    model = build("llama")
    save(model, tmp_path / "m")

    def change(arrays):
        arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"]
        arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    rewrite(tmp_path / "m", change)
    assert same(model, load(tmp_path / "m"))


def test_a_wrapped_checkpoint_may_not_hold_a_tensor_twice(tmp_path, fixtures):
    shutil.copytree(fixtures / "models" / "gemma3_wrapped", tmp_path / "m")

    def change(arrays):
        arrays["model.language_model.norm.weight"] = np.zeros(16, np.float32)

    rewrite(tmp_path / "m", change)
    with pytest.raises(FormatError, match="are the same tensor"):
        load(tmp_path / "m")


def test_directories_without_what_is_needed(tmp_path):
    with pytest.raises(FormatError, match="not a directory"):
        load(tmp_path / "absent")
    with pytest.raises(FormatError, match=r"config\.json"):
        load(tmp_path)
    save(build("llama"), tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(FormatError, match="neither"):
        load(tmp_path / "m")
    (tmp_path / "m" / "config.json").unlink()
    (tmp_path / "m" / "config.json").symlink_to("/etc/passwd")
    with pytest.raises(FormatError, match="leaves the directory"):
        load(tmp_path / "m")


def test_configs_of_absurd_size_fail_before_anything_is_made(tmp_path):
    save(build("llama"), tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    config = json.loads(file.read_text())
    for change, text in [
        ({"num_hidden_layers": 1000}, "num_hidden_layers=1000"),
        ({"vocab_size": 2**24, "hidden_size": 2**18}, r"asks for \[16777216, 262144\]"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method='gptq'"),
    ]:
        file.write_text(json.dumps(config | change))
        with pytest.raises((ConfigError, FormatError), match=text):
            load(tmp_path / "m")


def test_many_layers_that_are_not_there_are_refused_soon(tmp_path):
    save(build("llama"), tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 1024}))
    junk = {f"junk.{i}": st.entry(np.zeros(1, np.float32)) for i in range(1100)}
    st.write_directory(tmp_path / "m", junk)
    start = time.process_time()
    with pytest.raises(FormatError, match="10318 problems"):
        load(tmp_path / "m")
    # Measured 1.3 s; 18 when every block was traced and every name was looked for in all.
    assert time.process_time() - start < 9


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_without_arrays_is_the_model(name):
    whole = jax.eval_shape(lambda key: Decoder(CONFIGS[name], key=key), jax.random.key(0))
    made = abstract(CONFIGS[name])
    assert jax.tree.structure(made) == jax.tree.structure(whole)
    assert jax.tree.leaves(made) == jax.tree.leaves(whole)
    assert len({id(block) for block in made.layers}) == 3


def test_a_tied_model_with_another_head_uses_it(tmp_path):
    tied, folder = build("llama"), tmp_path / "m"
    save(tied, folder)
    head = np.random.default_rng(3).normal(size=(32, 16)).astype(np.float32)

    def store(array):
        rewrite(folder, lambda arrays: arrays.update({"lm_head.weight": array}))

    store(head)
    model = load(folder)
    assert not model.config.tie_embeddings
    np.testing.assert_array_equal(model.head.weight.dense(), head.T)
    want = tied.norm(tied.hidden(TOKENS)) @ head.T
    np.testing.assert_allclose(model(TOKENS), want, rtol=1e-4, atol=1e-4)
    save(model, tmp_path / "n")
    assert same(model, load(tmp_path / "n"))

    one = np.asarray(tied.embed.weight.dense()).copy()
    one[31, 15] += 1e-3  # in the last entry only
    store(one)
    assert not load(folder).config.tie_embeddings
    store(np.asarray(tied.embed.weight.dense(), np.float64))  # the same values, wider
    assert same(tied, load(folder))
    store(head[:31])
    with pytest.raises(FormatError, match=r"lm_head.weight' has shape \[31, 16\]"):
        load(folder)


def test_a_tied_head_that_the_index_lists_and_no_shard_holds(tmp_path):
    def listed(name, tensor, shard=None):
        """The model saved in shards, with one more entry in the index."""
        save(build(name), tmp_path / name, max_shard_bytes=3000)
        file = tmp_path / name / st.INDEX_FILE
        index = json.loads(file.read_text())
        index["weight_map"][tensor] = shard or max(index["weight_map"].values())
        file.write_text(json.dumps(index))
        return tmp_path / name

    assert same(build("llama"), load(listed("llama", "lm_head.weight")))
    # A shard that is not there may have held a head that differs.
    with pytest.raises(FormatError, match="absent"):
        load(listed("llama", "lm_head.weight", "absent"))
    for name, tensor in (("untied", "lm_head.weight2"), ("llama", "model.norm2.weight")):
        with pytest.raises(FormatError, match=f"'{tensor}': the index lists it"):
            load(listed(name, tensor))
    folder = listed("untied", "lm_head.weight")  # listed where it is not, and needed
    with pytest.raises(FormatError, match="'lm_head.weight': the index "):
        load(folder)


@pytest.mark.parametrize("name", ["llama", "gemma", "phi"])
@pytest.mark.parametrize("units", [(1,), (0, 3, 4), (2, 3), (0, 1, 4, 5), (0, 1, 2, 3, 4, 5)])
def test_removed_sublayers(tmp_path, name, units):
    model = remove(build(name), units)
    folder = tmp_path / "m"
    save(model, folder)
    gone = sum({2 * i, 2 * i + 1} <= set(units) for i in range(3))
    written = json.loads((folder / "config.json").read_text())
    assert written["num_hidden_layers"] == max(3 - gone, 1)
    if "layer_types" in written:
        assert len(written["layer_types"]) == max(3 - gone, 1)
    back = load(folder)
    assert same(model, back) and back.config == model.config
    # What others see: the same logits, by way of zeros.
    (folder / "ffnlab.json").unlink()
    difference = np.abs(np.asarray(load(folder)(TOKENS)) - np.asarray(model(TOKENS))).max()
    assert difference < 1e-5  # sums in another order


@pytest.mark.parametrize("scaling", ["yarn", "dynamic"])
def test_a_context_may_be_lifted_to_what_the_rope_allows(tmp_path, scaling):
    rope = Rope(scaling=scaling, factor=4.0, original=16)
    if scaling == "yarn":
        rope = dataclasses.replace(rope, low=1.0, high=32.0)
    config = dataclasses.replace(LLAMA, max_positions=16, rope=rope)
    folder = tmp_path / "m"
    save(Decoder(config, key=jax.random.key(0)), folder)
    assert load(folder).config.max_positions == 16
    lifted = load(folder, max_positions=64)
    assert lifted.config == dataclasses.replace(config, max_positions=64)
    for value in (65, 0, -1):
        with pytest.raises(ConfigError, match=rf"max_positions={value} must lie in 1\.\.64"):
            load(folder, max_positions=value)
    save(lifted, tmp_path / "n")
    # A dynamic rope stretches what the entry says, so that it cannot say how far.
    again = load(tmp_path / "n").config
    assert again.rope == rope and again.max_positions == (64 if scaling == "yarn" else 16)


def test_what_a_family_cannot_say(tmp_path):
    config = dataclasses.replace(LLAMA, qk_norm=True)
    with pytest.raises(ConfigError, match="'llama' cannot say qk_norm=True"):
        save(Decoder(config, key=jax.random.key(0)), tmp_path / "m")
    config = dataclasses.replace(LLAMA, windows=(4, None, 4))
    with pytest.raises(ConfigError, match="cannot say windows"):
        save(Decoder(config, key=jax.random.key(0)), tmp_path / "m")
    assert os.listdir(tmp_path) == []


def test_paths_and_names_agree(fixtures):
    """Every parameter of every family has one tensor, and every tensor its parameters."""
    from ffnlab.formats.huggingface.names import Names

    for name in ("llama_linear", "qwen3_bias", "gemma2", "gemma3", "phi3"):
        folder = fixtures / "models" / name
        model, names = load(folder), None
        names = Names(model.config.family)
        found = {names.place(path).name for path in variables(model)}
        assert found == set(st.open_directory(folder).tensors)
        for path in variables(model):
            place = names.place(path)
            assert names.paths(place.name) == place.paths and place.paths[place.part] == path


def test_transformers_4_and_5_forms_say_the_same(tmp_path, fixtures):
    shutil.copytree(fixtures / "models" / "llama3_v4", tmp_path / "m")
    assert load(tmp_path / "m").config == dataclasses.replace(
        load(fixtures / "models" / "llama3").config, tie_embeddings=False, eos=(2, 3)
    )


def test_each_expert_has_a_tensor_and_all_are_one_parameter(tmp_path, fixtures):
    folder = fixtures / "models" / "qwen3_moe"
    model = load(folder)
    checkpoint = st.open_directory(folder)
    for n, e, part in ((0, 0, "gate"), (2, 4, "up"), (2, 1, "down")):
        stored = checkpoint.read(f"model.layers.{n}.mlp.experts.{e}.{part}_proj.weight")
        held = getattr(model.layers[n].ffn.experts, part).weight.dense()[e]
        np.testing.assert_array_equal(held, stored.T)
    tp = NamedSharding(compat.make_mesh((5,), ("ep",), devices=jax.devices()[:5]), P("ep"))
    cut = load(
        folder,
        sharding=lambda path, axes, shape: tp if axes[0] == "expert" else tp.update(spec=P()),
    )
    assert cut.layers[0].ffn.experts.up.weight.dense().sharding == tp
    assert same(model, jax.device_get(cut))
    shutil.copytree(folder, tmp_path / "m")
    gone = "model.layers.2.mlp.experts.3.up_proj.weight"
    left = {n: st.entry(checkpoint.read(n)) for n in checkpoint.tensors if n != gone}
    st.write_file(tmp_path / "m" / "model.safetensors", left)
    with pytest.raises(FormatError, match=f"{re.escape(gone)}.* is missing"):
        load(tmp_path / "m")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok=9 is more than the 5 experts"),
        ({"num_experts": 4}, "num_experts=4 and num_local_experts=5 differ"),
        ({"num_local_experts": 0}, "num_local_experts=0: an integer from 1"),
        ({"mlp_only_layers": [3]}, "a list of layers below 3 is accepted"),
        ({"mlp_only_layers": 1}, "a list of layers below 3 is accepted"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step=0: an integer from 1"),
        ({"num_local_experts": 9000}, "says 9000 experts, but there are only"),
    ],
)
def test_configs_of_mixtures_that_are_absurd(tmp_path, fixtures, change, message):
    shutil.copytree(fixtures / "models" / "qwen3_moe", tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises((ConfigError, FormatError), match=message):
        load(tmp_path / "m")


def test_quantized_experts_are_written_dense_and_keep_their_rounding(tmp_path):
    model = build("mixtral")
    small, _ = transform.apply(nearest(format="int8", group=None, activations="e4m3"), model, [])
    notes = save(small, tmp_path / "m")
    assert any("Int8" in note for note in notes)
    back = load(tmp_path / "m")
    experts = back.layers[0].ffn.experts.up.weight
    assert experts.act == "e4m3" and back.layers[0].ffn.router.weight.act is None
    np.testing.assert_array_equal(experts.dense(), small.layers[0].ffn.experts.up.weight.dense())
