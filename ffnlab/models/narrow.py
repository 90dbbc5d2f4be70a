"""Physical removal of channels from a model, by its groups (`ffnlab.models.groups`)."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from ffnlab import tree
from ffnlab.errors import ConfigError
from ffnlab.layers import Attention, AttentionSpec, Conv, Residual, RMSNorm
from ffnlab.layers.feed_forward.ffn import is_plain
from ffnlab.layers.residual import usual_sources
from ffnlab.models.config import DecoderConfig
from ffnlab.models.encoder_config import EncoderConfig
from ffnlab.models.groups import (
    COLUMNS,
    ROWS,
    Group,
    check_names,
    groups,
    is_attention,
    is_depthwise,
    is_sparse,
    owner_of,
)
from ffnlab.models.resnet import ResNet, sizes_of
from ffnlab.models.stack import Stacked, period_of, stack, unstack
from ffnlab.models.vit_config import ViTConfig
from ffnlab.weights import Weight

__all__ = ["narrow"]

M = TypeVar("M")
Units = Sequence[int] | Bool[np.ndarray, "_"] | Int[np.ndarray, "_"]
Cuts = dict[str, dict[int, np.ndarray]]  # path, axis -> entries that go


def narrow(model: M, keep: Mapping[str, Units] | Iterable[tuple[str, Units]]) -> M:
    """The model without the other units of some of its groups.

    It computes what the model does in which those units give nothing (`ffnlab.models.masked`), up
    to the order of sums. Weights keep their format and are not rounded again. An RMSNorm that reads
    a narrower stream has its scale and eps adapted, for it counts channels.

    A stacked model stays stacked where its layers repeat as they did, else it comes back unstacked.
    The configuration says the new sizes where it has words for them: a Decoder's always for hidden
    channels and the stream, and for heads where layers have as many; an Encoder's and a ViT's where
    layers have as many hidden channels, an Encoder's heads; a ResNet's but where a shortcut without
    parameters has a map of channels of its own. What it cannot say, the model itself does, in the
    native format.

    Args:
      model: see `ffnlab.models.groups`; it is not changed.
      keep: name of a group -> the units that stay, by number or as one boolean for each; groups
        that are not named stay whole.
    Raises:
      ConfigError: a group that is not there or is named twice, units that are not, or twice, no
        unit at all, or a weight in a format that has no such part; all before any compute.

    >>> from ffnlab.layers import MLP
    >>> narrow(MLP((4, 3, 2), key=jax.random.key(0)), {"maps[0]": [0, 2]}).sizes
    [4, 2, 2]
    """
    known = {group.name: group for group in groups(model)}
    pairs = list(keep.items()) if isinstance(keep, Mapping) else list(keep)
    kept = _checked(pairs, known)
    if not kept:
        return tree.copy(model)
    # One program, whose tracing refuses what cannot be sliced before anything is computed.
    new = jax.jit(lambda model: _narrowed(model, known, kept))(model)
    if not isinstance(getattr(model, "layers", None), Stacked):
        return new
    again = stack(new)
    return again if len(period_of(again.layers)) == len(period_of(model.layers)) else new


def _checked(
    pairs: Sequence[tuple[str, Units]], known: Mapping[str, Group]
) -> dict[str, Int[np.ndarray, "_"]]:
    """The units that stay, ascending; without groups of which all do."""
    kept = {}
    check_names(dict(pairs), known)
    for name, units in pairs:
        if name in kept:
            raise ConfigError(f"keep names {name!r} twice; once is accepted")
        kept[name] = _numbers(name, units, known[name].size)
    return {name: numbers for name, numbers in kept.items() if len(numbers) < known[name].size}


def _numbers(name: str, units: Units, size: int) -> Int[np.ndarray, "_"]:
    given = np.asarray(units)
    if given.dtype == bool:
        if given.shape != (size,):
            raise ConfigError(
                f"keep[{name!r}] is a mask of {given.shape}; {size} booleans are accepted"
            )
        given = np.flatnonzero(given)
    if given.ndim != 1 or not given.size:
        raise ConfigError(f"keep[{name!r}]={given.tolist()}: at least one unit of {size} stays")
    if not np.issubdtype(given.dtype, np.integer) or given.min() < 0 or given.max() >= size:
        raise ConfigError(
            f"keep[{name!r}]={given.tolist()}: numbers from 0 to {size - 1} are accepted"
        )
    if len(np.unique(given)) != len(given):
        raise ConfigError(f"keep[{name!r}]={given.tolist()} names a unit twice")
    return np.sort(given)


def _narrowed(model: M, known: Mapping[str, Group], kept: Mapping[str, np.ndarray]) -> M:
    is_stacked = isinstance(getattr(model, "layers", None), Stacked)
    new = unstack(model) if is_stacked else tree.copy(model)
    nodes = dict(tree.walk(new))
    for path, by_axis in _cuts(known, kept).items():
        if isinstance(nodes[path], Residual):
            sources = _reconnected(path, known, kept)
            if sources != nodes[path].sources:
                nodes[path].sources = sources
            continue
        owner, attribute = owner_of(nodes, path)
        variable = getattr(owner, attribute)
        shape = variable.get_value().shape
        left = {axis: _rest(shape[axis], gone) for axis, gone in by_axis.items()}
        if isinstance(owner, RMSNorm):
            _adapt(owner, shape[COLUMNS], len(left[COLUMNS]))
        if isinstance(owner, Conv) and is_depthwise(owner) and attribute == "w":
            owner.groups = len(left[COLUMNS])
        value = _sliced(path, getattr(owner, attribute).get_value(), left)
        setattr(owner, attribute, variable.replace(value))
    for name, numbers in kept.items():
        if isinstance(nodes[name], Attention):
            nodes[name].spec = _fewer_heads(nodes[name].spec, len(numbers))
    if hasattr(new, "config"):
        new.config = _told(new)
    return new


def _cuts(known: Mapping[str, Group], kept: Mapping[str, np.ndarray]) -> Cuts:
    """The entries that go, by parameter and axis."""
    cuts: Cuts = defaultdict(dict)
    for name, numbers in kept.items():
        gone = _rest(known[name].size, numbers)
        for part in known[name].parts:
            cuts[part.path][part.axis] = part.index[gone].reshape(-1)
    return cuts


def _rest(size: int, gone: np.ndarray) -> np.ndarray:
    """The numbers below size that are not among some, ascending."""
    return np.setdiff1d(np.arange(size), gone)


def _sliced(path: str, value: Any, left: Mapping[int, np.ndarray]) -> Any:
    """A parameter of which some entries are left."""
    if isinstance(value, Weight):
        try:
            return value.take(left.get(ROWS), left.get(COLUMNS))
        except ValueError as error:
            raise ConfigError(f"keep: {path}: {error}") from None
    for axis, numbers in left.items():
        value = jnp.take(value, numbers, axis=axis)
    return value


def _adapt(norm: RMSNorm, before: int, after: int) -> None:
    """A norm of fewer channels that gives what it gave when the others were zero.

    With s the sum of squares, rsqrt(s / d + eps) = sqrt(d / e) rsqrt(s / e + eps d / e) for e of d
    channels; that root goes into the scale.
    """
    scale, ratio = norm.scale.get_value(), before / after
    gain = (norm.offset + scale.astype(jnp.float32)) * ratio**0.5
    norm.scale = norm.scale.replace((gain - norm.offset).astype(scale.dtype))
    norm.eps = norm.eps * ratio


def _fewer_heads(spec: AttentionSpec, kv_heads: int) -> AttentionSpec:
    heads = spec.heads // spec.kv_heads * kv_heads
    return dataclasses.replace(spec, heads=heads, kv_heads=kv_heads)


def _reconnected(
    path: str, known: Mapping[str, Group], kept: Mapping[str, np.ndarray]
) -> tuple[int, ...] | None:
    """Which channel of its input a shortcut without parameters adds to each of the sum's; None for
    the usual ones."""
    ends = {}
    for group in known.values():
        for part in group.parts:
            if part.path == path:
                ends[part.axis] = part.index[kept.get(group.name, np.arange(group.size)), 0]
    places, own = ends[ROWS], ends[COLUMNS]
    source_of = {int(place): source for source, place in enumerate(places)}
    found = tuple(source_of.get(int(place), -1) for place in own)
    return None if found == usual_sources(len(places), len(own)) else found


def _told(model: Any) -> Any:
    """The configuration with the sizes that the model has now, as far as it has words for them."""
    config = model.config
    if isinstance(model, ResNet):
        sizes = sizes_of(model)
        return config if sizes is None else dataclasses.replace(config, sizes=sizes)
    if not isinstance(config, DecoderConfig | EncoderConfig | ViTConfig):
        return config
    ffns = [getattr(block, "ffn", None) for block in model.layers]
    sizes = [ffn.down.weight.shape[0] if is_plain(ffn) or is_sparse(ffn) else None for ffn in ffns]
    found = {size for size in sizes if size is not None}
    specs = {b.attn.spec for b in model.layers if is_attention(getattr(b, "attn", None))}
    heads = {(spec.heads, spec.kv_heads) for spec in specs}
    new: dict[str, Any] = {}
    if isinstance(config, DecoderConfig):
        new |= {"width": model.embed.weight.shape[1], "eps": model.norm.eps}
        if found:  # a layer without such an FFN says nothing
            most = max(found)
            each = tuple(most if size is None else size for size in sizes)
            new |= {"hidden": most, "hiddens": each}
    elif len(found) == 1 and len(getattr(config, "depths", "1")) == 1:
        new["hidden"] = found.pop()
    if len(heads) == 1 and not isinstance(config, ViTConfig):  # there heads divide the width
        names = ("heads", "kv_heads") if isinstance(config, DecoderConfig) else ("heads",)
        new |= dict(zip(names, heads.pop(), strict=False))
    return dataclasses.replace(config, **new)
