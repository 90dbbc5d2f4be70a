"""One block: sublayers on a residual stream, in the order of its slots, each removable."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ffnlab.errors import ConfigError
from ffnlab.layers.context import Context, LayerInputs, LayerOutputs
from ffnlab.layers.logical import constrain
from ffnlab.layers.modality import through
from ffnlab.weights import kv

__all__ = ["Block", "Join"]


@dataclasses.dataclass(frozen=True)
class Join:
    """How a sublayer joins the residual stream h.

    "before": h + scale f(norm(h));  "output": h + scale norm(f(h));  "after": norm(h + scale f(h))

    Attributes:
      scale: multiplies the branch.
      norm: where the sublayer's norm stands.
      residual: whether h itself is added; without, the branch alone goes on.
    """

    scale: float = 1.0
    norm: str = "before"
    residual: bool = True

    def __post_init__(self) -> None:
        if self.norm not in ("before", "output", "after"):
            raise ConfigError(f"norm={self.norm!r} is not 'before', 'output' or 'after'")


class Block(nnx.Module):
    """Sublayers one after the other: h + attn(norm(h)), then h + ffn(norm(h)), unless told else.

    A sublayer of None is removed: it adds nothing, as if its gate were 0. Kinds are known by
    a class attribute: one that has `mixes` is called as `f(x, context, cache)` and gives (y,
    cache), one that has `informed` as `f(x, context, inputs)` and gives (y, report), any other as
    `f(x)`. Of a sublayer or norm that has `by_group` there is a copy for each modality, which
    tokens go through by `ffnlab.layers.modality.through`.

    Attributes:
      attn_norm, ffn_norm: norm of each sublayer, or None.
      attn: Attention or None.
      ffn: any module [b, t, d] -> [b, t, d], or None.
      post_attn_norm, post_ffn_norm: a second norm, on a sublayer's output (Gemma 2 and 3), or None.
      slots: names of the sublayers in order (static); further ones are attributes `NAME`,
        `NAME_norm` and `post_NAME_norm`.
      joins: how each of them joins the stream (static).
    """

    # Set in a block only where they differ, so that blocks of older files have the same structure.
    slots: tuple[str, ...] = ("attn", "ffn")
    joins: tuple[Join, ...] = (Join(), Join())

    def __init__(
        self,
        attn_norm: nnx.Module | None,
        attn: nnx.Module | None,
        ffn_norm: nnx.Module | None,
        ffn: nnx.Module | None,
        *,
        post_attn_norm: nnx.Module | None = None,
        post_ffn_norm: nnx.Module | None = None,
        slots: tuple[str, ...] = ("attn", "ffn"),
        joins: tuple[Join, ...] | None = None,
        others: Mapping[str, tuple[nnx.Module | None, nnx.Module | None]] | None = None,
    ):
        """A block of ready parts.

        Args:
          slots: order of the sublayers; all that are given, each once.
          joins: one for each slot; the defaults of `Join` when None.
          others: name -> (norm, sublayer) of the slots beside "attn" and "ffn".
        Raises:
          ConfigError: slots that are not the sublayers given, or another number of joins.
        """
        self.attn_norm, self.attn = nnx.data(attn_norm), nnx.data(attn)
        self.ffn_norm, self.ffn = nnx.data(ffn_norm), nnx.data(ffn)
        self.post_attn_norm = nnx.data(post_attn_norm)
        self.post_ffn_norm = nnx.data(post_ffn_norm)
        others = dict(others or {})
        given = {name for name in ("attn", "ffn") if getattr(self, name) is not None} | set(others)
        if len(set(slots)) != len(slots) or not given <= set(slots) <= {"attn", "ffn", *others}:
            raise ConfigError(f"slots={slots} are not the sublayers {sorted(given)}, each once")
        joins = (Join(),) * len(slots) if joins is None else tuple(joins)
        if len(joins) != len(slots):
            raise ConfigError(f"{len(joins)} joins for {len(slots)} slots {slots}")
        for name, (norm, sublayer) in others.items():
            setattr(self, name, nnx.data(sublayer))
            setattr(self, f"{name}_norm", nnx.data(norm))
        if tuple(slots) != type(self).slots:
            self.slots = tuple(slots)
        if joins != type(self).joins:
            self.joins = joins

    def __call__(
        self,
        h: Float[Array, "b t d"],
        context: Context,
        *,
        inputs: LayerInputs | None = None,
        cache: kv.KV | None = None,
        branches: bool | Literal["apart"] = False,
    ) -> tuple[Float[Array, "b t d"], kv.KV | None, LayerOutputs]:
        """Returns (h, cache, outputs).

        Args:
          inputs: what this layer alone is given.
          cache: this block's keys and values; None without caching.
          branches: also return what each sublayer added; "apart" not as one array but as a list,
            None where a sublayer is removed, which a gradient does not have to take apart again.
        """
        inputs = LayerInputs() if inputs is None else inputs
        reports, added, tokens = {}, [], context.tokens
        for i, (name, join) in enumerate(zip(self.slots, self.joins, strict=True)):
            gate, y = None if inputs.gates is None else inputs.gates[i], None
            if getattr(self, name) is not None:
                y, cache, report = self._branch(name, join, h, context, inputs, cache)
                if report is not None:
                    reports[name] = report
                y = y if join.scale == 1.0 else y * jnp.asarray(join.scale, y.dtype)
                y = y if gate is None else y * gate.astype(y.dtype)
                h = h + y if join.residual else y
            norm = getattr(self, f"{name}_norm")
            h = through(norm, h, tokens) if join.norm == "after" and norm is not None else h
            added.append(y)
        h = constrain(h, ("batch", "length", "embed"))
        if not branches:
            return h, cache, LayerOutputs(reports)
        given: Any = added if branches == "apart" else stacked(added, h)
        return h, cache, LayerOutputs(reports, given)

    def _branch(
        self,
        name: str,
        join: Join,
        h: Array,
        context: Context,
        inputs: LayerInputs,
        cache: kv.KV | None,
    ) -> tuple[Array, kv.KV | None, Any]:
        """What one sublayer makes of the stream, before scale and gate; the cache; its report."""
        sublayer, norm = getattr(self, name), getattr(self, f"{name}_norm")
        post, report = getattr(self, f"post_{name}_norm", None), None
        tokens = context.tokens
        x = through(norm, h, tokens) if join.norm == "before" and norm is not None else h
        if getattr(sublayer, "mixes", False):
            y, cache = sublayer(x, context, cache)
        elif getattr(sublayer, "informed", False):
            y, report = sublayer(x, context, inputs)
        else:
            y = through(sublayer, x, tokens)
        y = through(norm, y, tokens) if join.norm == "output" and norm is not None else y
        return (y if post is None else through(post, y, tokens)), cache, report

    def with_slot(
        self,
        name: str,
        sublayer: nnx.Module,
        *,
        after: str | None,
        norm: nnx.Module | None = None,
        join: Join | None = None,
    ) -> "Block":
        """A new block with one more sublayer.

        Args:
          name: of the new slot.
          sublayer: what stands in it.
          after: the slot that it follows; None for the first place.
          norm, join: as those of any slot.
        Raises:
          ValueError: a name that is taken, or no such slot.
        """
        if hasattr(self, name) or after not in (None, *self.slots):
            raise ValueError(
                f"name={name!r} after={after!r}: this block has the slots {self.slots}"
            )
        new = jax.tree.map(lambda leaf: leaf, self)
        i = 0 if after is None else self.slots.index(after) + 1
        setattr(new, name, nnx.data(sublayer))
        setattr(new, f"{name}_norm", nnx.data(norm))
        new.slots = (*self.slots[:i], name, *self.slots[i:])
        new.joins = (*self.joins[:i], Join() if join is None else join, *self.joins[i:])
        return new

    def without(self, sublayer: str) -> "Block":
        """A new block without one of its sublayers; a norm after the sum stays.

        Raises:
          ValueError: no such slot, one that is removed already, or one without a residual, after
            which nothing would be left.
        """
        if sublayer not in self.slots or getattr(self, sublayer) is None:
            raise ValueError(f"sublayer={sublayer!r}: this block has no such sublayer to remove")
        join = self.joins[self.slots.index(sublayer)]
        if not join.residual:
            raise ValueError(f"sublayer={sublayer!r} has no residual: nothing would be left")
        new = jax.tree.map(lambda leaf: leaf, self)
        gone = [sublayer, f"post_{sublayer}_norm"]
        gone += [] if join.norm == "after" else [f"{sublayer}_norm"]
        for name in gone:
            if hasattr(new, name):
                setattr(new, name, nnx.data(None))
        return new


def stacked(
    added: Sequence[Float[Array, "b t d"] | None], like: Float[Array, "b t d"]
) -> Float[Array, "s b t d"]:
    """What each sublayer added, on one axis; 0 where it is removed."""
    return jnp.stack([jnp.zeros_like(like) if y is None else y for y in added])
