"""`ffnlab train`: trains a model by a rule and writes it as a model directory."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
from flax import nnx
from jaxtyping import Array, PyTree
from rich.console import Group

from ffnlab import parallel
from ffnlab.cli.changes import LOSSES
from ffnlab.cli.identity import identity_of, versions
from ffnlab.cli.inputs.data_kinds import (
    BlockModelConfig,
    DataConfig,
)
from ffnlab.cli.inputs.forward import ForwardNodeData
from ffnlab.cli.inputs.halves import halved
from ffnlab.cli.inputs.loading import RunData, load_data
from ffnlab.cli.keys import Section, method_keys, training_keys
from ffnlab.cli.pipelining import in_list
from ffnlab.cli.rules import HALVED
from ffnlab.cli.show import show
from ffnlab.cli.streams import mute_orbax
from ffnlab.cli.training import RULES, TrainConfig, check_mesh, fresh, read_training, rule_of
from ffnlab.cli.work import work_of
from ffnlab.errors import ConfigError, FormatError, at_least
from ffnlab.formats import KINDS, load, save
from ffnlab.formats.opening import format_for, is_factored
from ffnlab.learning import OPTIMIZERS
from ffnlab.models.account import parameters
from ffnlab.models.calibration import called
from ffnlab.parallel import Outcome, Work, bytes_per_device, to_table
from ffnlab.parallel.clock import process_began
from ffnlab.routing import pal
from ffnlab.rule import Rule
from ffnlab.storage import placing
from ffnlab.storage.files import write_json


def train(
    config: Path | None = None,
    *,
    preset: str | None = None,
    out: Path = Path("runs/train"),
    steps: int | None = None,
    resume: bool = False,
    no_progress: bool = False,
    tensorboard: bool = False,
    profile: int = 0,
    dry_run: bool = False,
    keys: bool = False,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat: int = 100,
    join: int = 300,
) -> int:
    """Trains a model by a learning rule and writes it as a model directory.

    Ctrl-C, SIGTERM or a terminal that closes saves a checkpoint and stops; --resume goes on with
    the same bits. Ctrl-C again, a second or more later, interrupts at once. Of several processes
    all run this command, on a file system that they share, and the first one writes.

    Args:
      config: a TOML file (see ffnlab/presets); instead of a preset.
      preset: name of a configuration that comes with the package; "embedded" without one.
      out: folder of the run: checkpoint/, metrics.jsonl, times.jsonl (`ffnlab report`), run.json,
        and at the end model/.
      steps: in place of the configured number of steps.
      resume: continue an interrupted run in `out`.
      no_progress: show no bar; without this there is one on a terminal.
      tensorboard: write event files too, into `out`/events; needs the extra "log".
      profile: steps to trace with the profiler, from the third one on, into `out`/profile.
      dry_run: print what would be done, and do nothing.
      keys: print every key of a training file with type, default and meaning, and do nothing.
      coordinator: HOST:PORT of process 0, for a run of several processes; "auto" under Slurm, Open
        MPI, Kubernetes and on TPU pods.
      num_processes: how many there are, with HOST:PORT.
      process_id: which one this is, from 0, with HOST:PORT.
      heartbeat: seconds without a sign of life after which a process is dead and the run ends.
      join: seconds that all processes have to come at the start.
    Returns:
      0, also when a signal stopped the run and its checkpoint is saved.
    Raises:
      ConfigError: a bad configuration, or `out` holds another run.
    """
    if keys:
        show(Group(*training_keys(TrainConfig), *registered_keys()))
        return 0
    if config is not None and preset is not None:
        raise ConfigError(f"--config {config} and --preset {preset} exclude each other")
    at_least(0, profile=profile)
    mute_orbax()
    settings = read_training(preset or "embedded" if config is None else config)
    if steps is not None:
        settings = dataclasses.replace(settings, run=dataclasses.replace(settings.run, steps=steps))
    with parallel.joined(coordinator, num_processes, process_id, heartbeat, join):
        if dry_run:
            if parallel.is_first():
                announce(settings, Path(out))
            return 0
        shown = {"progress": not no_progress, "tensorboard": tensorboard, "profile": profile}
        shown["began"] = process_began()
        record = run(settings, Path(out), resume=resume, **shown)
        if parallel.is_first():
            report(record, out)
    return 0


def registered_keys() -> Iterator[Section]:
    """The options of the rules, and of the optimizers that installed packages register."""
    yield from method_keys(RULES, RULES.names(), 'rule = "{}"\n[rule_options]')
    yield from method_keys(LOSSES, LOSSES.names(), 'loss = "{}"\n[loss_options]')
    found = OPTIMIZERS.names()[len(OPTIMIZERS.own) :]
    yield from method_keys(OPTIMIZERS, found, '[optimizer]\nname = "{}"\n[optimizer.options]')


def announce(settings: TrainConfig, out: Path) -> None:
    """Prints what a run would do: sizes, work, memory of the state, files."""
    from rich.table import Table

    options, data, more = settings.run, settings.data, settings.extension
    mesh = parallel.mesh_of(options.mesh) or parallel.parse_mesh("")
    key, rule = jax.random.key(options.seed), rule_of(settings)
    model = jax.eval_shape(functools.partial(fresh, settings), key)
    state = parallel.abstract(jax.eval_shape(rule.init, model, key), mesh)
    check_mesh(settings, rule, state, mesh)
    steps, work = settings.run.steps + more.steps, work_of(settings, model)
    items = sum(work.items(position) for position in range(steps))
    of_text = isinstance(data, DataConfig)
    what = f"rows of {data.length} tokens" if isinstance(data, DataConfig) else "inputs"
    table = Table("what", "how much", title=f"{settings.rule}, {steps} steps, into {out}")
    for name, value in {
        "parameters": f"{parameters(model):,}",
        "text" if of_text else "data": source_of(data),
        "batch": f"{data.batch} {what}",
        "microbatches": str(settings.run.microbatches),
        f"{work.item}s": f"{items:,}",
        "operations": f"{items * work.flops:.3g}",
        "devices": f"{mesh.size} of {len(jax.devices())} {jax.devices()[0].device_kind}",
        "mesh": settings.run.mesh or "one device",
        "state on a device": f"{bytes_per_device(state) / 2**20:.1f} MiB",
        "checkpoints": f"every {settings.run.checkpoint_every} steps, the newest two",
    }.items():
        table.add_row(name, value)
    show(table)


def source_of(data: object) -> str:
    """What the data of a run is called: its first key, but of what is drawn."""
    is_drawn = isinstance(data, BlockModelConfig)
    return "block_model" if is_drawn else str(next(iter(vars(data).values())))


def report(record: Mapping, out: Path) -> None:
    """Prints how a run ended."""
    folder = out / "model"
    if not record["finished"]:
        print(f"stopped after step {record['position']} of {record['steps']}; --resume goes on")
    elif "held_out_bits_per_byte" in record:
        bits, xz = record["held_out_bits_per_byte"], record["xz_bits_per_byte"]
        print(f"{folder}: {bits:.3f} bits per byte on held-out text (xz -9: {xz:.3f})")
    elif "held_out_named" in record:
        bits, named = record["held_out_bits"], record["held_out_named"]
        print(f"{folder}: {bits:.3f} bits per token of held-out rows, {named:.1%} of images named")
    elif "held_out_bits" in record:
        bits, found = record["held_out_bits"], record["held_out_found"]
        print(f"{folder}: {bits:.3f} bits per hidden token of held-out text, {found:.1%} found")
    elif "held_out_f1" in record:
        f1, exact = record["held_out_f1"], record["held_out_exact"]
        print(f"{folder}: F1 {f1:.4f}, exact match {exact:.4f} on held-out questions")
    elif "held_out_accuracy" in record:
        also = {"test_accuracy": "test nodes", "target_accuracy": "the target"}
        more = "".join(f", {record[k]:.4f} on {what}" for k, what in also.items() if k in record)
        print(f"{folder}: accuracy {record['held_out_accuracy']:.4f} on held-out data{more}")
    elif "held_out_rate" in record:
        rate, theirs = record["held_out_rate"], record["baseline_rate"]
        print(f"{folder}: {rate:.3f} bit per use of held-out channels (baseline: {theirs:.3f})")
    else:
        print(f"{folder}: mean squared error {record['held_out_error']:.5f} on held-out data")


def run(
    settings: TrainConfig,
    out: Path,
    *,
    resume: bool = False,
    progress: bool = False,
    tensorboard: bool = False,
    profile: int = 0,
    began: float | None = None,
) -> dict[str, object]:
    """What `train` does, from a configuration to the record it writes; arguments as there.

    Args:
      began: see `ffnlab.parallel.LoopOptions`.
    Returns:
      the content of `out`/model/training.json, or {"finished": False, ...} when a signal stopped
      the run.
    """
    rule, options = rule_of(settings), settings.run
    data = load_data(settings)
    is_halved, scorer = settings.rule in HALVED, data.scorer(settings)
    batches = halved(data, settings) if is_halved else data.batches(settings)
    key = jax.random.key(options.seed)
    parallel.agree([to_table(settings), data.identity], "the configuration or the data")
    model = jax.eval_shape(functools.partial(fresh, settings), key)
    mesh = parallel.mesh_of(options.mesh)
    if mesh is not None:
        state = parallel.abstract(jax.eval_shape(rule.init, model, key), mesh)
        check_mesh(settings, rule, state, mesh)
    work, steps = work_of(settings, model), options.steps + settings.extension.steps
    shown = {"progress": progress, "tensorboard": tensorboard, "profile": profile}
    shown["began"] = began
    with parallel.locked(out):
        outcome = parallel.train(
            rule if settings.start else from_nothing(rule, settings),
            fresh(settings, key) if settings.start else None,
            batches,
            steps,
            key=key,
            folder=out,
            resume=resume,
            evaluate=lambda state: scorer(functools.partial(rule.predict, state)),
            options=options.loop(data.watched, **shown),
            mesh=mesh,
            work=work,
            identity=identity_of(settings, data.identity),
        )
        if not outcome.finished:
            return {"finished": False, "position": outcome.position, "steps": steps}
        return written(rule, settings, out / "model", outcome, data, scorer, work)


def written(
    rule: Rule,
    settings: TrainConfig,
    folder: Path,
    outcome: Outcome,
    data: RunData,
    scorer: Callable[[Callable], dict[str, float]],
    work: Work,
) -> dict[str, object]:
    """Writes a trained model with its record, and returns the record."""
    whole = in_list(placing.gather(rule.finished(outcome.state)))
    if parallel.is_first():
        save_as_can_be(whole, folder, settings, is_other=rule.result is not None)
        data.save_beside(folder)
    parallel.meet("the model is written")
    own = isinstance(data, ForwardNodeData)
    answer = data.predictor if own else functools.partial(predictor, rule)
    scores = scorer(answer(load(folder)))  # of what was written, rounding included
    record = training_record(settings, outcome, data.record(scores, settings), work)
    if parallel.is_first():
        write_json(folder / "training.json", record)
    return record


def save_as_can_be(
    model: nnx.Module, folder: Path, settings: TrainConfig, *, is_other: bool
) -> None:
    """Writes a model as other tools read it, or in the native format where they cannot.

    Args:
      is_other: the rule made it, of other sizes than `[model]` says.
    """
    dtype = settings.run.dtype
    usual = format_for(KINDS[settings.kind].model, settings.model)
    if usual == "dense" and not is_factored(model):
        try:
            save(model, folder, dtype=dtype)
            return
        except (ConfigError, FormatError):  # what was made of it no family can say
            if not (settings.transform or settings.start or is_other):
                raise
    save(model, folder, dtype=dtype, format="ffnlab")


def predictor(rule: Rule, model: nnx.Module) -> Callable[[PyTree], Array]:
    """Inputs -> outputs of a trained model; of one that is not called, as its rule predicts."""
    if getattr(getattr(model, "config", None), "audio", None) is not None:
        return functools.partial(jax.jit(lambda model, given: pal.answer(model, *given)), model)
    if callable(model):
        return functools.partial(jax.jit(called), model)
    return functools.partial(rule.predict, rule.init(model, jax.random.key(0)))


def from_nothing(rule: Rule, settings: TrainConfig) -> Rule:
    """A rule that draws the model of a run itself, whatever it is given.

    So no second copy lies beside the state while it is trained, on a mesh every part is drawn
    where it stays, and a resumed run draws nothing.
    """
    init = lambda _, key: rule.init(fresh(settings, key), key)  # noqa: E731
    return dataclasses.replace(rule, init=init)


def training_record(
    settings: TrainConfig, outcome: Outcome, of_data: Mapping[str, object], work: Work
) -> dict[str, object]:
    """What is known of a finished run: recipe, data, figures of the written model, versions."""
    items = sum(work.items(position) for position in range(outcome.position))
    return {
        "finished": True,
        "recipe": to_table(settings),
        "steps": outcome.position,
        f"{work.item}s": items,
        "seconds": round(outcome.seconds, 1),
        **of_data,
        "versions": versions("jax", "flax", "optax", "numpy"),
        "threads": os.cpu_count(),
    }
