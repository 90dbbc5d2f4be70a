"""`ffnlab train`: trains a language model by a rule and writes it as a model directory."""

import dataclasses
import functools
import importlib.metadata
import lzma
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array

from ffnlab import io, parallel, placing
from ffnlab.data import (
    HeldOut,
    TextBatches,
    held_out_windows,
    read_text,
    stdlib_text,
    text_identity,
)
from ffnlab.errors import ConfigError
from ffnlab.learning import Extension, OptimizerConfig, backprop, make_optimizer
from ffnlab.models import Decoder, DecoderConfig, Tokenizer, load, remat, save, stack
from ffnlab.parallel import LoopOptions, Outcome, held_out_bits, read_config, to_table
from ffnlab.rule import Rule


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The text and how it is cut.

    Attributes:
      text: "stdlib" (the running interpreter's standard library), or files to train on.
      held_out: files to score on; only with files to train on, whose last tenth serves without.
      batch: rows of a batch.
      length: predictions in a row.
      stride: of the held-out windows.
    """

    text: str | tuple[str, ...] = "stdlib"
    held_out: tuple[str, ...] = ()
    batch: int = 8
    length: int = 256
    stride: int = 128


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """How long, how often, and from which seed.

    Attributes:
      steps: batches in all.
      seed: of the weights, and of the order of the text.
      log_every, evaluate_every, checkpoint_every: in steps, see `ffnlab.parallel.LoopOptions`.
      dtype: of the saved parameters, "float32" or "bfloat16".
      mesh: of devices, "dp=2,fsdp=2,tp=2" (`ffnlab.parallel.parse_mesh`); "" for one device.
      scan: stack the layers and scan over them, so that compiling does not grow with depth.
      remat: what layers keep for the backward pass (`ffnlab.models.remat`); "" for everything.
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

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps={self.steps} must be at least 1")
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"dtype={self.dtype!r} is not one of 'float32', 'bfloat16'")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A whole training run; a TOML file has one table per part.

    Attributes:
      model: sizes of the Decoder.
      run: steps, seed, intervals.
      data: text and batches.
      optimizer: for rules that take one.
      extension: steps after those of `run`, with longer rows; scoring then uses their length.
      rule: name of the learning rule, a key of `RULES`.
    """

    model: DecoderConfig
    run: RunConfig
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    extension: Extension = Extension()
    rule: str = "backprop"

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ConfigError(f"rule={self.rule!r} is not one of {sorted(RULES)}")


def _backprop(config: TrainConfig) -> Rule:
    key = jax.random.key(config.run.seed)
    steps, more = config.run.steps, config.extension
    return backprop(optimizer=make_optimizer(config.optimizer, steps, more, key=key))


# The only place where a name becomes a rule.
RULES: dict[str, Callable[[TrainConfig], Rule]] = {"backprop": _backprop}


def train(
    config: Path | None = None,
    *,
    preset: str = "embedded",
    out: Path = Path("runs/train"),
    steps: int | None = None,
    resume: bool = False,
    progress: bool = True,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat: int = 100,
) -> int:
    """Trains a language model and writes it as a model directory.

    Ctrl-C or SIGTERM saves a checkpoint and stops; --resume goes on with the same bits. Of several
    processes all run this command, on a file system that they share, and the first one writes.

    Args:
      config: a TOML file (see ffnlab/presets); instead of a preset.
      preset: name of a configuration that comes with the package.
      out: folder of the run: checkpoint/, metrics.jsonl, run.json, and at the end model/.
      steps: in place of the configured number of steps.
      resume: continue an interrupted run in `out`.
      progress: show a bar on a terminal.
      coordinator: HOST:PORT of process 0, for a run of several processes; "auto" under Slurm, Open
        MPI, Kubernetes and on TPU pods.
      num_processes: how many there are, with HOST:PORT.
      process_id: which one this is, from 0, with HOST:PORT.
      heartbeat: seconds without a sign of life after which a process is dead and the run ends.
    Returns:
      0, also when a signal stopped the run and its checkpoint is saved.
    Raises:
      ConfigError: a bad configuration, or `out` holds another run.
    """
    settings = read_config(preset if config is None else config, TrainConfig)
    if steps is not None:
        settings = dataclasses.replace(settings, run=dataclasses.replace(settings.run, steps=steps))
    with parallel.joined(coordinator, num_processes, process_id, heartbeat):
        record = run(settings, Path(out), resume=resume, progress=progress)
        if parallel.is_first():
            report(record, out)
    return 0


def report(record: Mapping, out: Path) -> None:
    """Prints how a run ended."""
    if record["finished"]:
        bits, xz = record["held_out_bits_per_byte"], record["xz_bits_per_byte"]
        print(f"{out / 'model'}: {bits:.3f} bits per byte on held-out text (xz -9: {xz:.3f})")
    else:
        print(f"stopped after step {record['position']} of {record['steps']}; --resume goes on")


def run(
    settings: TrainConfig, out: Path, *, resume: bool = False, progress: bool = False
) -> dict[str, object]:
    """What `train` does, from a configuration to the record it writes.

    Returns:
      the content of `out`/model/training.json, or {"finished": False, ...} when a signal stopped
      the run.
    """
    text, held_out, identity = load_text(settings.data)
    options = settings.run
    batches = batches_of(settings, text)
    windows = held_out_windows(held_out, *window(settings), "the held-out text")
    rule = RULES[settings.rule](settings)
    key = jax.random.key(options.seed)
    parallel.agree([to_table(settings), identity], "the configuration or the text")
    model = fresh(settings, key)
    remember(out, settings, identity, resume)
    outcome = parallel.train(
        rule,
        model,
        batches,
        options.steps + settings.extension.steps,
        key=key,
        folder=out,
        resume=resume,
        evaluate=functools.partial(_evaluate, rule, windows),
        options=LoopOptions(
            options.log_every, options.evaluate_every, options.checkpoint_every, progress
        ),
        mesh=parallel.parse_mesh(options.mesh) if options.mesh else None,
    )
    if not outcome.finished:
        steps = options.steps + settings.extension.steps
        return {"finished": False, "position": outcome.position, "steps": steps}
    folder = out / "model"
    whole = placing.gather(outcome.state.model)
    if parallel.is_first():
        save(whole, folder, dtype=options.dtype)
        Tokenizer.bytes().save(folder)
    parallel.agree("written", "the model")
    predict = functools.partial(jax.jit(lambda model, tokens: model(tokens)), load(folder))
    bits = held_out_bits(predict, windows)  # of what was written, rounding included
    record = training_record(settings, outcome, bits, held_out, identity)
    if parallel.is_first():
        io.write_json(folder / "training.json", record)
    return record


def fresh(settings: TrainConfig, key: Array) -> Decoder:
    """The model that a run starts from."""
    model = Decoder(settings.model, key=key)
    model = stack(model) if settings.run.scan else model
    return remat(model, settings.run.remat or None)


def batches_of(settings: TrainConfig, text: bytes) -> Callable[[int], np.ndarray]:
    """Batches by position: those of `data`, then those of the extension."""
    data, more, steps = settings.data, settings.extension, settings.run.steps
    short = TextBatches(text, data.batch, data.length, settings.run.seed, "the training text")
    if not more.steps:
        return short
    long = TextBatches(text, more.batch, more.length, settings.run.seed + 1, "the training text")
    return lambda position: short(position) if position < steps else long(position - steps)


def window(settings: TrainConfig) -> tuple[int, int]:
    """Length and stride of the held-out windows: the longest rows trained on."""
    data, more = settings.data, settings.extension
    return (more.length, more.length // 2) if more.steps else (data.length, data.stride)


def load_text(data: DataConfig) -> tuple[bytes, bytes, dict[str, str | int]]:
    """Training text, held-out text and the record of what they are."""
    if data.text == "stdlib":
        text = stdlib_text()
        return text.train, text.held_out, text.identity
    if isinstance(data.text, str):
        raise ConfigError(f"text={data.text!r} must be 'stdlib' or a list of files")
    whole = read_text(data.text)
    if data.held_out:
        train_text, held_out = whole, read_text(data.held_out)
    else:
        cut = len(whole) - len(whole) // 10
        train_text, held_out = whole[:cut], whole[cut:]
    return train_text, held_out, text_identity(train_text, held_out)


def remember(out: Path, settings: TrainConfig, identity: Mapping, resume: bool) -> None:
    """Writes what the run is, or checks that a resumed run is the same but for its steps.

    With a trapezoid schedule, more or fewer steps change nothing before the fall begins; another
    mesh changes the last bits at most.
    """
    file = out / "run.json"
    table = to_table(settings)
    wanted = {"config": table, "text": dict(identity), "threads": os.cpu_count()}
    if resume and file.exists():
        found = io.read_json(file)
        found["config"]["run"] |= {"steps": settings.run.steps, "mesh": settings.run.mesh}
        different = [key for key in wanted if found.get(key) != wanted[key]]
        if different:
            raise ConfigError(
                f"{out} was started with another {' and '.join(different)}; see {file}, or train "
                "into another folder"
            )
    elif parallel.is_first() and not (out / "checkpoint").exists():  # else the loop refuses
        io.write_json(file, wanted)


def _evaluate(rule: Rule, windows: HeldOut, state: object) -> dict[str, float]:
    return {"held_out_bits": held_out_bits(functools.partial(rule.predict, state), windows)}


def training_record(
    settings: TrainConfig, outcome: Outcome, bits: float, held_out: bytes, identity: Mapping
) -> dict[str, object]:
    """What is known of a finished run: recipe, text, figures of the written model, versions."""
    data, more = settings.data, settings.extension
    tokens = settings.run.steps * data.batch * data.length + more.steps * more.batch * more.length
    return {
        "finished": True,
        "recipe": to_table(settings),
        "text": dict(identity),
        "steps": outcome.position,
        "tokens": tokens,
        "seconds": round(outcome.seconds, 1),
        "held_out_bits_per_byte": bits,
        "held_out_window": dict(zip(("length", "stride"), window(settings), strict=True)),
        "xz_bits_per_byte": xz_bits(held_out),
        "versions": versions("jax", "flax", "optax", "numpy"),
        "threads": os.cpu_count(),
    }


def versions(*names: str) -> dict[str, str]:
    """Installed versions of packages by name."""
    return {name: importlib.metadata.version(name) for name in names}


def xz_bits(text: bytes) -> float:
    """Bits per byte of `xz -9` on a text: what a model has to beat.

    >>> xz_bits(bytes(range(256)) * 64) < 1
    True
    """
    return 8 * len(lzma.compress(text, preset=9)) / len(text)
