"""ScaleLong: Towards More Stable Training of Diffusion Model via Scaling Network Long Skip
Connection (2023, arXiv 2310.13545).

Long skips that are added or joined as they are let hidden states and gradients grow with the depth
of a U-shaped network. Factors that fall geometrically towards the middle, or small gates, keep them
in bounds (`ffnlab.layers.long_skips`, whose `scale_skips` is for the skips of any network).

The map that joins a skip to the stream could undo any factor: what changes is where training
begins and how it goes, so that a model is trained with the scaling that it is run with.

What the paper bounds is measured of any U-ViT: how much noise in its images changes its hidden
state and its output (`noise_response`), and how large gradients are from block to block
(`block_gradients`).
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from ffnlab import tree
from ffnlab.errors import ConfigError, check_seed
from ffnlab.layers import scale_skips
from ffnlab.losses import Moment, denoising
from ffnlab.models import UViT
from ffnlab.models.rewriting import rewriting
from ffnlab.models.stack import Stacked
from ffnlab.models.uvit import make_scaling
from ffnlab.transform import Transform

__all__ = ["Response", "block_gradients", "noise_response", "scale_skips", "scalelong"]

Images = Float[Array | np.ndarray, "b h w c"]


def scalelong(
    *, method: str = "constant", kappa: float = 0.5, seed: int = 0
) -> Transform[Any, tuple[()]]:
    """The transform that scales the long skips of a U-ViT otherwise.

    Args:
      method: "original", "root", "constant", "learned" or "apart".
      kappa: of "constant", in (0, 1]; the paper suggests .5 to .95.
      seed: of gates that are learned.
    Returns:
      a Transform that observes nothing; the model's configuration says what it has then. The
      function changes: train it.
    Raises:
      ConfigError: another method or a kappa out of range; from the transform, what is no U-ViT, or
        one of fewer than 16 tokens where gates are learned.
    Source:
      arXiv 2310.13545; `libs/uvit.py` of its code, whose `scalelong` 0 to 4 are the methods.

    >>> scalelong(kappa=0.7).name
    'scalelong'
    """
    check_seed(seed)
    scale_skips(method, kappa=kappa, sizes=(16,), key=jax.random.key(seed))  # to say what is wrong

    def problems(model: Any) -> list[str]:
        return [] if isinstance(model, UViT) else [unfit(model)]

    def change(model: UViT) -> UViT:
        new = tree.copy(model)
        new.config = dataclasses.replace(model.config, scaling=method, kappa=kappa)
        new.scaling = make_scaling(new.config, jax.random.key(seed), model.patches.weight.dtype)
        return new

    return rewriting("scalelong", problems, change)


def unfit(model: object) -> str:
    """Why a model is not accepted."""
    return f"model is a {type(model).__name__}; a UViT is accepted"


def check_model(model: object) -> None:
    """Raises ConfigError for what is no U-ViT."""
    if not isinstance(model, UViT):
        raise ConfigError(unfit(model))


class Response(NamedTuple):
    """How much a little noise in the images changes, over the size of the noise.

    Root mean squares of both, so that 1 is as much as was added; of the output, too.

    Attributes:
      stream: [] of the residual stream behind the last block, before the norm makes it of one size.
      output: [] of the noise that is predicted.
    """

    stream: Float[Array, ""]
    output: Float[Array, ""]


def noise_response(
    model: Any,
    images: Images,
    times: Float[Array, "b"],
    key: Key[Array, ""],
    *,
    size: float = 0.01,
) -> Response:
    """What normal noise in the images of a U-ViT becomes.

    Args:
      model: a U-ViT of no classes; under `jax.jit`, `jax.vmap` too.
      images: as the model takes them.
      times: as the model takes them.
      key: of the noise.
      size: deviation of the noise, above 0.
    Raises:
      ConfigError: another model, or a size that is not positive.
    Source:
      arXiv 2310.13545, section 3.3: |net(x + e) - net(x)|, which it bounds by the factors' sum.
    """
    check_model(model)
    if not size > 0:
        raise ConfigError(f"size={size} must be positive")
    images = jnp.asarray(images)
    noise = size * jax.random.normal(key, images.shape)
    both = jnp.concatenate([images, images + noise]), jnp.concatenate([times, times])
    outputs, streams = seen(model, *both)
    n, length = len(images), rms(noise)
    return Response(*(rms(y[n:] - y[:n]) / length for y in (streams, outputs)))


def seen(model: UViT, images: Array, times: Array) -> tuple[Array, Array]:
    """(output, what the last norm is given)."""
    found: Any = tree.capture(model, tree.at("norm"), images, times)
    return found[0], found[1]["norm"].input[0].astype(jnp.float32)


def rms(x: Float[Array, "..."]) -> Float[Array, ""]:
    """Root mean square."""
    return jnp.sqrt(jnp.mean(jnp.square(x)))


def block_gradients(model: Any, images: Images, moment: Moment) -> Float[Array, "layers"]:
    """The norm of each block's gradient of `denoising`, in order.

    Args:
      model: a U-ViT of no classes, stacked or not; under `jax.jit`, `jax.vmap` too.
      images: with values in [0, 1].
      moment: whose key draws times and noise.
    Raises:
      ConfigError: another model.
    Source:
      arXiv 2310.13545, section 3.2: norms of gradients by layer, which it bounds likewise.
    """
    check_model(model)
    trained, fixed = tree.trained(model)
    loss = lambda trained: denoising(tree.combine(trained, fixed), images, moment)[0]  # noqa: E731
    layers = jax.grad(loss)(trained).layers

    def norm(block: Any) -> Float[Array, ""]:
        return jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(block)))

    if isinstance(layers, Stacked):
        return jnp.stack([jax.vmap(norm)(block) for block in layers.period], axis=-1).ravel()
    return jnp.stack([norm(block) for block in layers])
