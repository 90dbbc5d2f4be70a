"""What a hypernetwork is, by the five criteria of a review (arXiv 2306.06955), and which fit.

| criterion | values |
|---|---|
| inputs | "task": an embedding of its number; "data": features; "noise"; several side by side |
| outputs | "once", "multi_head", "component_wise", "chunk_wise": in how many pieces weights come |
| input variability | "static": known beforehand; "dynamic": of every example its own |
| output variability | "static": all of the target; "dynamic": channels of it may be absent |
| architecture | "mlp", "cnn", "rnn", "attention", "linear": what turns inputs into pieces |

What the review leaves open is decided here: static inputs are numbers of tasks, as data and noise
are never known beforehand; "cnn", "rnn" and "attention" run over the pieces, so that there must be
several from one call each; a dynamic output is a mask over the channels of the largest target.
"""

import dataclasses

from ffnlab.errors import ConfigError
from ffnlab.layers.activations import check_activation
from ffnlab.layers.recurrent import CELLS
from ffnlab.layers.sliding import is_size

__all__ = [
    "ARCHITECTURES",
    "INPUTS",
    "OUTPUTS",
    "VARIABILITIES",
    "HypernetSpec",
    "why_invalid",
]

INPUTS = ("task", "data", "noise")
OUTPUTS = ("once", "multi_head", "component_wise", "chunk_wise")
VARIABILITIES = ("static", "dynamic")
ARCHITECTURES = ("mlp", "cnn", "rnn", "attention", "linear")
OVER_PIECES = ("cnn", "rnn", "attention")
IN_PIECES = ("component_wise", "chunk_wise")
COMPONENTS = ("layer", "channel")
INITS = ("hyperfan", "target", "uniform")


def why_invalid(
    inputs: tuple[str, ...],
    outputs: str,
    input_variability: str,
    output_variability: str,
    architecture: str,
) -> str | None:
    """Why a hypernetwork cannot be of five kinds at once, or None where it can.

    >>> why_invalid(("task",), "chunk_wise", "static", "static", "rnn")
    >>> why_invalid(("data",), "once", "static", "static", "mlp")
    "input_variability='static' takes tasks alone: data is not known beforehand"
    """
    unknown = [name for name in inputs if name != "task"]
    if input_variability == "static" and unknown:
        return f"input_variability='static' takes tasks alone: {unknown[0]} is not known beforehand"
    if architecture in OVER_PIECES and outputs not in IN_PIECES:
        return (
            f"architecture={architecture!r} runs over pieces, of which outputs={outputs!r} has one "
            f"from a call; {' or '.join(map(repr, IN_PIECES))} have several"
        )
    if inputs:
        return None
    if "dynamic" in (input_variability, output_variability):
        return "inputs=() changes nothing: both variabilities must be 'static'"
    if outputs not in IN_PIECES and (outputs, architecture) != ("once", "linear"):
        return (
            "inputs=() in one piece is the target's own weights: outputs='once' with "
            "architecture='linear'"
        )
    return None


@dataclasses.dataclass(frozen=True)
class HypernetSpec:
    """The kinds and sizes of a hypernetwork.

    Attributes:
      inputs: some of "task", "data" and "noise"; () where weights depend on nothing, which with
        outputs="once" and architecture="linear" is an ordinary network.
      outputs: "once", all weights from one call; "multi_head", from heads on a shared trunk;
        "component_wise", a call for each layer or channel, as long as the longest and cut;
        "chunk_wise", a call for each `chunk` weights.
      input_variability: "static" or "dynamic".
      output_variability: "static", or "dynamic": a channel is absent where a map of the inputs is
        not positive, by a straight-through gradient.
      architecture: "mlp", "cnn" (3 taps over the pieces), "rnn", "attention" or "linear".
      tasks: how many.
      embedding: numbers that stand for a task, and for a piece.
      data, noise: numbers in those inputs.
      hidden: widths of the trunk; a layer of the cell, or a block, for each in "rnn" and
        "attention", where all are equal.
      activation: of "mlp", "cnn" and "attention", a key of `layers.ACTIVATIONS`.
      heads: of "multi_head", and of "attention"; they divide the last width.
      chunk: weights of a chunk.
      component: "layer", the arrays of a module, or "channel", one entry of their last axes.
      cell: of "rnn", a key of `layers.recurrent.CELLS`.
      shared: pieces have an embedding each beside that of the task; else each pair of a task and a
        piece has one.
      optional: paths in the target of what may be absent (`ffnlab.tree.at`).
      init: how the last map is drawn: "hyperfan", so that generated matrices [in, out] have
        variance 2 / in (of pieces, their mean), "target", so that every generated array has the
        variance of the target's own, or "uniform", as torch draws all maps. What is constant in
        the target (biases, scales of norms) begins as that constant.
    """

    inputs: tuple[str, ...] = ("task",)
    outputs: str = "once"
    input_variability: str = "static"
    output_variability: str = "static"
    architecture: str = "mlp"
    tasks: int = 1
    embedding: int = 8
    data: int = 0
    noise: int = 0
    hidden: tuple[int, ...] = (64,)
    activation: str = "relu"
    heads: int = 2
    chunk: int = 128
    component: str = "layer"
    cell: str = "lstm"
    shared: bool = True
    optional: str = "**"
    init: str = "hyperfan"

    def __post_init__(self) -> None:
        for name, accepted in (
            ("outputs", OUTPUTS),
            ("input_variability", VARIABILITIES),
            ("output_variability", VARIABILITIES),
            ("architecture", ARCHITECTURES),
            ("component", COMPONENTS),
            ("cell", tuple(CELLS)),
            ("init", INITS),
        ):
            if getattr(self, name) not in accepted:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not one of {accepted}")
        names = self.inputs if isinstance(self.inputs, tuple) else (None,)
        if len(set(names)) != len(names) or not set(names) <= {*INPUTS}:
            raise ConfigError(
                f"inputs={self.inputs!r} must be a tuple of some of {INPUTS}, each once"
            )
        check_activation(self.activation)
        self.check_sizes()
        criteria = (self.input_variability, self.output_variability, self.architecture)
        if said := why_invalid(self.inputs, self.outputs, *criteria):
            raise ConfigError(said)
        self.check_inputs()
        self.check_widths()

    def check_sizes(self) -> None:
        """Raises ConfigError for a number that counts nothing."""
        sizes = {"tasks": 1, "embedding": 1, "heads": 1, "chunk": 1, "data": 0, "noise": 0}
        for name, least in sizes.items():
            value = getattr(self, name)
            if not is_size(value, least):
                raise ConfigError(f"{name}={value!r} must be a whole number of at least {least}")
        if not isinstance(self.hidden, tuple) or not all(is_size(w, 1) for w in self.hidden):
            raise ConfigError(f"hidden={self.hidden!r} must be a tuple of positive whole numbers")

    def check_inputs(self) -> None:
        """Raises ConfigError for sizes of inputs that are not there, or the other way round."""
        for name in ("data", "noise"):
            if (name in self.inputs) != (getattr(self, name) > 0):
                raise ConfigError(
                    f"{name}={getattr(self, name)} and inputs={self.inputs}: numbers of an input "
                    "must be at least 1 where it is there, 0 where it is not"
                )
        if self.tasks > 1 and "task" not in self.inputs:
            raise ConfigError(f"tasks={self.tasks} are told apart by inputs with 'task' in them")
        if not self.shared and (self.inputs != ("task",) or not self.in_pieces):
            raise ConfigError(
                "shared=False has an embedding for each task and piece: inputs must be ('task',), "
                f"outputs one of {IN_PIECES}"
            )

    def check_widths(self) -> None:
        """Raises ConfigError for widths that the architecture cannot have."""
        hidden, heads = self.hidden, self.heads
        if self.architecture != "linear" and not hidden:
            raise ConfigError(f"hidden={hidden} must be one or more widths")
        if self.architecture in ("rnn", "attention") and len(set(hidden)) != 1:
            raise ConfigError(f"hidden={hidden}: widths of {self.architecture!r} must be equal")
        is_split = (self.outputs, self.architecture) == ("multi_head", "mlp")
        if (is_split or self.architecture == "attention") and hidden[-1] % heads:
            raise ConfigError(f"heads={heads} must divide the last of hidden={hidden}")

    @property
    def in_pieces(self) -> bool:
        """Whether the weights come in pieces, from a call each."""
        return self.outputs in IN_PIECES

    @property
    def condition(self) -> int:
        """Numbers that the inputs are, side by side."""
        return self.embedding * ("task" in self.inputs) + self.data + self.noise

    @property
    def width(self) -> int:
        """Numbers that one call reads: the inputs, and the piece where there are several."""
        return self.condition + self.embedding * (self.in_pieces and self.shared)
