"""Learning rules side by side: accuracy, memory, work, direction and reach of their steps.

The data are scikit-learn's digits and, but in the quick form, MNIST where it is present.

One MLP learns by backpropagation with counter-current learning's optimizer and with NoProp's, by
the domain-adversarial rule that is shown no target, by counter-current learning, and by physical
local learning. NoProp has a network of its own and a hypernetwork one that generates the MLP, both
of as many parameters as comes near. Each is the best of as many rates. Memory and work are read
from the compiled step, the direction is the cosine between what a step does to the MLP and the
gradient of its cross-entropy, and the reach which of a rule's losses has a gradient with respect to
which layer.
"""

import math
import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np
import optax
from jaxtyping import PyTree

from ffnlab.data import ArrayBatches, digits, mnist, mnist_folder
from ffnlab.layers import MLP
from ffnlab.learning import (
    NoPropNet,
    NoPropOptions,
    backprop,
    counter_current,
    dann,
    labelled,
    noprop,
    physical_ff,
)
from ffnlab.models import Hypernet, HypernetConfig, HypernetSpec, MLPConfig
from ffnlab.storage.files import StrPath
from ffnlab.studies import STUDIES, tuning
from ffnlab.studies.classify import at_rate, clipped_sgd, paced
from ffnlab.studies.learning_rules_measure import Measured, Reach, measure, reach
from ffnlab.studies.result import Claim, Result
from ffnlab.studies.tuning import Found, Side, Splits, Tuned

__all__ = ["run"]

HIDDEN, BLOCKS, CLASSES, BATCH = (128, 128, 128, 128, 128), 8, 10, 128
EMBEDDING, TRUNK = 8, 64  # of the hypernetwork, HypernetSpec's own
RATES, ADAM_RATES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0), (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
LOW_RATES, HIGH_RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3), (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)
EPOCHS, QUICK_EPOCHS = {"digits": 120, "mnist": 3}, {"digits": 40}
THROUGH = SGD, ADAMW = "backprop, SGD", "backprop, AdamW"
NO_TARGET, GENERATED = "dann, no target", "backprop, generated MLP"
ALONE = LOCAL, APART, PHYSICAL = "counter-current", "noprop", "physical-ff"
RULES = (*THROUGH, NO_TARGET, GENERATED, *ALONE)
BY_SGD = SGD, LOCAL


Steps = Mapping[str, Mapping[str, Measured]]  # data -> rule -> what was measured
Reaches = Mapping[str, Mapping[str, Reach]]  # data -> rule -> what its losses reach


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
        NO_TARGET: (dann(adamw(), strength=0.0), start),
        GENERATED: (backprop(labelled, adamw()), lambda seed: hypernet(sizes, size, seed)),
        LOCAL: (counter_current(optimizer=clipped_sgd()), start),
        APART: (noprop(NoPropOptions(), adamw()), stack),
        PHYSICAL: (physical_ff(adamw(), inner=1), start),
    }
    rates = dict.fromkeys(made, ADAM_RATES) | dict.fromkeys(BY_SGD, RATES)
    rates |= {GENERATED: LOW_RATES, PHYSICAL: HIGH_RATES}  # where the best of theirs lie
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


def hypernet(sizes: Sequence[int], size: int, seed: int) -> Hypernet:
    """A hypernetwork of the MLP, in chunks by which it has about `size` parameters."""
    chunk = min(range(32, 4096), key=lambda c: abs(hypernet_numbers(size, c) - size))
    spec = HypernetSpec(outputs="chunk_wise", embedding=EMBEDDING, hidden=(TRUNK,), chunk=chunk)
    target = MLPConfig(tuple(sizes), activation="elu", bias=False)
    return HypernetConfig(target, spec).make(key=jax.random.key(seed))


def hypernet_numbers(size: int, chunk: int) -> int:
    """How many parameters a hypernetwork of so many weights has, by chunks."""
    embeddings = EMBEDDING * (1 + math.ceil(size / chunk))
    return embeddings + (2 * EMBEDDING + 1) * TRUNK + (TRUNK + 1) * chunk


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
    found, steps, reached = {}, {}, {}
    for name, data in sets(seed, quick).items():
        count = epochs[name] * len(data.train.x) // BATCH
        compared = sides(data.train.x.shape[1], count, quick)
        found[name] = tuning.compare(compared, data, seeds)
        steps[name] = {
            side.name: measure(
                found[name][side.name].rule,
                side.model(seed),
                (data.train, data.test),
                BATCH,
                count,
                seed,
            )
            for side in compared
        }
        reached[name] = reach(
            compared[0].model(seed),
            compared[RULES.index(APART)].model(seed),
            ArrayBatches(data.train, BATCH, seed)(0),
            seed,
        )
    return Result(
        slug="learning-rules",
        title=STUDIES["learning-rules"].title,
        settings={
            "hidden": list(HIDDEN),
            "batch": BATCH,
            "epochs": {name: epochs[name] for name in found},
            "optimizers": "SGD on gradients clipped to norm 1; AdamW, decay 1e-3, of all others",
            "hypernetwork": f"chunks, embeddings of {EMBEDDING}, {TRUNK} hidden units",
            "physical-ff": "one step of each layer on a batch, layers judged as they are",
            "validation": tuning.trials(found),
            "seeds": seeds,
        },
        seed=seed,
        quick=quick,
        seconds=time.perf_counter() - begin,
        claims=[
            *accuracy_claims(found),
            no_target_claim(found),
            *step_claims(found, steps),
            reach_claim(reached, seed),
        ],
        table=rows_of(found, steps),
        pictures={
            "learning_curves": lambda figure: curves(figure, steps),
            "reach": lambda figure: reaches(figure, next(iter(reached.values()))),
        },
    ).write(out)


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
        for name in (*ALONE, GENERATED)
    ]


def no_target_claim(found: Found) -> Claim:
    """Whether a domain-adversarial rule without a target is backpropagation."""
    far = max(
        apart(*(None if state is None else side.rule.model(state) for side, state in pair))
        for sides in found.values()
        for each in [(sides[NO_TARGET], sides[ADAMW])]
        for pair in zip(*([(side, state) for state in side.states] for side in each), strict=True)
    )
    return tuning.tuned_claim(
        f"{NO_TARGET}, is backpropagation bit for bit",
        "lambda = 0 is the standard network",
        f"networks of all seeds and data after training, differing by {far:.1e} at most: by 0",
        far == 0,
        found,
        NO_TARGET,
        ADAMW,
    )


def apart(a: PyTree | None, b: PyTree | None) -> float:
    """The largest difference of two networks; without end where one alone is there."""
    if a is None or b is None:
        return 0.0 if a is b else math.inf
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.abs(np.subtract(x, y)).max()) for x, y in leaves)


def step_claims(found: Found, steps: Steps) -> list[Claim]:
    """What a step costs and where it goes, on all data."""
    rivals = {name: {data: m[name] for data, m in steps.items()} for name in ALONE}
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
            costs(steps, *ALONE),
            all(
                m.temporary + m.state <= through.temporary + through.state
                and m.flops <= through.flops
                for each in pairs.values()
                for m, through in each
            ),
            "neither temporary memory and state together nor FLOPs are more than with either "
            f"optimizer, for all three on each data set; {of_step(found, *THROUGH, *ALONE)}",
            seeds=0,
        ),
    ]


def reach_claim(reached: Reaches, seed: int) -> Claim:
    """Whether no rule differentiates across layers where its paper says that it does not."""
    said = "; ".join(
        f"{data}: " + ", ".join(f"{name} {each.text}" for name, each in rules.items())
        for data, rules in reached.items()
    )
    return Claim(
        "no loss of a local rule moves another layer",
        "no gradient crosses layers",
        f"pairs of a loss and a layer with a gradient: {said}",
        all(rules[name].is_local for rules in reached.values() for name in ALONE),
        f"gradients of the own losses of {', '.join(ALONE)} on one batch, before training, on each "
        f"data set: of every loss those of its own layers and of no other; seed {seed}",
        seeds=1,
    )


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
    figure.suptitle("One trainer, seven ways to learn")


def reaches(figure, rules: Mapping[str, Reach]) -> None:
    """Gradients of losses by layer, a table for each rule."""
    figure.set_size_inches(11, 4)
    for axes, (name, each) in zip(figure.subplots(1, len(rules)), rules.items(), strict=True):
        each.found.on(axes)
        axes.set_title(name, fontsize=9)
    figure.suptitle("Which loss has a gradient with respect to which layer (white: none)")
