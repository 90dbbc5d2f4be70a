"""S-Mamba measured: series of which some tell the future of others, ETTh1, what a token costs."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float32, PyTree

from ffnlab import tree
from ffnlab.data import (
    ArrayBatches,
    Series,
    etth1,
    lagged_series,
    parts_of,
    scaling_of,
    time_marks,
    window_starts,
    windows,
)
from ffnlab.data.series import ETT_PARTS
from ffnlab.layers import Attention, AttentionSpec, Context, Mamba
from ffnlab.learning import backprop, members
from ffnlab.models import SMamba, SMambaConfig
from ffnlab.models.calibration import called
from ffnlab.models.cost import multiply_adds
from ffnlab.models.s_mamba import SMambaBlock
from ffnlab.parallel import LoopOptions, train
from ffnlab.sequences import SeriesBatches, forecast_squares, repeated_last
from ffnlab.studies import tuning
from ffnlab.studies.side_by_side import learned_members
from ffnlab.studies.tuning import Splits, Tuned

__all__ = [
    "ETT",
    "LAGGED",
    "MAMBA",
    "NO_MAMBA",
    "Early",
    "Plain",
    "cost_growth",
    "lagged",
    "on_etth1",
    "on_lagged",
    "plain",
    "under_scaling",
]

MAMBA, NO_MAMBA = "S-Mamba", "without Mamba"
LAGGED = SMambaConfig(length=48, horizon=12, width=32, hidden=64, layers=2, states=8)
ETT = SMambaConfig(length=96, horizon=96, width=256, hidden=256, layers=2, states=2)
SHARES = (0.7, 0.1, 0.2)
ETT_RATE, EPOCHS, PATIENCE, BATCH = 7e-5, 10, 3, 32  # the authors' of ETTh1
RIDGES = tuple(10.0**e for e in range(-3, 6))
AT_ONCE = 512

Rows = tuple[Mapping[str, np.ndarray], np.ndarray]


class Plain(NamedTuple):
    """Mean squared errors on test windows of what is no network.

    Attributes:
      last: the last place, again and again.
      own: a linear map of the window of each series, one for all series.
      joint: a linear map of the windows of all series together.
    """

    last: float
    own: float
    joint: float


class Early(NamedTuple):
    """A run that stops early.

    Attributes:
      error: mean squared, on test windows, of the epoch that was best on validation windows.
      validation: of every epoch.
      parameters: numbers in the network.
    """

    error: float
    validation: Sequence[float]
    parameters: int


def cut(series: Series, parts: Sequence, config: SMambaConfig, *, marks: bool) -> Splits:
    """The windows of three parts, scaled by the first."""
    places = parts_of(len(series.values), parts)
    values = scaling_of(series.values[places[0]])(series.values)
    told = time_marks(series.times) if marks else None
    found = []
    for part in places:
        starts = window_starts(part, config.length, config.horizon)
        each = windows(values, told, starts, config.length, config.horizon)
        found.append(({"x": each.x} | ({} if told is None else {"marks": each.marks}), each.y))
    return Splits(*found)


def lagged(seed: int) -> Splits:
    """Windows of series that tell each other's future."""
    return cut(lagged_series(seed), SHARES, LAGGED, marks=False)


def on_lagged(
    data: Splits, seeds: Sequence[int], *, steps: int, rates: Sequence[float]
) -> dict[str, Tuned]:
    """S-Mamba and the same network whose Mamba gives zeros, each at the best of its rates.

    All rates and seeds of a side learn side by side, from the same batches; the rate is that of the
    first seed's least error on validation windows.
    """
    return {
        MAMBA: tuned(data, seeds, steps, rates, drawn, None),
        NO_MAMBA: tuned(data, seeds, steps, rates, without, tree.where(no_mamba)),
    }


def tuned(
    data: Splits,
    seeds: Sequence[int],
    steps: int,
    rates: Sequence[float],
    make: Callable[[int], SMamba],
    trainable: tree.Predicate | None,
) -> Tuned:
    """One side: networks that `make` gives for a seed, of which some parts learn."""
    count = len(rates) * len(seeds)
    rule = members(
        lambda rate: backprop(
            forecast_squares, optax.adam(rate), informed=True, trainable=trainable
        ),
        count,
        vary={"rate": [rate for rate in rates for _ in seeds]},
    )
    nets = [make(seed) for seed in seeds] * len(rates)
    start = jax.tree.map(lambda *leaves: jnp.stack(leaves), *nets)
    batches = ArrayBatches(data.train, BATCH, seeds[0])
    found = learned_members(rule, start, batches, steps, seeds[0], count)
    judged = [error(net, data.validation) for net in found[:: len(seeds)]]
    best = int(np.nan_to_num(judged, nan=np.inf).argmin())
    kept = found[best * len(seeds) : (best + 1) * len(seeds)]
    grid = tuning.grid(rate=rates)
    return Tuned(
        setting=grid[best],
        tried=tuple(zip(grid, judged, strict=True)),
        parameters=tuning.numbers(tree.trained(nets[0], trainable)[0]),
        mirror=0,
        seeds=tuple(seeds),
        scores=tuple(error(net, data.test) for net in kept),
        states=tuple(kept),
    )


def drawn(seed: int) -> SMamba:
    """A network of the lagged series."""
    return LAGGED.make(key=jax.random.key(seed))


def no_mamba(path: str, node: object) -> bool:
    """Whether an array is of no Mamba."""
    return tree.floating(path, node) and not {"forward", "reverse"} & set(path.split("."))


def without(seed: int) -> SMamba:
    """The network of a seed with zeros for what Mamba gives."""
    model = drawn(seed)
    outputs = [f"{p}.output.w" for p, node in tree.walk(model) if isinstance(node, Mamba)]
    nodes = dict(tree.walk(model))
    return tree.replace(model, {p: jax.tree.map(jnp.zeros_like, nodes[p]) for p in outputs})


forecast = jax.jit(called)


def error(model: SMamba, rows: Rows) -> float:
    """Mean squared error of forecasts."""
    inputs, y = rows
    total = 0.0
    for begin in range(0, len(y), AT_ONCE):
        part = {n: jnp.asarray(v[begin : begin + AT_ONCE]) for n, v in inputs.items()}
        found = np.asarray(forecast(model, part), np.float64)
        total += float(np.sum(np.mean((found - y[begin : begin + AT_ONCE]) ** 2, (1, 2))))
    return total / len(y)


def plain(data: Splits) -> Plain:
    """What is no network, its strength of regularization chosen on validation windows."""
    (inputs, y) = data.test
    last = float(np.mean((repeated_last(inputs["x"], y.shape[1]).astype(float) - y) ** 2))
    return Plain(last, linear(data, by_series), linear(data, by_window))


def by_series(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Each series of each window as a row."""
    turn = lambda v: np.moveaxis(v, 1, 2).reshape(-1, v.shape[1]).astype(float)  # noqa: E731
    return turn(rows[0]["x"]), turn(rows[1])


def by_window(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """All series of a window as one row."""
    return tuple(v.reshape(len(v), -1).astype(float) for v in (rows[0]["x"], rows[1]))


def linear(data: Splits, cases) -> float:
    """Test error of the ridge regression of what follows on what was, with an offset."""
    x, y = cases(data.train)
    x = np.column_stack([x, np.ones(len(x))])
    gram, cross = x.T @ x, x.T @ y
    found = {}
    for ridge in RIDGES:
        w = np.linalg.solve(gram + ridge * np.eye(len(gram)), cross)
        missed = []
        for part in (data.validation, data.test):
            a, b = cases(part)
            missed.append(float(np.mean((np.column_stack([a, np.ones(len(a))]) @ w - b) ** 2)))
        found[ridge] = missed
    return min(found.values())[1]


def on_etth1(seed: int) -> tuple[Early, Plain]:
    """The network of the authors' settings on their split, and what is no network."""
    series, config = etth1(), ETT
    data = cut(series, ETT_PARTS, config, marks=True)
    places = parts_of(len(series.values), ETT_PARTS)
    values = scaling_of(series.values[places[0]])(series.values)
    starts = window_starts(places[0], config.length, config.horizon)
    options = {"length": config.length, "horizon": config.horizon, "rows": BATCH, "seed": seed}
    batches = SeriesBatches(values, time_marks(series.times), starts, **options)
    epoch = len(starts) // BATCH
    rate = optax.exponential_decay(ETT_RATE, epoch, 0.5, staircase=True)
    rule = backprop(forecast_squares, optax.adam(rate), informed=True)
    best: dict[str, float] = {}
    told: list[float] = []

    def evaluate(state: PyTree) -> dict[str, float]:
        told.append(error(state.model, data.validation))
        if told[-1] == min(told):
            best["test"] = error(state.model, data.test)
        return {"validation": told[-1]}

    stop = LoopOptions(
        log_every=0, evaluate_every=epoch, watch="validation", patience=PATIENCE, progress=False
    )
    model, key = config.make(key=jax.random.key(seed)), jax.random.key(seed)
    train(rule, model, batches, EPOCHS * epoch, key=key, evaluate=evaluate, options=stop)
    return Early(best["test"], told, tuning.numbers(model)), plain(data)


def cost_growth(counts: Sequence[int] = (128, 256), width: int = 64) -> dict[str, float]:
    """How many times the products of a layer grow with so many more tokens, by what mixes them."""
    config = SMambaConfig(8, 8, width, width, layers=1, states=16)
    block = SMambaBlock(config, key=jax.random.key(0), dtype=jnp.float32)
    spec = AttentionSpec(4, 4, width // 4, None, causal=False)
    attention = Attention(spec, width, key=jax.random.key(0))

    def mixed(attention: Attention, h: Array) -> Array:
        return attention(h, Context({}, {None: None}))[0]

    def ratio(call, module) -> float:
        one, other = (
            multiply_adds(call, module, jax.ShapeDtypeStruct((1, n, width), jnp.float32))
            for n in counts
        )
        return other / one

    return {
        MAMBA: ratio(lambda block, h: block.forward(h)[0] + block.reverse(h)[0], block),
        "attention": ratio(mixed, attention),
    }


def under_scaling(model: SMamba, x: Float32[np.ndarray, "b t n"]) -> float:
    """Largest difference of forecasts of a x + b from a y + b, over the largest forecast."""
    random = np.random.default_rng(0)
    a, b = (random.uniform(*each, x.shape[2]).astype(np.float32) for each in ((0.5, 2), (-3, 3)))
    run = jax.jit(lambda model, x: model(x))
    wanted = run(model, jnp.asarray(x)) * a + b
    found = run(model, jnp.asarray(x * a + b))
    return float(jnp.abs(found - wanted).max() / jnp.abs(wanted).max())
