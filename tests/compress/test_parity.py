"""What a job writes, in the hands of transformers and of the compressed-tensors package."""

import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import models
from ffnlab.compress import TextTask, compress
from ffnlab.recipes import parse_recipe
from peer_scripts import difference, ours, read, runner
from quantized_models import matrices
from tests.compress.conftest import RECIPE

pytestmark = pytest.mark.parity
SPARSE = '[[stage]]\ntransform = "chess"\nsparsity = 0.5\n\n[[stage]]\ntransform = "fireq"'
# Both sides compute in float32; where inputs are rounded, one may fall to the neighbouring code.
TOLERANCE, ROUNDED = 1e-4, 0.05


@pytest.fixture(scope="module")
def written(model, tokenizer, text, tmp_path_factory):
    """(packed, dense): directories of a job that prunes, sparsifies and quantizes."""
    recipe = parse_recipe(RECIPE.replace('[[stage]]\ntransform = "fireq"', SPARSE))
    out = tmp_path_factory.mktemp("job")
    report = compress(model, recipe, TextTask(tokenizer, text), out, dense=True, progress=False)
    assert [export.format for export in report.exports] == ["compressed-tensors", "dense"]
    return tuple(out / export.folder for export in report.exports)


def test_stock_transformers_reads_the_dense_directory(written, fixtures):
    _, dense = written
    runner(fixtures / "models", "torch")("logits.py", dense)
    found = read(dense / "theirs.npz")
    plain = models.load(dense, extras=False)
    assert difference(ours(plain, found), found["full"], found["mask"]) < TOLERANCE


def test_the_package_reads_the_packed_directory(written, fixtures):
    packed, _ = written
    runner(fixtures / "compressed_tensors", "compressed_tensors")("check.py", packed)
    theirs = read(packed / "theirs.npz")
    tokens, logits = theirs.pop("tokens"), theirs.pop("logits")
    plain = models.load(packed, extras=False)
    mine = matrices(plain)
    assert mine.keys() == theirs.keys()
    for name, matrix in mine.items():
        assert np.array_equal(theirs[name], matrix), name
    found = np.asarray(plain(jnp.asarray(tokens, jnp.int32)))
    assert np.abs(found - logits).max() < ROUNDED
