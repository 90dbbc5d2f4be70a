"""OneForecast on waves whose truth is exact, in a nested region, and on real air temperature.

Rossby-Haurwitz waves on 12 x 24 places are forecast a day ahead, and four days by roll-out, by the
gated network and by GraphCast's blocks of equal width and depth, beside the forecast that nothing
moves. A second network forecasts a region in four times the resolution: alone, told of the global
forecast, and told of it without a margin. Real temperature over the United Kingdom, a month of one
variable, is forecast six hours ahead beside persistence and the climatology of the hour.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ffnlab.data import find_folder
from ffnlab.graph import Graph, collected
from ffnlab.graphs import balanced, make_globe
from ffnlab.layers.mesh import MeshBlock
from ffnlab.storage.files import StrPath
from ffnlab.studies import STUDIES
from ffnlab.studies import oneforecast_measure as measure
from ffnlab.studies import oneforecast_pictures as pictures
from ffnlab.studies.oneforecast_measure import BOXES, REGION, UK, WORLD, Measured, border, rms
from ffnlab.studies.result import Claim, Result
from ffnlab.studies.tried import at_ends

__all__ = ["run"]

GATED, PLAIN, TUNED = "gated", "GraphCast's blocks", "gated, then two days at once"
ALONE, NESTED, NO_MARGIN = "alone", "nested", "no margin"
ONE_STEP, ROLL_OUT = 0.35, 0.6  # of persistence, the card's
ROUNDING = 1e-5
RATES = (5e-4, measure.RATE, 2e-3)  # the authors' in the middle
# (level, boxes, grid) -> nodes, edges of the mesh, up, down: the card's
COUNTS = {
    (2, True, (12, 24)): (206, 1_568, 556, 864),
    (5, False, (120, 240)): (10_242, 81_900, 45_864, 86_400),
    (5, True, (120, 240)): (12_337, 98_296, 49_233, 86_400),
}


class Sizes(NamedTuple):
    """Of a form of the study.

    Attributes:
      seeds: of first weights.
      steps: of global networks; of regional ones; of temperature; of learning two days at once.
      rates: that every network on waves tries.
    """

    seeds: Sequence[int]
    steps: tuple[int, int, int, int]
    rates: Sequence[float]


class Region(NamedTuple):
    """Errors of a way to forecast the region, by seed: everywhere, and at its border, [n]."""

    whole: np.ndarray
    border: np.ndarray


Tried = Mapping[str, measure.Learned]


def sizes_of(seed: int, quick: bool) -> Sizes:
    """Of either form."""
    if quick:
        return Sizes([seed], (1500, 200, 150, 0), (measure.RATE,))
    return Sizes([seed, seed + 1], (3000, 1000, 1000, 500), RATES)


def run(*, out: StrPath | None = None, quick: bool = False, seed: int = 0) -> Result:
    """The study; arguments as for `ffnlab.studies.run.run_study`."""
    begin, sizes = time.perf_counter(), sizes_of(seed, quick)
    world = measure.wave_task(WORLD, seed)
    networks, found = global_forecasts(world, sizes, seed)
    region, by_ring = regional_forecasts(world, networks, sizes, seed)
    real = temperature(sizes) if find_folder("era5_uk_t2m") is not None else {}
    return Result(
        slug="oneforecast",
        title=STUDIES["oneforecast"].title,
        settings=settings_of(sizes) | {"rates": tried_of(networks)},
        seed=seed,
        quick=quick,
        seconds=time.perf_counter() - begin,
        claims=[
            counts_claim(),
            block_claim(seed),
            balance_claim(seed),
            *(
                dataclasses.replace(claim, evidence=f"{claim.evidence}; {rates_of(networks)}")
                for claim in (*global_claims(found), *region_claims(region))
            ),
            *temperature_claims(real),
        ],
        table=rows_of(found, region, real),
        pictures={
            "forecast": lambda figure: pictures.draw_maps(figure, world, found[GATED].found),
            "errors_by_day": lambda figure: pictures.draw_days(figure, found),
            "region": lambda figure: pictures.draw_rings(figure, by_ring),
        },
    ).write(out)


def settings_of(sizes: Sizes) -> dict[str, object]:
    """What was run."""
    waves, region, real, two_days = sizes.steps
    return {
        "network": {"width": WORLD.width, "blocks": WORLD.blocks, "level": WORLD.level},
        "waves": "{} to learn from, {} to choose rates by, {} to score on, 12 x 24 places, a step "
        "of a day".format(*measure.COUNTS),
        "region": f"{REGION.grid}, rows {measure.NEST.rows} and columns {measure.NEST.columns} of "
        f"the world, margin {measure.NEST.margin}",
        "temperature": f"ERA5, 33 x 49 places, {measure.UK_HOURS} hours ahead, parts "
        f"{measure.SHARES} of the hours with a day between them",
        "optimizer": f"Adam, one moment a step, noise {measure.NOISE}; temperature at "
        f"{measure.RATE}",
        "steps": {"waves": waves, "region": region, "temperature": real, "two days": two_days},
        "seeds": list(sizes.seeds),
    }


def tried_of(networks: Tried) -> dict[str, dict[str, float]]:
    """Validation errors by network and rate."""
    return {
        name: {f"{rate:g}": round(error, 4) for rate, error in each.tried.items()}
        for name, each in networks.items()
    }


def rates_of(networks: Tried) -> str:
    """How rates were chosen, in words."""
    rates = next(iter(networks.values())).tried
    if len(rates) == 1:
        return f"all networks at rate {next(iter(rates)):g}, not tuned"
    chosen = {name: each.rate for name, each in networks.items()}
    return (
        f"every network at the best of the rates {', '.join(f'{rate:g}' for rate in rates)} on "
        f"{measure.COUNTS[1]} other waves, first seed: "
        + ", ".join(f"{name} {rate:g}" for name, rate in chosen.items())
        + f"; {at_ends(list(chosen.values()), list(rates))}"
    )


def global_forecasts(
    world: measure.Task, sizes: Sizes, seed: int
) -> tuple[dict[str, measure.Learned], dict[str, Measured]]:
    """(networks, errors) by way of forecasting the world."""
    plain = world._replace(config=dataclasses.replace(WORLD, gated=False))
    tasks = {GATED: world, PLAIN: plain}
    networks = {
        name: measure.tuned(task, sizes.steps[0], sizes.seeds, sizes.rates)
        for name, task in tasks.items()
    }
    found = {name: measure.measured(networks[name].models, task) for name, task in tasks.items()}
    if more := sizes.steps[3]:
        ahead = measure.in_steps(world, seed, 2)
        rates = [networks[GATED].rate / 10] * len(sizes.seeds)
        start = networks[GATED].models
        tuned = measure.learned(ahead, more, sizes.seeds, start=start, rates=rates)
        found[TUNED] = measure.measured(tuned, world)
    return networks, found


def regional_forecasts(
    world: measure.Task, networks: dict[str, measure.Learned], sizes: Sizes, seed: int
) -> tuple[dict[str, Region], dict[str, np.ndarray]]:
    """Errors of the region by way, and by way and distance from its border.

    The networks of the region join those of the world.
    """
    found, rings = {}, {}
    for name, task in measure.nested_tasks(world, networks[GATED].models, seed).items():
        networks[name] = measure.tuned(task, sizes.steps[1], sizes.seeds, sizes.rates)
        small = networks[name].models
        apart = measure.answers(small, task, task.test) - task.test.y
        outside = border(task.config.grid)
        found[name] = Region(rms(apart)[:, 0], rms(apart, outside)[:, 0])
        half = task.config.grid[0] // 2
        each = [border(task.config.grid, k + 1) * (1 - ring(task.config.grid, k))
                for k in range(half)]  # fmt: skip
        rings[name] = np.stack([rms(apart, where)[:, 0].mean() for where in each])
    return found, rings


def ring(grid: Sequence[int], k: int) -> np.ndarray:
    """1 at the k outermost rows and columns of a grid."""
    return border(grid, k) if k else np.zeros(tuple(grid))


def temperature(sizes: Sizes) -> dict[str, np.ndarray]:
    """Errors six hours ahead, in kelvin: of the networks, of what stays, of the climatology."""
    given = measure.temperature(UK)
    models = measure.best_by(given.task, sizes.steps[2], sizes.seeds)
    found = measure.measured(models, given.task)
    kelvin = float(given.task.scaling.deviation[0])
    return {
        "network": found.errors[:, 0] * kelvin,
        "persistence": found.still[:1] * kelvin,
        "climatology": given.climatology[:1] * kelvin,
    }


def spread(values: np.ndarray, unit: str = "") -> str:
    """Mean and range over seeds.

    >>> spread(np.array([0.1, 0.3])), spread(np.array([0.2]), " K")
    ('0.200 (0.100 to 0.300)', '0.200 K')
    """
    values = np.atleast_1d(values)
    shown = f"{values.mean():.3f}{unit}"
    return shown if len(values) == 1 else f"{shown} ({values.min():.3f} to {values.max():.3f})"


def counts_claim() -> Claim:
    """Nodes and edges of the authors' meshes."""
    found = {}
    for level, is_refined, grid in COUNTS:
        globe = make_globe(grid, level, refined=BOXES if is_refined else ())
        edges = (globe.mesh.num_edges, globe.up.num_edges, globe.down.num_edges)
        found[level, is_refined, grid] = (globe.mesh.num_nodes, *edges)
    same = [name for name, counts in COUNTS.items() if found[name] == counts]
    return Claim(
        "the meshes are the authors'",
        "nodes, edges, edges up and down: " + "; ".join(map(str, COUNTS.values())),
        f"{len(same)} of {len(COUNTS)} alike: " + "; ".join(map(str, found.values())),
        len(same) == len(COUNTS),
        "counts of level 2 refined, of level 5, and of level 5 refined in the authors' two boxes",
        seeds=0,
    )


def block_claim(seed: int) -> Claim:
    """What a block is when its gate is forced to 1 and its softmax replaced by a sum."""
    keys = jax.random.split(jax.random.key(seed), 4)
    random = np.random.default_rng(seed)
    graph = Graph.make(*random.integers(0, 20, (2, 80)), nodes=20)
    gated, plain = MeshBlock(16, key=keys[0]), MeshBlock(16, key=keys[1], gated=False)
    e, x = jax.random.normal(keys[2], (80, 16)), jax.random.normal(keys[3], (20, 16))
    plain.edge = gated.edge
    gate: Any = gated.gate
    last = gate.last
    gate.last = last.replace(jax.tree.map(jnp.zeros_like, last.weight), last.bias + 100.0)
    p = collected(graph, gated.attention(graph, e))
    sums = float(jnp.abs(p[graph.degrees > 0] - 1).max())
    apart = float(jnp.abs(gated(graph, e, x)[0] - plain(graph, e, x)[0]).max())
    return Claim(
        "attention adds up to 1 for each node and head, and with its gate at 1 an edge is updated "
        "as GraphCast's",
        "-",
        f"sums within {sums:.1e}, edges within {apart:.1e}",
        max(sums, apart) <= ROUNDING,
        f"a graph of 20 nodes and 80 edges, width 16: the largest of both at most {ROUNDING}",
        seeds=1,
    )


def balance_claim(seed: int) -> Claim:
    """Lengths of the balanced gradients of fields."""
    scale = jnp.array([0.01, 1.0, 30.0])
    g = scale * jax.random.normal(jax.random.key(seed), (12, 24, 3))
    _, pull = jax.vjp(balanced, jnp.zeros_like(g))
    size, back = (jnp.linalg.norm(each.reshape(-1, 3), axis=0) for each in (g, pull(g)[0]))
    wanted = 3 / jnp.sum(1 / size)
    apart = float(jnp.abs(back / wanted - 1).max())
    return Claim(
        "after balancing the gradients of all fields have one length",
        "C / sum of 1 / |g_c|",
        f"within {apart:.1e} of it",
        apart <= ROUNDING,
        f"gradients of lengths 3000 to 1 apart, relative, at most {ROUNDING}",
        seeds=1,
    )


def global_claims(found: Mapping[str, Measured]) -> list[Claim]:
    """One step and four, against persistence and against GraphCast's blocks."""
    gated, plain = found[GATED], found[PLAIN]
    first, last = gated.errors[:, 0], gated.errors[:, -1]
    seeds, limits = len(first), (ONE_STEP * gated.still[0], ROLL_OUT * gated.still[-1])
    claims = [
        Claim(
            "a day ahead the error is at most 0.35 of persistence",
            ".119 against .589 of persistence (the official class, 3,000 steps)",
            f"{spread(first)} against {gated.still[0]:.3f}",
            bool((first <= limits[0]).all()),
            f"root mean square of 64 waves, every seed at most {limits[0]:.3f}",
            seeds=seeds,
        ),
        Claim(
            "the gated network beats GraphCast's blocks of equal width and depth",
            ".00589 against .00701 (validation MSE on ERA5)",
            f"{spread(first)} against {spread(plain.errors[:, 0])}",
            bool(first.mean() < plain.errors[:, 0].mean()),
            "mean over seeds of the error a day ahead, equal steps",
            seeds=seeds,
        ),
        Claim(
            "four days ahead the error of roll-out is at most 0.6 of persistence",
            ".347 to .376 against .950 (the official class)",
            f"{spread(last)} against {gated.still[-1]:.3f}",
            bool((last <= limits[1]).all()),
            f"root mean square of the fourth day, every seed at most {limits[1]:.3f}",
            seeds=seeds,
        ),
    ]
    if TUNED in found:
        tuned = found[TUNED].errors[:, -1]
        claims.append(
            Claim(
                "learning two days at once, at a small rate, lowers the error of the fourth day",
                "-",
                f"{spread(tuned)} against {spread(last)}",
                bool((tuned < last).all()),
                "every seed, from the same networks on",
                seeds=seeds,
            )
        )
    return claims


def region_claims(found: Mapping[str, Region]) -> list[Claim]:
    """The region told of the world against the region alone, with and without a margin."""
    alone, nested, bare = (found[name] for name in (ALONE, NESTED, NO_MARGIN))
    seeds = len(nested.whole)
    return [
        Claim(
            "a region is forecast better when it is told the global forecast",
            "better (a figure without numbers)",
            f"{spread(nested.whole)} against {spread(alone.whole)} alone",
            bool(nested.whole.mean() < alone.whole.mean()),
            "root mean square a day ahead over the region, mean over seeds, equal width and steps",
            seeds=seeds,
        ),
        Claim(
            "the margin lowers the error of the two outermost rows and columns",
            "-",
            f"{spread(nested.border)} against {spread(bare.border)} without",
            bool(nested.border.mean() < bare.border.mean()),
            "mean over seeds; without a margin the same cut is given twice to an equal network",
            seeds=seeds,
        ),
    ]


def temperature_claims(found: Mapping[str, np.ndarray]) -> list[Claim]:
    """Real temperature against what forecasts without dynamics say."""
    if not found:
        return []
    network = found["network"]
    return [
        Claim(
            f"real temperature over the United Kingdom: better than {name}",
            "-",
            f"{spread(network, ' K')} against {found[name][0]:.3f} K",
            bool((network < found[name][0]).all()),
            "six hours ahead, the last fifth of a month, every seed; networks chosen among four "
            "moments of training by other hours",
            seeds=len(network),
        )
        for name in ("persistence", "climatology")
    ]


def rows_of(
    found: Mapping[str, Measured],
    region: Mapping[str, Region],
    real: Mapping[str, np.ndarray],
) -> list[dict[str, object]]:
    """The measurements."""
    days = lambda errors: {f"day {i + 1}": round(float(x), 4) for i, x in enumerate(errors)}  # noqa: E731
    rows: list[dict] = [{"forecast": "waves, persistence"} | days(found[GATED].still)]
    rows += [{"forecast": f"waves, {k}"} | days(each.errors.mean(0)) for k, each in found.items()]
    rows += [
        {
            "forecast": f"region, {name}",
            "day 1": round(float(each.whole.mean()), 4),
            "border": round(float(each.border.mean()), 4),
        }
        for name, each in region.items()
    ]
    rows += [
        {"forecast": f"temperature, {name}", "kelvin": round(float(each.mean()), 3)}
        for name, each in real.items()
    ]
    return rows
