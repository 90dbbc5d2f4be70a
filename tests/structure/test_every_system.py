"""Every system of structure as users take it further: saved, stacked, quantized, pruned."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import models, transform, tree
from ffnlab.models import ResNet, ResNetConfig, UViT, UViTConfig, ViT, ViTConfig
from ffnlab.models.units import removable
from ffnlab.pruning import finercut
from ffnlab.quantization import nearest
from ffnlab.structure import (
    bundle,
    expand,
    macaron,
    pflayer,
    premerged,
    repa,
    repa_fold,
    scalelong,
    share,
    snnk,
    snnk_adapter,
    structured,
)
from ffnlab.testing import equal
from ffnlab.transform import Transform, chain
from ffnlab.weights import Int8

IMAGES = jax.random.uniform(jax.random.key(1), (3, 8, 8, 1))
run = jax.jit(lambda model, x: model(x))


def vit(dtype) -> ViT:
    """A vision transformer of four layers."""
    config = ViTConfig((8, 8), 2, 8, 16, 4, 2, channels=1, classes=3, pool="mean")
    return ViT(config, key=jax.random.key(0), dtype=dtype)


def uvit(dtype) -> UViT:
    """A U-ViT of five blocks."""
    config = UViTConfig((8, 8), 2, 8, 16, 4, 2, channels=1)
    return UViT(config, key=jax.random.key(0), dtype=dtype)


def resnet(op, dtype) -> ResNet:
    """A residual network of two bottlenecks, whose spatial step is an op."""
    config = ResNetConfig((1, 1), (4, 8), 3, 1, (8, 8), "bottleneck", op)
    return ResNet(config, key=jax.random.key(0), dtype=dtype)


class System(NamedTuple):
    """A system.

    Attributes:
      base: dtype -> the model that it begins with.
      change: what makes it of that; None where the configuration does.
      least: matrices that are quantized, at least.
      removable: slots that FinerCut can do without; 0 where blocks hold what it cannot part.
    """

    base: Callable[[Any], Any]
    change: Callable[[], Transform] | None
    least: int
    removable: int


SYSTEMS = {
    "repavit, trained": System(vit, lambda: repa(idle=0.75), 16, 8),
    "repavit, folded": System(vit, lambda: chain(repa(idle=0.75), repa_fold(force=True)), 16, 4),
    "pflayer": System(vit, pflayer, 16, 8),
    "learngene, shared": System(vit, lambda: share(repeats=(2, 2)), 8, 0),
    "learngene, expanded": System(
        vit, lambda: chain(share(repeats=(2, 2)), expand(layers=3)), 12, 6
    ),
    "snnk": System(vit, lambda: snnk(features=4), 16, 8),
    "snnk, bundled": System(vit, lambda: chain(snnk(features=4), bundle()), 12, 8),
    "snnk adapter": System(vit, snnk_adapter, 24, 16),
    "macaron": System(vit, lambda: macaron(start="split"), 32, 12),
    "structured, low rank": System(vit, lambda: structured(rank=4), 24, 8),
    "structured, merged shuffles": System(
        vit, lambda: chain(structured(form="block_shuffle"), premerged()), 24, 8
    ),
    "scalelong": System(uvit, lambda: scalelong(method="apart"), 30, 10),
    "max bottleneck": System(functools.partial(resnet, "max"), None, 5, 0),
    "depthwise bottleneck": System(functools.partial(resnet, "depthwise"), None, 5, 0),
}


def made(name: str, dtype) -> Any:
    """A model as a system has it."""
    system = SYSTEMS[name]
    model = system.base(dtype)
    return model if system.change is None else transform.apply(system.change(), model)[0]


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SYSTEMS)
def test_it_is_saved_stacked_quantized_and_pruned(name, dtype, tmp_path):
    system, model = SYSTEMS[name], made(name, dtype)
    floats = {x.dtype for x in jax.tree.leaves(model) if jnp.issubdtype(x.dtype, jnp.floating)}
    assert jnp.dtype(dtype) in floats
    models.save(model, tmp_path / "m", format="ffnlab")
    back = models.load(tmp_path / "m")
    assert equal(back, model)
    y = run(model, IMAGES)
    assert (
        y.shape == ((3, 8, 8, 1) if isinstance(model, UViT) else (3, 3))
        and np.isfinite(y).all()
        and np.abs(y).max() > 0
    )
    np.testing.assert_array_equal(run(back, IMAGES), y)
    near = 1e-5 if dtype == jnp.float32 else 0.03  # eight bits of a mantissa, in another order
    if isinstance(model, ViT | UViT) and not isinstance(model.layers, models.Shared):
        stacked = models.stack(model)
        np.testing.assert_allclose(run(stacked, IMAGES), y, atol=near)
        assert equal(models.unstack(stacked), model)
        models.save(stacked, tmp_path / "stacked", format="ffnlab")
        assert equal(models.load(tmp_path / "stacked"), stacked)
    small, _ = transform.apply(nearest(format="int8", group=None), model)
    packed = [node for _, node in tree.walk(small) if isinstance(node, Int8)]
    assert len(packed) >= system.least
    assert 0 < np.abs(run(small, IMAGES) - y).max() < 0.05 * np.abs(y).max() + near
    models.save(small, tmp_path / "small", format="ffnlab")
    assert equal(models.load(tmp_path / "small"), small)
    if system.removable:
        assert removable(model).sum() == system.removable
        cut, _ = transform.apply(finercut(remove=1, protect=None), model, [IMAGES])
        assert len(models.removed(cut)) == 1 and np.isfinite(run(cut, IMAGES)).all()
        assert removable(cut).sum() == system.removable - 1
