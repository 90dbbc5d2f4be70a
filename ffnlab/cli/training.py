"""What a training run is: its TOML tables, and the rule, model and batches that they make."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from ffnlab import parallel
from ffnlab.cli import pipelining
from ffnlab.cli.changes import (
    LOSSES,
    changed,
    check_changes,
    check_loss,
    is_informed,
    loss_named,
    selected,
    started,
    table_at,
)
from ffnlab.cli.inputs.batch_shapes import check_speech
from ffnlab.cli.inputs.data_kinds import DATA_KINDS, AnyData, DataConfig, SpeechConfig
from ffnlab.cli.inputs.reading import Reading, reading_of
from ffnlab.cli.pipelining import PipelineConfig
from ffnlab.cli.rules import HALVED, RULES, check_accepted, check_domains, check_halves
from ffnlab.cli.running import RunConfig
from ffnlab.errors import ConfigError
from ffnlab.formats.kinds import KINDS, Config, kind_of
from ffnlab.layers.pipelining import Schedule
from ffnlab.learning import (
    OPTIMIZERS,
    Extension,
    OptimizerConfig,
    computed_in,
    make_optimizer,
)
from ffnlab.losses import routed
from ffnlab.models import remat, stack
from ffnlab.models.calibration import called
from ffnlab.parallel.config import by_kind, from_table, read_table
from ffnlab.recipes import METHODS
from ffnlab.routing import pal
from ffnlab.rule import Rule

__all__ = [
    "RULES",
    "DataConfig",
    "RunConfig",
    "TrainConfig",
    "abstract_batch",
    "batch_of",
    "check_mesh",
    "find_methods",
    "fresh",
    "read_training",
    "rule_of",
    "training_of",
    "window",
]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A whole training run; a TOML file has one table per part.

    Attributes:
      model: sizes of the model; `kind` says of which kind.
      run: steps, seed, intervals.
      data: what is read, and its batches; `kind` says what it is.
      optimizer: for rules that take one.
      pipeline: stages of the layers, where the mesh has `pp` or they are given.
      extension: steps after those of `run`, with longer rows; scoring then uses their length.
      rule: the learning rule: a name that --keys lists, one of a package, or "module:factory".
      rule_options: of the rule, by the names of its factory's parameters.
      start: a model directory, or a model that comes with ffnlab, to go on from; "" for a fresh
        one. `[model]` is its own and left out.
      transform: what is made of the model before it learns: tables of a `name` and its options
        (`ffnlab compress --keys` lists them), in order; they look at no data.
      trainable: what learns: "lora" and other parts that adapters add, or paths as
        "layers[3]**"; "" for all.
      loss: what a rule that takes a loss minimizes: a name that --keys lists, one that a package
        registers, or "module:factory"; "" for the loss of the data.
      loss_options: of that, by the names of its factory's parameters.
    """

    model: Config = dataclasses.field(metadata=by_kind({k: v.config for k, v in KINDS.items()}))
    run: RunConfig
    data: AnyData = dataclasses.field(default=DataConfig(), metadata=by_kind(DATA_KINDS))
    optimizer: OptimizerConfig = OptimizerConfig()
    pipeline: PipelineConfig = PipelineConfig()
    extension: Extension = Extension()
    rule: str = "backprop"
    rule_options: Mapping[str, object] = dataclasses.field(default_factory=dict)
    start: str = ""
    transform: tuple[Mapping[str, object], ...] = ()
    trainable: str = ""
    loss: str = ""
    loss_options: Mapping[str, object] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        RULES.check(self.rule)
        check_changes(self.transform)
        if self.loss:
            LOSSES.check(self.loss)
        elif self.loss_options:
            raise ConfigError("[loss_options] are given, but no loss is named")
        check_accepted(self.rule, self.kind)
        reading = self.reading
        if not isinstance(self.data, reading.data):
            raise ConfigError(
                f"a model of kind {self.kind!r} reads {reading.what}: set kind in [data]"
            )
        if isinstance(self.data, SpeechConfig):
            check_speech(self.data, self.model)
        check_domains(self.rule, self.rule_options, self.data)
        check_halves(self.rule, self.data)
        pipelining.check_staged(self.schedule, self.kind)
        check_loss(self.loss, self.data)
        reads_text = isinstance(self.data, DataConfig)
        if self.extension.steps and not reads_text:
            raise ConfigError("[extension] makes rows of text longer; other data has none")
        if reads_text and self.kind != "decoder" and self.data.packed:
            raise ConfigError(f"packed: a {self.kind} has no rows of several documents")
        if (what := KINDS[self.kind].reads) in ("graphs", "networks", "fields"):
            fixed = {"remat": "", "microbatches": 1, "scan": False}
            if what == "graphs" and self.rule == "backprop":
                del fixed["scan"]
            if what == "fields":
                del fixed["remat"]
            for name, usual in fixed.items():
                if getattr(self.run, name) != usual:
                    raise ConfigError(
                        f"{name}={getattr(self.run, name)!r}: a {what[:-1]} is one batch, which is "
                        f"not cut, and its layers run as they are; leave {name} out"
                    )

    @property
    def reading(self) -> Reading:
        """What the model reads."""
        return reading_of(self.model, self.data)

    @property
    def has_mixture(self) -> bool:
        """Whether the model is made with mixtures of experts, or becomes one with some."""
        made = any(table.get("name") == "upcycle" for table in self.transform)
        return made or getattr(self.model, "mixture", None) is not None

    @property
    def schedule(self) -> Schedule | None:
        """Of the pipeline of the run; None where it has none."""
        return pipelining.schedule_of(self.pipeline, self.run.mesh)

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


def read_training(source: str | Path) -> TrainConfig:
    """A training file, or a preset by name; where it goes on from a model, `[model]` is of that.

    Raises:
      ConfigError: no such file or preset, a bad one, or no model of a kind to go on from.
      FormatError: there is no model to go on from, or it is damaged.
    """
    return training_of(*read_table(source))


def training_of(name: str, table: Mapping[str, object]) -> TrainConfig:
    """A training run from the content of a file; see `read_training`.

    Args:
      name: of the file, for errors.
      table: its content.
    """
    start = table.get("start")
    if isinstance(start, str) and start and "model" not in table:
        table = {**table, "model": table_at(start)}
    return from_table(table, TrainConfig, name)


def rule_of(settings: TrainConfig) -> Rule:
    """The rule of a run: the only place where a name becomes one.

    Its factory is given what the run decides, where it has a parameter of that name: `loss`
    ((model, batch) -> (mean, metrics)) and whether it is `informed` of the moment, `trainable` (a
    selector), `optimizer` (an optax transformation), `microbatches`, `model_kind`, the `steps` of
    the run, and a batch to see shapes of (`like`). The rest are options.

    Raises:
      ConfigError: the rule cannot be had, takes other options, or has no use for what is set.
    """
    run, name = settings.run, settings.rule
    options = RULES.read(name, settings.rule_options, "[rule_options]")
    takes = RULES.takes(name)
    for parameter, what, is_set in (
        ("optimizer", "[optimizer]", settings.optimizer != OptimizerConfig()),
        ("loss", f"compute={run.compute!r}", run.compute != "float32"),
        ("loss", f"loss={settings.loss!r}", bool(settings.loss)),
        ("loss", "teacher in [data]", bool(getattr(settings.data, "teacher", ""))),
        ("trainable", f"trainable={settings.trainable!r}", bool(settings.trainable)),
        ("microbatches", f"microbatches={run.microbatches}", run.microbatches != 1),
    ):
        if is_set and parameter not in takes:
            raise ConfigError(f"{what} is set, but rule {name!r} takes no {parameter}")
    if "optimizer" in takes:
        key = jax.random.key(run.seed)
        made = make_optimizer(settings.optimizer, run.steps, settings.extension, key=key)
        last = KINDS[settings.kind].projection
        options["optimizer"] = made if last is None else optax.chain(made, last())
    if "loss" in takes:
        loss = loss_of(settings)
        if is_informed(loss):
            if "informed" not in takes:
                what = f"loss={settings.loss!r}" if settings.loss else "the loss of the data"
                raise ConfigError(f"{what} asks for the step; {name!r} tells none")
            options["informed"] = True
        is_rounded = run.compute != "float32"
        options["loss"] = computed_in(run.compute, loss) if is_rounded else loss
    if settings.trainable:
        options["trainable"] = selected(settings.trainable)
    if "microbatches" in takes:
        options["microbatches"] = run.microbatches
    if "model_kind" in takes:
        options["model_kind"] = settings.kind
    if "steps" in takes:
        options["steps"] = run.steps + settings.extension.steps
    if "like" in takes:
        length = getattr(settings.data, "length", 0)
        options["like"] = batch_of(settings, settings.data.batch, length)
    rule = by_names(RULES.make(name, **options))
    if settings.schedule is not None:
        rule = pipelining.of_whole_batches(rule, settings.data.batch)
    if not isinstance(settings.data, SpeechConfig):
        return rule
    answers = jax.jit(lambda state, given: pal.answer(rule.model(state), *given))
    return dataclasses.replace(rule, predict=answers)


def loss_of(settings: TrainConfig) -> Callable:
    """What a rule minimizes that takes a loss: that of the data, or the one that is named.

    The balance of mixtures is added to the former; the latter says by itself what it adds.
    """
    of_data, hears = settings.reading.loss(settings.data), isinstance(settings.data, SpeechConfig)
    if settings.loss:
        if hears and "loss" not in LOSSES.takes(settings.loss):
            raise ConfigError(f"loss={settings.loss!r} is of rows of text; speech has none")
        of_data = loss_named(settings.loss, settings.loss_options, of_data)
    elif settings.has_mixture:
        of_data = routed(of_data, balance=settings.run.balance)
    return pal.heard(of_data) if hears else of_data


def by_names(rule: Rule) -> Rule:
    """The rule, whose model is given inputs by the names of its arguments where they have some."""
    of_names = jax.jit(lambda state, inputs: called(rule.model(state), inputs))

    def predict(state: PyTree, inputs: PyTree) -> PyTree:
        return (of_names if isinstance(inputs, Mapping) else rule.predict)(state, inputs)

    return dataclasses.replace(rule, predict=predict)


def find_methods(settings: TrainConfig) -> None:
    """Imports what a run names and makes nothing; ConfigError where that is not to be had."""
    RULES.factory(settings.rule)
    OPTIMIZERS.factory(settings.optimizer.name)
    if settings.loss:
        LOSSES.factory(settings.loss)
    for table in settings.transform:
        METHODS.factory(str(table["name"]))


def fresh(settings: TrainConfig, key: Array, dtype: DTypeLike = jnp.float32) -> nnx.Module:
    """The model that a run starts from.

    Raises:
      ConfigError: it is to be scanned or rematerialized and has no layers, stages do not divide
        them, a transform does not take it, or `start` is a model of another configuration.
      FormatError: there is no model to go on from.
    """
    if settings.start:
        model = started(settings.start, settings.model)
    else:
        model = KINDS[settings.kind].make(settings.model, key=key, dtype=dtype)
    model = changed(model, settings.transform, graph_of(settings))
    model = stack(model) if settings.run.scan else model
    model = pipelining.in_stages(model, settings.schedule)
    return remat(model, settings.run.remat) if settings.run.remat else model


def graph_of(settings: TrainConfig) -> Callable[[], PyTree] | None:
    """Makes the batch of a run that learns from a whole graph by backpropagation; else None."""
    if KINDS[settings.kind].reads != "graphs" or settings.rule != "backprop":
        return None
    return lambda: settings.reading.batch(settings.data, settings.model, 0, 0)


def batch_of(settings: TrainConfig, rows: int, length: int) -> PyTree:
    """A batch of a run, abstract where the data need not be read; sizes as `abstract_batch`."""
    if settings.rule == "forward_gnn":
        from ffnlab.cli.inputs.forward import forward_batch  # which needs this module

        return forward_batch(settings)
    batch = settings.reading.batch(settings.data, settings.model, rows, length)
    return (batch, batch) if settings.rule in HALVED else batch


def abstract_batch(settings: TrainConfig, mesh: Mesh, rows: int, length: int) -> PyTree:
    """A batch of a run as `ffnlab.parallel.place_batch` places it, without its values.

    Args:
      rows, length: of the batch; a row of text has length + 1 tokens.
    Raises:
      ConfigError: the rows do not divide, or the model does not take them.
    """
    batch = batch_of(settings, rows, length)
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
        length = getattr(part, "length", 0)  # only rows of tokens have one
        step.trace(state, abstract_batch(settings, mesh, part.batch, length))


def window(settings: TrainConfig) -> tuple[int, int]:
    """Length and stride of the held-out windows: the longest rows trained on."""
    data, more = settings.text, settings.extension
    return (more.length, more.length // 2) if more.steps else (data.length, data.stride)
