"""The work: calibrating and applying a stage, and measuring the model that it leaves."""

import dataclasses
import importlib
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax

from ffnlab import transform, weights
from ffnlab.compress.plan import Job
from ffnlab.compress.report import Row, build

__all__ = ["PICTURES", "apply_stage", "measured", "score"]

# Transforms whose stats draw themselves: file name, and "module:function" from stats to an object
# with `draw(figure)`.
PICTURES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {"finercut": ("removal", "ffnlab.pruning.removal_map:removal_map")}
)


def apply_stage(
    job: Job, number: int, model: Any
) -> tuple[Any, dict[str, Callable[..., object]], float]:
    """Calibrates a stage, or takes up its calibration, and rewrites the model.

    Args:
      job: the job.
      number: of the stage, from 1.
      model: what the stage before it left, not prepared.
    Returns:
      the new model; its pictures, file name without ending -> function that draws; seconds.
    """
    stage, step = job.plan.recipe.stages[number - 1], job.plan.transforms[number - 1]
    start = time.perf_counter()
    with job.clock.phase(job.plan.labels[number - 1]):
        stats = transform.calibrate(
            step,
            # Calibration reads the weights often and does not change them.
            weights.prepare(model),
            job.plan.batches[stage.calibration],
            progress=job.progress,
            checkpoint=job.state.checkpoint(number, stage.transform),
        )
        rewritten = jax.block_until_ready(step.rewrite(model, stats))
    return rewritten, pictures_of(job, number, stats), time.perf_counter() - start


def pictures_of(job: Job, number: int, stats: object) -> dict[str, Callable[..., object]]:
    """The drawings of a stage's statistics, where its transform has any."""
    if job.plan.recipe.stages[number - 1].transform not in PICTURES:
        return {}
    name, target = PICTURES[job.plan.recipe.stages[number - 1].transform]
    module, _, function = target.partition(":")
    drawn = getattr(importlib.import_module(module), function)(stats)
    again = job.plan.labels[number - 1].rpartition(" ")[2]
    return {f"{name}-{again}" if again.isdigit() and again != "1" else name: drawn.draw}


def measured(job: Job, label: str, prepared: Any, model: Any, seconds: float) -> Row:
    """The row of a model; one that was measured before the job was interrupted is not again.

    Args:
      job: the job.
      label: of the row.
      prepared: the model as the backend reads it fastest.
      model: the model as it is stored.
      seconds: that the stage took.
    """
    if label in job.state.measured:
        return build(Row, job.state.measured[label], f"{job.state.file}: {label}")
    with job.clock.phase("evaluate"):
        size = job.plan.recipe.evaluation.batch
        task, samples = job.plan.task, job.plan.samples
        found = task.quality(prepared, samples, size, label=label, progress=job.progress)
        needed = task.cost(model, prepared, samples, size)
    with job.clock.phase(task.phase):
        both = [job.original] if prepared is job.original else [prepared, job.original]
        speeds = task.speeds(samples, *both)
    row = Row(
        stage=label,
        scores=dict(found),
        speed=speeds[0],
        speed_original=speeds[-1],
        seconds=seconds,
        **needed._asdict(),
    )
    job.state.record(label, dataclasses.asdict(row))
    return row


def score(job: Job, model: Any, label: str) -> float:
    """The first score of a prepared model on what the job holds out."""
    task, size = job.plan.task, job.plan.recipe.evaluation.batch
    found = task.quality(model, job.plan.samples, size, label=label, progress=job.progress)
    return found[task.scores[0].name]
