"""Options of generation requests."""

import pytest

from ffnlab.errors import ConfigError
from ffnlab.text import Sampling
from ffnlab.text.lm_eval.options import Settings, overlooked, read_settings


def read(options, generation=None):
    """The settings, for a model that reads 48 tokens."""
    return read_settings(options, generation or {}, end="</s>", max_tokens=8, limit=48)


def test_stop_strings_and_lengths():
    assert read({}) == Settings(("</s>",), 8, Sampling())
    assert read({"until": "\n", "max_gen_toks": 3}) == Settings(("\n", "</s>"), 3, Sampling())
    assert read({"until": ["</s>", "", "b"]}).until == ("</s>", "b")
    assert read({"until": None, "max_gen_toks": None, "max_tokens": 5}).max_tokens == 5
    lengths = {"max_completion_tokens": 2, "max_new_tokens": 3, "max_gen_toks": 4}
    assert [read(dict(list(lengths.items())[:n])).max_tokens for n in (1, 2, 3)] == [2, 3, 4]


@pytest.mark.parametrize(
    ("options", "sampling"),
    [
        ({"temperature": 0.7, "do_sample": False, "top_k": 5}, Sampling()),
        ({"temperature": 0.0, "top_p": 0.5}, Sampling()),
        ({"top_k": 5}, Sampling()),
        ({"temperature": 0.7}, Sampling(0.7, 50, 0.9)),
        ({"temperature": 0.7, "do_sample": None}, Sampling(0.7, 50, 0.9)),
        ({"do_sample": True}, Sampling(0.6, 50, 0.9)),
        ({"do_sample": True, "temperature": 0}, Sampling(0.6, 50, 0.9)),
        ({"do_sample": True, "temperature": 2, "top_k": 3}, Sampling(2.0, 3, 0.9)),
        ({"do_sample": True, "top_k": 0, "top_p": 1.0}, Sampling(0.6, None, 1.0)),
        ({"do_sample": True, "top_k": -1, "min_p": 0.2}, Sampling(0.6, None, 0.9, 0.2)),
        ({"do_sample": True, "top_k": None, "min_p": 0}, Sampling(0.6, 50, 0.9)),
    ],
)
def test_sampling_is_the_request_s_before_the_model_s(options, sampling):
    assert read(options, {"temperature": 0.6, "top_p": 0.9}).sampling == sampling


def test_what_changes_nothing_is_accepted():
    neutral = {"num_beams": 1, "repetition_penalty": 1.0, "min_length": None}
    assert read(neutral) == read({})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beams": 3}, r"\['beams'\] are unknown"),
        ({"num_beams": 4}, "num_beams=4 is not done here; None or 1 is accepted"),
        ({"repetition_penalty": 1.1}, "repetition_penalty=1.1 is not done here"),
        ({"max_gen_toks": 48}, r"max_gen_toks=48 must lie in 1\.\.47"),
        ({"max_gen_toks": 0}, "max_gen_toks=0"),
        ({"max_gen_toks": "5"}, "max_gen_toks=5"),
        ({"until": 3}, "until=3 must be a string or a list of strings"),
        ({"until": ["a", 3]}, "until="),
        ({"temperature": "hot"}, "temperature='hot' must be of type float"),
        ({"top_k": True}, "top_k=True must be of type int"),
        ({"top_k": 2.5}, "top_k=2.5 must be of type int"),
        ({"do_sample": True, "min_p": 2}, "min_p=2.0 must be in"),
        ({"do_sample": True, "top_k": -3}, "top_k=-3"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        read(options)


def test_what_is_overlooked():
    generation = {"repetition_penalty": 1.1, "typical_p": 0.9, "num_beams": 1, "top_k": 3}
    assert overlooked({}, generation) == ["repetition_penalty", "typical_p"]
    assert overlooked({"repetition_penalty": 1.0, "typical_p": None}, generation) == ["typical_p"]
