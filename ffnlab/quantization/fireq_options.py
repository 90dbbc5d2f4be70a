"""The options of FireQ, checked, and the statistics it calibrates."""

import dataclasses
from typing import Literal, NamedTuple

from jaxtyping import Array, Float, Int

from ffnlab.errors import ConfigError
from ffnlab.quantization import fireq_core as core
from ffnlab.tree import Predicate

ChannelKind = Literal["absmean", "absmax", "constant"]
Scales = Literal["e4m3", "bfloat16", "float32"]


class FireQStats(NamedTuple):
    """What calibration measured, by path of each attention layer that rotates its keys.

    Attributes:
      norms: largest norm of each pre-RoPE key channel with its RoPE partner, [kv, D] float32.
      absmax: largest absolute post-RoPE key, [kv, D] float32.
      tokens: [] int32, tokens seen, padding included.
    """

    norms: dict[str, Float[Array, "kv D"]]
    absmax: dict[str, Float[Array, "kv D"]]
    tokens: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class Options:
    """The arguments of `fireq`, whose docstring says what each is.

    Raises:
      ConfigError: an option out of range.
    """

    weights: bool
    activations: Literal["e4m3"] | None
    kv: Literal["int4", "float8"] | None
    query: Literal["e4m3"] | None
    group: int | None
    scales: Scales
    tensor_scale: bool
    channel: bool
    c_up: float
    c_down: float
    channel_kind: ChannelKind
    v_scale: float
    pre_rope: bool
    post_rope: bool
    alpha: float
    beta: float
    top_k: int
    select: Predicate

    def __post_init__(self) -> None:
        for name in ("c_up", "c_down", "v_scale", "alpha", "beta"):
            core.positive(name, getattr(self, name))
        if self.group is not None and (self.group < 2 or self.group % 2):
            raise ConfigError(f"group={self.group}; it takes an even number >= 2, or None")
        if self.top_k < 0:
            raise ConfigError(f"top_k={self.top_k}; it takes a number of channels >= 0")
        accepted = {
            "activations": (None, "e4m3"),
            "kv": (None, "int4", "float8"),
            "query": (None, "e4m3"),
            "scales": tuple(core.SCALE_DTYPES),
            "channel_kind": core.CHANNEL_KINDS,
        }
        for name, values in accepted.items():
            if getattr(self, name) not in values:
                options = ", ".join(map(repr, values))
                raise ConfigError(f"{name}={getattr(self, name)!r}; accepted: {options}")

    @property
    def calibrates(self) -> bool:
        """Whether anything has to be measured."""
        return self.pre_rope or self.post_rope
