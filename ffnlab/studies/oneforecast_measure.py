"""Forecasts learned and measured: waves, a nested region, and real air temperature.

Every way of learning tries the same rates, with the first seed and as many steps, and takes the
one that is best on validation rows; its seeds are members of one program. Errors are roots of mean
squares over all numbers of all test moments, in standard deviations of the training moments.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from ffnlab.data import AirTemperature, Scaling, Waves, air_temperature, drawn_waves
from ffnlab.graphs import (
    ForecastBatch,
    ForecastBatches,
    Nest,
    Rows,
    forecast_loss,
    forecasts,
    globe_of,
    nested_inputs,
    split_by_time,
    temperature_rows,
    wave_rows,
)
from ffnlab.learning import backprop, members
from ffnlab.models import Globe, OneForecast, OneForecastConfig
from ffnlab.parallel import LoopOptions, train

__all__ = [
    "BOXES",
    "COUNTS",
    "NEST",
    "RATE",
    "REGION",
    "UK",
    "WORLD",
    "Learned",
    "Measured",
    "Task",
    "border",
    "learned",
    "measured",
    "nested_tasks",
    "rms",
    "still",
    "temperature",
    "tuned",
    "wave_task",
]

BOXES = (0.0, 30.0, 105.0, 160.0, 10.0, 30.0, -95.0, -35.0)  # the authors'
RATE, NOISE, HOURS, STEPS = 1e-3, 0.01, 24.0, 4
COUNTS = (400, 64, 64)  # waves to learn from, to choose rates by, and to score on
WORLD = OneForecastConfig((12, 24), 3, 3, 2, BOXES, 32, 4)
# Four rows and columns of the world, 60 degrees square, in four times the resolution.
NEST = Nest((4, 8), (10, 14), 2, (0, 1, 2))
REGION = OneForecastConfig((16, 16), 3, 3, 2, width=32, blocks=4)
PLACE = {"latitudes": (-30.0, 30.0), "longitudes": (-30.0, 30.0)}  # of the region
EDGE = 2  # rows and columns that are its border
# Finer and finer around the data, 1.1 degrees between nodes in the last box.
AROUND = (
    *(25.0, 80.0, -45.0, 40.0),
    *(38.0, 70.0, -28.0, 20.0),
    *(44.0, 65.0, -18.0, 10.0),
    *(48.0, 61.0, -13.0, 5.0),
)
UK = OneForecastConfig(
    (33, 49), 3, 1, 2, AROUND, 32, 4, latitudes=(50.0, 58.25), longitudes=(-10.25, 2.0)
)
UK_HOURS, SHARES = 6, (0.6, 0.2, 0.2)


class Task(NamedTuple):
    """What is learned from and what is scored.

    Attributes:
      config: of the network.
      globe: that it runs on.
      train, valid, test: rows to learn from, to choose by, and to score on.
      scaling: of their fields.
    """

    config: OneForecastConfig
    globe: Globe
    train: Rows
    valid: Rows
    test: Rows
    scaling: Scaling


class Learned(NamedTuple):
    """Networks at the rate that was best.

    Attributes:
      models: by seed, leaves [n, …].
      rate: the chosen one.
      tried: the error of the first step on validation rows, by rate; of the first seed.
    """

    models: PyTree
    rate: float
    tried: Mapping[float, float]


class Measured(NamedTuple):
    """Errors of forecasts.

    Attributes:
      errors: by seed and step, [n, s].
      still: of what stays as it is, by step, [s].
      found: forecasts of the first seed, [rows, s, h, w, o].
    """

    errors: Float[np.ndarray, "n s"]
    still: Float[np.ndarray, "s"]
    found: Float[np.ndarray, "r s h w o"]


def rms(
    apart: Float[np.ndarray, "... r s h w o"], where: Float[np.ndarray, "h w"] | None = None
) -> Float[np.ndarray, "... s"]:
    """Root of the mean square over rows, places and fields; over some places alone where given."""
    squares = np.square(np.asarray(apart, np.float64)).mean(-1)
    weights = np.ones(squares.shape[-2:]) if where is None else where
    return np.sqrt((squares * weights).sum((-2, -1)).mean(-2) / weights.sum())


def still(rows: Rows) -> Float[np.ndarray, "s"]:
    """Errors of the forecast that all stays as it is."""
    now = rows.x[:, None, ..., : rows.y.shape[-1]]
    return rms(now - rows.y)


def border(grid: Sequence[int], width: int = EDGE) -> Float[np.ndarray, "h w"]:
    """1 at the outermost rows and columns of a grid, 0 inside."""
    found = np.ones(tuple(grid))
    found[width:-width, width:-width] = 0
    return found


def learned(
    task: Task,
    steps: int,
    seeds: Sequence[int],
    *,
    start: OneForecast | None = None,
    rates: Sequence[float] | None = None,
    noise: float = NOISE,
    together: int = 50,
    watch: tuple[Sequence[int], Callable[[PyTree], None]] | None = None,
) -> PyTree:
    """Networks of a configuration that learned a task, all seeds as one, leaves [n, …].

    Args:
      task: what is learned.
      steps: of one moment each.
      seeds: of first weights.
      start: networks [n, …] to go on from; drawn when None.
      rates: of Adam, by member; that of the authors for all when None.
      noise: added to inputs.
      together: steps in one compiled loop.
      watch: positions at which a function is given the networks as they are.
    Raises:
      KeyboardInterrupt: it was stopped.
    """
    make = lambda rate: backprop(forecast_loss(noise=noise), optax.adam(rate), informed=True)  # noqa: E731
    rates = [RATE] * len(seeds) if rates is None else rates
    rule = members(make, len(seeds), vary={"rate": rates}, chunk=1)
    if start is None:
        keys = jax.vmap(jax.random.key)(jnp.array(seeds))
        start = jax.vmap(lambda key: task.config.make(key=key))(keys)
    globe = jax.tree.map(np.asarray, task.globe)
    batches = ForecastBatches(task.train, globe, seed=seeds[0])
    positions, look = ((), None) if watch is None else watch

    def shown(state: PyTree) -> Mapping[str, float]:
        if look is not None:
            look(rule.model(state))
        return {}

    options = LoopOptions(log_every=0, progress=False, evaluate_at=tuple(positions))
    outcome = train(
        rule,
        start,
        batches,
        steps,
        key=jax.random.key(seeds[0]),
        options=options,
        together=together,
        evaluate=None if look is None else shown,
    )
    if not outcome.finished:
        raise KeyboardInterrupt(f"stopped at step {outcome.position} of {steps}")
    return rule.model(outcome.state)


def tuned(task: Task, steps: int, seeds: Sequence[int], rates: Sequence[float]) -> Learned:
    """Networks of all seeds at the best of several rates.

    Args:
      task, steps, seeds: as for `learned`.
      rates: tried with the first seed, each for all steps; the rows of `task.valid` decide.
    """
    found = learned(task, steps, [seeds[0]] * len(rates), rates=rates)
    errors = rms(answers(found, task, task.valid) - task.valid.y)[:, 0]
    best = int(np.argmin(errors))
    models = jax.tree.map(lambda leaf: leaf[best : best + 1], found)
    if others := seeds[1:]:
        more = learned(task, steps, others, rates=[rates[best]] * len(others))
        models = jax.tree.map(lambda *each: jnp.concatenate(each), models, more)
    return Learned(models, rates[best], dict(zip(rates, errors.tolist(), strict=True)))


@jax.jit
def of_all(models: PyTree, batch: ForecastBatch) -> Float[Array, "n r s h w o"]:
    """Forecasts of every network."""
    return jax.lax.map(lambda model: forecasts(model, batch), models)


def answers(models: PyTree, task: Task, rows: Rows) -> Float[np.ndarray, "n r s h w o"]:
    """What networks [n, …] forecast of rows, as many steps as these have."""
    x, y, told = jax.tree.map(jnp.asarray, rows)
    return np.asarray(of_all(models, ForecastBatch(x, y, task.globe, told)))


def measured(models: PyTree, task: Task, rows: Rows | None = None) -> Measured:
    """Errors of networks on the test rows of their task, or on others."""
    rows = task.test if rows is None else rows
    found = answers(models, task, rows)
    return Measured(rms(found - rows.y), still(rows), found[0])


def drawn_parts(counts: Sequence[int], seed: int) -> list[Waves]:
    """Waves drawn at once, some for each part."""
    waves, ends = drawn_waves(sum(counts), seed), np.cumsum(counts)
    parts = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]
    return [Waves(*(each[part] for each in waves)) for part in parts]


def counts_of(task: Task) -> list[int]:
    """Rows to learn from, to choose by, and to score on."""
    return [len(rows.x) for rows in (task.train, task.valid, task.test)]


def wave_task(
    config: OneForecastConfig, seed: int, *, counts: Sequence[int] = COUNTS, steps: int = STEPS
) -> Task:
    """Waves to learn a day of, others to choose by, and others to forecast for several days."""
    first, second, third = drawn_parts(counts, seed)
    rows, scaling = wave_rows(first, config, hours=HOURS)
    valid, _ = wave_rows(second, config, hours=HOURS, scaling=scaling)
    held, _ = wave_rows(third, config, hours=HOURS, steps=steps, scaling=scaling)
    return Task(config, globe_of(config), rows, valid, held, scaling)


def in_steps(task: Task, seed: int, steps: int) -> Task:
    """A task of waves whose training rows know several days."""
    waves = drawn_parts(counts_of(task), seed)[0]
    rows, _ = wave_rows(waves, task.config, hours=HOURS, steps=steps, scaling=task.scaling)
    return task._replace(train=rows)


def nested_tasks(world: Task, models: PyTree, seed: int) -> dict[str, Task]:
    """The region alone, told of the world, and told of it without a margin.

    Args:
      world: the global task; its waves are those of the region.
      models: global networks [n, …], of which the first forecasts.
      seed: of the waves.
    """
    placed = dataclasses.replace(REGION, **PLACE)
    alone = train, valid, test = [
        wave_rows(waves, placed, hours=HOURS, scaling=world.scaling)[0]
        for waves in drawn_parts(counts_of(world), seed)
    ]
    first = jax.tree.map(lambda leaf: leaf[:1], models)
    told = [
        answers(first, world, each._replace(y=each.y[:, :1]))[0, :, 0]
        for each in (world.train, world.valid, world.test)
    ]
    globe = globe_of(REGION)
    tasks = {"alone": Task(REGION, globe, train, valid, test, world.scaling)}
    for name, margin in (("nested", NEST.margin), ("no margin", 0)):
        nest = Nest(NEST.rows, NEST.columns, margin, NEST.channels)
        join = jax.jit(jax.vmap(lambda x, forecast, nest=nest: nested_inputs(nest, x, forecast)))
        rows = [
            Rows(np.asarray(join(jnp.asarray(each.x), jnp.asarray(world_says))), each.y)
            for each, world_says in zip(alone, told, strict=True)
        ]
        config = dataclasses.replace(REGION, inputs=rows[0].x.shape[-1])
        tasks[name] = Task(config, globe, rows[0], rows[1], rows[2], world.scaling)
    return tasks


class Temperature(NamedTuple):
    """A task of real temperature with what forecasts that know no dynamics say.

    Attributes:
      task: its validation rows choose among moments of training.
      climatology: errors on the test rows of the mean of the hour of the day, by step, [s].
    """

    task: Task
    climatology: Float[np.ndarray, "s"]


def temperature(config: OneForecastConfig = UK, found: AirTemperature | None = None) -> Temperature:
    """Hours over the United Kingdom, split by time with a day between the parts.

    Raises:
      FFNLabError: the data is not there.
    """
    found = air_temperature() if found is None else found
    parts = split_by_time(len(found.hours), SHARES)
    train, scaling, _ = temperature_rows(found, parts[0], hours=UK_HOURS)
    others = [temperature_rows(found, part, hours=UK_HOURS, scaling=scaling) for part in parts[1:]]
    (valid, _, _), (test, _, first) = others
    task = Task(config, globe_of(config), train, valid, test, scaling)
    return Temperature(task, by_hour(found, parts[0], first, test, scaling))


def by_hour(
    found: AirTemperature, part: np.ndarray, first: np.ndarray, test: Rows, scaling: Scaling
) -> Float[np.ndarray, "1"]:
    """Errors of the mean over the training days of the hour of the day, place by place."""
    hours, scaled = found.hours % 24, scaling(found.kelvin[..., None])
    means = np.stack([scaled[part][hours[part] == hour].mean(0) for hour in range(24)])
    return rms(means[hours[first + UK_HOURS]][:, None] - test.y)


def best_by(task: Task, steps: int, seeds: Sequence[int], looks: int = 4) -> PyTree:
    """Networks as they were when their mean validation error was least, of several looks."""
    kept: dict[str, Any] = {"error": np.inf}

    def look(models: PyTree) -> None:
        error = float(rms(answers(models, task, task.valid) - task.valid.y).mean())
        if error < kept["error"]:
            kept.update(error=error, models=jax.tree.map(jnp.copy, models))

    positions = [steps * i // looks for i in range(1, looks)]  # the loop looks at the end by itself
    learned(task, steps, seeds, watch=(positions, look))
    return kept["models"]
