"""`ffnlab train`: trains a language model by a rule and writes it as a model directory."""

import dataclasses
import functools
import lzma
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
from rich.console import Group

from ffnlab import parallel
from ffnlab.cli.corpus import Corpus, load_corpus
from ffnlab.cli.identity import identity_of, versions
from ffnlab.cli.keys import Section, method_keys, training_keys
from ffnlab.cli.show import show
from ffnlab.cli.streams import mute_orbax
from ffnlab.cli.training import (
    RULES,
    WATCHED,
    TrainConfig,
    check_mesh,
    fresh,
    rule_of,
    window,
    work_of,
)
from ffnlab.data import HeldOut
from ffnlab.errors import ConfigError, at_least
from ffnlab.formats import load, save
from ffnlab.learning import OPTIMIZERS
from ffnlab.models.account import parameters
from ffnlab.parallel import (
    Outcome,
    Work,
    bytes_per_device,
    held_out_bits,
    read_config,
    to_table,
)
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
    """Trains a language model and writes it as a model directory.

    Ctrl-C, SIGTERM or a terminal that closes saves a checkpoint and stops; --resume goes on with
    the same bits. Ctrl-C again, a second or more later, interrupts at once. Of several processes
    all run this command, on a file system that they share, and the first one writes.

    Args:
      config: a TOML file (see ffnlab/presets); instead of a preset.
      preset: name of a configuration that comes with the package; "embedded" without one.
      out: folder of the run: checkpoint/, metrics.jsonl, run.json, and at the end model/.
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
    settings = read_config(preset or "embedded" if config is None else config, TrainConfig)
    if steps is not None:
        settings = dataclasses.replace(settings, run=dataclasses.replace(settings.run, steps=steps))
    with parallel.joined(coordinator, num_processes, process_id, heartbeat, join):
        if dry_run:
            if parallel.is_first():
                announce(settings, Path(out))
            return 0
        shown = {"progress": not no_progress, "tensorboard": tensorboard, "profile": profile}
        record = run(settings, Path(out), resume=resume, **shown)
        if parallel.is_first():
            report(record, out)
    return 0


def registered_keys() -> Iterator[Section]:
    """The options of the rules and optimizers that installed packages register."""
    yield from method_keys(RULES, RULES.names()[len(RULES.own) :], 'rule = "{}"\n[rule_options]')
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
    tokens = sum(work.tokens(position) for position in range(steps))
    table = Table("what", "how much", title=f"{settings.rule}, {steps} steps, into {out}")
    for name, value in {
        "parameters": f"{parameters(model):,}",
        "text": str(data.text),
        "batch": f"{data.batch} rows of {data.length} tokens",
        "microbatches": str(settings.run.microbatches),
        "tokens": f"{tokens:,}",
        "operations": f"{tokens * work.flops:.3g}",
        "devices": f"{mesh.size} of {len(jax.devices())} {jax.devices()[0].device_kind}",
        "mesh": settings.run.mesh or "one device",
        "state on a device": f"{bytes_per_device(state) / 2**20:.1f} MiB",
        "checkpoints": f"every {settings.run.checkpoint_every} steps, the newest two",
    }.items():
        table.add_row(name, value)
    show(table)


def report(record: Mapping, out: Path) -> None:
    """Prints how a run ended."""
    if record["finished"]:
        bits, xz = record["held_out_bits_per_byte"], record["xz_bits_per_byte"]
        print(f"{out / 'model'}: {bits:.3f} bits per byte on held-out text (xz -9: {xz:.3f})")
    else:
        print(f"stopped after step {record['position']} of {record['steps']}; --resume goes on")


def run(
    settings: TrainConfig,
    out: Path,
    *,
    resume: bool = False,
    progress: bool = False,
    tensorboard: bool = False,
    profile: int = 0,
) -> dict[str, object]:
    """What `train` does, from a configuration to the record it writes; arguments as there.

    Returns:
      the content of `out`/model/training.json, or {"finished": False, ...} when a signal stopped
      the run.
    """
    rule, options = rule_of(settings), settings.run
    corpus = load_corpus(settings.data, settings.model.vocab)
    batches, windows = corpus.batches(settings), corpus.windows(settings)
    key = jax.random.key(options.seed)
    parallel.agree([to_table(settings), corpus.identity], "the configuration or the text")
    model = jax.eval_shape(functools.partial(fresh, settings), key)
    mesh = parallel.mesh_of(options.mesh)
    if mesh is not None:
        state = parallel.abstract(jax.eval_shape(rule.init, model, key), mesh)
        check_mesh(settings, rule, state, mesh)
    work, steps = work_of(settings, model), options.steps + settings.extension.steps
    with parallel.locked(out):
        outcome = parallel.train(
            from_nothing(rule, settings),
            None,
            batches,
            steps,
            key=key,
            folder=out,
            resume=resume,
            evaluate=functools.partial(_evaluate, rule, windows),
            options=options.loop(progress=progress, tensorboard=tensorboard, profile=profile),
            mesh=mesh,
            work=work,
            identity=identity_of(settings, corpus.identity),
        )
        if not outcome.finished:
            return {"finished": False, "position": outcome.position, "steps": steps}
        return written(rule, settings, out / "model", outcome, corpus, windows, work)


def written(
    rule: Rule,
    settings: TrainConfig,
    folder: Path,
    outcome: Outcome,
    corpus: Corpus,
    windows: HeldOut,
    work: Work,
) -> dict[str, object]:
    """Writes a trained model with its record, and returns the record."""
    whole = placing.gather(rule.model(outcome.state))
    if parallel.is_first():
        save(whole, folder, dtype=settings.run.dtype)
        corpus.tokenizer.save(folder)
    parallel.meet("the model is written")
    predict = functools.partial(jax.jit(lambda model, tokens: model(tokens)), load(folder))
    bits = held_out_bits(predict, windows)  # of what was written, rounding included
    bits = bits / corpus.held_out.bytes_per_token
    record = training_record(settings, outcome, bits, corpus, work)
    if parallel.is_first():
        write_json(folder / "training.json", record)
    return record


def from_nothing(rule: Rule, settings: TrainConfig) -> Rule:
    """A rule that draws the model of a run itself, whatever it is given.

    So no second copy lies beside the state while it is trained, on a mesh every part is drawn
    where it stays, and a resumed run draws nothing.
    """
    init = lambda _, key: rule.init(fresh(settings, key), key)  # noqa: E731
    return dataclasses.replace(rule, init=init)


def _evaluate(rule: Rule, windows: HeldOut, state: object) -> dict[str, float]:
    return {WATCHED: held_out_bits(functools.partial(rule.predict, state), windows)}


def training_record(
    settings: TrainConfig, outcome: Outcome, bits: float, corpus: Corpus, work: Work
) -> dict[str, object]:
    """What is known of a finished run: recipe, text, figures of the written model, versions."""
    return {
        "finished": True,
        "recipe": to_table(settings),
        "text": dict(corpus.identity),
        "documents": corpus.digests,
        "steps": outcome.position,
        "tokens": sum(work.tokens(position) for position in range(outcome.position)),
        "seconds": round(outcome.seconds, 1),
        "held_out_bits_per_byte": bits,
        "held_out_window": dict(zip(("length", "stride"), window(settings), strict=True)),
        "xz_bits_per_byte": xz_bits(corpus.text),
        "versions": versions("jax", "flax", "optax", "numpy"),
        "threads": os.cpu_count(),
    }


def xz_bits(text: bytes) -> float:
    """Bits per byte of `xz -9` on a text: what a model has to beat.

    >>> xz_bits(bytes(range(256)) * 64) < 1
    True
    """
    return 8 * len(lzma.compress(text, preset=9)) / len(text)
