"""Rotary embeddings in `config.json`: the forms of transformers 4 and 5, as `Rope` and back."""

import dataclasses
import functools
import math
from collections.abc import Mapping

from ffnlab.layers.rope import Rope
from ffnlab.models.config import DecoderConfig
from ffnlab.models.fields import Fields
from ffnlab.models.untrusted import quoted

GLOBAL_THETA, LOCAL_THETA = 1e6, 1e4  # Gemma 3's defaults
_DEFAULTS: dict[str, object] = {"rope_theta": 1e4, "beta_fast": 32.0, "beta_slow": 1.0}


def read_rope(fields: Fields) -> Rope:
    """The rotary embedding of all layers, from `rope_parameters` or `rope_scaling`."""
    spec = dict(fields.entries("rope_parameters")) | dict(fields.entries("rope_scaling"))
    if any(isinstance(value, dict) for value in spec.values()):
        fields.wrong("rope_parameters", "one rotary embedding for all layers")
        return Rope()
    for name in ("rope_theta", "partial_rotary_factor"):
        if fields.values.get(name) is not None:
            spec.setdefault(name, fields.values[name])
    return _rope(fields, spec, 1e4)


def read_ropes_by_layer(fields: Fields) -> tuple[Rope, Rope]:
    """Gemma 3's two: that of layers that see everything, and that of layers with a window."""
    both = fields.entries("rope_parameters")
    parts = fields.inner(both, {})
    full = dict(parts.entries("full_attention")) | dict(fields.entries("rope_scaling"))
    local = dict(parts.entries("sliding_attention"))
    for spec, name in ((full, "rope_theta"), (local, "rope_local_base_freq")):
        if fields.values.get(name) is not None:
            spec.setdefault("rope_theta", fields.values[name])
    return _rope(fields, full, GLOBAL_THETA), _rope(fields, local, LOCAL_THETA)


def _rope(outer: Fields, spec: Mapping[str, object], theta: float) -> Rope:
    kind = spec.get("rope_type", spec.get("type", "default"))
    original = spec.get("original_max_position_embeddings") or outer.get("max_position_embeddings")
    fields = outer.inner(spec, _DEFAULTS | {"rope_theta": theta})
    plain = Rope(
        theta=fields.number("rope_theta"),
        fraction=fields.optional_number("partial_rotary_factor", high=1.0) or 1.0,
    )
    if kind == "default":
        return plain
    if kind not in ("linear", "llama3", "yarn"):
        outer.note(f"rope_type={quoted(kind)}: one of default, linear, llama3, yarn is accepted")
        return plain
    scaled = functools.partial(
        dataclasses.replace, plain, scaling=kind, factor=fields.number("factor", high=1e6)
    )
    if kind == "linear":
        return scaled()
    if isinstance(original, bool) or not isinstance(original, int) or not 0 < original < 2**31:
        outer.note(
            f"original_max_position_embeddings={quoted(original)}: a number of tokens is accepted"
        )
        original = 1
    if kind == "llama3":
        low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
        if low >= high:
            outer.note("low_freq_factor must be less than high_freq_factor")
        return scaled(original=original, low=low, high=high)
    if fields.get("truncate") not in (None, True):
        fields.wrong("truncate", "true")
    low, high = fields.number("beta_slow"), fields.number("beta_fast")
    magnitude = _yarn_magnitude(fields)
    return scaled(original=original, low=low, high=high, attention_factor=magnitude)


def _yarn_magnitude(fields: Fields) -> float | None:
    given = fields.optional_number("attention_factor")
    one = fields.optional_number("mscale", low=-1.0)
    all_dim = fields.optional_number("mscale_all_dim", low=-1.0)
    if given is not None or not (one and all_dim):
        return given
    factor = fields.number("factor", high=1e6)
    scale = lambda m: 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0  # noqa: E731
    return scale(one) / scale(all_dim)


def write_rope(config: DecoderConfig, *, by_layer: bool) -> dict[str, object]:
    """The entries that say a config's rotary embeddings, in the forms of transformers 4 and 5.

    Args:
      by_layer: whether layers with a window have their own (Gemma 3).
    """
    spec = _written(config.rope)
    written: dict[str, object] = {"rope_theta": config.rope.theta, "rope_parameters": spec}
    if config.rope.scaling is not None:
        written["rope_scaling"] = {k: v for k, v in spec.items() if k != "rope_theta"}
    if config.rope.fraction != 1.0:
        written["partial_rotary_factor"] = config.rope.fraction
    if by_layer:
        local = config.local_rope or config.rope
        written["rope_local_base_freq"] = local.theta
        written["rope_parameters"] = {
            "full_attention": spec,
            "sliding_attention": _written(local),
        }
    return written


def _written(rope: Rope) -> dict[str, object]:
    spec: dict[str, object] = {"rope_type": rope.scaling or "default", "rope_theta": rope.theta}
    if rope.fraction != 1.0:
        spec["partial_rotary_factor"] = rope.fraction
    if rope.scaling is not None:
        spec["factor"] = rope.factor
    if rope.scaling in ("llama3", "yarn"):
        spec["original_max_position_embeddings"] = rope.original
        names = ("low_freq_factor", "high_freq_factor")
        names = names if rope.scaling == "llama3" else ("beta_slow", "beta_fast")
        spec |= {names[0]: rope.low, names[1]: rope.high}
    if rope.attention_factor is not None:
        spec["attention_factor"] = rope.attention_factor
    return spec
