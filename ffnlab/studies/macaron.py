"""Macaron: what a half step of the FFN on either side of the attention is worth.

Attention and FFN split a differential equation. How the error of one step falls with its size is
measured for exact flows of linear fields, for Euler's steps along them, and for the fields of a
trained decoder's blocks. Decoders of bytes are trained with blocks of two slots and as Macarons of
as many parameters, with half steps and with whole ones; each tries the same rates, by validation
windows with the first seed, runs of one rate as members of one run (`ffnlab.learning.members`).
"""

import time
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from ffnlab.data import TextBatches, stdlib_text
from ffnlab.storage.files import StrPath
from ffnlab.studies import STUDIES
from ffnlab.studies.macaron_measure import (
    BATCH,
    FULL,
    HIDDEN,
    LAYERS,
    LENGTH,
    QUICK,
    WAYS,
    WIDTH,
    Counts,
    Errors,
    Kept,
    Run,
    compared,
    counts,
    kept,
    linear_errors,
    trained_errors,
)
from ffnlab.studies.result import Claim, Result
from ffnlab.studies.side_by_side import spread

__all__ = ["run"]

Found = Mapping[str, Run]  # way -> what it reached
PLAIN, HALF, WHOLE = WAYS
CLOSE = 0.1  # of an exponent
SLACK = 0.05  # nats per byte: what counts as no worse, at this size
ROWS, TOKENS = 4, 128  # of held-out text, for the trained decoder


def run(*, out: StrPath | None = None, quick: bool = False, seed: int = 0) -> Result:
    """The study; arguments as for `ffnlab.studies.run.run_study`."""
    begin = time.perf_counter()
    sizes, text = QUICK if quick else FULL, stdlib_text()
    rows = TextBatches(text.held_out, ROWS, TOKENS, seed)(0)
    linear = linear_errors(sizes.draws, seed)
    trained = trained_errors(rows[:2, :64])
    found = compared(sizes, seed)
    return Result(
        slug="macaron",
        title=STUDIES["macaron"].title,
        settings={
            "network": f"decoder, width {WIDTH}, {LAYERS} layers, FFNs of {HIDDEN} with gelu",
            "batch": [BATCH, LENGTH],
            "optimizer": "Adam, a constant rate",
            "sizes": sizes._asdict(),
            "tried": {
                way: {f"{rate:g}": nats for rate, nats in one.tried.items()}
                for way, one in found.items()
            },
            "text": text.identity,
        },
        seed=seed,
        quick=quick,
        seconds=time.perf_counter() - begin,
        claims=[
            *order_claims(linear),
            *trained_claims(trained),
            *exact_claims(counts(), kept(rows)),
            *learning_claims(found),
        ],
        table=[*error_rows(linear, "linear fields"), *error_rows(trained, "trained decoder")]
        + [
            {"case": "training", "side": way, "rate": one.rate, "parameters": one.parameters}
            | {"nats per byte": float(np.mean(one.nats))}
            for way, one in found.items()
        ],
        pictures={
            "errors": lambda figure: errors(figure, linear, trained),
            "training": lambda figure: bars(figure, found),
        },
    ).write(out)


def is_close(slopes: Float[np.ndarray, "n"], order: int) -> bool:
    """Whether the mean of exponents is that of an order."""
    return abs(float(slopes.mean()) - order) <= CLOSE


def order_claims(found: Errors) -> list[Claim]:
    """Orders of one step for linear fields."""
    lie, strang, lie_euler, strang_euler = (
        found.slopes[f"{name}, {inside}"]
        for inside in ("exact", "Euler")
        for name in ("Lie", "Strang")
    )
    basis = (
        f"slope of log error over log h, h from 1/4 to 1/128, {len(lie)} draws of two fields of "
        "8 dimensions, float64; the mean over draws within "
    )
    ratio = found.errors["Lie, Euler"][:, -1] / found.errors["Strang, Euler"][:, -1]
    smaller = float(np.exp(np.mean(np.log(ratio))))
    return [
        Claim(
            "with exact flows Strang's splitting errs by the cube of a step, Lie's by the square",
            "much lower local truncation error (abstract)",
            f"exponent {spread(strang.tolist())}, of Lie's {spread(lie.tolist())}",
            is_close(strang, 3) and is_close(lie, 2),
            f"{basis}{CLOSE} of 3 and of 2",
            seeds=1,
        ),
        Claim(
            "a Macaron, which takes Euler's steps inside, errs by the cube of a step",
            "the layer is Strang's splitting, for a higher-order ODE solver",
            f"exponent {spread(strang_euler.tolist())}, of Lie's {spread(lie_euler.tolist())}",
            is_close(strang_euler, 3),
            f"{basis}{CLOSE} of 3",
            seeds=1,
        ),
        Claim(
            "with Euler's steps inside, Strang's splitting has the smaller error",
            "much lower local truncation error (abstract)",
            f"{smaller:.2f} times smaller (geometric mean), smaller in {int((ratio > 1).sum())} "
            f"of {len(ratio)} draws",
            smaller > 1,
            "errors of one step of h = 1/128, Lie's over Strang's; a mean above 1",
            seeds=1,
        ),
    ]


def trained_claims(found: Errors) -> list[Claim]:
    """A trained decoder's own fields."""
    lie, strang = (found.errors[f"{name}, Euler"] for name in ("Lie", "Strang"))
    slopes = found.slopes["Strang, Euler"]
    own = lie[:, 0] / strang[:, 0]
    return [
        Claim(
            "along a trained decoder's fields a step of two half FFNs is closer to the ODE than "
            "attention and then the FFN",
            "much lower local truncation error (abstract)",
            f"error at h = 1 {spread(strang[:, 0].tolist())} of what a step adds, of attention "
            f"and then the FFN {spread(lie[:, 0].tolist())}; smaller in {int((own > 1).sum())} of "
            f"{len(own)} blocks",
            bool((own > 1).all()),
            "the embedded decoder, each block's attention and FFN at the stream that comes to it, "
            "against a Runge-Kutta scheme of 32 steps; in every block",
            seeds=0,
        ),
        Claim(
            "along a trained decoder's fields that step errs by the cube of its size",
            "the layer is Strang's splitting, for a higher-order ODE solver",
            f"exponent {spread(slopes.tolist())}, of attention and then the FFN "
            f"{spread(found.slopes['Lie, Euler'].tolist())}",
            is_close(slopes, 3),
            f"h from 1 to 1/32; the mean over blocks within {CLOSE} of 3",
            seeds=0,
        ),
    ]


def exact_claims(counted: Counts, same: Kept) -> list[Claim]:
    """What must hold of any model."""
    nats, change = same.nats, same.change
    least = min(abs(nats[name] - nats[""]) for name in ("twice", "moved"))
    said = ", ".join(f"{name} {nats[name]:.3f}" for name in ("twice", "moved", "split"))
    more = ", ".join(f"{m:g} d ({name})" for name, m in counted.parameters.items())
    return [
        Claim(
            "a Macaron of two FFNs of half the width has as many parameters but for 3 d a layer",
            "FFN width 2048 becomes 1024 twice; 3 d more by the code",
            f"{more}; {counted.products:.4f} of the products",
            counted.parameters == {"decoder": 1, "encoder": 3} and counted.products == 1,
            "an encoder of layer norms and biases 3 d exactly, a decoder of RMS norms without "
            "biases 1 d; products counted in the jaxpr, as many",
            seeds=0,
        ),
        Claim(
            "a first FFN of nothing and a second one doubled are the model that was",
            "-",
            f"largest change of a logit {change['kept']:.1e} of the largest",
            change["kept"] <= 1e-6,
            "the embedded decoder on held-out windows: at most 1e-6",
            seeds=0,
        ),
        Claim(
            "the same FFN in both slots, or in the first one alone, is another function",
            "two different FFNs in a layer",
            f"{nats['']:.3f} nats per byte become: {said}",
            least >= 0.01,
            "the embedded decoder on held-out windows, untrained: .01 nats or more, twice and "
            "moved; split is half of the channels in each slot",
            seeds=0,
        ),
    ]


def learning_claims(found: Found) -> list[Claim]:
    """What is learned in as many steps."""
    rates = ", ".join(f"{rate:g}" for rate in found[PLAIN].tried)
    chosen = ", ".join(f"{way} {one.rate:g}" for way, one in found.items())
    how = f"held-out nats per byte; Adam at {rates} tried alike on validation windows: {chosen}"

    def claim(text: str, paper: str, theirs: str) -> Claim:
        gap = np.array(found[HALF].nats) - np.array(found[theirs].nats)
        return Claim(
            text,
            paper,
            f"{spread(list(found[HALF].nats))}, {theirs} {spread(list(found[theirs].nats))}: "
            f"difference {spread(gap.tolist())}",
            float(gap.mean()) <= SLACK,
            f"mean over seeds at most {SLACK} above, which is within the noise of seeds at this "
            f"size; {how}",
            seeds=len(gap),
        )

    claims = [
        claim(
            "a Macaron learns as well as blocks of attention and FFN of as many parameters",
            "superior on IWSLT14, WMT14 and GLUE (abstract)",
            PLAIN,
        )
    ]
    if WHOLE in found:
        claims.append(
            claim("half steps learn as well as whole ones", "a factor of .5 of either FFN", WHOLE)
        )
    return claims


def error_rows(found: Errors, case: str) -> list[dict[str, object]]:
    """A row for each scheme: means over draws or blocks."""
    return [
        {
            "case": case,
            "side": name,
            "exponent": float(found.slopes[name].mean()),
            "lowest": float(found.slopes[name].min()),
            "highest": float(found.slopes[name].max()),
            "error of the shortest step": float(found.errors[name][:, -1].mean()),
        }
        for name in found.errors
    ]


def errors(figure, linear: Errors, trained: Errors) -> None:
    """Error of one step by its size, means over draws and blocks."""
    figure.set_size_inches(9, 4)
    titles = {"linear fields": linear, "a trained decoder's blocks": trained}
    for axes, (title, found) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for name, values in found.errors.items():
            mean = np.exp(np.log(values).mean(0))
            style = "--" if "Euler" in name else "-"
            color = "C0" if name.startswith("Lie") else "C1"
            label = f"{name}: {found.slopes[name].mean():.2f}"
            axes.loglog(found.sizes, mean, style, color=color, marker="o", ms=3, label=label)
        axes.set_title(title)
        axes.set_xlabel("h")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, title="exponent")
    figure.axes[0].set_ylabel("error of one step")


def bars(figure, found: Found) -> None:
    """Held-out nats per byte of every seed."""
    axes = figure.subplots()
    for i, one in enumerate(found.values()):
        axes.plot([i] * len(one.nats), one.nats, "o", color=f"C{i}")
        axes.plot([i - 0.2, i + 0.2], [np.mean(one.nats)] * 2, color=f"C{i}")
        axes.annotate(f"{np.mean(one.nats):.3f}", (i + 0.23, np.mean(one.nats)), va="center")
    axes.set_xticks(range(len(found)), [f"{way}\nrate {one.rate:g}" for way, one in found.items()])
    axes.set_xlim(-0.5, len(found) - 0.3)
    axes.set_ylabel("held-out nats per byte")
    axes.spines[["top", "right"]].set_visible(False)
