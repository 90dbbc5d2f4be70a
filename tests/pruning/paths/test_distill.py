"""Self-distillation: brute force, who learns from whom, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import tree
from ffnlab.errors import ConfigError
from ffnlab.models import ViT, ViTConfig
from ffnlab.pruning import ensemble_scale, exits, self_distilled
from ffnlab.testing import tiny_encoder
from ffnlab.transform import apply

CONFIG = ViTConfig((8, 8), 4, 8, 12, 3, 2, channels=1, classes=3, pool="mean")
VIT = apply(ensemble_scale(), ViT(CONFIG, key=jax.random.key(0)))[0]
BATCH = (jax.random.uniform(jax.random.key(1), (4, 8, 8, 1)), jnp.array([0, 1, 2, 1]))


def test_the_loss_is_that_of_the_formula():
    loss = self_distilled((1, 2), weight=0.7, temperature=2.0)
    both = jax.jit(lambda m: (loss(m, BATCH), exits(m, BATCH[0], (1, 2, 3))))
    (value, metrics), found = both(VIT)
    short, middle, whole = np.asarray(found, np.float64)
    p = lambda y: np.exp(y) / np.exp(y).sum(-1, keepdims=True)  # noqa: E731
    kl = lambda y: (p(whole / 2) * (np.log(p(whole / 2)) - np.log(p(y / 2)))).sum(-1).mean()  # noqa: E731
    nats = -np.log(p(whole)[np.arange(4), BATCH[1]]).mean()
    np.testing.assert_allclose(metrics["labels"], nats, rtol=1e-5)
    np.testing.assert_allclose(metrics["teacher"], 4 * (kl(short) + kl(middle)), rtol=1e-4)
    np.testing.assert_allclose(value, nats + 0.7 * 4 * (kl(short) + kl(middle)), rtol=1e-5)
    np.testing.assert_allclose(metrics["exit 1"], (short.argmax(-1) == BATCH[1]).mean())


def test_the_teacher_learns_nothing_of_its_pupils():
    """What only the whole ensemble reads, the last blocks, has no gradient of the distillation."""
    trained, fixed = tree.trained(VIT)

    @jax.jit
    def gradient(trained, weight):
        loss = self_distilled((1,), weight=weight)
        return jax.grad(lambda t: loss(tree.combine(t, fixed), BATCH)[0])(trained)

    taught, plain = gradient(trained, 3.0), gradient(trained, 0.0)
    same = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6)  # noqa: E731
    for i in (1, 2):
        jax.tree.map(same, taught.layers[i], plain.layers[i])
    same(taught.ensemble.scale[3:], plain.ensemble.scale[3:])
    pairs = zip(jax.tree.leaves(taught.layers[0]), jax.tree.leaves(plain.layers[0]), strict=True)
    assert max(float(jnp.abs(a - b).max()) for a, b in pairs) > 1e-4


@pytest.mark.parametrize(
    ("depths", "options", "message"),
    [
        ((), {}, "numbers of layers"),
        ((0,), {}, "numbers of layers"),
        ((1, 1), {}, "each once"),
        ((1,), {"weight": -0.1}, "0 or more"),
        ((1,), {"temperature": 0.0}, "must be positive"),
        ((3,), {}, "below the 3 layers"),
    ],
)
def test_what_does_not_fit_is_refused(depths, options, message):
    with pytest.raises(ConfigError, match=message):
        self_distilled(depths, **options)(VIT, BATCH)


def test_other_models_are_refused():
    with pytest.raises(ConfigError, match="a ViT or a Decoder"):
        self_distilled((1,))(tiny_encoder(norm="before"), BATCH)
