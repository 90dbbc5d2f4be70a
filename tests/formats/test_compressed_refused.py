"""Quantized directories that lie, contradict themselves or ask for too much: clear errors only."""

import json
import shutil
import time

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as hs

from ffnlab.errors import ConfigError, FormatError
from ffnlab.formats import load, save
from ffnlab.formats import safetensors as st
from ffnlab.formats.compressed_tensors import schemes as schemes_module
from ffnlab.formats.compressed_tensors.reading import decoder
from ffnlab.formats.compressed_tensors.schemes import Schemes, read_schemes
from ffnlab.models import Decoder, DecoderConfig
from quantized_models import config_of, int4, quantized, rewrite, same

CONFIG = DecoderConfig(vocab=32, width=64, hidden=96, layers=2, heads=4, kv_heads=2, head_dim=16)


@pytest.fixture(scope="module")
def folder(fixtures):
    return fixtures / "compressed_tensors"


@pytest.fixture(scope="module")
def model():
    return Decoder(CONFIG, key=jax.random.key(0))


def reconfigure(directory, change):
    """Applies `change` to the quantization_config of a directory."""
    config = config_of(directory)
    change(config["quantization_config"])
    (directory / "config.json").write_text(json.dumps(config))


BAD_CONFIG = {
    "bits": (("weights", "num_bits", 3), "int with 4 or 8, float with 8"),
    "float bits": (("weights", "num_bits", 4.0), "int with 4 or 8"),
    "type": (("weights", "type", "float"), "('float', 4)"),
    "zero points": (("weights", "symmetric", False), "weights.symmetric=False: true (no zero"),
    "dynamic": (("weights", "dynamic", True), "weights.dynamic=True"),
    "reordered": (("weights", "actorder", "group"), "actorder='group'"),
    "blocks": (("weights", "strategy", "block"), "strategy='block': group or channel or tensor"),
    "no group": (("weights", "group_size", None), "group_size=None"),
    "huge group": (("weights", "group_size", 2**40), "group_size=1099511627776"),
    "group text": (("weights", "group_size", "x"), "group_size='x'"),
    "unknown argument": (("weights", "bias", 1), "unknown key 'bias'"),
    "no weights": ((None, "weights", None), "weights=None: an object"),
    "format": ((None, "format", "marlin-24"), "'marlin-24': pack-quantized or int-quantized"),
    "targets": ((None, "targets", "Linear"), "targets='Linear': a list of names"),
    "outputs": ((None, "output_activations", {}), "output_activations={}: none"),
    "int8 inputs": ((None, "input_activations", {"num_bits": 8, "dynamic": True}), "float with 8"),
    "static inputs": (
        (None, "input_activations", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
        "strategy token, dynamic",
    ),
    "unknown in group": ((None, "sparsity", 1), "unknown key 'sparsity'"),
    "preset": (("", "config_groups", {"W4A16": ["Linear"]}), "config_groups['W4A16']=['Linear']"),
    "no groups": (("", "config_groups", {}), "1 to 256 groups"),
    "cache": (("", "kv_cache_scheme", {"num_bits": 8}), "kv_cache_scheme"),
    "sparsity": (("", "sparsity_config", {"format": "sparse-24-bitmask"}), "sparsity_config"),
    "rotations": (("", "transform_config", {"config_groups": {}}), "transform_config"),
    "status": (("", "quantization_status", "frozen"), "quantization_status='frozen'"),
    "ignore": (("", "ignore", [3]), "ignore=[3]: a list of names"),
    "pattern": (("", "ignore", ["re:("]), "a regular expression"),
    "slow pattern": (("", "ignore", ["re:(.+)+x"]), "few and plain repetitions"),
    "slow patterns": (("", "ignore", ["re:.*.*.*.*x"]), "few and plain repetitions"),
    "many patterns": (("", "ignore", ["re:abc"] * 2000), "few and plain repetitions"),
    "optional parts": (("", "ignore", ["re:" + ".?" * 25]), "few and plain repetitions"),
    "many names": (("", "ignore", ["a"] * 100_001), "at most 100000"),
}


def set_entry(config, where, value):
    part, key, _ = where
    node = config if part == "" else config["config_groups"]["group_0"]
    node = node[part] if part else node
    node[key] = value


@pytest.mark.parametrize("case", BAD_CONFIG)
def test_bad_configs_are_named(tmp_path, folder, case):
    where, text = BAD_CONFIG[case]
    shutil.copytree(folder / "w4a16", tmp_path / "m")
    reconfigure(tmp_path / "m", lambda config: set_entry(config, where, where[2]))
    with pytest.raises(ConfigError, match=r"m/config\.json: quantization_config") as error:
        load(tmp_path / "m")
    assert text in str(error.value) and len(str(error.value)) < 2000


def test_zero_points_are_refused(folder):
    with pytest.raises(ConfigError, match=r"symmetric=False: true \(no zero points\)"):
        load(folder / "w4a16_asymmetric")


def test_older_configs(tmp_path, folder):
    shutil.copytree(folder / "w4a16", tmp_path / "m")

    def older(config):
        config |= {"sparsity_config": {"format": "dense"}, "ignore": ["re:.*lm_head"]}
        group = config["config_groups"]["group_0"]
        del group["format"], config["quantization_status"]
        group["weights"] |= {"observer": "minmax", "actorder": "static", "strategy": None}

    reconfigure(tmp_path / "m", older)
    assert same(load(tmp_path / "m"), load(folder / "w4a16"))


Q = "model.layers.0.self_attn.q_proj"
PACKED, SCALE, SHAPE = f"{Q}.weight_packed", f"{Q}.weight_scale", f"{Q}.weight_shape"
BAD_TENSORS = {
    "no scales": (SCALE, None, "weight_scale is missing"),
    "no codes": (PACKED, None, "weight_packed is missing"),
    "no shape": (SHAPE, None, "weight_shape is missing"),
    "words": (PACKED, lambda a: a[:, :-1], "weight_packed has shape [32, 3]"),
    "scale shape": (SCALE, lambda a: a[:, :1], "weight_scale has shape [32, 1]"),
    "scale dtype": (SCALE, lambda a: a.astype(np.int32), "weight_scale is int32"),
    "codes dtype": (PACKED, lambda a: a.astype(np.int64), "weight_packed is int64; int32"),
    "shape": (SHAPE, lambda a: a[::-1] + 1, "weight_shape says [33, 33], config.json [32, 32]"),
    "zero points": (f"{Q}.weight_zero_point", np.zeros((4, 2), np.int32), "not part of the model"),
    "dense too": (f"{Q}.weight", np.zeros((32, 32), np.float32), "not part of the model"),
    "NaN scale": (SCALE, lambda a: a * np.float32(np.nan), "q_proj.weight_scale' holds NaN"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors_are_named(tmp_path, folder, case):
    name, change, text = BAD_TENSORS[case]
    shutil.copytree(folder / "w4a16", tmp_path / "m")

    def apply(arrays):
        if change is None:
            del arrays[name]
        else:
            made = change(arrays[name]) if callable(change) else change
            arrays[name] = np.ascontiguousarray(made)

    rewrite(tmp_path / "m", apply)
    with pytest.raises(FormatError) as error:
        load(tmp_path / "m")
    assert text in str(error.value) and str(tmp_path / "m") in str(error.value)
    assert "q_proj" in str(error.value)
    if case == "NaN scale":
        assert load(tmp_path / "m", check_finite=False) is not None


def test_codes_out_of_range(tmp_path, folder):
    shutil.copytree(folder / "w4afp8_inferred", tmp_path / "int")
    rewrite(tmp_path / "int", lambda a: a[f"{Q}.weight"].__setitem__((3, 4), 8))
    with pytest.raises(FormatError, match=r"q_proj\.weight' holds codes outside -8\.\.7"):
        load(tmp_path / "int")
    shutil.copytree(folder / "fp8", tmp_path / "fp8")
    rewrite(tmp_path / "fp8", lambda a: a[f"{Q}.weight"].__setitem__((3, 4), np.nan))
    with pytest.raises(FormatError, match=r"q_proj\.weight' holds NaN"):
        load(tmp_path / "fp8")


def test_groups_that_do_not_fit(tmp_path, folder):
    for group, text in [(12, "does not divide its 32 inputs"), (1, "even groups of INT4")]:
        shutil.copytree(folder / "w4a16", tmp_path / str(group))
        reconfigure(
            tmp_path / str(group),
            lambda config, g=group: set_entry(config, ("weights", "group_size", g), g),
        )
        with pytest.raises(FormatError, match=text):
            load(tmp_path / str(group))


BAD_SCALES = {
    "not an object": (3, "must be an object"),
    "dtype": ({"group": 32, "dtype": "int8"}, "dtype 'int8' is not one of"),
    "group zero": ({"group": 0, "dtype": "float32"}, "positive ones"),
    "divisor": ({"group": 32, "dtype": "float32", "divisor": -1}, "positive ones"),
    "divisor that is none": ({"group": 32, "dtype": "float32", "divisor": 1e-60}, "positive ones"),
    "group not there": ({"group": 48, "dtype": "float32"}, "does not consist of the groups of 32"),
    "huge group": ({"group": 2**30, "dtype": "float32"}, "does not consist"),
    "unknown key": ({"group": 32, "dtype": "float32", "zero": 1}, "unknown key 'zero'"),
}


@pytest.mark.parametrize("case", BAD_SCALES)
def test_bad_scales_in_the_sidecar(tmp_path, model, case):
    value, text = BAD_SCALES[case]
    save(quantized(model, int4), tmp_path / "m", format="compressed-tensors")
    file = tmp_path / "m" / "ffnlab.json"
    raw = json.loads(file.read_text())
    raw["linears"]["layers[1].attn.v"]["scales"] = value
    file.write_text(json.dumps(raw))
    with pytest.raises(FormatError, match=r"ffnlab\.json") as error:
        load(tmp_path / "m")
    assert text in str(error.value)
    if case == "dtype":  # a map that is dense has no scales
        save(model, tmp_path / "m")
        raw["linears"] = {"layers[1].attn.v": {"scales": {"group": 32, "dtype": "float32"}}}
        file.write_text(json.dumps(raw))
        with pytest.raises(FormatError, match="the tensors hold it as a Dense"):
            load(tmp_path / "m")


PLAIN = hs.one_of(
    hs.none(),
    hs.booleans(),
    hs.integers(),
    hs.floats(),
    hs.text(max_size=6),
    hs.sampled_from(["group", "channel", "int", "FLOAT", "token", "naive-quantized", "re:.*"]),
)
JUNK = hs.one_of(
    PLAIN, hs.lists(PLAIN, max_size=3), hs.dictionaries(hs.text(max_size=5), PLAIN, max_size=3)
)


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=hs.data())
def test_mutated_configs_are_read_or_refused(folder, data):
    raw = config_of(folder / "mixed")["quantization_config"]
    node = raw
    while isinstance(node, dict | list) and node:
        keys = sorted(node) if isinstance(node, dict) else list(range(len(node)))
        key = data.draw(hs.sampled_from(keys))
        if not isinstance(node[key], dict | list) or data.draw(hs.booleans()):
            node[key] = data.draw(JUNK)
            break
        node = node[key]
    try:
        found = decoder(raw, "a/config.json").schemes
    except ConfigError as error:
        assert str(error).startswith("a/config.json: quantization_config: ")
    else:
        assert isinstance(found, Schemes)
        checkpoint = st.open_directory(folder / "mixed")
        packed = decoder(raw, "a/config.json")(checkpoint, Q, 32, (32,))
        assert packed is None or packed.problems or len(packed.build(True)) == 1


def test_names_win_over_patterns_and_patterns_over_classes():
    def group(bits, *targets):
        weights = {"num_bits": bits, "group_size": 128}
        return {"targets": list(targets), "weights": weights, "format": "pack-quantized"}

    raw = {
        "config_groups": {
            "a": group(8, "Linear"),
            "b": group(4, "re:.*up_proj$"),
            "c": group(8, "model.layers.0.mlp.up_proj"),
        },
        "ignore": ["re:.*down", "lm_head"],
    }
    schemes = read_schemes(raw, "config.json")
    assert schemes.of("model.layers.0.mlp.up_proj").bits == 8
    assert schemes.of("model.layers.1.mlp.up_proj").bits == 4
    assert schemes.of("model.layers.1.mlp.gate_proj").bits == 8
    assert schemes.of("model.layers.1.mlp.down_proj") is None and schemes.of("lm_head") is None


@pytest.mark.parametrize(
    "patterns",
    [["re:.*.*.*[XY]"], ["re:" + ".?" * 15 + "x"], ["re:(m|m)(o|o)(d|d)(e|e)l.*[X].*[X]"]],
)
def test_slow_patterns_that_are_accepted_end(patterns):
    weights = {"num_bits": 4, "group_size": 128}
    group = {"targets": patterns, "weights": weights, "format": "pack-quantized"}
    schemes = read_schemes({"config_groups": {"a": group}}, "config.json")
    start = time.process_time()
    for layer in range(100):
        name = f"model.language_model.layers.{layer}.self_attn.qkv_projection_of_the_block"
        assert schemes.of(name[: schemes_module.NAME]) is None
    # Measured .06 to .12 s on one core; a pattern that backtracks without bound takes minutes.
    assert time.process_time() - start < 10


def test_many_groups_are_refused():
    weights = {"num_bits": 4, "group_size": 128}
    group = {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}
    groups = {f"group_{i}": group for i in range(257)}
    with pytest.raises(ConfigError, match="1 to 256 groups"):
        read_schemes({"config_groups": groups}, "config.json")
    assert read_schemes({"config_groups": dict(list(groups.items())[:256])}, "config.json")


def test_patterns_of_published_checkpoints_are_cheap():
    published = [
        r".*layers\.\d+\..*_proj.*",
        r"model\.layers\.[0-9]+\.mlp\.experts\.\d+\.(gate|up|down)_proj$",
        r".*self_attn\.(q|k|v|o)_proj$",
        "visual.*",
        ".*block_sparse_moe.gate",
        ".*mlp.shared_expert_gate$",
        "model.visual.*",
        r".*mlp\.(gate|up|down)_proj.*",
    ]
    assert sum(map(schemes_module.cost, published)) < schemes_module.PATTERN_COST / 4
