"""Mixture-of-Transformers: what a copy of the weights for each kind of token is worth.

Small decoders learn two streams of tokens of two kinds. In one, segments of two families follow
modular rules of their own; in the other, images of digits (8 x 8 pixels of 16 levels) stand between
captions, half of which say the digit before it is seen. A dense decoder is compared with those that
have copies of the FFN, of attention's maps, of the norms, or of all: the work of a token is the
same. Every way tries the same rates, by the loss on validation rows with the first seed; runs of
one rate are members of one run (`ffnlab.learning.members`). Figures are of test rows, which choose
nothing.
"""

import time
from collections.abc import Mapping, Sequence

import numpy as np

from ffnlab.storage.files import StrPath
from ffnlab.studies import STUDIES
from ffnlab.studies.mixture_of_transformers_measure import (
    FULL,
    HIDDEN,
    LAYERS,
    QUICK,
    WAYS,
    WIDTH,
    Exact,
    Run,
    Task,
    compared,
    exact,
    tasks,
)
from ffnlab.studies.result import Claim, Result
from ffnlab.studies.side_by_side import spread

__all__ = ["run"]

Found = Mapping[str, Mapping[str, Run]]  # task -> way -> what it reached
SLACK = 0.02  # nats, between three quarters of the steps and all of them
NO_WORSE = 0.01  # nats, that an untied way may lie above the dense one


def run(*, out: StrPath | None = None, quick: bool = False, seed: int = 0) -> Result:
    """The study; arguments as for `ffnlab.studies.run.run_study`."""
    begin = time.perf_counter()
    sizes = QUICK if quick else FULL
    every = tasks(sizes, seed)
    same = exact(every[0], seed)
    found = {task.name: compared(task, sizes, seed) for task in every}
    marks = {task.name: task.marks for task in every}
    return Result(
        slug="mixture-of-transformers",
        title=STUDIES["mixture-of-transformers"].title,
        settings={
            "width": WIDTH,
            "hidden": HIDDEN,
            "layers": LAYERS,
            "optimizer": "AdamW, a constant rate",
            "sizes": sizes._asdict(),
            "marks": marks,
            "untied": WAYS,
            "tried": {
                name: {
                    way: {f"{r:g}": v for r, v in one.tried.items()} for way, one in ways.items()
                }
                for name, ways in found.items()
            },
        },
        seed=seed,
        quick=quick,
        seconds=time.perf_counter() - begin,
        claims=[
            *exact_claims(same),
            *speed_claims(found, every),
            *kind_claims(found),
            *part_claims(found),
        ],
        table=rows_of(found, marks),
        pictures={"losses": lambda figure: losses(figure, found, marks)},
    ).write(out)


def exact_claims(same: Exact) -> list[Claim]:
    """What must hold of any model."""
    return [
        Claim(
            "copies that are alike are the dense model",
            "every modality its own copy of what a dense model has",
            f"largest difference of a logit {same.tied:.1e}",
            same.tied <= 1e-6,
            "copies of all parts, rows of both kinds of token",
            seeds=0,
        ),
        Claim(
            "sorted tokens, blocks and a choice among all copies' results are the same",
            "-",
            f"largest difference of a logit {same.ways[0]:.1e}, of a gradient {same.ways[1]:.1e} "
            "of its largest",
            max(same.ways) <= 1e-5,
            "copies that differ, norms after sublayers",
            seeds=0,
        ),
        Claim(
            "a token costs what it costs the dense model, within 2 %",
            "active operations are the dense model's",
            f"{same.work:.4f} of its matrix products counted, {same.closed:.4f} in closed form; "
            f"{same.size:.3f} times its parameters in blocks",
            max(abs(same.work - 1), abs(same.closed - 1)) <= 0.02 and abs(same.size - 2) <= 1e-9,
            "two kinds of token; products counted in the compiled program's jaxpr",
            seeds=0,
        ),
    ]


def speed_claims(found: Found, every: Sequence[Task]) -> list[Claim]:
    """Copies of all parts against none, after each mark."""
    claims = []
    for task in every:
        dense, untied = (found[task.name][way].nats for way in ("dense", "all"))
        pairs = zip(task.marks, dense.tolist(), untied.tolist(), strict=True)
        said = "; ".join(f"step {m}: {spread(u)}, dense {spread(d)}" for m, d, u in pairs)
        seeds = dense.shape[1]
        early, late = (spread(values.tolist()) for values in (untied[1], dense[2]))
        claims += [
            Claim(
                f"{task.name}: with copies of all parts the loss is below the dense model's all "
                "along",
                "Chameleon 7B: the dense model's quality at 55.8 % of its operations",
                f"{said} nats",
                bool((untied < dense).all()),
                "held-out nats per token after each mark, each seed; " + tuned(found[task.name]),
                seeds=seeds,
            ),
            Claim(
                f"{task.name}: three quarters of the steps are enough",
                "Chameleon 7B: the dense model's quality at 55.8 % of its operations",
                f"step {task.marks[1]}: {early}, dense at step {task.marks[2]}: {late} nats",
                bool((untied[1] <= dense[2] + SLACK).all()),
                f"at most {SLACK} nats above the dense model at the end, each seed",
                seeds=seeds,
            ),
        ]
    return claims


def kind_claims(found: Found) -> list[Claim]:
    """Which kind of token gains."""
    runs = found["text and images"]
    letters, pixels = (runs["dense"].kinds - runs["all"].kinds).tolist()
    return [
        Claim(
            "images gain from copies of all parts",
            "Transfusion 7B: image quality of the dense model at a third of its operations",
            f"{spread(pixels)} nats per pixel, {spread(letters)} per letter",
            min(pixels) > 0,
            "held-out nats of the dense model less those with copies, at the end, each seed",
            seeds=len(pixels),
        )
    ]


def part_claims(found: Found) -> list[Claim]:
    """What each part's copies are worth."""
    claims = []
    for name, runs in found.items():
        dense = runs["dense"].nats[-1]
        above = {way: one.nats[-1] - dense for way, one in runs.items() if way != "dense"}
        said = ", ".join(f"{way} {spread(values.tolist())}" for way, values in above.items())
        ffn, whole = (float(above[way].mean()) for way in ("FFN", "all"))
        share = f"{ffn / whole:.2f} of the gain of all parts" if whole < 0 else "there is no gain"
        claims += [
            Claim(
                f"{name}: no part is worse with copies",
                "more is untied, more is gained",
                f"nats above the dense model: {said}",
                all(bool((values <= NO_WORSE).all()) for values in above.values()),
                f"at most {NO_WORSE} nats at the end, each seed",
                seeds=len(dense),
            ),
            Claim(
                f"{name}: copies of the FFN alone give most of the gain",
                "untying the FFN gives most, attention and norms add to it",
                f"{share}; nats above the dense model: FFN "
                f"{spread(above['FFN'].tolist())}, all {spread(above['all'].tolist())}",
                whole < 0 and ffn < whole / 2,
                "mean over seeds, at the end",
                seeds=len(dense),
            ),
        ]
    return claims


def tuned(runs: Mapping[str, Run]) -> str:
    """How the rates were chosen."""
    rates = ", ".join(f"{r:g}" for r in runs["dense"].tried)
    chosen = ", ".join(f"{way} {runs[way].rate:g}" for way in ("dense", "all"))
    return f"AdamW at {rates} tried alike on validation rows with the first seed: {chosen}"


def rows_of(found: Found, marks: Mapping[str, Sequence[int]]) -> list[dict[str, object]]:
    """A row for each task and way: means over seeds."""
    rows = []
    for name, runs in found.items():
        for way, one in runs.items():
            row: dict[str, object] = {"task": name, "copies": way, "rate": one.rate}
            row["parameters"] = one.parameters
            columns = ("half", "three quarters", "all steps")
            row |= dict(zip(columns, one.nats.mean(1).tolist(), strict=True))
            first, second = one.kinds.mean(1).tolist()
            rows.append(row | {"first kind": first, "second kind": second})
    return rows


def losses(figure, found: Found, marks: Mapping[str, Sequence[int]]) -> None:
    """Loss after each mark, means over seeds with their range."""
    figure.set_size_inches(9, 4)
    for axes, (name, runs) in zip(figure.subplots(1, len(found)), found.items(), strict=True):
        for way, one in runs.items():
            middle = one.nats.mean(1)
            ends = np.stack([middle - one.nats.min(1), one.nats.max(1) - middle])
            axes.errorbar(marks[name], middle, ends, marker="o", capsize=2, label=way)
        axes.set_title(name)
        axes.set_xlabel("steps")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("held-out nats per token")
    figure.axes[0].legend(frameon=False, title="copies of")
