"""Storage formats of the attention cache: dense, FP8 and INT4 per token and head.

One object holds the keys and values of one layer, logical shape [b, S, kv, hd] (S slots). It is a
frozen pytree: `write` returns a new cache of the same type, `read` gives dense arrays back, and a
layer never asks which format it has. `fake` is the same rounding without storage, so a forward
pass without a cache sees bit for bit the keys and values that a cached one would read.

INT4 (FireQ, arXiv 2505.20839, static cache), per token and head over hd channels:

    m = max(absmax(x), 1e-5);  s = clip(e4m3(m / 7), 2^-9, 448);  q = clip(round(x / s), -8, 7)

and the value is q * s. FP8: s = bf16(absmax(x) / 448), 1 for a zero row; q = e4m3(x / s).

Differs from the authors' code: rounding is half to even (their store kernel truncates), the scale
is clamped at 448 (their cast overflows to NaN there), and codes are packed two per byte. Since the
scale is rounded before the codes, q reaches -8 only where s is an e4m3 subnormal (m < 0.11).
A token and head that holds a NaN or an infinity reads back as NaN throughout. Beyond absmax 3136
the INT4 scale is at its maximum and values saturate.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from ffnlab.errors import ConfigError
from ffnlab.weights.activations import E4M3_MAX, quantize_e4m3
from ffnlab.weights.base import AxisNames, nbytes, register
from pallas_kernels.numerics import divide

KINDS = ("dense", "float8", "int4")
E4M3 = jnp.float8_e4m3fn
E4M3_TINY = 2.0**-9
INT4_FLOOR = 1e-5
AXES = ("batch", "cache", "kv_heads", "head_dim")
Slot = int | Int[Array, ""]


@runtime_checkable
class KV(Protocol):
    """What every cache format can do; k and v below are dense [b, t, kv, hd]."""

    @property
    def shape(self) -> tuple[int, int, int, int]: ...

    @property
    def nbytes(self) -> int: ...

    def write(
        self, k: Float[Array, "b t kv hd"], v: Float[Array, "b t kv hd"], index: Slot
    ) -> KV: ...

    def read(self, dtype) -> tuple[Float[Array, "b S kv hd"], Float[Array, "b S kv hd"]]: ...

    def leaf_axes(self) -> KV: ...


class _Leaves:
    """Accounting shared by the formats: all of them are dataclasses of arrays only."""

    @property
    def nbytes(self) -> int:
        """Bytes held, codes and scales."""
        return sum(nbytes(leaf) for leaf in jax.tree.leaves(self))

    def leaf_axes(self):
        """The same structure with a tuple of logical axis names for each array (scales lack
        the last axis)."""
        leaves, structure = jax.tree.flatten(self)
        return structure.unflatten([AxisNames(AXES[: leaf.ndim]) for leaf in leaves])

    def _update(self, index: Slot, **new):
        length = self.k.shape[1]
        t = new["k"].shape[1]
        if isinstance(index, int) and not 0 <= index <= length - t:
            raise ConfigError(
                f"index={index} with {t} tokens does not fit a cache of {length} slots; "
                f"accepted: 0..{length - t}"
            )
        put = jax.lax.dynamic_update_slice_in_dim
        return type(self)(**{n: put(getattr(self, n), x, index, axis=1) for n, x in new.items()})


@register
@dataclasses.dataclass(frozen=True)
class DenseKV(_Leaves):
    """Keys and values as they are.

    Attributes:
      k, v: [b, S, kv, hd], float32 or bfloat16.
    """

    k: Float[Array, "b S kv hd"]
    v: Float[Array, "b S kv hd"]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(b, S, kv, hd)."""
        return self.k.shape

    def write(
        self, k: Float[Array, "b t kv hd"], v: Float[Array, "b t kv hd"], index: Slot
    ) -> DenseKV:
        """Store t tokens at slots index..index+t-1 (a traced index is clamped to fit, as
        `lax.dynamic_update_slice` does; an int out of range raises ConfigError)."""
        return self._update(index, k=k.astype(self.k.dtype), v=v.astype(self.v.dtype))

    def read(self, dtype) -> tuple[Float[Array, "b S kv hd"], Float[Array, "b S kv hd"]]:
        """All slots in `dtype`."""
        return self.k.astype(dtype), self.v.astype(dtype)


@register
@dataclasses.dataclass(frozen=True)
class Float8KV(_Leaves):
    """FP8 per token and head.

    Attributes:
      k, v: codes, [b, S, kv, hd], float8_e4m3fn.
      k_scale, v_scale: [b, S, kv], bfloat16; value = code * scale. Empty slots hold zeros.
    """

    k: Float[Array, "b S kv hd"]
    v: Float[Array, "b S kv hd"]
    k_scale: Float[Array, "b S kv"]
    v_scale: Float[Array, "b S kv"]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(b, S, kv, hd)."""
        return self.k.shape

    def write(
        self, k: Float[Array, "b t kv hd"], v: Float[Array, "b t kv hd"], index: Slot
    ) -> Float8KV:
        """Round and store t tokens at slots index..index+t-1; see `DenseKV.write`."""
        (k, k_scale), (v, v_scale) = quantize_float8(k), quantize_float8(v)
        return self._update(index, k=k, v=v, k_scale=k_scale, v_scale=v_scale)

    def read(self, dtype) -> tuple[Float[Array, "b S kv hd"], Float[Array, "b S kv hd"]]:
        """All slots, dequantized, in `dtype`."""
        return _scaled(self.k, self.k_scale, dtype), _scaled(self.v, self.v_scale, dtype)


@register
@dataclasses.dataclass(frozen=True)
class Int4KV(_Leaves):
    """INT4 per token and head.

    Attributes:
      k, v: codes -8..7 in two's complement, two per byte, uint8 [b, S, kv, hd/2]; channel 2i in
        the low nibble of byte i.
      k_scale, v_scale: [b, S, kv], float8_e4m3fn, >= 2^-9 where written (empty slots: 0);
        value = code * scale.
    """

    k: UInt8[Array, "b S kv half"]
    v: UInt8[Array, "b S kv half"]
    k_scale: Float[Array, "b S kv"]
    v_scale: Float[Array, "b S kv"]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(b, S, kv, hd): the logical shape, not the packed one."""
        return (*self.k.shape[:-1], 2 * self.k.shape[-1])

    def write(
        self, k: Float[Array, "b t kv hd"], v: Float[Array, "b t kv hd"], index: Slot
    ) -> Int4KV:
        """Round, pack and store t tokens at slots index..index+t-1; see `DenseKV.write`."""
        (k, k_scale), (v, v_scale) = quantize_int4(k), quantize_int4(v)
        return self._update(index, k=pack(k), v=pack(v), k_scale=k_scale, v_scale=v_scale)

    def read(self, dtype) -> tuple[Float[Array, "b S kv hd"], Float[Array, "b S kv hd"]]:
        """All slots, dequantized, in `dtype`."""
        k, v = unpack(self.k), unpack(self.v)
        return _scaled(k, self.k_scale, dtype), _scaled(v, self.v_scale, dtype)


def empty(
    kind: str | None, batch: int, length: int, kv_heads: int, head_dim: int, dtype=jnp.float32
) -> DenseKV | Float8KV | Int4KV:
    """A cache with nothing in it (all zeros).

    Args:
      kind: "dense" (or None), "float8" or "int4".
      batch, length, kv_heads, head_dim: b, S, kv, hd; head_dim even for "int4".
      dtype: of a dense cache; the other kinds have their own.
    Returns:
      one layer's cache of shape [b, S, kv, hd].
    Raises:
      ConfigError: unknown kind, odd head_dim with "int4".

    >>> empty("int4", 1, 16, 2, 32).nbytes, empty("dense", 1, 16, 2, 32).nbytes
    (1088, 8192)
    """
    kind = check_kind(kind, head_dim)
    shape = (batch, length, kv_heads)

    def zeros(dtype, *last):
        return jnp.zeros((*shape, *last), dtype)

    if kind == "dense":
        return DenseKV(zeros(dtype, head_dim), zeros(dtype, head_dim))
    if kind == "float8":
        codes, scale = (E4M3, head_dim), (jnp.bfloat16,)
        return Float8KV(zeros(*codes), zeros(*codes), zeros(*scale), zeros(*scale))
    codes = (jnp.uint8, head_dim // 2)
    return Int4KV(zeros(*codes), zeros(*codes), zeros(E4M3), zeros(E4M3))


def fake(kind: str | None, x: Float[Array, "*rows hd"]) -> Float[Array, "*rows hd"]:
    """Keys or values as a cache of this kind would give them back.

    Args:
      kind: "dense" (or None), "float8" or "int4".
      x: [..., hd], float32 or bfloat16.
    Returns:
      rounded x, same shape and dtype; equal to write then read. The gradient passes straight
      through.
    Raises:
      ConfigError: unknown kind, odd hd with "int4".

    >>> fake("int4", jnp.array([7.0, -3.4, 0.2, 0.0]))
    Array([ 7., -3.,  0.,  0.], dtype=float32)
    """
    kind = check_kind(kind, x.shape[-1])
    if kind == "dense":
        return x
    quantize = quantize_float8 if kind == "float8" else quantize_int4
    return _straight_through(x, _scaled(*quantize(x), x.dtype))


def fake_query(kind: str | None, q: Float[Array, "*rows hd"]) -> Float[Array, "*rows hd"]:
    """Queries rounded to e4m3 per token and head: sx = absmax / 448 (1 for a zero row) in f32.

    Args:
      kind: "e4m3", or None for q itself.
      q: [..., hd], float32 or bfloat16.
    Returns:
      e4m3(q / sx) * sx, same shape and dtype.
    Raises:
      ConfigError: unknown kind.
    """
    if kind is None:
        return q
    if kind != "e4m3":
        raise ConfigError(f"query format {kind!r} is unknown; accepted: None, 'e4m3'")
    codes, scale = quantize_e4m3(q)
    return _straight_through(q, _scaled(codes, scale[..., 0], q.dtype))


def check_kind(kind: str | None, head_dim: int) -> str:
    """Canonical name of a cache kind.

    Raises:
      ConfigError: unknown kind, or odd head_dim with "int4".
    """
    kind = "dense" if kind is None else kind
    if kind not in KINDS:
        raise ConfigError(f"cache kind {kind!r} is unknown; accepted: {', '.join(KINDS)}")
    if kind == "int4" and head_dim % 2:
        raise ConfigError(
            f"head_dim={head_dim} is odd: an int4 cache packs two channels per byte; "
            "use an even head_dim or the kind 'float8'"
        )
    return kind


def quantize_float8(
    x: Float[Array, "*rows hd"],
) -> tuple[Float[Array, "*rows hd"], Float[Array, "*rows"]]:
    """FP8 codes and scales: s = bf16(absmax / 448), 1 for a zero row; q = e4m3(x / s).

    Returns:
      codes [..., hd] float8_e4m3fn; scales [...] bfloat16.
    """
    x = x.astype(jnp.float32)
    scale = divide(jnp.max(jnp.abs(x), axis=-1), E4M3_MAX)
    scale = jnp.where(scale == 0, 1.0, scale).astype(jnp.bfloat16)
    # The rounded scale can push the largest element past 448, where the cast gives NaN.
    codes = jnp.clip(x / scale[..., None].astype(jnp.float32), -E4M3_MAX, E4M3_MAX)
    return codes.astype(E4M3), scale


def quantize_int4(
    x: Float[Array, "*rows hd"],
) -> tuple[Int[Array, "*rows hd"], Float[Array, "*rows"]]:
    """INT4 codes and scales; the formula is in the module's first lines.

    Returns:
      codes [..., hd] int8 in -8..7; scales [...] float8_e4m3fn in 2^-9..448.
    """
    x = x.astype(jnp.float32)
    absmax = jnp.maximum(jnp.max(jnp.abs(x), axis=-1), INT4_FLOOR)
    scale = jnp.where(jnp.isinf(absmax), jnp.nan, jnp.clip(divide(absmax, 7), E4M3_TINY, E4M3_MAX))
    scale = scale.astype(E4M3)
    codes = jnp.round(x / scale[..., None].astype(jnp.float32))
    return jnp.clip(codes, -8, 7).astype(jnp.int8), scale


def pack(codes: Int[Array, "*rows hd"]) -> UInt8[Array, "*rows half"]:
    """Two codes -8..7 per byte, [..., hd] int8 -> [..., hd/2] uint8; element 2i is the low nibble.

    >>> pack(jnp.array([1, -1], jnp.int8))
    Array([241], dtype=uint8)
    """
    nibbles = codes.astype(jnp.uint8) & jnp.uint8(15)
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << jnp.uint8(4))


def unpack(packed: UInt8[Array, "*rows half"]) -> Int[Array, "*rows hd"]:
    """The opposite of `pack`, [..., hd/2] uint8 -> [..., hd] int8."""
    signed = jax.lax.bitcast_convert_type(packed, jnp.int8)
    low = (signed << jnp.int8(4)) >> jnp.int8(4)
    pairs = jnp.stack([low, signed >> jnp.int8(4)], axis=-1)
    return pairs.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def _scaled(codes, scale, dtype):
    return (codes.astype(jnp.float32) * scale[..., None].astype(jnp.float32)).astype(dtype)


def _straight_through(x, rounded):
    """`rounded`, bit for bit, with the gradient of x."""
    return jax.lax.stop_gradient(rounded) + (x - jax.lax.stop_gradient(x))
