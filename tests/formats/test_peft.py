"""PEFT directories: recorded adapters give recorded logits, ours come back, others are refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import models, transform, tree
from ffnlab.errors import ConfigError, FormatError, SelectionError
from ffnlab.formats import load
from ffnlab.formats.peft import load_adapter, pattern_of, save_adapter
from ffnlab.formats.safetensors import entry, open_file, write_file
from ffnlab.layers import MLP
from ffnlab.models import adapters
from ffnlab.quantization import nearest
from ffnlab.testing import tiny
from ffnlab.weights import Dense, Int4, LoRA, map_weights
from peer_scripts import read, runner

CASES = {
    "attention": "models/llama2",
    "patterns": "models/qwen2",
    "fused": "models/phi3",
    "encoder": "encoders/bert_classes",
}
run = jax.jit(lambda model, tokens: model(tokens))
# Both sides compute in float32 on other kernels; logits are of order 1.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def expected(fixtures, name):
    """Base model, folder of the adapter, tokens, logits."""
    folder = fixtures / "peft" / name
    with np.load(folder / "expected.npz") as arrays:
        tokens, logits = jnp.asarray(arrays["tokens"]), arrays["logits"]
    return load(fixtures / CASES[name]), folder, tokens, logits


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_of_peft_gives_its_logits(fixtures, name):
    base, folder, tokens, logits = expected(fixtures, name)
    model = load_adapter(base, folder)
    np.testing.assert_allclose(run(model, tokens), logits, **CLOSE)
    assert not np.allclose(run(base, tokens), logits, atol=0.05)
    np.testing.assert_allclose(run(adapters.merge(model), tokens), logits, **CLOSE)
    stacked = load_adapter(models.stack(base), folder) if name != "patterns" else model
    np.testing.assert_allclose(run(stacked, tokens), logits, **CLOSE)


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_comes_back(fixtures, tmp_path, name):
    base, folder, tokens, logits = expected(fixtures, name)
    save_adapter(load_adapter(base, folder), tmp_path / "adapter", base="somewhere")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["base_model_name_or_path"] == "somewhere"
    ends = {"attention": ["q_proj", "v_proj"], "fused": ["gate_up_proj", "qkv_proj"]}
    bert = "bert.encoder.layer.{}.{}"
    maps = (
        "attention.self.query",
        "attention.self.value",
        "attention.output.dense",
        "output.dense",
    )
    ends["encoder"] = sorted(bert.format(i, name) for i in (0, 1) for name in maps)
    theirs = ["down_proj", "gate_proj", "o_proj", "q_proj"]
    assert config["target_modules"] == ends.get(name, theirs)
    again = load_adapter(base, tmp_path / "adapter")
    np.testing.assert_allclose(run(again, tokens), logits, **CLOSE)
    if name != "fused":  # there each part comes back with the ranks of all
        jax.tree.map(np.testing.assert_allclose, again, load_adapter(base, folder))
    save_adapter(again, tmp_path / "adapter")  # a directory that is there is replaced
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.parity
@pytest.mark.parametrize("name", CASES)
def test_peft_reads_what_is_written(fixtures, tmp_path, name):
    check = runner(fixtures / "peft", "peft")
    base, folder, _, logits = expected(fixtures, name)
    save_adapter(load_adapter(base, folder), tmp_path / "a")
    tokens = folder / "expected.npz"
    check("check.py", fixtures / CASES[name], tmp_path / "a", tokens, tmp_path / "o.npz")
    np.testing.assert_allclose(read(tmp_path / "o.npz")["logits"], logits, **CLOSE)


def test_some_layers_and_some_parts_of_a_fused_map(fixtures, tmp_path):
    base, _, tokens, _ = expected(fixtures, "fused")
    some = tree.at("layers[1].attn.k") | tree.at("layers[2].ffn.down")
    model, _ = transform.apply(adapters.lora(rank=2, alpha=5.0, where=some), base, [])
    mine, rest = tree.trained(model, adapters.TRAINS["lora"])
    model = tree.combine(jax.tree.map(lambda x: x + 0.3, mine), rest)
    save_adapter(model, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_modules"] == [
        "model.layers.1.self_attn.qkv_proj",
        "model.layers.2.mlp.down_proj",
    ]
    again = load_adapter(base, tmp_path / "a")
    np.testing.assert_allclose(run(again, tokens), run(model, tokens), rtol=1e-5, atol=1e-5)


def test_a_quantized_stacked_base_and_names_of_ours(tmp_path, fixtures):
    base, folder, tokens, logits = expected(fixtures, "attention")
    quantized, _ = transform.apply(nearest(format="int4", group=8), models.stack(base), [])
    model = load_adapter(quantized, folder)
    assert isinstance(model.layers.period[0].attn.q.weight.base, Int4)
    rounded = map_weights(lambda w: Dense(w.dense()), quantized)
    np.testing.assert_allclose(
        run(model, tokens), run(load_adapter(rounded, folder), tokens), **CLOSE
    )
    renamed(
        folder,
        tmp_path / "ours",
        lambda name: (
            name.replace("model.model.", "model.", 1)
            .replace("self_attn.q_proj", "attn.q")
            .replace("self_attn.v_proj", "attn.v")
        ),
    )
    np.testing.assert_allclose(run(load_adapter(base, tmp_path / "ours"), tokens), logits, **CLOSE)


def test_models_without_a_family_are_named_by_path(tmp_path, key):
    mlp = MLP((3, 4, 2), key=key)
    chain = jax.tree.map(lambda x: x, mlp)
    maps = {
        path: node.replace(LoRA.init(node.weight, 1, key))
        for path, node in tree.select(mlp, tree.at("maps[*]")).items()
    }
    chain = tree.replace(chain, maps)
    with pytest.raises(ConfigError, match="model is a MLP"):
        save_adapter(chain, tmp_path / "a")


def renamed(folder, target, name):
    """A copy of an adapter whose tensors are called something else."""
    shutil.copytree(folder, target)
    found = open_file(folder / "adapter_model.safetensors")
    write_file(
        target / "adapter_model.safetensors",
        {name(n): entry(found.read(n)) for n in found.tensors},
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; LORA is read"),
        ({"use_dora": True}, r"DoRA \(use_dora\) is True"),
        ({"bias": "all"}, "bias is 'all', which is not read"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"r": 0}, "r is 0, no positive number"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'"),
        ({"alpha_pattern": {"q_proj": -1}}, "alpha_pattern must map modules"),
        ({"use_rslora": 1}, "use_rslora is 1"),
    ],
)
def test_what_is_no_plain_lora_is_refused_by_name(fixtures, tmp_path, change, message):
    base, folder, _, _ = expected(fixtures, "attention")
    shutil.copytree(folder, tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(FormatError, match=message):
        load_adapter(base, tmp_path / "a")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (lambda n: n.replace("lora_A", "lora_magnitude_vector"), "DoRA's magnitudes"),
        (lambda n: n.replace("lora_A", "lora_C"), "tensors that are no low-rank update"),
    ],
)
def test_other_tensors_are_refused(fixtures, tmp_path, name, message):
    base, folder, _, _ = expected(fixtures, "attention")
    renamed(folder, tmp_path / "a", name)
    with pytest.raises(FormatError, match=message):
        load_adapter(base, tmp_path / "a")


def test_an_adapter_of_another_base_is_refused_whole(fixtures, tmp_path):
    base, folder, _, _ = expected(fixtures, "attention")
    with pytest.raises(ConfigError, match="of another base:\n") as caught:
        load_adapter(tiny(), folder)
    assert str(caught.value).count("has A (4, 16), B (16, 4); the map is [in, out] = (16, 8)") == 3
    # Qwen names its maps as Llama does, and its value map is of the same size here: it fits.
    assert load_adapter(load(fixtures / "models" / "llama2"), folder) is not None
    renamed(folder, tmp_path / "a", lambda n: n.replace("q_proj", "r_proj"))
    with pytest.raises(ConfigError, match=r"r_proj' is no linear map of the model"):
        load_adapter(base, tmp_path / "a")
    with pytest.raises(ConfigError, match="has an update already; merge it first"):
        load_adapter(load_adapter(base, folder), folder)
    with pytest.raises(SelectionError, match="has a low-rank update"):
        save_adapter(base, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_numbers_that_are_none_are_refused(fixtures, tmp_path):
    base, folder, _, _ = expected(fixtures, "attention")
    shutil.copytree(folder, tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    found = open_file(folder / file.name)
    arrays = {n: found.read(n) for n in found.tensors}
    next(iter(arrays.values()))[0, 0] = np.nan
    write_file(file, {n: entry(a) for n, a in arrays.items()})
    with pytest.raises(FormatError, match="is not made of finite floats"):
        load_adapter(base, tmp_path / "a")
    file.unlink()
    with pytest.raises(FormatError, match="cannot be read"):
        load_adapter(base, tmp_path / "a")


def test_patterns_name_a_module_by_its_end_or_whole():
    pattern = {"v_proj": 1, "^model.layers.0.q_proj": 2, "model\\.layers\\.1\\.q_proj": 3}
    assert pattern_of(pattern, "model.layers.5.v_proj", 9) == 1
    assert pattern_of(pattern, "model.layers.0.q_proj", 9) == 2
    assert pattern_of(pattern, "base.model.layers.0.q_proj", 9) == 9
    assert pattern_of(pattern, "model.layers.1.q_proj", 9) == 3
    assert pattern_of(pattern, "model.layers.1.kv_proj", 9) == 9
