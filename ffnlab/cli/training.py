"""What a training run is: its TOML tables, and the rule, model and batches that they make."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from ffnlab import parallel
from ffnlab.cli.data_kinds import (
    DATA_KINDS,
    DataConfig,
    ImagesConfig,
    RecordsConfig,
    SpeechConfig,
)
from ffnlab.cli.rules import RULES, check_accepted
from ffnlab.data import Labelled, Packed
from ffnlab.data.sound_rows import PER_SECOND
from ffnlab.errors import ConfigError, at_least, check_seed, first_line
from ffnlab.formats.kinds import KINDS, Config, kind_of
from ffnlab.learning import (
    OPTIMIZERS,
    Extension,
    OptimizerConfig,
    computed_in,
    labelled,
    make_optimizer,
    next_token,
    packed_next_token,
)
from ffnlab.losses import masked
from ffnlab.models import remat, stack
from ffnlab.models.account import flops_per_token
from ffnlab.models.cost import multiply_adds
from ffnlab.parallel import LoopOptions, Work
from ffnlab.parallel.config import by_kind
from ffnlab.routing import pal
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
    "input_shape",
    "loss_of",
    "rule_of",
    "window",
    "work_of",
]


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
        self.loop("a figure")

    def loop(self, watch: str, **more: bool | int) -> LoopOptions:
        """The loop's options, of which some come from the command line; watch: what stops early."""
        return LoopOptions(
            self.log_every,
            self.evaluate_every,
            self.checkpoint_every,
            on_bad=self.on_bad,
            watch=watch,
            patience=self.patience,
            **more,
        )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A whole training run; a TOML file has one table per part.

    Attributes:
      model: sizes of the model; `kind` says of which kind.
      run: steps, seed, intervals.
      data: what is read, and its batches; `kind` says whether text, images, records or speech.
      optimizer: for rules that take one.
      extension: steps after those of `run`, with longer rows; scoring then uses their length.
      rule: the learning rule: "backprop", "counter_current", "noprop", a name that a package
        registers, or "module:factory".
      rule_options: of the rule, by the names of its factory's parameters.
    """

    model: Config = dataclasses.field(metadata=by_kind({k: v.config for k, v in KINDS.items()}))
    run: RunConfig
    data: DataConfig | ImagesConfig | RecordsConfig | SpeechConfig = dataclasses.field(
        default=DataConfig(), metadata=by_kind(DATA_KINDS)
    )
    optimizer: OptimizerConfig = OptimizerConfig()
    extension: Extension = Extension()
    rule: str = "backprop"
    rule_options: Mapping[str, object] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        RULES.check(self.rule)
        reads = KINDS[self.kind].reads
        if reads in ("graphs", "frames"):
            raise ConfigError(
                f"a model of kind {self.kind!r} reads {reads}, which no kind of [data] gives; "
                "train it in Python, by a rule and a loss of its own"
            )
        check_accepted(self.rule, self.kind)
        reads_text = reads == "tokens"
        if getattr(self.model, "audio", None) is not None:
            check_speech(self)
        elif reads_text != isinstance(self.data, DataConfig):
            which = "text" if reads_text else "images or records"
            raise ConfigError(f"a model of kind {self.kind!r} reads {which}: set kind in [data]")
        if self.extension.steps and not isinstance(self.data, DataConfig):
            raise ConfigError("[extension] makes rows of text longer; other data have none")

    @property
    def kind(self) -> str:
        """The kind of the model."""
        kind = kind_of(self.model)
        if kind is None:
            raise ConfigError(f"model={type(self.model).__name__} is of no kind of {list(KINDS)}")
        return kind

    @property
    def text(self) -> DataConfig:
        """The data of a run that reads text.

        Raises:
          ConfigError: it reads something else.
        """
        if not isinstance(self.data, DataConfig):
            raise ConfigError(f"[data] is a {type(self.data).__name__}, which is no text")
        return self.data


def check_speech(settings: TrainConfig) -> None:
    """Raises ConfigError unless a model that hears is given speech, and features as it takes."""
    data, widths = settings.data, settings.model.audio.widths
    if not isinstance(data, SpeechConfig) or settings.rule != "backprop":
        raise ConfigError('a model with `audio` hears: [data] kind = "speech", rule = "backprop"')
    if len(data.encoders) != len(widths):
        raise ConfigError(
            f"encoders={list(data.encoders)}; the model hears {len(widths)}, of {list(widths)}"
        )
    vocab, last = settings.model.vocab, max(*data.question.encode(), *b"0123456789")
    if last >= vocab:
        raise ConfigError(f"the question and digits have the byte {last}; the model has {vocab}")


def rule_of(settings: TrainConfig) -> Rule:
    """The rule of a run: the only place where a name becomes one.

    Its factory is given what the run decides, where it has a parameter of that name: `loss`
    ((model, batch) -> (mean, metrics)), `optimizer` (an optax transformation), `microbatches` and
    `model_kind`. The rest are options.

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
        loss = loss_of(settings)
        is_rounded = run.compute != "float32"
        options["loss"] = computed_in(run.compute, loss) if is_rounded else loss
    if "microbatches" in takes:
        options["microbatches"] = run.microbatches
    if "model_kind" in takes:
        options["model_kind"] = settings.kind
    rule = RULES.make(name, **options)
    if not isinstance(settings.data, SpeechConfig):
        return rule
    predict = jax.jit(lambda state, given: pal.answer(rule.model(state), *given))
    return dataclasses.replace(rule, predict=predict)


def loss_of(settings: TrainConfig) -> Callable:
    """What a rule minimizes that takes a loss, by the kind of data."""
    if isinstance(settings.data, SpeechConfig):
        return pal.heard(masked)
    if not isinstance(settings.data, DataConfig):
        return labelled
    return packed_next_token if settings.data.packed else next_token


def find_methods(settings: TrainConfig) -> None:
    """Imports what a run names and makes nothing; ConfigError where that is not to be had."""
    RULES.factory(settings.rule)
    OPTIMIZERS.factory(settings.optimizer.name)


def fresh(settings: TrainConfig, key: Array, dtype: DTypeLike = jnp.float32) -> nnx.Module:
    """The model that a run starts from.

    Raises:
      ConfigError: it is to be scanned or rematerialized and has no layers.
    """
    model = KINDS[settings.kind].make(settings.model, key=key, dtype=dtype)
    model = stack(model) if settings.run.scan else model
    return remat(model, settings.run.remat) if settings.run.remat else model


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


def input_shape(settings: TrainConfig) -> tuple[int, ...]:
    """Shape of one image or record as the model is given it: a row where it reads rows.

    Raises:
      ConfigError: the model does not take inputs of that shape.
    """
    data, kind = settings.data, KINDS[settings.kind]
    assert not isinstance(data, DataConfig)
    shape = (math.prod(data.shape),) if kind.reads == "rows" else data.shape
    model = jax.eval_shape(functools.partial(fresh, settings), jax.random.key(0))
    try:
        jax.eval_shape(kind.call, model, jax.ShapeDtypeStruct((1, *shape), np.float32))
    except (TypeError, ValueError) as error:
        said = f"[data] gives inputs of shape {list(shape)}, which a {settings.kind} of "
        raise ConfigError(f"{said}{settings.model} does not take: {first_line(error)}") from None
    return shape


def abstract_batch(settings: TrainConfig, mesh: Mesh, rows: int, length: int) -> PyTree:
    """A batch of a run as `ffnlab.parallel.place_batch` places it, without its values.

    Args:
      rows, length: of the batch; a row of text has length + 1 tokens.
    Raises:
      ConfigError: the rows do not divide, or the model does not take them.
    """
    if isinstance(settings.data, DataConfig):
        tokens = jax.ShapeDtypeStruct((rows, length + 1), np.int32)
        batch: PyTree = Packed(tokens, tokens, tokens) if settings.data.packed else tokens
    elif isinstance(settings.data, SpeechConfig):
        batch = abstract_speech(settings, rows)
    else:
        x = jax.ShapeDtypeStruct((rows, *input_shape(settings)), np.float32)
        labels = jax.ShapeDtypeStruct((rows,), np.int32)
        batch = x if KINDS[settings.kind].classes is None else Labelled(x, labels)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        batch,
        parallel.batch_shardings(batch, mesh),
    )


def abstract_speech(settings: TrainConfig, rows: int) -> PyTree:
    """(Sounds, (tokens, answers)) of so many recordings, without values."""
    data = settings.data
    assert isinstance(data, SpeechConfig)
    shape = rows, data.seconds * PER_SECOND // data.size
    widths = settings.model.audio.widths
    features = tuple(jax.ShapeDtypeStruct((*shape, width), np.float32) for width in widths)
    valid = (jax.ShapeDtypeStruct(shape, np.bool_),) * len(widths)
    tokens = jax.ShapeDtypeStruct((rows, len(data.question.encode())), np.int32)
    return pal.Sounds(features, valid), (tokens, tokens)


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
        length = getattr(part, "length", 0)  # images and records have none
        step.trace(state, abstract_batch(settings, mesh, part.batch, length))


def window(settings: TrainConfig) -> tuple[int, int]:
    """Length and stride of the held-out windows: the longest rows trained on."""
    data, more = settings.text, settings.extension
    return (more.length, more.length // 2) if more.steps else (data.length, data.stride)


def work_of(settings: TrainConfig, model: nnx.Module) -> Work:
    """What a step does: tokens predicted, or inputs read, and the operations of both passes.

    The backward pass counts twice the forward one; what is computed again (remat) does not count.
    Attention counts half of the longest row, which a token attends to on average.
    """
    data, more, steps = settings.data, settings.extension, settings.run.steps
    if isinstance(data, SpeechConfig):
        sounds, (tokens, _) = abstract_speech(settings, 1)
        forward = 2.0 * multiply_adds(pal.answer, model, sounds, tokens)
        return Work(lambda position: data.batch, 3 * forward)
    if not isinstance(data, DataConfig):
        x = jax.ShapeDtypeStruct((1, *input_shape(settings)), np.float32)
        forward = 2.0 * multiply_adds(KINDS[settings.kind].call, model, x)
        return Work(lambda position: data.batch, 3 * forward)
    short, long = data.batch * data.length, more.batch * more.length
    forward = flops_per_token(model, -(-data.length // 2))
    return Work(lambda position: short if position < steps else long, 3 * forward)
