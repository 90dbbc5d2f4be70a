"""A tiny model, a text and a recipe that every test of the job uses."""

import dataclasses

import jax
import pytest

from ffnlab.compress import Text
from ffnlab.formats import Tokenizer
from ffnlab.models import Decoder, DecoderConfig
from ffnlab.recipes import Recipe, parse_recipe

CONFIG = DecoderConfig(
    vocab=256,
    width=32,
    hidden=64,
    layers=3,
    heads=2,
    kv_heads=1,
    head_dim=16,
    max_positions=512,
    bos=0,
    eos=(0,),
)
WORDS = " ".join(f"{i} times {i % 7} is {i * (i % 7)};" for i in range(900)).encode()
RECIPE = """
[calibration]
tokens = 128
window = 32
batch = 2

[evaluation]
tokens = 256
window = 32
batch = 4

[[stage]]
transform = "finercut"
remove = 2

[[stage]]
transform = "fireq"
group = 32
top_k = 2
"""


@pytest.fixture(scope="package")
def model() -> Decoder:
    """A random model of three blocks, of bytes."""
    return Decoder(CONFIG, key=jax.random.key(3))


@pytest.fixture(scope="package")
def tokenizer() -> Tokenizer:
    """Bytes."""
    return Tokenizer.bytes()


@pytest.fixture(scope="package")
def text() -> Text:
    """Sums, the last tenth held out."""
    cut = len(WORDS) * 9 // 10
    return Text(WORDS[:cut], WORDS[cut:], "sums", "the last tenth is held out")


@pytest.fixture(scope="package")
def recipe() -> Recipe:
    """FinerCut, then FireQ."""
    return parse_recipe(RECIPE)


@pytest.fixture(scope="package")
def pruning(recipe) -> Recipe:
    """FinerCut only."""
    return dataclasses.replace(recipe, stages=recipe.stages[:1])
