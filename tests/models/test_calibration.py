"""Batches and models that methods calibrate on: what is none is refused before any compute."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from ffnlab.errors import ConfigError
from ffnlab.models import unstack
from ffnlab.models.calibration import check_tokens, given
from ffnlab.quantization import fireq
from ffnlab.sparsity import chess
from ffnlab.testing import tiny, tiny_encoder

BAD = {
    "beyond the vocabulary": (np.full((2, 3), 64), r"from 64 to 64; the vocabulary is 0\.\.63"),
    "negative": (np.array([[1, -1]]), "from -1 to 1"),
    "no rows": (np.zeros((0, 3), int), r"\(0, 3\)"),
    "no tokens": (np.zeros((3, 0), int), r"\(3, 0\)"),
    "one axis": (np.arange(5), r"\(5,\)"),
    "three axes": (np.zeros((1, 2, 3), int), r"\(1, 2, 3\)"),
    "floats": (np.zeros((2, 3)), "float64"),
    "booleans": (np.zeros((2, 3), bool), "bool"),
    "text": ("some text", "<U9"),
    "texts": (["some", "text"], "<U4"),
    "a dict": ({"tokens": np.zeros((2, 3), int)}, "object"),
    "nothing": (None, "object"),
    "ragged": ([[1, 2], [3]], "a batch of list is no array"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_batches_are_named(case):
    batch, text = BAD[case]
    with pytest.raises(ConfigError, match=text):
        check_tokens(batch, 64)


def test_good_batches_are_int32():
    found = check_tokens([[0, 63]], 64, least=2)
    assert found.dtype == np.int32 and found.tolist() == [[0, 63]]
    assert check_tokens(np.array([[2**63]], np.uint64) - np.uint64(2**63), 64).tolist() == [[0]]
    with pytest.raises(ConfigError, match="t >= 2"):
        check_tokens([[1]], 64, least=2)


def test_a_batch_is_what_a_model_is_called_with():
    model, tokens = tiny_encoder(), np.array([[1, 2, 3]])
    alone = given(tokens, model)
    assert len(alone.args) == 1 and alone.options == {} and alone.valid is None
    assert alone.args[0].dtype == np.int32
    valid = np.array([[True, True, False]])
    named = given({"valid": valid, "tokens": tokens}, model)
    assert named.args == () and sorted(named.options) == ["tokens", "valid"]
    assert named.first.tolist() == named.tokens.tolist() == tokens.tolist()
    assert named.valid.tolist() == valid.tolist()
    found = jax.jit(lambda model, batch: batch.run(model))(model, named)
    want = jax.jit(lambda model, tokens, valid: model(tokens, valid=valid))(model, tokens, valid)
    assert np.array_equal(found, want)
    words = given({"embeddings": np.zeros((1, 3, 16), np.float32)}, model)
    assert words.tokens is None and words.first.shape == (1, 3, 16)


def test_segments_of_a_decoder_say_what_is_padding():
    found = given({"tokens": [[0, 1, 2]], "segments": np.array([[0, 1, 2]])}, tiny())
    assert found.valid.tolist() == [[False, True, True]]


STRANGE = {
    "a name": ({"tokens": [[1]], "mask": [[1]]}, r"\['mask', 'tokens'\]; .*'valid'"),
    "inputs of layers": ({"tokens": [[1]], "inputs": [[1]]}, "'inputs'"),
    "no text": ({"valid": [[True]]}, "one of .*'embeddings'.* is needed"),
    "two texts": ({"tokens": [[1]], "embeddings": np.zeros((1, 1, 16))}, "one of"),
    "rows": ({"tokens": [[1], [2]], "valid": [[True]]}, r"rows \{.*\(1,\)"),
    "nothing": ({}, r"a batch of \[\]"),
    "tokens": ({"tokens": [[64]]}, r"the vocabulary is 0\.\.63"),
    "text": ({"tokens": [[1]], "valid": ["yes"]}, "a batch of <U3"),
    "one number": ({"tokens": [[1]], "types": 3}, r"int64 \(\)"),
}


@pytest.mark.parametrize("case", STRANGE)
def test_mappings_that_are_no_batch_are_named(case):
    batch, text = STRANGE[case]
    with pytest.raises(ConfigError, match=text):
        given(batch, tiny_encoder())


@pytest.mark.parametrize("transform", [fireq(top_k=1), chess()], ids=lambda t: t.name)
@pytest.mark.parametrize("wrong", [64, -1])
def test_methods_refuse_ids_out_of_range(transform, wrong):
    model = tiny()
    with pytest.raises(ConfigError, match=r"the vocabulary is 0\.\.63"):
        transform.observe(transform.init(model), model, np.array([[1, wrong]], np.int32))


PROGRAM = """
import numpy as np
from ffnlab import models
from ffnlab.errors import ConfigError
from ffnlab.pruning import finercut
from ffnlab.quantization import fireq, nearest
from ffnlab.sparsity import chess
from ffnlab.transform import apply

tokens = [np.zeros((1, 4), np.int32)]
for make in (fireq, chess, nearest, lambda: finercut(remove=1)):
    for model in ({}, "model", None):
        try:
            apply(make(), model, tokens, progress=False)
        except ConfigError as error:
            assert "a Decoder or another" in str(error), error
        else:
            raise SystemExit(f"{make} took {model}")
try:
    models.save({}, "nowhere")
except ConfigError as error:
    assert "model is a dict" in str(error)
config = models.DecoderConfig(
    vocab=8, width=8, hidden=8, layers=3, heads=1, kv_heads=1, head_dim=8
)
import jax
model = models.Decoder(config, key=jax.random.key(0))
for make in (lambda: fireq(top_k=1), chess, lambda: finercut(remove=1)):
    for batches in ("text", ["text"], {"a": 1}, [{"a": 1}], [None], [[[0.5]]]):
        try:
            apply(make(), model, batches, progress=False)
        except ConfigError as error:
            assert "batch of" in str(error), error
        else:
            raise SystemExit(f"{make} took {batches}")
"""


def test_what_is_no_model_or_no_batch_is_named_to_users(tmp_path):
    """In a process without the type checks of this test run."""
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(tmp_path.iterdir()) == []


def test_what_has_no_layers_is_no_decoder():
    with pytest.raises(ConfigError, match="model is a dict; a Decoder or another"):
        getattr(unstack, "__wrapped__", unstack)({})
