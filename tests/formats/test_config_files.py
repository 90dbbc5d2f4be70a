"""config.json from elsewhere: both ways, defaults of each family, and everything that is absurd."""

import copy
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as hs

from ffnlab.errors import ConfigError
from ffnlab.formats.huggingface.families import FAMILIES, read_config, write_config
from ffnlab.layers import ACTIVATIONS, Rope
from ffnlab.models import DecoderConfig

LLAMA = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def recorded(fixtures):
    """The configs transformers wrote, by variant."""
    folders = sorted(p.parent for p in (fixtures / "models").glob("*/config.json"))
    return {p.name: json.loads((p / "config.json").read_text()) for p in folders}


def test_every_recorded_config_survives_the_round_trip(recorded):
    for name, raw in recorded.items():
        config = read_config(raw)
        assert read_config(write_config(config)) == config, name


@pytest.mark.parametrize("name", FAMILIES)
def test_absent_keys_mean_what_the_family_says(name):
    config = read_config(LLAMA | {"model_type": name})
    assert config.family == name and config.layers == 3
    if name == "mistral":
        assert config.windows == (4096,) * 3
    if name == "gemma2":
        assert config.windows == (4096, None, 4096)
        assert (config.attn_softcap, config.logit_softcap) == (50.0, 30.0)
    if name == "gemma3_text":
        assert config.rope.theta == 1e6 and config.local_rope == Rope(theta=1e4)
    if name == "qwen3":
        assert config.head_dim == 128 and config.qk_norm
    if name == "phi3":
        assert config.eps == 1e-5


def test_gemma3_text_config_may_say_very_little():
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    scaling = {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    config = read_config({"model_type": "gemma3", "text_config": text | scaling})
    assert (config.vocab, config.heads, config.kv_heads, config.head_dim) == (262208, 8, 4, 256)
    assert config.windows[:6] == (1024,) * 5 + (None,)
    assert config.rope == Rope(theta=1e6, scaling="linear", factor=8.0)
    assert config.local_rope == Rope(theta=1e4)


def test_yarn_with_two_magnitudes():
    spec = {"type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096}
    spec |= {"mscale": 1.0, "mscale_all_dim": 0.707}
    rope = read_config(LLAMA | {"rope_scaling": spec}).rope
    assert rope.magnitude == pytest.approx(1.0857263992561355)


def test_what_the_families_make_of_rotary_entries():
    """As transformers 5.23 does; `tests/fixtures/models` has the logits."""

    def rope(**changes):
        return read_config(LLAMA | changes).rope

    top = {"original_max_position_embeddings": 512}
    assert rope(rope_scaling=YARN | {"original_max_position_embeddings": 64}, **top).original == 512
    assert rope(rope_scaling=YARN).original == 2048
    assert rope(rope_scaling=DYNAMIC, **top).original == 2048
    assert rope(partial_rotary_factor=0.5) == Rope()
    # An older entry stands for all of the newer one.
    assert rope(rope_scaling=YARN, rope_parameters={"beta_fast": 8.0}).high == 32.0
    long = Rope(scaling="longrope", factor=16.0, original=256, short=(1.0, 1.5), long=(2.0, 4.0))
    sizes = {"max_position_embeddings": 4096, "original_max_position_embeddings": 256}
    for name in ("longrope", "su", "yarn"):
        assert rope(rope_scaling=LONG | {"type": name}, **PHI, **sizes) == long
    assert long.magnitude == pytest.approx(1.224744871391589)  # sqrt(1 + log 16 / log 256)
    assert rope(rope_scaling=LONG, **PHI).original == 4096  # the family's default
    assert rope(rope_scaling=LONG | {"factor": 3.0}, **sizes).factor == 3.0


def test_phi_is_written_as_both_versions_of_transformers_read_it():
    sizes = {"max_position_embeddings": 4096, "original_max_position_embeddings": 256}
    config = read_config(LLAMA | PHI | sizes | {"rope_scaling": LONG})
    written = write_config(config)
    assert written["rope_scaling"] == LONG
    assert written["original_max_position_embeddings"] == 256
    other = read_config(LLAMA | PHI | sizes | {"rope_scaling": LONG | {"attention_factor": 1.5}})
    assert write_config(other)["rope_scaling"]["attention_factor"] == 1.5
    assert read_config(write_config(other)) == other


def test_the_reach_of_a_stretched_context():
    def reach(**changes):
        return read_config(LLAMA | changes).reach

    assert reach() == 2048 and reach(rope_scaling={"type": "linear", "factor": 4.0}) == 2048
    original = {"original_max_position_embeddings": 2048}
    assert reach(rope_scaling=YARN | original | {"factor": 4.0}) == 8192
    assert reach(rope_scaling=YARN | original, max_position_embeddings=9000) == 9000
    assert reach(rope_scaling=DYNAMIC) == 4096


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"type": "yarn", "factor": 2.0}
DYNAMIC = {"type": "dynamic", "factor": 2.0}
LONG = {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 4.0]}
PHI = {"model_type": "phi3"}
BAD = {
    "unknown architecture": ({"model_type": "gpt_neox"}, "unknown architecture.*'gpt_neox'"),
    "no architecture": ({"model_type": None}, "unknown architecture"),
    "architecture no string": ({"model_type": ["llama"]}, "unknown architecture"),
    "wrapper without text": ({"model_type": "gemma3"}, "text_config"),
    "zero layers": ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
    "layers true": ({"num_hidden_layers": True}, "num_hidden_layers=True"),
    "many layers": ({"num_hidden_layers": 10**9}, "from 1 to 1024"),
    "huge vocabulary": ({"vocab_size": 10**15}, "vocab_size"),
    "no width": ({"hidden_size": None}, "hidden_size=None"),
    "width text": ({"hidden_size": "4096"}, "hidden_size='4096'"),
    "width float": ({"hidden_size": 16.0}, "hidden_size=16.0"),
    "heads do not divide": ({"num_attention_heads": 5, "num_key_value_heads": 5}, "multiple"),
    "kv heads do not divide": ({"num_key_value_heads": 3}, "kv_heads=3"),
    "odd head": ({"head_dim": 7}, "head_dim=7 must be even"),
    "eps": ({"rms_norm_eps": -1e-6}, "rms_norm_eps"),
    "activation": ({"hidden_act": "relu6"}, "hidden_act='relu6'.*silu"),
    "tie": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    "theta": ({"rope_theta": 0}, "rope_theta"),
    "scaling no object": ({"rope_scaling": "linear"}, "rope_scaling"),
    "scaling unknown": ({"rope_scaling": {"rope_type": "ntk"}}, "rope_type='ntk'.*dynamic"),
    "scaling a list": ({"rope_scaling": {"rope_type": ["yarn"]}}, "rope_type="),
    "scaling of others": (PHI | {"rope_scaling": {"type": "linear", "factor": 2}}, "'linear'"),
    "theta 1": ({"rope_theta": 1}, r"rope_theta=1: a number in \(1"),
    "theta tiny": ({"rope_theta": 1e-300}, "rope_theta=1e-300"),
    "factor tiny": ({"rope_scaling": {"type": "linear", "factor": 1e-300}}, "factor=1e-300"),
    "beta tiny": ({"rope_scaling": YARN | {"beta_slow": 5e-324}}, "beta_slow=5e-324"),
    "mscale": ({"rope_scaling": YARN | {"mscale": 1e300, "mscale_all_dim": 1}}, "mscale=1e"),
    "magnitude": ({"rope_scaling": YARN | {"attention_factor": 1e30}}, "attention_factor=1e"),
    "eps tiny": ({"rms_norm_eps": 1e-300}, "rms_norm_eps=1e-300"),
    "cap tiny": ({"model_type": "gemma2", "attn_logit_softcapping": 1e-300}, "softcapping=1e-300"),
    "scalar tiny": ({"model_type": "gemma2", "query_pre_attn_scalar": 1e-300}, "scalar=1e-300"),
    "no long factors": ({"rope_scaling": LONG | {"long_factor": None}}, "long_factor=None"),
    "long factor": ({"rope_scaling": LONG | {"long_factor": [1, 1e-300]}}, "long_factor="),
    "long factor text": ({"rope_scaling": LONG | {"long_factor": ["a", 1]}}, "long_factor="),
    "few factors": ({"rope_scaling": LONG | {"short_factor": [1.0]}}, "1 short and 2 long"),
    "long odd": (PHI | {"rope_scaling": LONG, "partial_rotary_factor": 0.75}, "even number"),
    "nothing turns": (PHI | {"partial_rotary_factor": 0.1}, "nothing"),
    "partial scaled": (
        {"rope_scaling": YARN, "partial_rotary_factor": 0.5},
        "partial_rotary_factor=0.5: this family rotates all",
    ),
    "original 1": (
        {"rope_scaling": YARN, "original_max_position_embeddings": 1},
        "original_max_position_embeddings=1",
    ),
    "dynamic pair": ({"rope_scaling": DYNAMIC, "head_dim": 2}, "at least 4 rotating"),
    "gemma untruncated": (
        {
            "model_type": "gemma3_text",
            "rope_parameters": {"full_attention": YARN | {"truncate": False}},
        },
        "truncate=false",
    ),
    "factor missing": ({"rope_scaling": {"type": "linear"}}, "factor=None"),
    "factor NaN": ({"rope_scaling": {"type": "linear", "factor": float("nan")}}, "factor=nan"),
    "llama3 bands": ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "less than"),
    "original": (
        {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": "many"}},
        "original_max_position_embeddings",
    ),
    "nested": ({"rope_parameters": {"full_attention": {}}}, "one rotary embedding"),
    "yarn untruncated": ({"rope_scaling": YARN | {"truncate": "no"}}, "truncate='no'"),
    "eos": ({"eos_token_id": "</s>"}, "eos_token_id"),
    "window": ({"model_type": "mistral", "sliding_window": 0}, "sliding_window=0"),
    "layer types": (
        {"model_type": "gemma2", "layer_types": ["chunked_attention"] * 3},
        "layer_types",
    ),
    "layer types length": (
        {"model_type": "gemma2", "layer_types": ["full_attention"]},
        "3 entries",
    ),
    "both directions": (
        {"model_type": "gemma3_text", "use_bidirectional_attention": True},
        "causal",
    ),
    "pattern": ({"model_type": "gemma3_text", "sliding_window_pattern": 0}, "pattern=0"),
    "window layers": (
        {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": -1},
        "max_window_layers",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_absurd_configs_are_refused_with_the_reason(case):
    change, text = BAD[case]
    with pytest.raises(ConfigError, match=rf"(?s)config\.json: .*{text}"):
        read_config(LLAMA | change)


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(ConfigError) as error:
        read_config(LLAMA | {"vocab_size": 0, "hidden_act": "x", "rope_theta": -1})
    assert all(part in str(error.value) for part in ("vocab_size", "hidden_act", "rope_theta"))
    with pytest.raises(ConfigError, match="JSON object"):
        read_config(["llama"])


def test_a_family_says_what_it_loses():
    sizes = {"vocab": 32, "width": 16, "hidden": 24, "layers": 2, "heads": 4, "kv_heads": 2}
    with pytest.raises(ConfigError, match="cannot say logit_softcap=30.0"):
        write_config(DecoderConfig(**sizes, head_dim=4, logit_softcap=30.0))
    with pytest.raises(ConfigError, match="unknown architecture"):
        write_config(DecoderConfig(**sizes, head_dim=4, family="mamba"))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_is_written_or_refused(name):
    sizes = {"vocab": 32, "width": 16, "hidden": 24, "layers": 2, "heads": 4, "kv_heads": 2}
    config = DecoderConfig(**sizes, head_dim=4, activation=name)
    if name in ("abs", "elu", "softplus"):
        with pytest.raises(ConfigError, match=f"cannot say activation='{name}'"):
            write_config(config)
    else:
        assert read_config(write_config(config)) == config


JUNK = hs.recursive(
    hs.one_of(
        hs.none(),
        hs.booleans(),
        hs.integers(-5, 70),
        hs.sampled_from([2**31, 10**400, -(10**400)]),
        hs.floats(),
        hs.text(max_size=4),
    ),
    lambda inner: hs.one_of(
        hs.lists(inner, max_size=3), hs.dictionaries(hs.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=hs.data())
def test_mutated_configs_are_read_or_refused(recorded, data):
    raw = copy.deepcopy(data.draw(hs.sampled_from(list(recorded.values()))))
    for _ in range(data.draw(hs.integers(1, 4))):
        inner = [v for v in raw.values() if isinstance(v, dict)]
        target = data.draw(hs.sampled_from([raw, *inner]))
        if target and data.draw(hs.booleans()):
            target[data.draw(hs.sampled_from(sorted(target)))] = data.draw(JUNK)
        else:
            target.pop(data.draw(hs.sampled_from([*sorted(target), "none"])), None)
    try:
        config = read_config(raw)
    except ConfigError as error:
        assert "config.json" in str(error)
    else:
        assert isinstance(config, DecoderConfig)
