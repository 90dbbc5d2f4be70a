"""LAMB on a small classifier: nineteen steps of 4,096 rows instead of 1,250 of 64.

A four-layer network learns clusters in ten epochs. Each optimizer gets its best rate of a short
grid, as the paper tunes by batch size, and large batches are few steps: what counts is how much a
step does. A second network has layers of very unlike scale, which a rate for all cannot fit.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ffnlab.data import ArrayBatches, Labelled, gaussian_clusters
from ffnlab.errors import NumericalError
from ffnlab.files import StrPath
from ffnlab.layers import MLP
from ffnlab.learning import backprop, labelled, lamb, lars
from ffnlab.learning.trust import matrices
from ffnlab.studies import STUDIES
from ffnlab.studies.classify import fit
from ffnlab.studies.result import Claim, Result

__all__ = ["Optimizer", "run"]

SIZES = (64, 128, 128, 128, 10)
SCALES = (1.0, 0.05, 5.0, 1.0)
LARGE, SMALL = 4096, 64
EPOCHS, DECAY = 10, 0.01


class Optimizer(NamedTuple):
    """An optimizer and the rates tried.

    Attributes:
      name: for people.
      make: schedule -> optax transformation.
      rates: peaks tried at the large batch.
      small: peak at the small batch.
    """

    name: str
    make: Callable[[optax.Schedule], optax.GradientTransformation]
    rates: Sequence[float]
    small: float


OPTIMIZERS = (
    Optimizer("LAMB", lambda r: lamb(r, weight_decay=DECAY), (0.01, 0.03, 0.1), 0.01),
    Optimizer(
        "AdamW",
        lambda r: optax.adamw(r, weight_decay=DECAY, mask=matrices),
        (1e-3, 3e-3, 1e-2, 3e-2),
        1e-3,
    ),
    Optimizer("SGD", lambda r: optax.sgd(r, 0.9), (0.03, 0.1, 0.3), 0.03),
    Optimizer("LARS", lambda r: lars(r, weight_decay=DECAY), (0.03, 0.1, 0.3), 0.01),
)


def run(*, out: StrPath | None = None, quick: bool = False, seed: int = 0) -> Result:
    """The study; arguments as for `ffnlab.studies.run.run_study`."""
    begin = time.perf_counter()
    data = gaussian_clusters(seed)
    chosen = OPTIMIZERS[:2] if quick else OPTIMIZERS
    table = [row for scales in (None, SCALES) for row in rows_of(chosen, data, scales, seed)]
    return Result(
        slug="lamb",
        title=STUDIES["lamb"].title,
        settings={
            "data": "gaussian_clusters: 30 centres, 10 classes, width 64, 8000 rows",
            "model": list(SIZES),
            "epochs": EPOCHS,
            "batches": [LARGE, SMALL],
            "weight_decay": DECAY,
            "schedule": "warm-up over a tenth, cosine to zero",
        },
        seed=seed,
        seconds=time.perf_counter() - begin,
        claims=[*batch_claims(table), *step_claims(data, seed)],
        table=table,
        pictures={"accuracy": lambda figure: bars(figure, table)},
    ).write(out)


def rows_of(
    chosen: Sequence[Optimizer],
    data: tuple[Labelled, Labelled],
    scales: Sequence[float] | None,
    seed: int,
) -> list[dict[str, Any]]:
    """Test accuracy of each optimizer: at its best rate with large batches, and with small ones."""
    model = network(seed, scales)
    rows = []
    for optimizer in chosen:
        large = {r: trained(optimizer, r, model, data, LARGE, seed) for r in optimizer.rates}
        best = max(large, key=large.__getitem__)
        row = {
            "layers": "alike" if scales is None else f"scaled by {', '.join(map(str, scales))}",
            "optimizer": optimizer.name,
            "best rate": best,
            f"accuracy, batch {LARGE}": large[best],
        }
        if scales is None:
            small = trained(optimizer, optimizer.small, model, data, SMALL, seed)
            row[f"accuracy, batch {SMALL}"] = small
        rows.append(row)
    return rows


def network(seed: int, scales: Sequence[float] | None = None) -> MLP:
    """The network, each layer's matrix multiplied by its scale."""
    model = MLP(SIZES, key=jax.random.key(seed))
    for linear, scale in zip(model.maps, scales or (), strict=scales is not None):
        linear.w = linear.replace(jax.tree.map(lambda w, s=scale: w * s, linear.weight)).w
    return model


def schedule(rate: float, steps: int) -> optax.Schedule:
    """Linear warm-up over a tenth of the steps, then cosine to zero."""
    return optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps // 10), steps)


def trained(
    optimizer: Optimizer,
    rate: float,
    model: MLP,
    data: tuple[Labelled, Labelled],
    batch: int,
    seed: int,
) -> float:
    """Test accuracy after `EPOCHS` epochs' worth of rows; 0 where the run diverged."""
    steps = EPOCHS * len(data[0].x) // batch
    rule = backprop(labelled, optimizer.make(schedule(rate, steps)))
    try:
        return fit(rule, model, data, batch=batch, steps=steps, seed=seed)
    except NumericalError:
        return 0.0


def batch_claims(table: list[dict[str, Any]]) -> list[Claim]:
    """What the trust ratio buys with large batches."""
    large, small = f"accuracy, batch {LARGE}", f"accuracy, batch {SMALL}"
    alike = {row["optimizer"]: row for row in table if row["layers"] == "alike"}
    scaled = {row["optimizer"]: row for row in table if row["layers"] != "alike"}
    ours, adam = alike["LAMB"], alike["AdamW"]
    gain = ours[large] - adam[large]
    lost = ours[small] - ours[large]
    steps = EPOCHS * 8000 // LARGE
    return [
        Claim(
            "large batches train in few steps",
            "BERT in 8,599 steps instead of 1,000,000, at batch 32k",
            f"{steps} steps: LAMB {ours[large]:.3f}, AdamW {adam[large]:.3f}",
            ours[large] >= 0.97 and gain >= 0.02,
            "test accuracy of LAMB, best rate, at least .97 and .02 above AdamW's best",
        ),
        Claim(
            "a large batch costs no quality",
            "same quality at batch 32k (abstract)",
            f"batch {SMALL}: {ours[small]:.3f}, batch {LARGE}: {ours[large]:.3f}",
            lost <= 0.02,
            "same number of epochs; test accuracy at most .02 lower",
        ),
        Claim(
            "layers of unlike scale need no rates of their own",
            "-",
            f"LAMB {scaled['LAMB'][large]:.3f}, AdamW {scaled['AdamW'][large]:.3f}",
            scaled["LAMB"][large] >= max(0.97, scaled["AdamW"][large]),
            f"layers multiplied by {SCALES}; test accuracy at least .97 and AdamW's",
        ),
        Claim(
            "well-tuned AdamW is as good at small batches",
            "Nesterov and Adam, tuned, match LAMB (arXiv 2102.06356)",
            f"batch {SMALL}: AdamW {adam[small]:.3f}, LAMB {ours[small]:.3f}",
            abs(adam[small] - ours[small]) <= 0.01,
            "test accuracies at most .01 apart",
        ),
    ]


def step_claims(data: tuple[Labelled, Labelled], seed: int) -> list[Claim]:
    """What one step does, whatever the data: its length, and what gradients' scale changes."""
    rate, model = 0.03, network(seed)
    batch = ArrayBatches(data[0], SMALL, seed)(0)
    rule = backprop(labelled, lamb(rate))
    after = rule.step(rule.init(model, jax.random.key(seed)), batch)[0].model
    pairs = list(zip(maps(model), maps(after), strict=True))
    worst = max(abs(norm(b - a) / (rate * norm(a)) - 1) for a, b in pairs)
    ends = []
    for scale in (1.0, 1e-2):
        scaled = backprop(lambda m, b, s=scale: scaled_loss(m, b, s), lamb(rate, eps=1e-12))
        start = scaled.init(model, jax.random.key(seed))
        ends.append(maps(scaled.step(start, batch)[0].model))
    apart = max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(*ends, strict=True))
    return [
        Claim(
            "a step's length is the rate times the norm of the weights",
            "ratio = ||x|| / ||u||",
            f"largest relative difference {worst:.1e}",
            worst < 1e-4,
            f"each matrix after one step at rate {rate}, no decay; float32",
        ),
        Claim(
            "the scale of gradients changes nothing",
            "-",
            f"loss divided by 100: largest relative difference {apart:.1e}",
            apart < 1e-4,
            "matrices after one step, eps 1e-12",
        ),
    ]


def scaled_loss(model: MLP, batch: Labelled, scale: float) -> tuple[jax.Array, dict]:
    """The loss of `labelled` times a number."""
    loss, metrics = labelled(model, batch)
    return loss * scale, metrics


def maps(model: MLP) -> list[np.ndarray]:
    """The network's matrices, in float64."""
    return [np.asarray(linear.weight.dense(), np.float64) for linear in model.maps]


def norm(x: np.ndarray) -> float:
    """The Euclidean norm of all entries."""
    return float(jnp.linalg.norm(x.ravel()))


def bars(figure, table: list[dict[str, Any]]) -> None:
    """Accuracy at the large batch, by optimizer, layers alike and unlike."""
    axes = figure.subplots()
    large = f"accuracy, batch {LARGE}"
    names = list(dict.fromkeys(row["optimizer"] for row in table))
    kinds = list(dict.fromkeys(row["layers"] for row in table))
    for i, kind in enumerate(kinds):
        heights = [row[large] for row in table if row["layers"] == kind]
        places = np.arange(len(names)) + 0.4 * (i - 0.5)
        drawn = axes.bar(places, heights, 0.38, label=f"layers {kind}", color=f"C{i}")
        axes.bar_label(drawn, fmt="%.3f", fontsize=8)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(0, 1.12)
    axes.set_ylabel("test accuracy")
    axes.set_title(f"{EPOCHS * 8000 // LARGE} steps of {LARGE} rows, best rate of each")
    axes.legend(frameon=False, loc="upper right", ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
