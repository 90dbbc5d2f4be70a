"""Which tokens of a row each device of a ring has, and whose keys they meet.

Two orders of a row's tokens over n devices:

- "contiguous": device r has part r of n. Windows need the keys of the devices just before alone.
- "zig-zag": device r has the parts r and 2n - 1 - r of 2n, so that causal work is even, and exactly
  so: from every other device come two of the four pairs of parts, whole, and nothing else is
  computed (Llama 3, arXiv 2407.21783, section 3.3.2, gathers the keys of the same parts). Rows come
  and go contiguous: each half of a device's part is sent where it belongs, and what was found back.
"""

import dataclasses
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from ffnlab.layers.attention.spec import AttentionSpec

__all__ = ["Pair", "Ring", "from_zigzag", "ring_of", "to_zigzag"]

T = TypeVar("T")
OWN = ((0, 0), (1, 1), (1, 0))  # pairs of parts of a device itself


class Pair(NamedTuple):
    """Queries of part i of a device and keys of part j of another, with their numbers in a row.

    Of several pairs, one after the other, each is [n] instead of [].
    """

    i: Int[Array, "*n"]
    j: Int[Array, "*n"]
    number: Int[Array, "*n"]
    key_number: Int[Array, "*n"]


@dataclasses.dataclass(frozen=True)
class Ring:
    """How keys go round.

    Attributes:
      axes: of the mesh, over which rows are cut.
      devices: along them (n).
      zigzag: the order, else contiguous.
      turns: how many devices' keys each device meets, its own among them.
      spec: of the layer.
      scale: of the scores.
    """

    axes: tuple[str, ...]
    devices: int
    zigzag: bool
    turns: int
    spec: AttentionSpec
    scale: float

    @property
    def parts(self) -> int:
        """How many parts of a row a device has."""
        return 2 if self.zigzag else 1

    def pairs(self, own: Int[Array, ""], source: Int[Array, ""] | None) -> Pair:
        """Which of a device's parts meet which parts of keys of another, or (None) of its own."""
        if not self.zigzag:
            found = [(0, 0, own, own if source is None else source)]
        elif source is None:
            found = [(i, j, self._number(i, own), self._number(j, own)) for i, j in OWN]
        else:
            # The first keys come before the second queries whoever has them; beyond that the first
            # queries see those of a device before, the second the second ones of a device after.
            i = jnp.where(source < own, 0, 1)
            second = self._number(1, own)
            found = [(1, 0, second, source), (i, i, *(self._number(i, d) for d in (own, source)))]
        return Pair(*(jnp.stack([jnp.int32(x) for x in each]) for each in zip(*found, strict=True)))

    def _number(self, part: Int[Array, ""] | int, device: Int[Array, ""]) -> Int[Array, ""]:
        """Of 2n parts in zig-zag order."""
        return jnp.where(part == 0, device, 2 * self.devices - 1 - device)

    def shifted(self, tree: T, by: int = 1) -> T:
        """A tree as the device `by` places before had it."""
        pairs = [(i, (i + by) % self.devices) for i in range(self.devices)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axes, pairs), tree)


def ring_of(
    axes: tuple[str, ...], devices: int, t: int, spec: AttentionSpec, *, masked: bool
) -> Ring:
    """The ring that does least for a layer.

    Args:
      axes, devices: see `Ring`.
      t: tokens of a row.
      spec: of the layer.
      masked: an array says which keys are seen: not even causality is then made use of.
    """
    scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale
    part, turns = -(-t // devices), devices
    if spec.causal and not masked and spec.window is not None:
        turns = min(devices, 1 - (1 - spec.window) // part)
    # A zig-zag device computes 2n + 1 pairs of half parts, a contiguous one 4 for each it meets.
    zigzag = spec.causal and not masked and 2 * devices + 1 < 4 * turns
    return Ring(axes, devices, zigzag, devices if zigzag else turns, spec, scale)


def holders_of(n: int) -> list[int]:
    """Which of n devices has each of the 2n parts."""
    return [*range(n), *reversed(range(n))]


def to_zigzag(ring: Ring, tree: T) -> T:
    """The halves of a contiguous device, [2, ...], to where they belong."""
    n, holders = ring.devices, holders_of(ring.devices)
    is_even = jax.lax.axis_index(ring.axes) % 2 == 0

    def of_leaf(x: Array) -> Array:
        sent = [
            jax.lax.ppermute(x[i], ring.axes, [(d, holders[2 * d + i]) for d in range(n)])
            for i in range(2)
        ]
        # Of the parts r and 2n - 1 - r the even one comes from the first half of its device.
        return jnp.stack([jnp.where(is_even, *sent), jnp.where(is_even, *sent[::-1])])

    return jax.tree.map(of_leaf, tree)


def from_zigzag(ring: Ring, x: Array) -> Array:
    """The inverse of `to_zigzag`."""
    n, holders = ring.devices, holders_of(ring.devices)
    is_even = jax.lax.axis_index(ring.axes) % 2 == 0
    halves = jnp.where(is_even, x[0], x[1]), jnp.where(is_even, x[1], x[0])
    back = [
        jax.lax.ppermute(half, ring.axes, [(holders[2 * d + i], d) for d in range(n)])
        for i, half in enumerate(halves)
    ]
    return jnp.stack(back)
