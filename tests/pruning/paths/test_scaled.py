"""Weights of paths that are trained: the same function at first, the right parameters, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import models, tree
from ffnlab.errors import ConfigError
from ffnlab.layers import EnsembleScale
from ffnlab.losses import next_token
from ffnlab.models.paths import with_ensemble
from ffnlab.pruning import ensemble_scale, path_ensemble
from ffnlab.testing import batches, tiny
from ffnlab.transform import apply, chain

TOKENS = batches()


@pytest.mark.parametrize("kind", ["vector", pytest.param("scalar", marks=pytest.mark.slow)])
def test_training_begins_at_the_same_loss_and_moves_the_weights(kind):
    model = tiny()
    new, _ = apply(ensemble_scale(kind=kind), model)
    trained, fixed = tree.trained(new)
    assert trained.ensemble.scale.shape == ((7, 16) if kind == "vector" else (7,))
    assert len(jax.tree.leaves(trained.ensemble)) == 1  # the mask is held
    loss = lambda t: next_token(tree.combine(t, fixed), TOKENS[0])[0]  # noqa: E731
    value, slope = jax.jit(jax.value_and_grad(loss))(trained)
    plain = jax.jit(lambda m: next_token(m, TOKENS[0])[0])(model)
    np.testing.assert_allclose(value, plain, atol=1e-6)
    assert np.abs(slope.ensemble.scale[...]).min() > 0


def test_paths_are_dropped_and_masks_stay():
    new, _ = apply(ensemble_scale(drop=(1, 3)), models.stack(tiny()))
    np.testing.assert_array_equal(new.ensemble.kept[...], [1, 0, 1, 0, 1, 1, 1])
    assert isinstance(new.layers, models.Stacked)
    both, stats = apply(
        chain(path_ensemble(remove=2), ensemble_scale(kind="scalar")),
        tiny(),
        TOKENS,
        progress=False,
    )
    np.testing.assert_array_equal(both.ensemble.kept[...] == 0, stats.done[0].step >= 0)
    assert both.ensemble.scale.shape == (7,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "matrix"}, "not one of"),
        ({"drop": (7,)}, "some of the paths 0 to 6"),
        ({"drop": (-1,)}, "some of the paths 0 to 6"),
        ({"drop": tuple(range(7))}, "not all"),
    ],
)
def test_what_is_not_there_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        apply(ensemble_scale(**options), tiny())


def test_weights_are_given_once():
    model = with_ensemble(tiny(), EnsembleScale(np.ones(7), jnp.ones(7)))
    with pytest.raises(ConfigError, match="has weights of its paths already"):
        apply(ensemble_scale(), model)
