"""What generation_config.json advises."""

import pytest

from ffnlab.errors import FormatError
from ffnlab.formats import Tokenizer
from ffnlab.formats.tokenizer.files import Beside
from ffnlab.models import DecoderConfig
from ffnlab.text import Sampling
from ffnlab.text.generation_config import advised_sampling, stop_ids

CONFIG = DecoderConfig(
    vocab=256, width=16, hidden=16, layers=1, heads=2, kv_heads=1, head_dim=8, eos=(7,)
)


@pytest.mark.parametrize(
    ("table", "sampling"),
    [
        ({}, Sampling()),
        ({"temperature": 0.6, "top_p": 0.9}, Sampling()),  # do_sample is not there: greedy
        ({"do_sample": True}, Sampling(1.0, 50, None)),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, Sampling(0.6, 50, 0.9)),
        ({"do_sample": True, "top_k": 0, "top_p": 1.0}, Sampling(1.0, None, None)),
        ({"do_sample": True, "top_k": None, "temperature": 2}, Sampling(2.0, 50, None)),
        ({"do_sample": True, "min_p": 0.1}, Sampling(1.0, 50, None, 0.1)),
        ({"do_sample": True, "min_p": 0}, Sampling(1.0, 50, None)),
    ],
)
def test_sampling_is_as_advised(table, sampling):
    assert advised_sampling(table) == (sampling, [])


def test_what_is_not_done_is_named():
    table = {"do_sample": True, "repetition_penalty": 1.05, "epsilon_cutoff": 0.1, "num_beams": 1}
    assert advised_sampling(table)[1] == ["epsilon_cutoff", "repetition_penalty"]
    assert advised_sampling({"typical_p": 1.0, "stop_strings": ["x"]})[1] == ["stop_strings"]


@pytest.mark.parametrize(
    "table",
    [
        {"temperature": "hot"},
        {"temperature": -1},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 0},
        {"top_p": True},
        {"min_p": 2},
    ],
)
def test_bad_values_are_named(table):
    with pytest.raises(FormatError, match=rf"generation_config\.json: .*{next(iter(table))}="):
        advised_sampling({"do_sample": True} | table)
    with pytest.raises(FormatError, match="do_sample=1: no boolean"):
        advised_sampling({"do_sample": 1})


def test_ends_are_those_of_the_first_file_that_lists_some():
    backend = Tokenizer.bytes().backend
    listed = Beside(generation={"eos_token_id": [3, 4]})
    assert stop_ids(CONFIG, Tokenizer(backend, eos=(3, 4), beside=listed)) == (3, 4)
    assert stop_ids(CONFIG, Tokenizer(backend, eos=(5,))) == (7,)
    without = DecoderConfig(**{**vars(CONFIG), "eos": ()})
    assert stop_ids(without, Tokenizer(backend, eos=(5,))) == (5,)
