"""One homogeneous network for precoding and for powers, on sizes that it never saw.

A network on users learns the powers of their precoders, and one on links the powers of cell-free
networks, by the rates themselves. Both are tried on other numbers of users, antennas and points,
beside what needs no learning and beside oracles that search for each channel by itself.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ffnlab.graphs.channels import LIMIT
from ffnlab.models import ICGNN
from ffnlab.storage.files import StrPath
from ffnlab.studies import STUDIES
from ffnlab.studies import icgnn_measure as measure
from ffnlab.studies.icgnn_measure import RISING, Cell, Free, Settings, Solved, Symmetry
from ffnlab.studies.result import Claim, Result
from ffnlab.studies.side_by_side import spread

__all__ = ["run"]

# Of the card.
EXACT, SYMMETRIC, WITHIN = 1e-8, 1e-5, 1e-6
KEEPS, GAINS, LOUD = 0.99, 1.02, 0.9  # times RZF: everywhere, at 8 users of 8 antennas, at 20 dB
BEATS, NEAR = 1.03, 0.9  # times the best split, times the oracle
DB = 10.0
LEVELS = (0.0, 5.0, 15.0, 20.0)
TURNS = 21


def run(*, out: StrPath | None = None, quick: bool = False, seed: int = 0) -> Result:
    """The study; arguments as for `ffnlab.studies.run.run_study`."""
    begin = time.perf_counter()
    settings = (
        Settings((seed,), (300, 600), 100, 60, 150)
        if quick
        else Settings(tuple(range(seed, seed + 3)), (600, 1200), 300, 200, 300)
    )
    precoders, allocators = measure.learned_precoders(settings), measure.learned_powers(settings)
    cells = measure.cells(precoders, settings, LEVELS)
    free = measure.free(allocators, settings)
    solved = measure.solved(precoders[0], 20)
    symmetry = measure.symmetry(precoders, 50)
    over = measure.limits(precoders, allocators, settings)
    seconds = measure.seconds(precoders[0], 200 if quick else 1000, TURNS)
    return Result(
        slug="icgnn",
        title=STUDIES["icgnn"].title,
        settings={
            "precoding": f"4 or 6 users, 8 antennas, 5 to 15 dB; Adam at 0.002, "
            f"{settings.steps[0]} steps of 128 channels; not tuned",
            "power": "sizes (points, users, serving, antennas) (16, 6, 6, 4), (20, 8, 8, 2), "
            f"(12, 5, 5, 4) in turns; Adam at 0.001, {settings.steps[1]} steps of 64; not tuned",
            "networks": "width 32; two rounds of messages over pairs, three over links",
            "tested": f"{settings.channels} channels and {settings.networks} networks of each size",
            "baselines": "RZF of K s2 / P; WMMSE from it until no channel gains 1e-5 in a round; "
            f"oracle of powers: {settings.climb} steps of Adam for each network",
            "seeds": list(settings.seeds),
        },
        seed=seed,
        quick=quick,
        seconds=time.perf_counter() - begin,
        claims=[
            solved_claim(solved),
            symmetry_claim(symmetry),
            *rate_claims([each for each in cells if each.db == DB]),
            loud_claim(cells),
            *power_claims(free),
            limit_claim(over),
            cost_claim(seconds),
        ],
        table=rows_of(cells, free, solved, seconds),
        pictures={
            "rates": lambda figure: rates_drawn(figure, cells),
            "sizes": lambda figure: sizes_drawn(figure, free),
            "links": lambda figure: links_drawn(figure, allocators[0], settings),
        },
    ).write(out)


def ratios(found: Cell | Free, name: str) -> list[float]:
    """The network's rates over those of another method, by seed."""
    return [rate / found.rates[name][0] for rate in found.rates["ICGNN"]]


def loaded(cells: Sequence[Cell]) -> list[Cell]:
    """Those of 8 users and 8 antennas, by power."""
    return sorted((c for c in cells if (c.users, c.antennas) == (8, 8)), key=lambda c: c.db)


def best_split(found: Free) -> float:
    """The rate of the best split without learning, of this size."""
    return max(found.rates[name][0] for name in ("equal", "gain^0.5", "gain^1"))


def named(found: Cell | Free) -> str:
    """What a size is called."""
    if isinstance(found, Free):
        return "x".join(map(str, found.size))
    return f"K {found.users} N {found.antennas}"


def in_words(values: Sequence[tuple[str, Sequence[float]]]) -> str:
    """Figures of sizes, each with its name."""
    return ", ".join(f"{name}: {spread(each)}" for name, each in values)


def solved_claim(found: Solved) -> Claim:
    """Claims of conjugate gradients."""
    rising = bool((np.diff(found.rates) > 0).all())
    norms = ", ".join(f"{norm:.1e}" for norm in found.norms)
    return Claim(
        "conjugate gradients take the place of an inverse",
        "-",
        f"error after as many steps as users {found.error:.1e}; in the norm of A by steps {norms}; "
        f"rates by {RISING} steps {', '.join(f'{rate:.2f}' for rate in found.rates)}",
        found.error <= EXACT and found.falls and rising,
        f"within {EXACT:g} of a dense solve in float64 after 8 steps, the error falling in the "
        f"norm of A with every step and channel, and the mean rate rising from {RISING} steps to "
        "the next: 8 users, 8 antennas, 10 dB",
        seeds=1,
    )


def symmetry_claim(found: Symmetry) -> Claim:
    """Claims of what does not matter."""
    worst = max(*found.renumbered, *found.turned)
    return Claim(
        "users have no numbers and antennas no directions",
        "permutation equivariance",
        f"p and q over the power: users renumbered {max(found.renumbered):.1e}, antennas turned "
        f"{max(found.turned):.1e} (all: 0 to {worst:.1e})",
        worst <= SYMMETRIC,
        f"at most {SYMMETRIC:g}, rates included (relative), 50 channels, every seed",
        seeds=len(found.turned),
    )


def rate_claims(sizes: Sequence[Cell]) -> list[Claim]:
    """Claims of precoding at 10 dB."""
    over = [(named(each), ratios(each, "RZF")) for each in sizes]
    square = loaded(sizes)[0]
    climbs = [(named(each), ratios(each, "WMMSE")) for each in sizes]
    seeds = len(square.rates["ICGNN"])
    return [
        Claim(
            "precoding keeps up with regularized zero forcing, at sizes never seen too",
            "equal or above conventional algorithms",
            f"rate over that of RZF, {in_words(over)}",
            min(min(each) for _, each in over) >= KEEPS,
            f"at least {KEEPS:g} at every size with every seed, 10 dB; learned on K 4 and 6, N 8",
            seeds=seeds,
        ),
        Claim(
            "and gains where there are as many users as antennas",
            "-",
            f"K 8 N 8: {spread(ratios(square, 'RZF'))} of RZF",
            min(ratios(square, "RZF")) >= GAINS,
            f"at least {GAINS:g} with every seed, 10 dB",
            seeds=seeds,
        ),
        Claim(
            "its rates are those of WMMSE or above",
            "equal or above conventional algorithms",
            f"rate over that of WMMSE, {in_words(climbs)}",
            min(min(each) for _, each in climbs) >= 1,
            "at least 1 at every size with every seed, 10 dB; WMMSE until it gains no more",
            seeds=seeds,
        ),
    ]


def loud_claim(cells: Sequence[Cell]) -> Claim:
    """Claims of powers never seen."""
    loud = loaded(cells)[-1]
    found = ratios(loud, "RZF")
    return Claim(
        "powers beyond those learned on cost some of the rate",
        "-",
        f"at {loud.db:g} dB, K 8 N 8: {spread(found)} of RZF",
        min(found) >= LOUD,
        f"at least {LOUD:g} of RZF with every seed; learned on 5 to 15 dB",
        seeds=len(found),
    )


def power_claims(found: Sequence[Free]) -> list[Claim]:
    """Claims of cell-free powers."""
    over = [(named(e), [rate / best_split(e) for rate in e.rates["ICGNN"]]) for e in found]
    near = [(named(e), ratios(e, "oracle")) for e in found]
    seeds = len(found[0].rates["ICGNN"])
    return [
        Claim(
            "powers of links beat every split by gains, at sizes never seen too",
            "equal or above conventional algorithms",
            f"rate over that of the best split, {in_words(over)}",
            min(min(each) for _, each in over) >= BEATS,
            f"at least {BEATS:g} at every size with every seed; splits equal, by gain^0.5 and by "
            "gain, the best on the networks that are tested; learned on the first size of these",
            seeds=seeds,
        ),
        Claim(
            "and come near to what is searched for each network by itself",
            "-",
            f"rate over that of the oracle, {in_words(near)}",
            min(min(each) for _, each in near) >= NEAR,
            f"at least {NEAR:g} at every size with every seed",
            seeds=seeds,
        ),
    ]


def limit_claim(over: Sequence[float]) -> Claim:
    """Claims of limits."""
    return Claim(
        "limits of power hold by construction",
        "-",
        f"the most that one is passed by, relative: {min(over):.1e} to {max(over):.1e}",
        max(over) <= WITHIN,
        f"at most {WITHIN:g} for every channel and point, and exactly 0 for links that do not "
        "serve, with every seed",
        seeds=len(over),
    )


def cost_claim(seconds: Mapping[str, float]) -> Claim:
    """Claims of cost."""
    times = {name: value for name, value in seconds.items() if name != "over"}
    told = ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in times.items())
    return Claim(
        "it costs less than WMMSE",
        "lower computational cost",
        f"K 8 N 8, all channels at once: {told}; {seconds['over']:.2f} of 50 rounds",
        seconds["over"] < 1,
        f"median over {TURNS} turns of the time over that of 50 rounds of WMMSE; both compiled and "
        "batched",
        seeds=1,
        timed=True,
    )


def rows_of(
    cells: Sequence[Cell], free: Sequence[Free], solved: Solved, seconds: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Lines of the table."""
    mean = lambda found: {name: float(np.mean(each)) for name, each in found.rates.items()}  # noqa: E731
    rows = [{"case": f"{named(each)}, {each.db:g} dB"} | mean(each) for each in cells]
    rows += [{"case": named(each)} | mean(each) for each in free]
    steps = zip(RISING, solved.rates, strict=True)
    rows += [{"case": f"K 8 N 8, {step} steps", "ICGNN": rate} for step, rate in steps]
    return rows + [{"case": "seconds"} | {k: v for k, v in seconds.items() if k != "over"}]


def rates_drawn(figure: Any, cells: Sequence[Cell]) -> None:
    """Rates by power of 8 users and antennas, and by size at 10 dB."""
    left, right = figure.subplots(1, 2)
    figure.set_size_inches(9, 3.6)
    curve = loaded(cells)
    sizes = [each for each in cells if each.db == DB]
    for i, name in enumerate(("ICGNN", "RZF", "WMMSE", "ZF", "MRT")):
        style = {"color": f"C{i}", "marker": "o", "markersize": 3}
        style["linestyle"] = "-" if name == "ICGNN" else "--"
        mean = lambda each, name=name: np.mean(each.rates[name])  # noqa: E731
        left.plot([c.db for c in curve], [mean(c) for c in curve], label=name, **style)
        ratio = [mean(c) / c.rates["RZF"][0] for c in sizes]
        right.plot([named(c) for c in sizes], ratio, **style)
    left.axvspan(5, 15, color="0.93", zorder=0)
    left.set_xlabel("power over noise, dB (learned on the grey part)")
    left.set_ylabel("sum of rates, 8 users, 8 antennas")
    left.legend(frameon=False, fontsize=7)
    right.set_ylabel("rate over that of RZF, 10 dB")
    right.tick_params(axis="x", labelsize=7)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)


def sizes_drawn(figure: Any, found: Sequence[Free]) -> None:
    """Rates of cell-free networks by size, a bar for each method."""
    axes = figure.subplots()
    names = ("equal", "gain^0.5", "gain^1", "ICGNN", "oracle")
    for i, name in enumerate(names):
        places = np.arange(len(found)) + (i - 2) / (len(names) + 1)
        height = [np.mean(each.rates[name]) for each in found]
        axes.bar(places, height, 1 / (len(names) + 1), label=name)
    axes.set_xticks(range(len(found)), [named(each) for each in found])
    axes.set_xlabel("points x users x serving x antennas (learned on the first)")
    axes.set_ylabel("sum of rates")
    axes.legend(frameon=False, fontsize=7, ncols=len(names))
    axes.spines[["top", "right"]].set_visible(False)


def links_drawn(figure: Any, net: ICGNN, settings: Settings) -> None:
    """Powers of the links of one network, by method."""
    size = measure.FREE[0]
    case = measure.drawn_free(size, 1)
    found = measure.rho_of(net, case, settings.climb)
    shown = ("gain^0.5", "ICGNN", "oracle")
    figure.set_size_inches(8, 4)
    for axes, name in zip(figure.subplots(1, len(shown), sharey=True), shown, strict=True):
        rho = np.asarray(found[name])[0, : size[0], : size[1]]
        image = axes.imshow(rho, vmin=0, vmax=LIMIT, cmap="viridis", aspect="auto")
        axes.set_title(f"{name}: {measure.mean_rate(case, found[name]):.1f}", fontsize=9)
        axes.set_xlabel("user")
    figure.axes[0].set_ylabel("access point")
    figure.colorbar(image, ax=figure.axes, label="power, mW")
