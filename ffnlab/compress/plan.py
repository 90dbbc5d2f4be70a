"""Before the work: everything that can be wrong with a job is found here, all of it at once."""

import contextlib
import dataclasses
import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

import ffnlab
from ffnlab.compress.state import State
from ffnlab.compress.task import Task
from ffnlab.errors import ConfigError, FFNLabError
from ffnlab.recipes import Calibration, Recipe
from ffnlab.storage import structure
from ffnlab.transform import Transform

__all__ = ["Clock", "Job", "Plan", "digest", "identity", "plan"]


class Clock:
    """Adds up seconds by phase.

    Attributes:
      seconds: by name, in the order of their beginning.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time of the block to a phase."""
        start = time.perf_counter()
        self.seconds.setdefault(name, 0.0)
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be done, checked.

    Attributes:
      recipe: as given.
      labels: a name per stage, in which a transform that occurs twice has a number.
      transforms: one per stage.
      batches: calibration batches by their settings.
      task: what the model is for.
      samples: what the task scores.
    """

    recipe: Recipe
    labels: Sequence[str]
    transforms: Sequence[Transform]
    batches: Mapping[Calibration, list]
    task: Task
    samples: Any


@dataclasses.dataclass(frozen=True)
class Job:
    """What the phases of one job share.

    Attributes:
      plan: what is to be done.
      original: the original model, prepared for the backend.
      state: what is on disk for `resume`.
      clock: seconds by phase.
      progress: whether bars are shown.
    """

    plan: Plan
    original: Any
    state: State
    clock: Clock
    progress: bool


def plan(model: Any, recipe: Recipe, task: Task) -> Plan:
    """Checks that a job can be done; the arguments are those of `compress`.

    Raises:
      ConfigError: it cannot; every problem of recipe, model and data is listed.
    """
    problems = task.problems(model, recipe)
    labels, transforms = labels_of(recipe), [stage.build() for stage in recipe.stages]
    for number, (label, transform) in enumerate(zip(labels, transforms, strict=True), 1):
        try:
            transform.init(model)
        except FFNLabError as error:
            problems.append(f"stage {number} ({label}): {error}")
    batches, samples = {}, None
    for settings in dict.fromkeys(stage.calibration for stage in recipe.stages):
        try:
            batches[settings] = task.calibration(model, settings)
        except FFNLabError as error:
            problems.append(str(error))
    try:
        samples = task.held_out(model, recipe.evaluation)
    except FFNLabError as error:
        problems.append(str(error))
    if problems or samples is None:
        listed = "\n".join(f"  - {problem}" for problem in dict.fromkeys(problems))
        raise ConfigError(f"{recipe.source} does not fit the model or the data:\n{listed}")
    return Plan(recipe, labels, transforms, batches, task, samples)


def identity(model: Any, recipe: Recipe, task: Task) -> dict[str, str]:
    """What must be the same for a job to be resumed."""
    return {
        "ffnlab": ffnlab.__version__,
        "jax": jax.__version__,
        "recipe": recipe.digest(),
        "model": digest(model),
        "data": hashlib.sha256(json.dumps(task.as_json()).encode()).hexdigest(),
    }


def labels_of(recipe: Recipe) -> list[str]:
    """A name for each stage: its transform, with a number where it occurs more than once."""
    names = [stage.transform for stage in recipe.stages]
    times, seen = Counter(names), Counter()
    labels = []
    for name in names:
        seen[name] += 1
        labels.append(f"{name} {seen[name]}" if times[name] > 1 else name)
    return labels


def digest(model: Any) -> str:
    """SHA-256 of a model: structure, static fields, dtypes, shapes and values."""
    found = hashlib.sha256(json.dumps(structure.describe(model), sort_keys=True).encode())
    for leaf in jax.tree.leaves(model):
        found.update(np.ascontiguousarray(np.asarray(leaf)).view(np.uint8).data)
    return found.hexdigest()
