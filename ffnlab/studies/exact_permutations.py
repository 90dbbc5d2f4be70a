"""Exact permutations: how many networks an ensemble needs, from closed forms and from ensembles.

Networks of one hidden layer learn k basis vectors by gradient descent, in the NTK and in the
standard parametrization. Their averages are compared with the means and variances of the kernels
that training follows, the networks needed by k with what those predict and with what the authors
recorded, for inputs of two ones, and for all 2^k - 1.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ffnlab.learning.exact_permutations.closed_form import (
    KERNELS,
    Kernel,
    last_layer,
    moments,
    ntk,
    safe_threshold,
)
from ffnlab.learning.exact_permutations.ensemble import averaged
from ffnlab.storage.files import StrPath
from ffnlab.studies import STUDIES
from ffnlab.studies.exact_permutations_measure import (
    ORDERS,
    RECORDED,
    STEPS,
    THRESHOLD,
    Ensemble,
    ensemble,
    predicted,
    predicted_for_all,
)
from ffnlab.studies.result import Claim, Result

__all__ = ["run"]

WIDTH, QUICK_WIDTH = 2048, 1024
# Networks of the standard parametrization by k, and of the NTK's.
STANDARD, NTK = {5: 300, 10: 300, 15: 400, 20: 500}, {5: 500, 8: 200}
QUICK_STANDARD, QUICK_NTK = {5: 200}, {5: 200}
LIMITS = {"standard": last_layer, "ntk": ntk}  # whose kernel a parametrization follows
SIZES, GROWTH = tuple(range(3, 65)), (8, 16, 32, 64, 128, 256, 512)


def run(*, out: StrPath | None = None, quick: bool = False, seed: int = 0) -> Result:
    """The study; arguments as for `ffnlab.studies.run.run_study`."""
    begin = time.perf_counter()
    width = QUICK_WIDTH if quick else WIDTH
    counts = {"standard": QUICK_STANDARD, "ntk": QUICK_NTK}
    counts = counts if quick else {"standard": STANDARD, "ntk": NTK}
    found = {
        (name, k): ensemble(name, k, width, count, seed)
        for name, by_k in counts.items()
        for k, count in by_k.items()
    }
    return Result(
        slug="exact-permutations",
        title=STUDIES["exact-permutations"].title,
        settings={
            "width": width,
            "networks": {
                name: {str(k): n for k, n in by_k.items()} for name, by_k in counts.items()
            },
            "descent": f"full batch, {STEPS} steps at the inverse of the largest eigenvalue",
            "orders": ORDERS,
            "threshold": THRESHOLD,
        },
        seed=seed,
        quick=quick,
        seconds=time.perf_counter() - begin,
        claims=claims_of(found),
        table=rows_of(found),
        pictures={
            "ensemble_sizes": lambda figure: curves(figure, found),
            "means": lambda figure: means(figure, found),
        },
    ).write(out)


Found = Mapping[tuple[str, int], Ensemble]


def claims_of(found: Found) -> list[Claim]:
    """All claims; those about ensembles name how many networks they are of."""
    return [
        signs_claim(),
        *growth_claims(),
        recorded_claim(),
        moments_claim(found, "ntk", ntk, last_layer),
        moments_claim(found, "standard", last_layer, ntk),
        sizes_claim(found),
        *exact_claims(found),
    ]


def signs_claim() -> Claim:
    """Whether the sign of a mean tells the output, for every size and number of ones."""
    found = {
        (name, k, m): moments(k, m, kernel)
        for name, kernel in KERNELS.items()
        for k in SIZES
        for m in range(2, k + 1)
    }
    on = min(each.on for each in found.values())
    off = max(each.off for (_, k, m), each in found.items() if m < k)
    return Claim(
        "the sign of the mean is the output, for every number of ones",
        "means are positive at the outputs that are ones, and there alone",
        f"least mean of a 1 is {on:.4f}, largest of a 0 {off:.4f}",
        on > 0 > off,
        "closed forms of both kernels, k from 3 to 64, 2 to k ones; with one all means are exact",
        seeds=0,
    )


def growth_claims() -> list[Claim]:
    """Whether closed forms grow as the paper's bounds do: one rule for all of them."""
    limit = 8 * math.log(2) * (last_layer(1.0) - last_layer(0.0))
    return [
        growth_claim(
            "the ensemble for one input grows as k log k",
            "O(k log k)",
            "closed form at two ones and a cut of 0",
            lambda k, kernel: predicted(k, kernel) / (k * math.log(k)),
        ),
        growth_claim(
            "the ensemble for all inputs grows as k^2",
            "O(k^2)",
            "closed form at two ones and a cut of 0, a union of the outputs of all 2^k - 1 inputs",
            lambda k, kernel: predicted(k, kernel, inputs=2.0**k - 1) / k**2,
        ),
        growth_claim(
            "and so at the worst number of ones and half the least mean of a 1 as the cut",
            "O(k^2)",
            "closed form at the worst of 1 to k ones and the safe cut, a union as before, of which "
            f"the ratio's limit is 8 log 2 (k1(1) - k1(0)) = {limit:.2f}, all outputs being ones",
            lambda k, kernel: predicted_for_all(k, kernel, safe_threshold(k, kernel)) / k**2,
        ),
    ]


def growth_claim(claim: str, order: str, how: str, ratio: Callable[[int, Kernel], float]) -> Claim:
    """Whether networks over a bound never grow from one k to its double, of both kernels."""
    found = {name: [ratio(k, kernel) for k in GROWTH] for name, kernel in KERNELS.items()}
    text = "; ".join(
        f"{name} {values[0]:.2f} at k = {GROWTH[0]}, {values[-1]:.2f} at k = {GROWTH[-1]}"
        for name, values in found.items()
    )
    return Claim(
        claim,
        order,
        f"networks over {order[2:-1]}: {text}",
        all(np.diff(values).max() <= 0 for values in found.values()),
        f"{how}; the ratio grows at none of k = {', '.join(map(str, GROWTH))}, both kernels; "
        "delta .1, by the normal tail",
        seeds=0,
    )


def recorded_claim() -> Claim:
    """Whose kernel the authors' recorded figures are."""
    ours, others = (
        {k: predicted(k, kernel) for k in RECORDED[0.999]} for kernel in (last_layer, ntk)
    )
    text = "; ".join(
        f"for {share:g}, k: networks (last layer's prediction, NTK's) "
        + ", ".join(f"{k}: {n} ({ours[k]}, {others[k]})" for k, n in known.items())
        for share, known in RECORDED.items()
    )
    apart = {
        name: [abs(math.log(n / sizes[k])) for known in RECORDED.values() for k, n in known.items()]
        for name, sizes in (("ours", ours), ("others", others))
    }
    return Claim(
        "the authors' recorded ensembles are those of the last layer's kernel, not of the NTK",
        "networks are said to be in the NTK regime",
        f"recorded at two ones {text}",
        max(apart["ours"]) <= math.log(2) < min(apart["others"]),
        "prediction 2 v / off^2 log(k / .1): that of the last layer within a factor of two of "
        "every record, that of the NTK of none",
        seeds=0,
    )


def moments_claim(found: Found, name: str, kernel, other) -> Claim:
    """Whether networks of some width have the limit's means and variance."""
    parts, holds = [], True
    for (form, k), each in found.items():
        if form != name:
            continue
        on, off = each.outputs[:, each.wanted].mean(), each.outputs[:, ~each.wanted].mean()
        variance = float(each.outputs.var(0).mean())
        known, wrong = moments(k, 2, kernel), moments(k, 2, other)
        parts.append(
            f"k = {k}: {on:.3f}, {off:.4f}, variance {variance:.2e} (predicted {known.on:.3f}, "
            f"{known.off:.4f}, {known.variance:.2e}; by the other kernel {wrong.on:.3f})"
        )
        is_near = abs(on - known.on) <= 0.01 and abs(off - known.off) <= 0.01
        holds &= bool(is_near and abs(variance / known.variance - 1) <= 0.15)
    paper = {"ntk": "a normal distribution in the limit", "standard": "-"}[name]
    kind = {"ntk": "the NTK's", "standard": "the last layer's"}[name]
    return Claim(
        f"finite networks, {name} parametrization: means and variance are {kind}",
        paper,
        "; ".join(parts),
        holds,
        "inputs of two ones, over all networks of an ensemble; means within .01, variance within "
        "15 %, at every k",
        seeds=1,
    )


def or_more(counts: Sequence[float]) -> np.ndarray:
    """Networks needed, infinitely many where all did not suffice."""
    return np.nan_to_num(counts, nan=math.inf)


def ranged(counts: np.ndarray) -> str:
    """Median and range in words."""
    return f"{np.median(counts):.0f} ({counts.min():.0f} to {counts.max():.0f})"


def sizes_claim(found: Found) -> Claim:
    """Whether networks needed are what was recorded, and what the kernel predicts."""
    parts, holds = [], True
    for share, recorded in RECORDED.items():
        for k in (k for name, k in found if name == "standard"):
            counts = or_more(found["standard", k].needed[share])
            middle, size, known = float(np.median(counts)), predicted(k, last_layer), recorded[k]
            parts.append(
                f"for {share:g} at k = {k}: {ranged(counts)} (recorded {known}, predicted {size}, "
                f"by the NTK {predicted(k, ntk)})"
            )
            holds &= size / 2 <= middle <= 2 * size and known / 2 <= middle <= 2 * known
    return Claim(
        "networks needed at two ones are those recorded and predicted",
        "; ".join(
            f"{', '.join(str(known[k]) for k in STANDARD)} for {share:g}"
            for share, known in RECORDED.items()
        )
        + f" at k = {', '.join(map(str, STANDARD))} (recorded)",
        "; ".join(parts),
        bool(holds),
        "the number from which on so large a share of all inputs of two ones is right at a cut of "
        f"0, the median (and the range) of {ORDERS} orders of the same networks, standard "
        "parametrization; within a factor of two of both for either share at every k",
        seeds=1,
    )


def exact_claims(found: Found) -> list[Claim]:
    """Whether all inputs come out, and at which cut they do not."""
    whole = {key: each for key, each in found.items() if each.whole}
    parts, holds = [], True
    for (name, k), each in whole.items():
        counts, size = or_more(each.whole), predicted_for_all(k, LIMITS[name], THRESHOLD)
        parts.append(f"{name}, k = {k}: {ranged(counts)} of {len(each.outputs)}, predicted {size}")
        holds &= bool(counts.max() <= {5: 100, 8: 200}[k])
    stuck = {key: each.stuck for key, each in whole.items()}
    return [
        Claim(
            "all 2^k - 1 inputs are exact",
            "with high probability, for O(k^2) networks",
            "networks needed, their median and range over orders: " + "; ".join(parts),
            holds,
            f"every input right from so many networks on at a cut of {THRESHOLD}; at most 100 at "
            f"k = 5 and 200 at k = 8 in each of {ORDERS} orders",
            seeds=1,
        ),
        Claim(
            "a cut of exactly 0 does not serve all inputs",
            "rounding at 0",
            "; ".join(
                f"{name}, k = {k}: at most {share:.3f}" for (name, k), share in stuck.items()
            ),
            all(share < 1 for share in stuck.values()),
            "share of all 2^k - 1 inputs right at a cut of 0, the best of any number of networks: "
            "outputs of training inputs that are to be 0 are 0 but for rounding",
            seeds=1,
        ),
    ]


def rows_of(found: Found) -> list[dict[str, object]]:
    """Lines of the table."""
    rows: list[dict[str, object]] = []
    for (name, k), each in found.items():
        known = moments(k, 2, LIMITS[name])
        middle = {share: float(np.median(n)) for share, n in each.needed.items()}
        row = {
            "parametrization": name,
            "k": k,
            "networks": len(each.outputs),
            "mean of a 1": float(each.outputs[:, each.wanted].mean()),
            "predicted 1": known.on,
            "mean of a 0": float(each.outputs[:, ~each.wanted].mean()),
            "predicted 0": known.off,
            "variance": float(each.outputs.var(0).mean()),
            "predicted variance": known.variance,
        }
        shares = {f"needed for {s}": n for s, n in middle.items() if math.isfinite(n)}
        rows.append(row | shares)
    return rows


def curves(figure, found: Found) -> None:
    """Networks needed by k: for one input and for all."""
    figure.set_size_inches(8, 3.8)
    sizes = np.arange(4, 31)
    one, every = figure.subplots(1, 2)
    for axes, size in (
        (one, predicted),
        (every, lambda k, kernel: predicted_for_all(k, kernel, THRESHOLD)),
    ):
        for name, kernel, color in (("last layer", last_layer, "C0"), ("NTK", ntk, "C3")):
            values = [size(int(k), kernel) for k in sizes]
            axes.plot(sizes, values, color=color, label=f"predicted, {name}")
        axes.set_xlabel("k")
        axes.set_yscale("log")
        axes.spines[["top", "right"]].set_visible(False)
    one.plot(*zip(*RECORDED[0.999].items(), strict=True), "k^", label="recorded, .999")
    for marker, form, color in (("o", "standard", "C0"), ("s", "ntk", "C3")):
        mine = {k: each for (name, k), each in found.items() if name == form}
        whole = {k: each.whole for k, each in mine.items() if each.whole}
        for axes, needed in ((one, {k: e.needed[0.999] for k, e in mine.items()}), (every, whole)):
            middle = {k: np.median(counts) for k, counts in needed.items()}
            points = [(k, n) for k, n in middle.items() if math.isfinite(n)]
            if points:
                axes.plot(*zip(*points, strict=True), marker, color=color, label=f"ours, {form}")
    one.set_title("an input of two ones, cut at 0", fontsize=10)
    every.set_title(f"all inputs, cut at {THRESHOLD}", fontsize=10)
    one.set_ylabel("networks")
    one.legend(frameon=False, fontsize=7)
    every.legend(frameon=False, fontsize=7)


def means(figure, found: Found) -> None:
    """Outputs of averages for two ones at k = 5, by networks."""
    for axes, (name, kernel) in zip(
        figure.subplots(1, 2, sharey=True), (("standard", last_layer), ("ntk", ntk)), strict=True
    ):
        each, known = found[name, 5], moments(5, 2, kernel)
        lines = averaged(each.outputs)
        axes.plot(lines[:, each.wanted], color="C0", linewidth=0.6)
        axes.plot(lines[:, ~each.wanted], color="C3", linewidth=0.6)
        for value in (known.on, known.off):
            axes.axhline(value, color="black", linestyle="--", linewidth=1)
        axes.set_title(f"{name}; dashed: its kernel", fontsize=10)
        axes.set_xlabel("networks in the average")
        axes.set_ylim(-0.4, 1.0)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("outputs, k = 5, two ones")
