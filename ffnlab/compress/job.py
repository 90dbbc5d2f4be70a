"""The job: apply a recipe to a model, measure after each stage, write the result, check it.

OUT/model/       the compressed model: a Hugging Face directory with `ffnlab.json`, its weights
                 packed (compressed-tensors) where the recipe quantized any
OUT/dense/       on demand, the same with plain matrices, which stock `transformers` reads
OUT/report.json  what each stage cost and bought (`ffnlab.compress.report`)
OUT/pareto.png   quality against bytes and against decode speed
OUT/removal.png  the order in which FinerCut removed sublayers, where the recipe has it
OUT/.resume/     only while the job is not finished (`ffnlab.compress.state`)
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from flax import nnx

from ffnlab import tree, weights
from ffnlab.compress import measure, pictures
from ffnlab.compress.export import export
from ffnlab.compress.plan import Clock, Job, identity, plan
from ffnlab.compress.report import FORMAT, Report, Rival, Row
from ffnlab.compress.stages import apply_stage, measured, score
from ffnlab.compress.state import Interrupted, begin
from ffnlab.compress.task import Task
from ffnlab.errors import require
from ffnlab.parallel import locked
from ffnlab.recipes import Recipe
from ffnlab.report import as_png
from ffnlab.storage.files import StrPath, atomic_write
from ffnlab.studies.result import versions

__all__ = ["compress"]


def compress(
    model: Any,
    recipe: Recipe,
    task: Task,
    out: StrPath,
    *,
    source: str = "in memory",
    rival: Callable[[Any, Row], Rival] | None = None,
    dense: bool = False,
    interrupted: Interrupted = "refuse",
    loading: float = 0.0,
    origin: Mapping[str, object] = MappingProxyType({}),
    progress: bool = True,
) -> Report:
    """Applies a recipe to a model and writes the result with its report; see the module.

    Args:
      model: to be compressed; stays as it is.
      recipe: what to do.
      task: what the model is for, with the data to calibrate and to measure on: `TextTask` of a
        decoder, `EncoderTask` of an encoder, `LabelledTask` of a classifier.
      out: folder for the results; made when missing.
      source: where the model came from, for the report.
      rival: measures the dense model to compare with, given the compressed one and its row.
      dense: write OUT/dense too, where OUT/model is packed.
      interrupted: what to do with an interrupted job in `out`: "refuse", "resume" or "restart".
      loading: seconds that loading the model took, for the report.
      origin: what the model was trained on, written beside the compressed ones as training.json, so
        that scoring them can warn of it too.
      progress: show bars on a terminal.
    Returns:
      the report, as written.
    Raises:
      ConfigError: options that do not fit the model or the data (all at once, before any work), or
        an interrupted job in `out` that is not to be continued, or is another one, or another
        process at work there.
      NumericalError: a stage broke the model.
      FormatError: what was written is not what was measured, or the state in `out` is damaged.
    """
    require("matplotlib", extra="run")
    out, clock = Path(out), Clock()
    clock.seconds["load"] = loading
    with clock.phase("prepare"):
        planned = plan(model, recipe, task)
    with locked(out):
        with clock.phase("prepare"):
            state = begin(out, identity(model, recipe, task), interrupted=interrupted)
            job = Job(planned, weights.prepare(model), state, clock, progress)
        rows = [measured(job, "original", job.original, model, 0.0)]
        compressed, drawings = model, {}
        for number, label in enumerate(planned.labels, 1):
            compressed, drawing, seconds = apply_stage(job, number, compressed)
            drawings |= drawing
            rows.append(measured(job, label, weights.prepare(compressed), compressed, seconds))
        with clock.phase("write and check"):
            found, reached = functools.partial(score, job), rows[-1].scores[task.scores[0].name]
            options = {"dense": dense, "origin": origin}
            written = export(compressed, task.save, out, reached, found, **options)
        beside = None
        if rival is not None:
            with clock.phase("rival"):
                beside = rival(compressed, rows[-1])
        report = Report(
            format=FORMAT,
            model=describe(model, source, state.identity["model"]),
            recipe=recipe.as_json(),
            data=task.as_json(),
            item=task.item,
            scores=task.scores,
            axis=task.axis,
            pace=task.pace,
            measured_on=task.counts(planned.samples),
            rows=tuple(rows),
            exports=written,
            rival=beside,
            versions=versions(),
            device=measure.device(),
            seconds=clock.seconds,
            peak_memory=measure.peak_memory(),
        )
        publish(report, out, drawings, clock)
        state.finish()
    return report


def publish(report: Report, out: Path, drawings: dict[str, Callable], clock: Clock) -> None:
    """Writes the pictures of a finished job, and then its report."""
    with clock.phase("pictures"):
        for name, draw in {
            "pareto": functools.partial(pictures.pareto, report),
            **drawings,
        }.items():
            with atomic_write(out / f"{name}.png") as file:
                file.write(as_png(draw))
    report.write(out / "report.json")


def describe(model: Any, source: str, sha256: str) -> dict[str, object]:
    """What the report says of the original model."""
    config = getattr(model, "config", None)
    params = [node for _, node in tree.walk(model) if isinstance(node, nnx.Param)]
    found: dict[str, object] = {"source": source, "sha256": sha256, "kind": type(model).__name__}
    found["dtype"] = str(params[0].get_value().dtype)
    if hasattr(model, "compute_dtype"):
        found["compute_dtype"] = str(model.compute_dtype)
    names = ("vocab", "width", "hidden", "layers", "heads", "kv_heads", "head_dim", "family")
    return found | {name: getattr(config, name) for name in names if hasattr(config, name)}
