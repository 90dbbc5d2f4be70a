"""`[data]` of runs on graphs: whole ones, summaries of their nodes, graphs of networks."""

import dataclasses
from typing import ClassVar

from ffnlab.errors import ConfigError, at_least, check_seed
from ffnlab.graphs import RpHGNNOptions

__all__ = ["BlockModelConfig", "GraphConfig", "HeteroConfig", "NetworksConfig"]

HETERO = ("academic", "cora_words")


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


@dataclasses.dataclass(frozen=True)
class HeteroConfig:
    """A graph of several kinds of nodes, summarized once before learning: rows of its target.

    The classes of some of the target's nodes are learned in batches, others are held out, a third
    part is for testing; the data says which.

    Attributes:
      graph: "academic" (drawn) or "cora_words" (papers and words of Cora, of FFNLAB_DATA).
      rounds: in which kinds hear each other (`ffnlab.graphs.precomputed`); groups of the model have
        as many repetitions.
      width: of the rows of kinds without features.
      squash: how a kind makes one row of what it heard.
      with_input: groups of even echoes begin with the target's own rows, and are one longer.
      labels: groups of the classes around a node come last, one repetition each.
      batch: nodes of a batch.
      draw: seed of the graph, of rows and of projections.
    """

    graph: str = "academic"
    rounds: int = 3
    width: int = 32
    squash: str = "project_norm_sum"
    with_input: bool = False
    labels: bool = False
    batch: int = 128
    draw: int = 0

    def __post_init__(self) -> None:
        at_least(1, rounds=self.rounds, width=self.width, batch=self.batch)
        check_seed(self.draw)
        if self.graph not in HETERO:
            raise ConfigError(f"graph={self.graph!r} is not one of {list(HETERO)}")
        RpHGNNOptions(squash=self.squash)


@dataclasses.dataclass(frozen=True)
class NetworksConfig:
    """Trained networks that a metanetwork learns to correct, and what they were trained on.

    Attributes:
      networks: directories of models with classes, of one layout (`ffnlab.pruning.meta`); a step
        is on one of them, in turns.
      held_out: directories of models to score on; those learned from where there are none.
      labelled: what they were trained on: "digits", "mnist" or a folder of images, or a
        safetensors file of records.
      batch: least rows of a batch of their loss, which is summed over as many equal ones as there
        are.
      reg: weight of the penalty beside that sum; the authors' 10 is for about 100 batches.
      alpha: by how much more the least channel of a group is penalized than the largest.
    """

    networks: tuple[str, ...]
    held_out: tuple[str, ...] = ()
    labelled: str = "digits"
    batch: int = 1024
    reg: float = 0.003
    alpha: float = 16.0

    def __post_init__(self) -> None:
        at_least(1, batch=self.batch)
        if not self.networks or not self.reg >= 0 or not self.alpha >= 1:
            raise ConfigError(
                f"networks={list(self.networks)}, reg={self.reg}, alpha={self.alpha}: a directory "
                "or more, 0 or more and 1 or more are accepted"
            )
