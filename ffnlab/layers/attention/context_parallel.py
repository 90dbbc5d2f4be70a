"""Attention of rows whose tokens lie on several devices: the mesh axes of "length".

Neither way ever has the keys and values of whole rows on one device:

- Ulysses (arXiv 2309.14509): one all-to-all gives each device whole rows of some of the heads, and
  another takes what was found back. Where heads divide, and causality alone says who sees whom, as
  it sends least and runs the attention of one device.
- Ring (`ffnlab.layers.attention.ring`) elsewhere: other numbers of heads; windows, which need a few
  neighbours' keys alone; segments and masks, of which a device has its own rows.

Per device and layer, of t tokens on n devices, Ulysses sends 2 (h + kv) t hd / n numbers, a ring
2 kv t hd and, in zig-zag order, 2 (h + kv) t hd / n too.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ffnlab.errors import ConfigError
from ffnlab.layers.attention.ring import ring_attention
from ffnlab.layers.attention.ring_order import ring_of
from ffnlab.layers.attention.spec import AttentionSpec
from ffnlab.layers.logical import ambient, automatic, partition

__all__ = ["context_axes", "context_parallel"]


def context_axes() -> tuple[str, ...]:
    """The axes of the mesh that is set which cut rows, by the layout in use."""
    sizes = automatic()
    return tuple(axis for axis in ambient().get("length", ()) if sizes.get(axis, 1) > 1)


def context_parallel(
    alone: Callable[..., Array],
    q: Float[Array, "b t h hd"],
    k: Float[Array, "b t kv hd"],
    v: Float[Array, "b t kv hd"],
    mask: Bool[Array, "mb 1 t t"] | None,
    spec: AttentionSpec,
    *,
    segments: Int[Array, "b t"] | None = None,
) -> Float[Array, "b t h hd"]:
    """Attention over a mesh with `context_axes`, equal to that of one device.

    Args:
      alone: (q, k, v, mask, spec) -> the same of one device.
      q, k, v: whole, to be cut; h is a multiple of kv.
      mask: which keys are seen, causality and window included; None where spec and segments say it.
      spec: of the layer.
      segments: number of the text each token is of, 0 for padding; they stand in for a mask.
    Raises:
      ConfigError: a row does not divide.
    """
    sizes, layout, axes = automatic(), ambient(), context_axes()
    t, n = q.shape[1], math.prod(sizes[axis] for axis in axes)
    mask = mask if segments is None else None
    place = partition(("batch", "length", "heads", None), q.shape, sizes, layout)
    cut = place[2] if isinstance(place[2], tuple) else (place[2],)
    by_heads = math.prod(sizes[axis] for axis in cut if axis is not None)
    free = mask is None and segments is None and spec.window is None
    ulysses = free and q.shape[2] % (by_heads * n) == 0
    ring = None if ulysses else ring_of(axes, n, t, spec, masked=mask is not None)
    check_length(t, n * (1 if ring is None else ring.parts), axes, sizes)
    # Each device has the keys of its own queries: where there are too few heads, of all it shares.
    shares = math.lcm(k.shape[2], by_heads * (n if ulysses else 1)) // k.shape[2]
    k, v = (x if shares == 1 else jnp.repeat(x, shares, axis=2) for x in (k, v))
    given = (q, k, v, segments, mask)
    names = (*[None] * 3, ("batch", "length"), ("batch", None, "length", None))
    places = tuple(
        place if own is None or x is None else partition(own, x.shape, sizes, layout)
        for own, x in zip(names, given, strict=True)
    )

    def run(q: Array, k: Array, v: Array, segments: Array | None, mask: Array | None) -> Array:
        if ring is None:
            return _ulysses(alone, axes, q, k, v, spec)
        return ring_attention(ring, q, k, v, segments=segments, mask=mask)

    return jax.shard_map(run, in_specs=places, out_specs=place, check_vma=False)(*given)


def check_length(t: int, parts: int, axes: tuple[str, ...], sizes: dict[str, int]) -> None:
    """Raises ConfigError unless rows of t tokens divide into equal parts."""
    if t % parts:
        cut = " x ".join(f"{axis}={sizes[axis]}" for axis in axes)
        near = [n for n in (t - t % parts, t - t % parts + parts) if n]
        raise ConfigError(
            f"attention over {t} tokens: {cut} cuts a row in {parts} equal parts, which do not "
            f"divide {t}; use rows of {' or '.join(map(str, near))} tokens, or another mesh"
        )


def _ulysses(
    alone: Callable[..., Array],
    axes: tuple[str, ...],
    q: Array,
    k: Array,
    v: Array,
    spec: AttentionSpec,
) -> Array:
    """Whole rows of a share of the heads, and back."""
    by_head = [jax.lax.all_to_all(x, axes, 2, 1, tiled=True) for x in (q, k, v)]
    return jax.lax.all_to_all(alone(*by_head, None, spec), axes, 1, 2, tiled=True)
