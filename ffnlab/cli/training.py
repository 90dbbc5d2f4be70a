"""What a training run is: its TOML tables, and the rule, model and batches that they make."""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from ffnlab import parallel
from ffnlab.data import Packed
from ffnlab.errors import ConfigError, at_least, check_seed
from ffnlab.learning import (
    OPTIMIZERS,
    Extension,
    OptimizerConfig,
    computed_in,
    make_optimizer,
    next_token,
    packed_next_token,
)
from ffnlab.models import Decoder, DecoderConfig, remat, stack
from ffnlab.models.account import flops_per_token
from ffnlab.outside import Methods
from ffnlab.parallel import LoopOptions, Work
from ffnlab.rule import Rule

__all__ = [
    "RULES",
    "DataConfig",
    "Extended",
    "RunConfig",
    "TrainConfig",
    "abstract_batch",
    "check_mesh",
    "find_methods",
    "fresh",
    "rule_of",
    "window",
]

# What a training file may name as its rule; a rule from outside is one too (`ffnlab.outside`).
RULES = Methods(
    "rule",
    "ffnlab.rules",
    Rule,
    MappingProxyType({"backprop": "ffnlab.learning.backprop:backprop"}),
    given=frozenset({"loss", "optimizer", "microbatches"}),
)
WATCHED = "held_out_bits"  # what evaluations of a run are called, and early stopping looks at


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The text and how it is cut.

    Attributes:
      text: "stdlib" (the running interpreter's standard library), "stdlib-validation" (its training
        part alone, of which one module in 60 is scored: to choose settings on), or files.
      held_out: files to score on; only with files to train on, whose last tenth serves without.
      batch: rows of a batch.
      length: predictions in a row.
      stride: of the held-out windows.
      tokenizer: folder with a tokenizer.json; "" takes bytes as tokens.
      packed: rows keep documents apart: none is attended to, or predicted from, another.
    """

    text: str | tuple[str, ...] = "stdlib"
    held_out: tuple[str, ...] = ()
    batch: int = 8
    length: int = 256
    stride: int = 128
    tokenizer: str = ""
    packed: bool = False

    def __post_init__(self) -> None:
        at_least(1, batch=self.batch, length=self.length, stride=self.stride)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """How long, how often, and from which seed.

    Attributes:
      steps: batches in all.
      seed: of the weights, and of the order of the text.
      log_every: steps between rows of metrics.
      evaluate_every: steps between measurements on the held-out text; 0 for the end alone.
      checkpoint_every: steps between checkpoints; 0 for the end alone.
      dtype: of the saved parameters, "float32" or "bfloat16".
      mesh: of devices, "dp=2,fsdp=2,tp=2" (`ffnlab.parallel.parse_mesh`); "" for one device.
      scan: stack the layers and scan over them, so that compiling does not grow with depth.
      remat: what layers keep for the backward pass (`ffnlab.models.remat`); "" for everything.
      microbatches: parts of a batch that are computed one after the other, for less memory.
      compute: dtype that parameters are rounded to for a step, "float32" or "bfloat16"; the trained
        ones are float32.
      on_bad: a step that is not finite ends the run ("stop") or is left out ("skip").
      patience: evaluations in a row without a new lowest figure after which the run stops; 0 for
        never.
    """

    steps: int
    seed: int = 0
    log_every: int = 20
    evaluate_every: int = 0
    checkpoint_every: int = 200
    dtype: str = "bfloat16"
    mesh: str = ""
    scan: bool = False
    remat: str = ""
    microbatches: int = 1
    compute: str = "float32"
    on_bad: str = "stop"
    patience: int = 0

    def __post_init__(self) -> None:
        at_least(1, steps=self.steps, microbatches=self.microbatches)
        check_seed(self.seed)
        for name in ("dtype", "compute"):
            if getattr(self, name) not in ("float32", "bfloat16"):
                found = getattr(self, name)
                raise ConfigError(f"{name}={found!r} is not one of 'float32', 'bfloat16'")
        self.loop()

    def loop(self, **more: bool | int) -> LoopOptions:
        """The loop's options, of which some come from the command line."""
        return LoopOptions(
            self.log_every,
            self.evaluate_every,
            self.checkpoint_every,
            on_bad=self.on_bad,
            watch=WATCHED,
            patience=self.patience,
            **more,
        )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A whole training run; a TOML file has one table per part.

    Attributes:
      model: sizes of the Decoder.
      run: steps, seed, intervals.
      data: text and batches.
      optimizer: for rules that take one.
      extension: steps after those of `run`, with longer rows; scoring then uses their length.
      rule: the learning rule: "backprop", a name that a package registers, or "module:factory".
      rule_options: of the rule, by the names of its factory's parameters.
    """

    model: DecoderConfig
    run: RunConfig
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    extension: Extension = Extension()
    rule: str = "backprop"
    rule_options: Mapping[str, object] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        RULES.check(self.rule)


def rule_of(settings: TrainConfig) -> Rule:
    """The rule of a run: the only place where a name becomes one.

    Its factory is given what the run decides, where it has a parameter of that name: `loss`
    ((model, batch) -> (mean, metrics)), `optimizer` (an optax transformation) and `microbatches`.
    The rest are options.

    Raises:
      ConfigError: the rule cannot be had, takes other options, or has no use for what is set.
    """
    run, name = settings.run, settings.rule
    options = RULES.read(name, settings.rule_options, "[rule_options]")
    takes = RULES.takes(name)
    for parameter, what, is_set in (
        ("optimizer", "[optimizer]", settings.optimizer != OptimizerConfig()),
        ("loss", f"compute={run.compute!r}", run.compute != "float32"),
        ("microbatches", f"microbatches={run.microbatches}", run.microbatches != 1),
    ):
        if is_set and parameter not in takes:
            raise ConfigError(f"{what} is set, but rule {name!r} takes no {parameter}")
    if "optimizer" in takes:
        key = jax.random.key(run.seed)
        made = make_optimizer(settings.optimizer, run.steps, settings.extension, key=key)
        options["optimizer"] = made
    if "loss" in takes:
        loss = packed_next_token if settings.data.packed else next_token
        is_rounded = run.compute != "float32"
        options["loss"] = computed_in(run.compute, loss) if is_rounded else loss
    if "microbatches" in takes:
        options["microbatches"] = run.microbatches
    return RULES.make(name, **options)


def find_methods(settings: TrainConfig) -> None:
    """Imports what a run names and makes nothing; ConfigError where that is not to be had."""
    RULES.factory(settings.rule)
    OPTIMIZERS.factory(settings.optimizer.name)


def fresh(settings: TrainConfig, key: Array) -> Decoder:
    """The model that a run starts from."""
    model = Decoder(settings.model, key=key)
    model = stack(model) if settings.run.scan else model
    return remat(model, settings.run.remat or None)


@dataclasses.dataclass(frozen=True)
class Extended:
    """Batches by position: of one source for some steps, then of another from its start.

    Attributes:
      first, then: the sources.
      steps: positions of the first.
    """

    first: Callable[[int], PyTree]
    then: Callable[[int], PyTree]
    steps: int

    def __call__(self, position: int) -> PyTree:
        """The batch of a position."""
        source, start = (self.first, 0) if position < self.steps else (self.then, self.steps)
        return source(position - start)

    def part(self, index: int, count: int) -> "Extended":
        """See `ffnlab.parallel.Parted`; both sources are such."""
        first, then = self.first.part(index, count), self.then.part(index, count)
        return Extended(first, then, self.steps)


def abstract_batch(settings: TrainConfig, mesh: Mesh, rows: int, length: int) -> PyTree:
    """A batch of a run as `ffnlab.parallel.place_batch` places it, without its values.

    Args:
      rows, length: of the batch; a row has length + 1 tokens.
    Raises:
      ConfigError: the rows do not divide.
    """
    tokens = jax.ShapeDtypeStruct((rows, length + 1), np.int32)
    batch = Packed(tokens, tokens, tokens) if settings.data.packed else tokens
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        batch,
        parallel.batch_shardings(batch, mesh),
    )


def check_mesh(settings: TrainConfig, rule: Rule, state: PyTree, mesh: Mesh) -> None:
    """Traces the steps of a run on its mesh, those of the extension too; nothing is computed.

    Args:
      rule: of the run.
      state: its state, abstract and placed.
    Raises:
      ConfigError: as `ffnlab.parallel.MeshStep.trace`.
    """
    step = parallel.make_step(rule, mesh)
    more = [settings.extension] if settings.extension.steps else []
    for part in (settings.data, *more):
        step.trace(state, abstract_batch(settings, mesh, part.batch, part.length))


def window(settings: TrainConfig) -> tuple[int, int]:
    """Length and stride of the held-out windows: the longest rows trained on."""
    data, more = settings.data, settings.extension
    return (more.length, more.length // 2) if more.steps else (data.length, data.stride)


def work_of(settings: TrainConfig, model: Decoder) -> Work:
    """What a step does: tokens predicted, and the operations of a forward and a backward pass.

    The backward pass counts twice the forward one; what is computed again (remat) does not count.
    Attention counts half of the longest row, which a token attends to on average.
    """
    data, more, steps = settings.data, settings.extension, settings.run.steps
    short, long = data.batch * data.length, more.batch * more.length
    forward = flops_per_token(model, -(-data.length // 2))
    return Work(lambda position: short if position < steps else long, 3 * forward)
