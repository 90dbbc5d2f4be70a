"""Rotary embeddings in `config.json`: the forms of transformers 4 and 5, as `Rope` and back."""

import dataclasses
import math
from collections.abc import Callable, Mapping

from ffnlab.formats.huggingface.fields import Fields
from ffnlab.formats.untrusted import quoted
from ffnlab.layers.attention.rope import Rope
from ffnlab.models.config import DecoderConfig

GLOBAL_THETA, LOCAL_THETA = 1e6, 1e4  # Gemma 3's defaults
ORIGINAL = "original_max_position_embeddings"
MIN_FACTOR, MAX_FACTOR = 1e-4, 1e6  # of all that scales frequencies or angles
_DEFAULTS: dict[str, object] = {"rope_theta": 1e4, "beta_fast": 32.0, "beta_slow": 1.0}


def read_rope(fields: Fields, forms: Mapping[str, str], *, partial: bool) -> Rope:
    """The rotary embedding of all layers, from `rope_scaling` or else `rope_parameters`.

    Args:
      fields: of the whole config.
      forms: what each `rope_type` that the family has stands for.
      partial: whether the family rotates a share of the channels only (`partial_rotary_factor`).
    """
    spec = dict(fields.entries("rope_scaling") or fields.entries("rope_parameters"))
    if any(isinstance(value, dict) for value in spec.values()):
        fields.wrong("rope_parameters", "one rotary embedding for all layers")
        return Rope()
    for name in ("rope_theta", "partial_rotary_factor"):
        if fields.values.get(name) is not None:
            spec.setdefault(name, fields.values[name])
    # As in transformers, the entry beside `rope_parameters` wins over the one in it.
    original = fields.get(ORIGINAL) or spec.get(ORIGINAL)
    return _rope(fields, spec | {ORIGINAL: original}, 1e4, forms, partial=partial)


def read_ropes_by_layer(fields: Fields, forms: Mapping[str, str]) -> tuple[Rope, Rope]:
    """Gemma 3's two: that of layers that see everything, and that of layers with a window."""
    both = fields.entries("rope_parameters")
    parts = fields.inner(both, {})
    full = dict(parts.entries("full_attention")) | dict(fields.entries("rope_scaling"))
    local = dict(parts.entries("sliding_attention"))
    for spec, name in ((full, "rope_theta"), (local, "rope_local_base_freq")):
        if fields.values.get(name) is not None:
            spec.setdefault("rope_theta", fields.values[name])
    ropes = [
        _rope(fields, spec, theta, forms, partial=False)
        for spec, theta in ((full, GLOBAL_THETA), (local, LOCAL_THETA))
    ]
    if not all(rope.truncate for rope in ropes):
        fields.note("truncate=false: no rotary embedding of this family has it")
    return ropes[0], ropes[1]


def _rope(
    outer: Fields,
    spec: Mapping[str, object],
    theta: float,
    forms: Mapping[str, str],
    *,
    partial: bool,
) -> Rope:
    kind = spec.get("rope_type", spec.get("type", "default"))
    fields = outer.inner(spec, _DEFAULTS | {"rope_theta": theta})
    share = fields.optional_number("partial_rotary_factor", low=0.0, high=1.0) or 1.0
    plain = Rope(theta=fields.number("rope_theta", low=1.0), fraction=share if partial else 1.0)
    if not isinstance(kind, str) or kind not in forms:
        outer.note(f"rope_type={quoted(kind)}: one of {', '.join(forms)} is accepted")
        return plain
    if kind == "default":
        return plain  # transformers rotates all channels, whatever the share, in most families
    if share != plain.fraction:
        outer.note(
            f"partial_rotary_factor={share}: this family rotates all channels with "
            f"rope_type={quoted(kind)}; 1 is accepted"
        )
    return _READERS[forms[kind]](outer, fields, plain)


def _linear(outer: Fields, fields: Fields, plain: Rope) -> Rope:
    return dataclasses.replace(plain, scaling="linear", factor=_factor(fields))


def _llama3(outer: Fields, fields: Fields, plain: Rope) -> Rope:
    low, high = _turns(fields, "low_freq_factor"), _turns(fields, "high_freq_factor")
    if low >= high:
        outer.note("low_freq_factor must be less than high_freq_factor")
    return dataclasses.replace(
        plain,
        scaling="llama3",
        factor=_factor(fields),
        original=_original(outer, fields),
        low=low,
        high=high,
    )


def _yarn(outer: Fields, fields: Fields, plain: Rope) -> Rope:
    return dataclasses.replace(
        plain,
        scaling="yarn",
        factor=_factor(fields),
        original=_original(outer, fields),
        low=_turns(fields, "beta_slow"),
        high=_turns(fields, "beta_fast"),
        attention_factor=_yarn_magnitude(fields),
        truncate=fields.get("truncate") is None or fields.flag("truncate"),
    )


def _longrope(outer: Fields, fields: Fields, plain: Rope) -> Rope:
    original = _original(outer, fields)
    implied = outer.size("max_position_embeddings") / original
    return dataclasses.replace(
        plain,
        scaling="longrope",
        factor=implied if fields.get("factor") is None else _factor(fields),
        original=original,
        attention_factor=_magnitude(fields),
        short=fields.numbers("short_factor", low=MIN_FACTOR, high=MAX_FACTOR),
        long=fields.numbers("long_factor", low=MIN_FACTOR, high=MAX_FACTOR),
    )


def _dynamic(outer: Fields, fields: Fields, plain: Rope) -> Rope:
    # transformers goes by this entry alone, whatever original_max_position_embeddings says.
    original = max(outer.size("max_position_embeddings"), 2)
    return dataclasses.replace(plain, scaling="dynamic", factor=_factor(fields), original=original)


_READERS: dict[str, Callable[[Fields, Fields, Rope], Rope]] = {
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "dynamic": _dynamic,
}
FORMS = {name: name for name in ("default", *_READERS)}
FIXED_FORMS = {name: name for name in ("default", "linear", "llama3", "yarn")}
PHI_FORMS = dict.fromkeys(("longrope", "su", "yarn"), "longrope") | {"default": "default"}


def _factor(fields: Fields) -> float:
    return fields.number("factor", low=MIN_FACTOR, high=MAX_FACTOR)


def _turns(fields: Fields, name: str) -> float:
    return fields.number(name, low=MIN_FACTOR, high=MAX_FACTOR)


def _magnitude(fields: Fields) -> float | None:
    return fields.optional_number("attention_factor", low=MIN_FACTOR, high=MAX_FACTOR)


def _original(outer: Fields, fields: Fields) -> int:
    found = fields.get(ORIGINAL) or outer.get("max_position_embeddings")
    if isinstance(found, bool) or not isinstance(found, int) or not 1 < found < 2**31:
        outer.note(f"{ORIGINAL}={quoted(found)}: a number of tokens above 1 is accepted")
        return 2
    return found


def _yarn_magnitude(fields: Fields) -> float | None:
    given = _magnitude(fields)
    one = fields.optional_number("mscale", low=-1.0, high=MAX_FACTOR)
    all_dim = fields.optional_number("mscale_all_dim", low=-1.0, high=MAX_FACTOR)
    if given is not None or not (one and all_dim):
        return given
    factor = _factor(fields)
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
        written["rope_scaling"] = _older(config, spec)
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


def _older(config: DecoderConfig, spec: Mapping[str, object]) -> dict[str, object]:
    """`rope_scaling`; that of Phi-3 has three entries where the sizes imply the rest, since
    transformers 4 takes no others."""
    rope = config.rope
    implied = rope.factor == config.max_positions / max(rope.original, 1)
    if config.family == "phi3" and implied and rope.attention_factor is None:
        lists = {name: spec[name] for name in ("short_factor", "long_factor")}
        return {"type": "longrope"} | lists
    return {k: v for k, v in spec.items() if k != "rope_theta"}


def _written(rope: Rope) -> dict[str, object]:
    spec: dict[str, object] = {"rope_type": rope.scaling or "default", "rope_theta": rope.theta}
    if rope.fraction != 1.0:
        spec["partial_rotary_factor"] = rope.fraction
    if rope.scaling is not None:
        spec["factor"] = rope.factor
    if rope.scaling in ("llama3", "yarn", "longrope"):
        spec[ORIGINAL] = rope.original
    if rope.scaling in ("llama3", "yarn"):
        names = ("low_freq_factor", "high_freq_factor")
        names = names if rope.scaling == "llama3" else ("beta_slow", "beta_fast")
        spec |= {names[0]: rope.low, names[1]: rope.high}
    if not rope.truncate:
        spec["truncate"] = False
    if rope.scaling == "longrope":
        spec |= {"short_factor": list(rope.short), "long_factor": list(rope.long)}
    if rope.attention_factor is not None:
        spec["attention_factor"] = rope.attention_factor
    return spec
