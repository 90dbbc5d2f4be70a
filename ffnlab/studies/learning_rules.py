"""Learning rules side by side: accuracy, memory, work and direction of their steps.

The data are scikit-learn's digits and, but in the quick form, MNIST where it is present.

Backpropagation, by counter-current learning's optimizer and by NoProp's, and counter-current
learning train one MLP, NoProp its own network of as many parameters as comes near, each at the best
of as many rates. Memory and work are read from the
compiled step, the direction is the cosine between what a step does to the MLP and the gradient of
its cross-entropy.
"""

import math
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import optax
from jaxtyping import PyTree

from ffnlab.analysis import gradient_alignment
from ffnlab.data import ArrayBatches, Labelled, digits, mnist, mnist_folder
from ffnlab.layers import MLP
from ffnlab.learning import NoPropNet, NoPropOptions, backprop, counter_current, labelled, noprop
from ffnlab.models.account import compiled_cost
from ffnlab.rule import Rule
from ffnlab.storage.files import StrPath
from ffnlab.studies import STUDIES, tuning
from ffnlab.studies.classify import accuracy, at_rate, clipped_sgd, learned, paced
from ffnlab.studies.result import Claim, Result
from ffnlab.studies.tuning import Found, Side, Splits, Tuned

__all__ = ["Measured", "measure", "run"]

HIDDEN, BLOCKS, CLASSES, BATCH = (128, 128, 128, 128, 128), 8, 10, 128
RATES, ADAM_RATES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0), (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
EPOCHS, QUICK_EPOCHS = {"digits": 120, "mnist": 3}, {"digits": 40}
THROUGH = SGD, ADAMW = "backprop, SGD", "backprop, AdamW"
LOCAL, APART = "counter-current", "noprop"
RULES = (*THROUGH, LOCAL, APART)


class Measured(NamedTuple):
    """What is known of a rule's step and of how it learned.

    Attributes:
      curve: test accuracy by step.
      temporary: bytes the compiled step keeps besides its arguments and results.
      state: bytes of the rule's state: parameters, a mirror, what an optimizer remembers.
      flops: of one step, as the compiler counts them.
      cosines: between a step and the gradient, before and after training; NaN without an MLP.
    """

    curve: dict[int, float]
    temporary: int
    state: int
    flops: float
    cosines: tuple[float, float]

    @property
    def text(self) -> str:
        """Memory and work in words."""
        kib = f"{self.temporary / 1024:.0f} KiB temporary, {self.state / 1024:.0f} KiB state"
        return f"{kib}, {self.flops / 1e6:.1f} MFLOP"


Steps = Mapping[str, Mapping[str, Measured]]  # data -> rule -> what was measured


def sets(seed: int, quick: bool) -> dict[str, Splits]:
    """The data by name."""
    found = {"digits": tuning.splits(digits(seed))}
    if not quick and mnist_folder() is not None:
        found["mnist"] = tuning.splits(mnist())
    return found


def sides(width: int, steps: int, quick: bool) -> list[Side]:
    """The rules with the networks they start from, for inputs of some width."""
    sizes = (width, *HIDDEN, CLASSES)
    size = tuning.numbers(mlp(sizes, 0))
    hidden = min(range(2, 1024), key=lambda h: abs(noprop_numbers(width, h) - size))
    start = lambda seed: mlp(sizes, seed)  # noqa: E731
    stack = lambda seed: NoPropNet(  # noqa: E731
        width, CLASSES, key=jax.random.key(seed), hidden=hidden, blocks=BLOCKS
    )
    made = {
        SGD: (backprop(labelled, clipped_sgd()), start),
        ADAMW: (backprop(labelled, adamw()), start),
        LOCAL: (counter_current(optimizer=clipped_sgd()), start),
        APART: (noprop(NoPropOptions(), adamw()), stack),
    }
    rates = {name: ADAM_RATES if name in (ADAMW, APART) else RATES for name in made}
    cut = slice(2, 4) if quick else slice(None)
    return [
        Side(
            name,
            tuning.grid(rate=rates[name][cut]),
            lambda setting, rule=rule: at_rate(rule, setting["rate"]),
            network,
            BATCH,
            steps,
        )
        for name, (rule, network) in made.items()
    ]


def adamw() -> optax.GradientTransformation:
    """NoProp's optimizer, at rate 1: see `at_rate`."""
    return paced(optax.adamw(1.0, weight_decay=1e-3))


def mlp(sizes: Sequence[int], seed: int) -> MLP:
    """The network of backpropagation and of counter-current learning."""
    return MLP(sizes, key=jax.random.key(seed), activation="elu", bias=False)


def noprop_numbers(width: int, hidden: int) -> int:
    """How many parameters NoProp's network has, the fixed table of classes included."""
    classes = CLASSES
    branches = (width + 1) * hidden + (classes + 1) * hidden
    block = branches + (2 * hidden + 1) * hidden + (hidden + 1) * classes
    return BLOCKS * block + classes**2 + (classes + 1) * classes


def run(*, out: StrPath | None = None, quick: bool = False, seed: int = 0) -> Result:
    """The study; arguments as for `ffnlab.studies.run.run_study`."""
    begin = time.perf_counter()
    seeds = [seed] if quick else [seed, seed + 1, seed + 2]
    epochs = QUICK_EPOCHS if quick else EPOCHS
    found, steps = {}, {}
    for name, data in sets(seed, quick).items():
        count = epochs[name] * len(data.train.x) // BATCH
        compared = sides(data.train.x.shape[1], count, quick)
        found[name] = tuning.compare(compared, data, seeds)
        steps[name] = {
            side.name: measure(
                found[name][side.name].rule,
                side.model(seed),
                (data.train, data.test),
                count,
                seed,
            )
            for side in compared
        }
    return Result(
        slug="learning-rules",
        title=STUDIES["learning-rules"].title,
        settings={
            "hidden": list(HIDDEN),
            "batch": BATCH,
            "epochs": {name: epochs[name] for name in found},
            "optimizers": "SGD on gradients clipped to norm 1; AdamW, decay 1e-3 (noprop's too)",
            "validation": tuning.trials(found),
            "seeds": seeds,
        },
        seed=seed,
        quick=quick,
        seconds=time.perf_counter() - begin,
        claims=[*accuracy_claims(found), *step_claims(found, steps)],
        table=rows_of(found, steps),
        pictures={"learning_curves": lambda figure: curves(figure, steps)},
    ).write(out)


def measure(
    rule: Rule, model: PyTree, data: tuple[Labelled, Labelled], steps: int, seed: int
) -> Measured:
    """Trains by a rule and measures its step.

    Args:
      rule: takes batches of `Labelled`.
      model: where it starts.
      data: rows to train on, and rows that the curve is drawn by.
      steps: how many.
      seed: of the order of rows, and of the rule.
    """
    batches, key = ArrayBatches(data[0], BATCH, seed), jax.random.key(seed)
    start = rule.init(model, key)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(start))
    cost = compiled_cost(rule.step, start, batches(0))
    curve: dict[int, float] = {0: accuracy(rule, start, data[1])}
    every = max(1, steps // 20)

    def evaluate(state: PyTree) -> dict[str, float]:
        value = accuracy(rule, state, data[1])
        curve[min(len(curve) * every, steps)] = value
        return {"test_accuracy": value}

    first = direction(rule, rule.init(model, key), batches(0))
    sizes = {"batch": BATCH, "steps": steps, "seed": seed}
    last = learned(rule, model, data[0], **sizes, evaluate=evaluate, every=every)
    return Measured(
        curve,
        cost.temporary,
        held,
        cost.compiler_flops,
        (first, direction(rule, last, batches(0))),
    )


def direction(rule: Rule, state: PyTree, batch: Labelled) -> float:
    """The cosine between what a step takes from an MLP and the gradient of its cross-entropy."""
    model = rule.model(state)
    if not isinstance(model, MLP):
        return math.nan
    probe = gradient_alignment(rule, labelled, begin=lambda model: state)
    return probe(model, [batch], progress=False).figures()["cosine"]


def rows_of(found: Found, steps: Steps) -> list[dict[str, object]]:
    """Lines of the table."""
    rows = tuning.table(found)
    for row in rows:
        m = steps[row["case"]][row["side"]]
        row |= {"temporary KiB": m.temporary / 1024, "state KiB": m.state / 1024}
        row["MFLOP a step"] = m.flops / 1e6
        if not math.isnan(m.cosines[0]):
            row |= {"cosine, first": m.cosines[0], "cosine, last": m.cosines[1]}
    return rows


def accuracy_claims(found: Found) -> list[Claim]:
    """Whether rules without a backward pass through depth learn as well, on all data."""
    return [
        tuning.tuned_claim(
            f"{name}: accuracy at most {tuning.CLOSE} below backpropagation's",
            "comparable accuracy (no figures in the abstract)",
            f"test accuracy at most {tuning.CLOSE} below that with either optimizer, on each data "
            "set with each seed",
            tuning.deficit(found, name, *THROUGH) <= tuning.CLOSE,
            found,
            name,
            *THROUGH,
        )
        for name in (LOCAL, APART)
    ]


def step_claims(found: Found, steps: Steps) -> list[Claim]:
    """What a step costs and where it goes, on all data."""
    rivals = {name: {data: m[name] for data, m in steps.items()} for name in (LOCAL, APART)}
    cosines = {data: m.cosines for data, m in rivals[LOCAL].items()}
    pairs = {
        name: [(m, steps[data][through]) for data, m in each.items() for through in THROUGH]
        for name, each in rivals.items()
    }
    return [
        Claim(
            "counter-current goes downhill in another direction than the gradient",
            "-",
            "; ".join(
                f"{d}: cosine {a:.2f} at first, {b:.2f} at last" for d, (a, b) in cosines.items()
            ),
            all(0 < c < 0.99 for pair in cosines.values() for c in pair),
            "a step against the gradient of the cross-entropy, before training and after it, on "
            f"each data set: in (0, .99); {of_step(found, LOCAL)}",
            seeds=1,
        ),
        *(
            Claim(
                f"{name} need not store activations for a backward pass",
                "no storage through depth",
                costs(steps, name),
                all(m.temporary <= through.temporary for m, through in pairs[name]),
                "temporary memory of the compiled step at most that of backpropagation with either "
                f"optimizer on each data set; {of_step(found, name, *THROUGH)}",
                seeds=0,
            )
            for name in rivals
        ),
        Claim(
            "a step of these rules is no dearer than backpropagation's",
            "-",
            costs(steps, LOCAL, APART),
            all(
                m.temporary + m.state <= through.temporary + through.state
                and m.flops <= through.flops
                for each in pairs.values()
                for m, through in each
            ),
            "neither temporary memory and state together nor FLOPs are more than with either "
            f"optimizer, for both rules on each data set; {of_step(found, *RULES)}",
            seeds=0,
        ),
    ]


def costs(steps: Steps, *names: str) -> str:
    """Memory and work of steps in words, backpropagation's last."""
    return "; ".join(
        f"{data}: " + ", ".join(f"{name} {measured[name].text}" for name in (*names, *THROUGH))
        for data, measured in steps.items()
    )


def of_step(found: Found, *names: str) -> str:
    """The sizes of what a step was measured on, which no rate changes; and the seed."""

    def sizes(sides: Mapping[str, Tuned]) -> str:
        return ", ".join(f"{name} {sides[name].size}" for name in names)

    first = tuning.first_of(found)
    each = "; ".join(f"{data}: {sizes(of)}" for data, of in found.items())
    return f"batch {BATCH}, seed {first.seeds[0]}, at the tuned rate; {each}"


def curves(figure, steps: Steps) -> None:
    """Test accuracy by step, one picture per data."""
    for axes, (data, measured) in zip(
        figure.subplots(1, len(steps), squeeze=False)[0], steps.items(), strict=True
    ):
        for name, m in measured.items():
            axes.plot(list(m.curve), list(m.curve.values()), "o-", markersize=3, label=name)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("steps")
        axes.set_ylabel(f"test accuracy, {data}")
        axes.legend(frameon=False, loc="center right")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("One trainer, three rules")
