"""`ffnlab plan`: exact bytes of what is known, a large model on 256 pretended devices."""

import json

import pytest

from ffnlab.cli.plan import as_table, measure, plan
from ffnlab.errors import ConfigError, FFNLabError

SMALL = """
[model]
vocab = 64
width = 16
hidden = 32
layers = 4
heads = 4
kv_heads = 2
head_dim = 8
[data]
batch = 8
length = 16
[optimizer]
clip = 0.0
[run]
steps = 2
"""
LARGE = {  # Llama 3 70B
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}


@pytest.fixture
def small(tmp_path):
    (tmp_path / "run.toml").write_text(SMALL)
    return tmp_path / "run.toml"


def ask(config, mesh, **options):
    request = {"batch": None, "length": None, "remat": None, "dtype": "float32"}
    request |= {"microbatches": None}
    return measure({"config": str(config), "mesh": mesh, **request, **options})


def test_bytes_of_the_state_are_those_of_the_layout(small):
    whole, cut = ask(small, "dp=2"), ask(small, "fsdp=2,tp=2")
    # embed, final norm; per block q, k, v, o, gate, up, down and two norms.
    block = 16 * 32 + 2 * 16 * 16 + 32 * 16 + 3 * 16 * 32 + 2 * 16
    assert whole["parameters"] == 64 * 16 + 16 + 4 * block
    assert whole["state"]["model"] == 4 * whole["parameters"]
    norms = 16 + 4 * 2 * 16  # cut along fsdp only
    assert cut["state"]["model"] == (whole["parameters"] - norms) + 2 * norms
    assert whole["state"]["optimizer"] >= 2 * whole["state"]["model"]
    assert whole["temporary"] > 0 and (whole["rows"], whole["length"]) == (8, 16)


def test_less_is_kept_with_remat(small):
    most, least = (ask(small, "dp=1", length=64, remat=r) for r in (None, "nothing"))
    assert least["temporary"] < most["temporary"]


def test_microbatches_hold_less(small):
    whole = ask(small, "dp=2", length=64)
    small.write_text(small.read_text() + "microbatches = 4\n")
    parts = ask(small, "dp=2", length=64)
    assert parts["temporary"] < whole["temporary"] and parts["rows"] == 8
    assert parts["state"] == whole["state"]


def test_stages_hold_their_layers_and_the_bubble_is_told(small):
    whole, cut = ask(small, "dp=2"), ask(small, "pp=2", microbatches=4)
    outside = 64 * 16 + 16  # embedding and final norm, which every device has
    assert cut["parameters"] == whole["parameters"]
    assert cut["state"]["model"] == 4 * (outside + (whole["parameters"] - outside) // 2)
    assert cut["pipeline"] == {"stages": 2, "microbatches": 4, "repeats": 1}
    printed = as_table(cut, "pp=2").caption
    assert "2 stages, 4 microbatches, 1 repeats: 5 ticks, a bubble of 20.0%" in printed
    assert whole["pipeline"] is None


def test_a_large_model_on_256_devices(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(LARGE))
    options = {"batch": 32, "length": 1024, "remat": "nothing", "dtype": "bfloat16"}
    plan(tmp_path, mesh="dp=2,fsdp=16,tp=8", **options)
    said = capsys.readouterr().out
    assert "70.6 G parameters on dp=2,fsdp=16,tp=8" in said
    assert "1.027" in said, "GiB of bfloat16 parameters"
    assert "6.161" in said, "of float32 masters and of AdamW's two averages"


MIXTURE = {  # Mixtral 8x22B
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 32768,
    "hidden_size": 6144,
    "intermediate_size": 16384,
    "num_hidden_layers": 56,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "sliding_window": None,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "mesh", "said", "sent"),
    [
        (
            LARGE,
            "dp=2,fsdp=8,tp=4,pp=4",
            ["70.6 G", "4 stages, 8 microbatches, 1 repeats: 11 ticks, a bubble of 27.3%"],
            "collective-permute",
        ),
        (MIXTURE, "dp=2,fsdp=8,ep=8,tp=2", ["141 G"], "all-to-all"),
    ],
    ids=["stages", "experts"],
)
def test_stages_and_experts_on_256_devices(tmp_path, capsys, config, mesh, said, sent):
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = {"batch": 128, "length": 4096, "remat": "nothing", "dtype": "bfloat16"}
    plan(tmp_path, mesh=mesh, **options, **({"microbatches": 8} if "pp" in mesh else {}))
    found = capsys.readouterr().out
    assert all(part in found for part in (*said, f"on {mesh}", f"sent: {sent}"))


def test_a_plan_is_of_the_configured_run(small, capsys):
    """Mesh and remat of the file hold where nothing else is asked for; packed rows are three."""
    small.write_text(small.read_text() + 'mesh = "fsdp=2"\nremat = "nothing"\n')
    plan(small)
    assert "parameters on fsdp=2" in capsys.readouterr().out
    configured = ask(small, "dp=1", length=64)["temporary"]
    assert configured < ask(small, "dp=1", length=64, remat="products")["temporary"]
    small.write_text(small.read_text().replace("[data]", "[data]\npacked = true"))
    assert ask(small, "dp=2")["parameters"] > 0


def test_refusals(small, tmp_path):
    with pytest.raises(ConfigError, match=r"axis '\w+' of size \d+ is not divisible by 3"):
        ask(small, "tp=3")
    with pytest.raises(ConfigError, match="batch: axis 'batch' of size 8"):
        ask(small, "dp=3")
    with pytest.raises(ConfigError, match="policy='some'"):
        ask(small, "dp=1", remat="some")
    with pytest.raises(ConfigError, match="mesh='dp=-1': a plan needs every size"):
        plan(small, mesh="dp=-1")
    with pytest.raises(ConfigError, match="'dp=0' must be at least 1"):
        plan(small, mesh="dp=0")
    with pytest.raises(ConfigError, match="stages=3 x repeats=1 do not divide the 4 layers"):
        ask(small, "pp=3")
    with pytest.raises(ConfigError, match="microbatches=3 do not divide the 8 rows of a batch"):
        ask(small, "pp=2", microbatches=3)
    with pytest.raises(ConfigError, match=r"attention over 15 tokens: sp=4 cuts a row in"):
        ask(small, "sp=4", length=15)
    with pytest.raises(FFNLabError, match="cannot be read"):
        plan(tmp_path / "absent")


def test_what_the_compiling_process_refuses_is_said_whole(small, capsys):
    """A refusal comes as it is; so does a failure, without jax's notice about hidden frames."""
    with pytest.raises(FFNLabError, match="^batch: axis 'batch' of size 8"):
        plan(small, mesh="dp=3")
    small.write_text(small.read_text().replace("batch = 8", "batch = -1"))
    with pytest.raises(ConfigError, match="batch=-1 must be at least 1"):
        plan(small)
