"""S-Mamba: series that tell each other's future, by a network that reads one after the other.

Eight drawn series, each three hours behind the one before it: the network against itself with
nothing that reads across series, against linear maps and against the last place again and again. In
full also ETTh1, at the authors' settings on the published split, scaled by its first twelve months.
"""

import time
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from ffnlab.data import find_folder
from ffnlab.storage.files import StrPath
from ffnlab.studies import STUDIES, tuning
from ffnlab.studies import s_mamba_measure as measure
from ffnlab.studies.result import Claim, Result
from ffnlab.studies.s_mamba_measure import MAMBA, NO_MAMBA, Early, Plain
from ffnlab.studies.side_by_side import spread
from ffnlab.studies.tried import at_ends
from ffnlab.studies.tuning import Tuned

__all__ = ["run"]

STEPS, RATES = 1500, (3e-4, 1e-3, 3e-3, 1e-2)
QUICK_RATES = (1e-3, 3e-3)
PUBLISHED, NEAR = 0.386, 0.01  # test error of ETTh1, 96 hours from 96; what is as published
MOST, OF_LAST = 0.6, 0.25  # of the error without Mamba, and of the last place's
GROWTH = 2.3  # of cost where there are twice as many series
CASE = "lagged"


def run(*, out: StrPath | None = None, quick: bool = False, seed: int = 0) -> Result:
    """The study; arguments as for `ffnlab.studies.run.run_study`."""
    begin = time.perf_counter()
    seeds = [seed] if quick else [seed, seed + 1, seed + 2]
    rates = QUICK_RATES if quick else RATES
    data = measure.lagged(seed)
    found = measure.on_lagged(data, seeds, steps=STEPS, rates=rates)
    beside, growth = measure.plain(data), measure.cost_growth()
    apart = measure.under_scaling(found[MAMBA].states[0], data.test[0]["x"][:64])
    real = [] if quick or find_folder("etth1") is None else [measure.on_etth1(s) for s in seeds]
    chosen = [found[name].setting["rate"] for name in (MAMBA, NO_MAMBA)]
    return Result(
        slug="s-mamba",
        title=STUDIES["s-mamba"].title,
        settings={
            "lagged": "8 drawn series of 6,000 hours, 70/10/20; 12 hours from 48, mean squared "
            f"error in units of the first part's deviation; {STEPS} steps of {measure.BATCH}",
            "rates": f"{at_ends(chosen, rates)} ({', '.join(map(str, rates))})",
            "linear maps": f"ridge, the best of {len(measure.RIDGES)} on validation windows",
            "etth1": "twelve, four and four months; 96 hours from 96; Adam at "
            f"{measure.ETT_RATE:g}, halved every epoch, at most {measure.EPOCHS}, patience "
            f"{measure.PATIENCE}" if real else "not run",
            "seeds": seeds,
        },
        seed=seed,
        quick=quick,
        seconds=time.perf_counter() - begin,
        claims=[*lagged_claims(found, beside), scaling_claim(apart), cost_claim(growth),
                *etth1_claims(real)],
        table=rows_of(found, beside, real),
        pictures={
            "forecasts": lambda figure: forecasts(figure, found[MAMBA], data),
            "errors": lambda figure: bars(figure, found, beside),
        },
    ).write(out)  # fmt: skip


def lagged_claims(found: Mapping[str, Tuned], beside: Plain) -> list[Claim]:
    """Whether what other series tell is read."""
    ours, other = np.array(found[MAMBA].scores), np.array(found[NO_MAMBA].scores)
    cases = {CASE: found}
    linear = min(beside.own, beside.joint)
    said = tuning.says(cases, MAMBA)
    return [
        tuning.tuned_claim(
            "reading across series lowers the error",
            "a prototype: .165 and .170, .430 and .428 without",
            f"test error at most {MOST} of the same network's whose Mamba gives zeros, every seed",
            bool((ours <= MOST * other).all()),
            cases,
            MAMBA,
            NO_MAMBA,
        ),
        Claim(
            "it is far better than the last place again and again",
            "a prototype: .165 and .170, 1.316 of the last place",
            f"{said}; the last place {beside.last:.3f}",
            bool((ours <= OF_LAST * beside.last).all()),
            f"test error at most {OF_LAST} of it, every seed",
            seeds=len(ours),
        ),
        Claim(
            "it is better than linear maps",
            "-",
            f"{said}; of each series {beside.own:.3f}, of all together {beside.joint:.3f}",
            bool((ours < linear).all()),
            "test error below that of both, every seed; ridge regressions, one map for all series "
            "and one of all series of a window, at the best strength on validation windows",
            seeds=len(ours),
        ),
    ]


def scaling_claim(apart: float) -> Claim:
    """What scaling a series does."""
    return Claim(
        "a series scaled and shifted is forecast scaled and shifted",
        "-",
        f"differences of {apart:.1e} of the largest forecast",
        apart <= 1e-4,
        "64 test windows of the trained network, a in .5..2 and b in -3..3 for each series",
        seeds=1,
    )


def cost_claim(growth: Mapping[str, float]) -> Claim:
    """What twice as many series cost."""
    told = ", ".join(f"{name} {times:.2f} times" for name, times in growth.items())
    return Claim(
        "twice as many series cost little more than twice",
        "near-linear in the number of variates",
        told,
        growth[MAMBA] <= GROWTH and growth[MAMBA] < growth["attention"],
        f"products of what mixes 256 series over those of 128, at most {GROWTH}, and fewer times "
        "than attention of the same width; counted",
        seeds=0,
    )


def etth1_claims(real: Sequence[tuple[Early, Plain]]) -> list[Claim]:
    """The published figure, and what is beside it."""
    if not real:
        return []
    errors, beside = [early.error for early, _ in real], real[0][1]
    said = f"{spread(errors)}; {min(len(e.validation) for e, _ in real)} epochs or more"
    return [
        Claim(
            "ETTh1 is forecast as published, 96 hours from 96",
            f"test error {PUBLISHED}",
            said,
            bool((np.abs(np.array(errors) - PUBLISHED) <= NEAR).all()),
            f"within {NEAR} of it, every seed; the authors' settings, none tuned here; the epoch "
            "that is best on validation windows",
            seeds=len(errors),
        ),
        Claim(
            "and better than by linear maps and by the last place",
            "-",
            f"{spread(errors)}; of each series {beside.own:.3f}, of all together "
            f"{beside.joint:.3f}, the last place {beside.last:.3f}",
            max(errors) < min(beside),
            "test error below each, every seed",
            seeds=len(errors),
        ),
    ]


def rows_of(
    found: Mapping[str, Tuned], beside: Plain, real: Sequence[tuple[Early, Plain]]
) -> list[dict[str, object]]:
    """Lines of the table."""
    names = {"last": "the last place", "own": "linear, each series", "joint": "linear, all series"}
    rows: list[dict] = list(tuning.table({CASE: found}, "error"))
    rows += [{"case": CASE, "side": names[n], "error": v} for n, v in beside._asdict().items()]
    if real:
        error = float(np.mean([early.error for early, _ in real]))
        first = {"case": "ETTh1", "side": MAMBA, "error": error}
        rows += [first | {"parameters": real[0][0].parameters}]
        rows += [
            {"case": "ETTh1", "side": names[n], "error": v} for n, v in real[0][1]._asdict().items()
        ]
    return rows


def forecasts(figure, ours: Tuned, data: tuning.Splits) -> None:
    """What follows two windows, of the first and of the last series, and what was forecast."""
    figure.set_size_inches(9, 4.5)
    model, (inputs, y) = ours.states[0], data.test
    length, horizon = inputs["x"].shape[1], y.shape[1]
    grid = figure.subplots(2, 2, sharex=True)
    for row, place in zip(grid, (0, len(y) // 2), strict=True):
        said = np.asarray(model(jnp.asarray(inputs["x"][place : place + 1])))
        for axes, series in zip(row, (0, -1), strict=True):
            axes.plot(np.arange(-length, 0), inputs["x"][place, :, series], color="C7")
            axes.plot(np.arange(horizon), y[place, :, series], color="black", label="truth")
            axes.plot(np.arange(horizon), said[0, :, series], color="C3", label="forecast")
            axes.spines[["top", "right"]].set_visible(False)
    for axes, name in zip(
        grid[0], ("first series", "last series, told by the others"), strict=True
    ):
        axes.set_title(name, fontsize=10)
    grid[0, 0].legend(frameon=False, fontsize=8)
    figure.supxlabel("hours", fontsize=9)


def bars(figure, found: Mapping[str, Tuned], beside: Plain) -> None:
    """Test errors."""
    axes = figure.subplots()
    named = {name: each.scores for name, each in found.items()}
    named |= {"linear, each series": [beside.own], "linear, all series": [beside.joint]}
    named |= {"the last place": [beside.last]}
    for i, scores in enumerate(named.values()):
        axes.bar(i, np.mean(scores), color="C0" if i == 0 else "C7")
        axes.plot([i] * len(scores), scores, "k.", markersize=4)
        axes.text(i, np.mean(scores) + 0.02, f"{np.mean(scores):.3f}", ha="center", fontsize=9)
    axes.set_xticks(range(len(named)), named, fontsize=8)
    axes.set_ylabel("mean squared error on test windows")
    axes.spines[["top", "right"]].set_visible(False)
