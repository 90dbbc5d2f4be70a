"""Hardware-aware NAS: searches with predictors, on problems that are known and in a super-network.

NSGA-II is held against the front of ZDT1, and LINAS against evolution and random search where a
measurement costs nothing. Then a network of four FFN blocks learns digits in all its widths and
depths, and all three search it with equal budgets: with every seed by loss and MACs and by loss and
bytes, with the first one by loss and the latency of this machine. What is chosen there is cut out,
saved, loaded, counted and timed, and stands in the table at the end beside a network drawn of as
many MACs.
"""

import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from ffnlab.losses import labelled
from ffnlab.pruning.search import Supernet
from ffnlab.storage.files import StrPath
from ffnlab.studies import STUDIES
from ffnlab.studies.digit_images import DIGITS
from ffnlab.studies.found_networks import Entry, rows
from ffnlab.studies.hardware_aware_nas_known import (
    COUNTS,
    TACTICS,
    TRUE_VOLUME,
    efficiency,
    zdt1_volumes,
)
from ffnlab.studies.hardware_aware_nas_measure import (
    COUNTED,
    DRAWS,
    FAST,
    FULL,
    HALF,
    QUICK,
    TIMED,
    Chosen,
    Found,
    Pair,
    all_foretold,
    beside,
    chosen,
    counted_searches,
    timed_searches,
    volumes,
    worst,
)
from ffnlab.studies.hardware_aware_nas_network import (
    COPIES,
    DEPTHS,
    FORMATS,
    HIDDEN,
    LAYERS,
    SIDE,
    WIDTH,
    WIDTHS,
    alike,
    learned,
    moved_digits,
    network,
    on_device,
)
from ffnlab.studies.hardware_aware_nas_pictures import fronts, latencies, lines
from ffnlab.studies.result import Claim, Result
from ffnlab.studies.side_by_side import spread
from ffnlab.studies.tuning import Splits

__all__ = ["run"]

LINAS, EVOLUTION, RANDOM = TACTICS
REACHED = 0.85  # of ZDT1's hypervolume: the card's
WORTH = 0.99  # of the hypervolume of twice as many measurements
ORDER = 0.9  # Kendall's tau
EXACT = 1e-6  # of the largest output
NEAR = 0.2  # of a latency, relative
SLACK = 1.1  # of a limit of latency, for what times differ by from run to run

Volumes = Mapping[str, Float[np.ndarray, "..."]]  # by tactic


def run(*, out: StrPath | None = None, quick: bool = False, seed: int = 0) -> Result:
    """The study; arguments as for `ffnlab.studies.run.run_study`."""
    begin, sizes = time.perf_counter(), QUICK if quick else FULL
    seeds = range(seed, seed + sizes.seeds)
    zdt1, efficient = zdt1_volumes(seeds), efficiency(seeds)
    net, data = network(), moved_digits(seed)
    models = learned(net, data.train, sizes.steps, seeds)
    counted = counted_searches(sizes, net, models, data.validation, seed)
    timed, measure = timed_searches(sizes, net, models[0], data.validation, seed)
    found = Found(
        models,
        counted,
        timed,
        all_foretold(net.space, counted),
        [
            beside(net, model, log, data.test, seed + i)
            for i, (model, log) in enumerate(zip(models, counted[COUNTED[0]][LINAS], strict=True))
        ],
        chosen(net, models[0], timed[LINAS], measure, data.validation),
    )
    return Result(
        slug="hardware-aware-nas",
        title=STUDIES["hardware-aware-nas"].title,
        settings={
            "data": f"{DIGITS}; each at {COPIES[0]} places of a canvas of {SIDE} x {SIDE} to "
            f"train, {COPIES[1]} to search and to time by, {COPIES[2]} to test",
            "network": f"a ViT of one patch without attention: {LAYERS} residual FFNs, width "
            f"{WIDTH}, {HIDDEN} channels",
            "searched": f"blocks {list(DEPTHS)}, channels {list(WIDTHS)} and weights "
            f"{list(FORMATS)} of each: {net.space.networks:,} networks",
            "sizes": sizes._asdict(),
            "reference": {name: float(worst([name])[0]) for name in ("loss", "macs", "bytes")},
            "chosen": {name: list(values) for name, values in found.chosen.config.items()},
        },
        seed=seed,
        quick=quick,
        seconds=time.perf_counter() - begin,
        claims=[
            *known_claims(zdt1, efficient),
            *(
                claim
                for pair, logs in counted.items()
                for claim in search_claims(pair, {t: volumes(pair, logs[t]) for t in TACTICS})
            ),
            *told_claims(found),
            *chosen_claims(found.chosen),
            *latency_claims({t: volumes(TIMED, [log]) for t, log in timed.items()}),
        ],
        table=[
            *known_rows(zdt1, efficient),
            *search_rows(found),
            *closing(net, found, data, seed),
        ],
        pictures={
            "fronts": lambda figure: fronts(figure, found),
            "efficiency": lambda figure: lines(figure, efficient),
            "latency": lambda figure: latencies(figure, found),
        },
    ).write(out)


def needed(seeds: int) -> int:
    """In how many of some seeds a search has to be ahead: all but one of five or more."""
    return seeds - 1 if seeds >= 5 else seeds


def ahead(
    text: str, paper: str, ours: np.ndarray, theirs: np.ndarray, name: str, how: str
) -> Claim:
    """A claim that one search's hypervolumes are at least another's."""
    wins, seeds = int((ours >= theirs).sum()), len(ours)
    return Claim(
        text,
        paper,
        f"{spread(ours.tolist())}, {name} {spread(theirs.tolist())}; at least as much in {wins} of "
        f"{seeds}",
        wins >= needed(seeds),
        f"{how}; in {needed(seeds)} of {seeds} seeds",
        seeds=seeds,
    )


def known_claims(zdt1: np.ndarray, efficient: Volumes) -> list[Claim]:
    """Where what is best is known, and where measuring costs nothing."""
    after = {t: dict(zip(COUNTS, found.T, strict=True)) for t, found in efficient.items()}
    half, whole = after[LINAS][100], after[EVOLUTION][200]
    how = (
        "hypervolume below (1, 1) of losses with interactions and costs, 12 widths of 4 values, "
        "population 25"
    )
    return [
        Claim(
            "NSGA-II reaches the front of ZDT1",
            f"the front itself: {TRUE_VOLUME:.4f}",
            spread(zdt1.tolist()),
            bool((zdt1 >= REACHED).all()),
            f"hypervolume below (1.1, 1.1), 30 variables, 250 generations of 50; at least "
            f"{REACHED} with every seed",
            seeds=len(zdt1),
        ),
        ahead(
            "after 100 measurements LINAS is ahead of evolution",
            "3.47 against 3.33e9 MAC % after 100 of ImageNet (shipped logs)",
            half,
            after[EVOLUTION][100],
            "evolution",
            how,
        ),
        Claim(
            "100 measurements of LINAS are worth 200 of evolution",
            "about 4 times as sample-efficient as usual (README); 300 beat 500 (shipped logs)",
            f"{spread(half.tolist())}, evolution with 200 {spread(whole.tolist())}",
            float(half.mean()) >= WORTH * float(whole.mean()),
            f"{how}; means over seeds, at least {WORTH:g} of evolution's",
            seeds=len(half),
        ),
    ]


def search_claims(pair: Pair, found: Volumes) -> list[Claim]:
    """Searches of the digits' networks with equal budgets."""
    cost = {"macs": "MACs", "bytes": "bytes"}[pair[1]]
    how = (
        f"share of the box below the loss of chance and the whole network's {cost}, of fronts of "
        "as many networks measured"
    )
    paper = "faster, with Pareto diversity kept (abstract)"
    return [
        ahead(
            f"by loss and {cost} LINAS finds no worse a front than {name}",
            paper,
            found[LINAS],
            found[tactic],
            name,
            how,
        )
        for tactic, name in ((RANDOM, "random search"), (EVOLUTION, "evolution"))
    ]


def told_claims(found: Found) -> list[Claim]:
    """Predictors, and what searches are for."""
    order = {name: [one.order for one in told] for name, told in found.told.items()}
    error = {name: np.mean([one.error for one in told]) for name, told in found.told.items()}
    gaps = [one.found - float(np.mean(one.drawn)) for one in found.besides]
    seeds = len(gaps)
    return [
        Claim(
            "predictors put networks that they have not seen in order",
            "tau .93 and MAPE .2 % of accuracy, .91 and 3.1 % of MACs (400 networks, shipped logs)",
            ", ".join(
                f"{name} tau {spread(order[name])}, off by {100 * error[name]:.1f} %"
                for name in order
            ),
            all(np.mean(order[name]) >= ORDER for name in ("loss", "macs")),
            f"fitted to all networks of random search, asked of LINAS's others; mean tau of loss "
            f"and of MACs at least {ORDER}",
            seeds=seeds,
        ),
        Claim(
            "networks that were found are better than others of as many MACs",
            "-",
            f"accuracy higher by {spread(gaps)}: "
            f"{spread([one.found for one in found.besides])} within half of the MACs",
            float(np.mean(gaps)) > 0,
            f"LINAS's lowest validation loss within {HALF} of the whole network's MACs, test rows, "
            f"beside the mean of {DRAWS} networks drawn of as many; mean over seeds above 0",
            seeds=seeds,
        ),
    ]


def chosen_claims(found: Chosen) -> list[Claim]:
    """The network that was made of a configuration."""
    said, again = found.said, found.again
    off = said / again.median - 1
    of_whole = "latency over the whole network's"
    return [
        Claim(
            "the network that was chosen, cut out, saved and loaded, is the one that was searched",
            "no retraining (abstract)",
            f"outputs differ by {found.change:.1e} of the largest; MACs and bytes "
            f"{found.counts[1][0]:,} and {found.counts[1][1]:,}",
            found.change <= EXACT and found.kept and found.counts[0] == found.counts[1],
            f"outputs within {EXACT:g} of the super-network's by masks, and the same bits after "
            "loading; counts of the loaded network those that the search was told",
            seeds=0,
        ),
        Claim(
            "predictors tell the latency of a network that they have not seen",
            "-",
            f"{said:.2f} was said, {again.median:.2f} ({again.low:.2f} to {again.high:.2f}) "
            f"measured after: off by {100 * off:+.0f} %",
            abs(off) <= NEAR,
            f"{of_whole}, by a predictor fitted to all other networks that LINAS measured, against "
            f"101 turns of the loaded one; within {100 * NEAR:.0f} %",
            seeds=1,
            timed=True,
        ),
        Claim(
            "the network that was chosen is as fast as was asked for",
            "-",
            f"{again.median:.2f} ({again.low:.2f} to {again.high:.2f}); the search measured "
            f"{found.searched:.2f}",
            again.median <= SLACK * FAST,
            f"{of_whole}, measured after; at most {FAST} and a tenth of that",
            seeds=1,
            timed=True,
        ),
    ]


def latency_claims(found: Volumes) -> list[Claim]:
    """Searches by latency, where the other two were run."""
    if RANDOM not in found:
        return []
    ours = {tactic: float(values[0]) for tactic, values in found.items()}
    said = ", ".join(f"{tactic} {volume:.3f}" for tactic, volume in ours.items())
    return [
        Claim(
            "by loss and latency LINAS finds no worse a front than either",
            "faster, with Pareto diversity kept (abstract)",
            said,
            ours[LINAS] >= max(ours[RANDOM], ours[EVOLUTION]),
            "share of the box below the loss of chance and the whole network's latency",
            seeds=1,
            timed=True,
        )
    ]


def known_rows(zdt1: np.ndarray, efficient: Volumes) -> list[dict[str, object]]:
    """Hypervolumes, means over seeds."""
    first = {"case": "ZDT1", "search": "NSGA-II", "hypervolume": float(zdt1.mean())}
    return [
        first,
        *(
            {"case": "widths that interact", "search": tactic, "measured": count}
            | {"hypervolume": value}
            for tactic, found in efficient.items()
            for count, value in zip(COUNTS, found.mean(axis=0).tolist(), strict=True)
        ),
    ]


def search_rows(found: Found) -> list[dict[str, object]]:
    """Of the digits' networks: hypervolumes, and how predictors did."""
    table: list[dict[str, object]] = []
    timed = {tactic: [log] for tactic, log in found.timed.items()}
    for objectives, by_tactic in [*found.counted.items(), (TIMED, timed)]:
        for tactic, logs in by_tactic.items():
            own = {"case": f"digits by {' and '.join(objectives)}", "search": tactic}
            own |= {"measured": int(logs[0].count)}
            table.append(own | {"hypervolume": float(volumes(objectives, logs).mean())})
    for name, told in found.told.items():
        order, error = (
            float(np.mean([getattr(one, what) for one in told])) for what in ("order", "error")
        )
        table.append({"case": f"predictor of {name}", "tau": order, "relative error": error})
    return table


def closing(net: Supernet, found: Found, data: Splits, seed: int) -> list[dict[str, object]]:
    """The table of networks."""
    model, images = found.models[0], jnp.asarray(data.validation.x)
    (other,) = alike(net, found.chosen.config, seed, 1)
    least = net.space.decode(np.zeros(net.space.size, int))
    networks = {
        "whole": model,
        "found": found.chosen.model,
        "drawn, equal MACs": net.cut(model, other),
        "smallest": net.cut(model, least),
    }
    score = jax.jit(lambda model, rows: labelled(model, rows)[1]["accuracy"])
    test = on_device(data.test)
    entries = {name: Entry(one, (float(score(one, test)),)) for name, one in networks.items()}
    return rows(entries, images)
