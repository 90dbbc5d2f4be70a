"""Which of the ways of forward learning, and its numbers."""

import dataclasses
import math

from jaxtyping import Array

from ffnlab.errors import ConfigError, at_least, is_known

__all__ = ["AUTHORS", "ForwardGNNOptions"]

OBJECTIVES = ("single_forward", "label_appending", "virtual_nodes", "links")
SIGNALS = ("none", "input", "loss")
FED_BACK = {"input": ("single_forward", "links"), "loss": ("single_forward",)}


@dataclasses.dataclass(frozen=True)
class ForwardGNNOptions:
    """The objective of layers, what they are told from above, and when they end.

    Defaults are the authors' values.

    Attributes:
      objective: "single_forward", "label_appending", "virtual_nodes" or "links".
      top_down: what a layer takes from those above it: "none"; "input", it reads the next one; or
        "loss", its loss is of a mean with all of them. Without, layers learn one after the other,
        else all at once.
      temperature: of "single_forward", what similarities are divided by, > 0.
      threshold: of the goodness of "label_appending" and "virtual_nodes".
      negatives: wrong classes that these write to each node; 0 for all.
      both_ways: virtual nodes and nodes read each other, else only virtual nodes read.
      every: steps between validations.
      patience: validations in a row without a new best one after which a layer ends; 0 for none,
        every layer takes all its steps.
      limit: steps of a layer at most, or of all at once.
      alternating: of "input", layers 0, 2, … take a step before layers 1, 3, …, which read them
        anew.
    """

    objective: str = "single_forward"
    top_down: str = "none"
    temperature: float | Array = 1.0
    threshold: float | Array = 2.0
    negatives: int = 0
    both_ways: bool = True
    every: int = 2
    patience: int = 100
    limit: int = 1000
    alternating: bool = True

    def __post_init__(self) -> None:
        for name, accepted in (("objective", OBJECTIVES), ("top_down", SIGNALS)):
            if getattr(self, name) not in accepted:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not one of {list(accepted)}")
        if self.objective not in FED_BACK.get(self.top_down, OBJECTIVES):
            raise ConfigError(
                f"top_down={self.top_down!r} is of objective {list(FED_BACK[self.top_down])}, not "
                f"of {self.objective!r}"
            )
        for name in ("temperature", "threshold"):
            value = getattr(self, name)
            if is_known(value) and not is_number(value):
                raise ConfigError(f"{name}={value!r} must be a finite number")
        if is_known(self.temperature) and not self.temperature > 0:
            raise ConfigError(f"temperature={self.temperature} must be positive")
        for name in ("every", "limit", "negatives", "patience"):
            if type(getattr(self, name)) is not int:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be a whole number")
        for name in ("both_ways", "alternating"):
            if type(getattr(self, name)) is not bool:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be True or False")
        at_least(1, every=self.every, limit=self.limit)
        at_least(0, negatives=self.negatives, patience=self.patience)

    @property
    def form(self) -> str:
        """The form of network that learns so (`ffnlab.models.GraphNetworkConfig`)."""
        return "top_down" if self.top_down == "input" else "layerwise"

    @property
    def has_virtual(self) -> bool:
        """Whether a graph has a virtual node for each class."""
        return self.objective in ("single_forward", "virtual_nodes")


def is_number(value: object) -> bool:
    """Whether it is one finite number."""
    try:
        return math.isfinite(value)  # type: ignore[arg-type]
    except TypeError:
        return False


AUTHORS = ForwardGNNOptions()
