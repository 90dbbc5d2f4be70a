"""`[data]` of runs that see a whole graph at every step."""

import dataclasses
from typing import ClassVar

from ffnlab.errors import ConfigError, at_least

__all__ = ["BlockModelConfig", "GraphConfig"]


@dataclasses.dataclass(frozen=True)
class GraphConfig:
    """A graph whose nodes have features and classes; a step sees all of it.

    The classes of some nodes are learned from, others are held out to score on during the run, and
    a third part is for testing; the data says which.

    Attributes:
      graph: "cora" (that of FFNLAB_DATA), or an npz file like it (`ffnlab.data.cora`); kind
        "block_model" draws one.
    """

    graph: str = "cora"
    batch: ClassVar[int] = 1


@dataclasses.dataclass(frozen=True)
class BlockModelConfig:
    """A graph drawn at random: classes join their own more often than others; a step sees all.

    The nodes that are neither for training nor held out are for testing.

    Attributes:
      nodes, classes: how many.
      inside, across: probabilities of an edge between nodes of the same class, and of two.
      width: of the features.
      noise: standard deviation of a feature around the centre of its class.
      train, held_out: nodes to learn from, and to score on during the run.
      seed: of the draw.
    """

    nodes: int = 600
    classes: int = 4
    inside: float = 0.05
    across: float = 0.005
    width: int = 16
    noise: float = 2.0
    train: int = 80
    held_out: int = 120
    seed: int = 0
    batch: ClassVar[int] = 1

    def __post_init__(self) -> None:
        at_least(1, nodes=self.nodes, classes=self.classes, width=self.width)
        at_least(1, train=self.train, held_out=self.held_out)
        if self.train + self.held_out > self.nodes:
            raise ConfigError(
                f"train={self.train} and held_out={self.held_out} are more than nodes={self.nodes}"
            )
