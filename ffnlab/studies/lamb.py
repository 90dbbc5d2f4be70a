"""LAMB on a small classifier: nineteen steps of 4,096 rows instead of 1,250 of 64.

A four-layer network learns clusters in ten epochs. At each batch size each optimizer gets the best
of as many rates, and large batches are few steps: what counts is how much a step does. A second
network has layers of very unlike scale, which a rate for all may not fit.
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ffnlab.data import ArrayBatches, Labelled
from ffnlab.layers import MLP
from ffnlab.learning import backprop, labelled, lamb, lars
from ffnlab.learning.optimizers.trust import matrices
from ffnlab.rule import Rule
from ffnlab.storage.files import StrPath
from ffnlab.studies import STUDIES, tuning
from ffnlab.studies.classify import CLUSTERS, at_rate, clusters, grouped_bars, paced
from ffnlab.studies.result import Claim, Result
from ffnlab.studies.tuning import Found, Setting, Side, Splits

__all__ = ["Optimizer", "run"]

SIZES = (64, 128, 128, 128, 10)
SCALES = (1.0, 0.05, 5.0, 1.0)
LARGE, SMALL = 4096, 64
EPOCHS, DECAY = 10, 0.01
LAYERS = {"layers alike": None, "layers scaled": SCALES}


class Optimizer(NamedTuple):
    """An optimizer and the rates tried, the same ones at every batch size.

    Attributes:
      make: schedule -> optax transformation.
      rates: peaks of the schedule.
    """

    make: Callable[[optax.Schedule], optax.GradientTransformation]
    rates: Sequence[float]


OPTIMIZERS = {
    "LAMB": Optimizer(lambda r: lamb(r, weight_decay=DECAY), (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)),
    "AdamW": Optimizer(
        lambda r: optax.adamw(r, weight_decay=DECAY, mask=matrices),
        (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    ),
    "Nesterov": Optimizer(
        lambda r: optax.sgd(r, 0.9, nesterov=True), (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    ),
    "LARS": Optimizer(lambda r: lars(r, weight_decay=DECAY), (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)),
}


def run(*, out: StrPath | None = None, quick: bool = False, seed: int = 0) -> Result:
    """The study; arguments as for `ffnlab.studies.run.run_study`."""
    begin = time.perf_counter()
    seeds = [seed] if quick else [seed, seed + 1, seed + 2]
    data = tuning.splits(clusters(seed))
    found = measured(data, seeds, quick)
    return Result(
        slug="lamb",
        title=STUDIES["lamb"].title,
        settings={
            "data": CLUSTERS,
            "model": list(SIZES),
            "scales": list(SCALES),
            "epochs": EPOCHS,
            "batches": [LARGE, SMALL],
            "weight_decay": DECAY,
            "schedule": "warm-up over a tenth, cosine to zero",
            "validation": tuning.trials(found),
            "seeds": seeds,
        },
        seed=seed,
        quick=quick,
        seconds=time.perf_counter() - begin,
        claims=[*batch_claims(found, len(data.train.x)), *step_claims(data.train, seed)],
        table=tuning.table(found),
        pictures={"accuracy": lambda figure: bars(figure, found)},
    ).write(out)


def case_of(layers: str, batch: int) -> str:
    """The name of a network at a batch size."""
    return f"{layers}, batch {batch}"


def measured(data: Splits, seeds: Sequence[int], quick: bool) -> Found:
    """What each optimizer reaches with each network at each batch size."""
    names = list(OPTIMIZERS)[:2] if quick else list(OPTIMIZERS)
    found = {}
    for batch in (LARGE, SMALL):
        steps = EPOCHS * len(data.train.x) // batch
        rules = {name: rule_of(name, steps) for name in names}
        for layers, scales in LAYERS.items():
            sides = [side(name, rule, scales, batch, steps, quick) for name, rule in rules.items()]
            found[case_of(layers, batch)] = tuning.compare(sides, data, seeds)
    return found


def rule_of(name: str, steps: int) -> Rule:
    """The rule of an optimizer for a run of so many steps, its schedule's peak 1: see `at_rate`."""
    return backprop(labelled, paced(OPTIMIZERS[name].make(schedule(1.0, steps))))


def side(
    name: str,
    rule: Rule,
    scales: Sequence[float] | None,
    batch: int,
    steps: int,
    quick: bool,
) -> Side:
    """An optimizer with its rates; the quick form tries two of them."""
    rates = OPTIMIZERS[name].rates

    def at(setting: Setting) -> Rule:
        return at_rate(rule, setting["rate"])

    tried = tuning.grid(rate=rates[2::2] if quick else rates)
    return Side(name, tried, at, lambda seed: network(seed, scales), batch, steps)


def network(seed: int, scales: Sequence[float] | None = None) -> MLP:
    """The network, each layer's matrix multiplied by its scale."""
    model = MLP(SIZES, key=jax.random.key(seed))
    for linear, scale in zip(model.maps, scales or (), strict=scales is not None):
        linear.w = linear.replace(jax.tree.map(lambda w, s=scale: w * s, linear.weight)).w
    return model


def schedule(rate: float, steps: int) -> optax.Schedule:
    """Linear warm-up over a tenth of the steps, then cosine to zero."""
    return optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps // 10), steps)


def batch_claims(found: Found, rows: int) -> list[Claim]:
    """What the trust ratio buys with large batches, and what it does not.

    Args:
      found: see `measured`.
      rows: of the training set.
    """
    large = {case: found[case] for case in (case_of(name, LARGE) for name in LAYERS)}
    rivals = [name for name in OPTIMIZERS if name != "LAMB" and name in next(iter(found.values()))]
    steps = EPOCHS * rows // LARGE
    lost, outside = lost_of(found)
    return [
        tuning.tuned_claim(
            f"{steps} steps of {LARGE} rows are enough for LAMB",
            "BERT in 8,599 steps instead of 1,000,000, at batch 32k",
            "test accuracy at least .97, for both networks with each seed",
            min(tuning.scores(large, "LAMB")) >= 0.97,
            large,
            "LAMB",
        ),
        tuning.tuned_claim(
            f"at batch {LARGE} LAMB is .02 above its rivals",
            "matches or beats LARS; others need more tuning",
            "test accuracy at least .02 above each other optimizer's, for both networks with each "
            "seed",
            tuning.deficit(large, "LAMB", *rivals) <= -0.02,
            large,
            "LAMB",
            *rivals,
        ),
        tuning.tuned_claim(
            f"a batch of {LARGE} costs LAMB at most {tuning.CLOSE} of accuracy",
            "same quality at batch 32k (abstract)",
            f"same number of epochs; test accuracy at most {tuning.CLOSE} below that at batch "
            f"{SMALL}, for both networks with each seed (largest loss {lost:.4f})",
            lost <= tuning.CLOSE,
            found,
            "LAMB",
        ),
        tuning.tuned_claim(
            f"a batch of {LARGE} costs LAMB nothing",
            "no loss of quality at batch 32k (abstract)",
            f"mean test accuracy at batch {LARGE} at least the lowest of the seeds at batch {SMALL}"
            ", for both networks",
            not outside,
            found,
            "LAMB",
        ),
        tuning.tuned_claim(
            "layers of unlike scale cost LAMB at most .01 of accuracy",
            "-",
            f"layers multiplied by {SCALES}; test accuracy at most .01 below that with layers "
            "alike, at both batch sizes with each seed",
            cost_of_scale(found) <= 0.01,
            found,
            "LAMB",
        ),
        *(match_claim(found, batch, rivals) for batch in (SMALL, LARGE)),
    ]


def lost_of(found: Found) -> tuple[float, bool]:
    """What the large batch costs LAMB: the most with any seed, and whether a mean is below all."""
    most, outside = -1.0, False
    for layers in LAYERS:
        large, small = (found[case_of(layers, batch)]["LAMB"] for batch in (LARGE, SMALL))
        most = max(most, *(b - a for a, b in zip(large.scores, small.scores, strict=True)))
        outside |= large.mean < min(small.scores)
    return most - tuning.SLACK, outside


def cost_of_scale(found: Found) -> float:
    """The most that scaled layers cost LAMB, at any batch size with any seed."""
    return max(
        b - a - tuning.SLACK
        for batch in (LARGE, SMALL)
        for b, a in zip(
            *(found[case_of(name, batch)]["LAMB"].scores for name in LAYERS), strict=True
        )
    )


def match_claim(found: Found, batch: int, rivals: Sequence[str]) -> Claim:
    """Whether tuned rivals come near LAMB at a batch size."""
    cases = {case: found[case] for case in (case_of(name, batch) for name in LAYERS)}
    names = [name for name in rivals if name in ("AdamW", "Nesterov")]
    gap = max(tuning.deficit(cases, name, "LAMB") for name in names)
    return tuning.tuned_claim(
        f"tuned, {' and '.join(names)} come within .01 of LAMB at batch {batch}",
        "Nesterov and Adam, tuned, match LAMB at its batch sizes (arXiv 2102.06356)",
        "test accuracy at most .01 below LAMB's, for both networks with each seed",
        gap <= 0.01,
        cases,
        "LAMB",
        *names,
    )


def step_claims(rows: Labelled, seed: int) -> list[Claim]:
    """What one step does, whatever the data: its length, and what gradients' scale changes."""
    rate, model = 0.03, network(seed)
    batch = ArrayBatches(rows, SMALL, seed)(0)
    rule = backprop(labelled, lamb(rate))
    after = rule.model(rule.step(rule.init(model, jax.random.key(seed)), batch)[0])
    pairs = list(zip(maps(model), maps(after), strict=True))
    worst = max(abs(norm(b - a) / (rate * norm(a)) - 1) for a, b in pairs)
    ends = []
    for scale in (1.0, 1e-2):
        scaled = backprop(lambda m, b, s=scale: scaled_loss(m, b, s), lamb(rate, eps=1e-12))
        start = scaled.init(model, jax.random.key(seed))
        ends.append(maps(scaled.model(scaled.step(start, batch)[0])))
    apart = max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(*ends, strict=True))
    return [
        Claim(
            "a step's length is the rate times the norm of the weights",
            "ratio = ||x|| / ||u||",
            f"largest relative difference {worst:.1e}",
            worst < 1e-4,
            f"each matrix after one step at rate {rate}, no decay; float32",
            seeds=1,
        ),
        Claim(
            "the scale of gradients changes nothing",
            "-",
            f"loss divided by 100: largest relative difference {apart:.1e}",
            apart < 1e-4,
            "matrices after one step, eps 1e-12",
            seeds=1,
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


def bars(figure, found: Found) -> None:
    """Accuracy by network, batch size and optimizer."""
    axes = figure.subplots()
    grouped_bars(axes, tuning.values(found))
    axes.set_ylim(0, 1.2)
    axes.set_ylabel("test accuracy")
    axes.set_title("Ten epochs, each optimizer at its best rate by validation")
