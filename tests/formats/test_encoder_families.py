"""Encoders against what `transformers` made of the same weights (recorded), and their configs."""

import dataclasses
import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.errors import ConfigError
from ffnlab.formats.huggingface.dialects import read_config, write_config
from ffnlab.formats.huggingface.load import load
from ffnlab.models import Encoder, EncoderConfig, stack

VARIANTS = [
    "bert",
    "bert_masked",
    "bert_untied",
    "bert_old",
    "bert_span",
    "bert_classes",
    "bert_tokens",
    "distilbert",
    "distilbert_masked",
    "distilbert_span",
    "distilbert_classes",
    "distilbert_tokens",
]
# Both sides compute in float32 on other kernels; outputs are of order 10.
TOLERANCE = 1e-4
BERT = {
    "model_type": "bert",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@functools.cache  # no test changes a model
def loaded(folder):
    return load(folder)


def expected(folder):
    with np.load(folder / "expected.npz", allow_pickle=False) as saved:
        return dict(saved)


def given(model, want, side):
    """What the model is called with."""
    more = {"types": jnp.asarray(want["types"])} if model.config.types else {}
    return jnp.asarray(want["tokens"]), {"valid": jnp.asarray(want[f"{side}_mask"]), **more}


def difference(found, want, side):
    """The largest difference: of texts all, of tokens those that are no padding."""
    gap = np.abs(np.asarray(found) - want[side])
    return gap.max() if gap.ndim == 2 else gap[want[f"{side}_mask"]].max()


def test_all_recorded_encoders_are_listed(fixtures):
    recorded = {file.parent.name for file in (fixtures / "encoders").glob("*/expected.npz")}
    assert recorded == set(VARIANTS)


@pytest.mark.parametrize("name", VARIANTS)
def test_outputs_with_padding_on_either_side(fixtures, name):
    want, model = expected(fixtures / "encoders" / name), loaded(fixtures / "encoders" / name)
    assert isinstance(model, Encoder)
    for side in ("left", "right"):
        tokens, options = given(model, want, side)
        assert difference(model(tokens, **options), want, side) < TOLERANCE
    if "pooled" in want:
        pooled = model.pooled(model.hidden(tokens, **options))
        assert np.abs(np.asarray(pooled) - want["pooled"]).max() < TOLERANCE


def test_the_stacked_form_and_given_embeddings(fixtures):
    folder = fixtures / "encoders" / "bert_masked"
    want, model = expected(folder), stack(loaded(folder))
    tokens, options = given(model, want, "left")
    found = model(embeddings=model.embed(tokens), **options)
    assert difference(found, want, "left") < TOLERANCE


@pytest.mark.parametrize("name", VARIANTS)
def test_configs_go_back_and_forth(fixtures, name):
    raw = json.loads((fixtures / "encoders" / name / "config.json").read_text())
    config = read_config(raw)
    assert read_config(write_config(config)) == config
    if name == "bert_classes":
        assert config.labels == ("no", "yes", "maybe")
        assert write_config(config)["label2id"] == {"no": 0, "yes": 1, "maybe": 2}
    if name == "bert_tokens":
        assert (config.classes, config.labels) == (5, None)


def test_absent_keys_mean_what_transformers_takes_them_for():
    config = read_config(BERT)
    assert config == EncoderConfig(32, 16, 24, 2, 4, 4, types=2, pooler="tanh", pad=0)
    assert read_config(BERT | {"architectures": ["BertForSequenceClassification"]}).classes == 2


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"architectures": ["BertLMHeadModel"]}, "BertLMHeadModel.*BertForMaskedLM"),
        ({"architectures": ["Model"]}, "architectures names 'Model'"),
        ({"is_decoder": True}, "is_decoder=true: encoders alone"),
        ({"position_embedding_type": "relative_key"}, "relative_key.*'absolute'"),
        ({"num_attention_heads": 3}, "hidden_size=16 is not a multiple"),
        ({"type_vocab_size": 0}, "type_vocab_size=0"),
        ({"layer_norm_eps": 0}, "layer_norm_eps=0"),
        ({"hidden_act": "mish"}, "hidden_act='mish'"),
        ({"vocab_size": 2**30, "num_hidden_layers": -1}, "(?s)num_hidden_layers=-1.*vocab_size"),
        (
            {"architectures": ["BertForTokenClassification"], "id2label": {"1": "a", "2": "b"}},
            "id2label",
        ),
        ({"architectures": ["BertForTokenClassification"], "num_labels": 0}, "num_labels=0"),
    ],
)
def test_configs_that_are_refused(change, told):
    with pytest.raises(ConfigError, match=told):
        read_config(BERT | change)


def test_an_unknown_family_names_the_known_ones():
    with pytest.raises(ConfigError, match="'mamba'; known: llama.*bert, distilbert"):
        read_config({"model_type": "mamba"})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"norm": "before"}, "norm='before'"),
        ({"gated": True}, "gated=True"),
        ({"positions": None}, "positions=None"),
        ({"positions": "rotary"}, "positions='rotary'"),
        ({"head_dim": 8}, "head_dim=8"),
        ({"types": 0}, "type_vocab_size=0"),
        ({"mlp_bias": False}, "mlp_bias=False"),
        ({"pooler": "relu"}, "pooler='relu'"),
        ({"activation": "softplus"}, "activation='softplus'"),
        ({"family": "distilbert"}, "'distilbert' cannot say types=2"),
        ({"family": "t5"}, "'t5'; known: bert, distilbert"),
    ],
)
def test_what_a_family_cannot_say_is_named(change, told):
    config = dataclasses.replace(read_config(BERT), **change)
    with pytest.raises(ConfigError, match=told):
        write_config(config)
