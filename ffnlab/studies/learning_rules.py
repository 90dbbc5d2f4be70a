"""Learning rules side by side on digits: accuracy, memory, work and direction of their steps.

The data are scikit-learn's digits and, but in the quick form, MNIST where it is present.

Backpropagation and counter-current learning train one MLP, NoProp its own network of as many
parameters as comes near. Memory and work are read from the compiled step, the direction is the
cosine between what a step does to the MLP and the gradient of its cross-entropy.
"""

import math
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import PyTree

from ffnlab.data import ArrayBatches, Labelled, digits, mnist, mnist_folder
from ffnlab.files import StrPath
from ffnlab.layers import MLP
from ffnlab.learning import NoPropNet, backprop, counter_current, labelled, noprop
from ffnlab.parallel import LoopOptions, train
from ffnlab.rule import Rule
from ffnlab.studies import STUDIES
from ffnlab.studies.classify import accuracy
from ffnlab.studies.result import Claim, Result

__all__ = ["Measured", "measure", "run"]

HIDDEN, BATCH = (128, 128, 128, 128, 128), 128
MNIST_EPOCHS = 20


class Measured(NamedTuple):
    """What is known of a rule.

    Attributes:
      parameters: of the network that predicts.
      curve: test accuracy by step.
      temporary: bytes the compiled step keeps besides its arguments and results.
      flops: of one step, as the compiler counts them.
      cosines: between a step and the gradient, before and after training; NaN without an MLP.
    """

    parameters: int
    curve: dict[int, float]
    temporary: int
    flops: float
    cosines: tuple[float, float]

    @property
    def accuracy(self) -> float:
        """The last of the curve."""
        return self.curve[max(self.curve)]


def cases(seed: int, width: int, classes: int = 10) -> dict[str, tuple[Rule, PyTree]]:
    """The rules with the networks they start from, for inputs of some width."""
    key = jax.random.key(seed)
    model = MLP((width, *HIDDEN, classes), key=key, activation="elu", bias=False)
    return {
        "backprop": (backprop(labelled, optax.sgd(0.1)), model),
        "counter-current": (counter_current(), model),
        "noprop": (noprop(), NoPropNet(width, classes, key=key, hidden=48, blocks=8)),
    }


def sets(seed: int, quick: bool) -> dict[str, tuple[tuple[Labelled, Labelled], int]]:
    """(train, test) and epochs by name of the data."""
    found = {"digits": (digits(seed), 40 if quick else 120)}
    if not quick and mnist_folder() is not None:
        found["mnist"] = (mnist(), MNIST_EPOCHS)
    return found


def run(*, out: StrPath | None = None, quick: bool = False, seed: int = 0) -> Result:
    """The study; arguments as for `ffnlab.studies.run.run_study`."""
    begin = time.perf_counter()
    found, epochs = {}, {}
    for data, (pair, epochs[data]) in sets(seed, quick).items():
        steps = epochs[data] * len(pair[0].x) // BATCH
        found[data] = {
            name: measure(rule, model, pair, steps, seed)
            for name, (rule, model) in cases(seed, pair[0].x.shape[1]).items()
        }
    return Result(
        slug="learning-rules",
        title=STUDIES["learning-rules"].title,
        settings={"hidden": list(HIDDEN), "batch": BATCH, "epochs": epochs},
        seed=seed,
        seconds=time.perf_counter() - begin,
        claims=[claim for data, measured in found.items() for claim in claims_of(data, measured)],
        table=[row(data, *item) for data, measured in found.items() for item in measured.items()],
        pictures={"learning_curves": lambda figure: curves(figure, found)},
    ).write(out)


def measure(
    rule: Rule, model: PyTree, data: tuple[Labelled, Labelled], steps: int, seed: int
) -> Measured:
    """Trains by a rule and measures its step.

    Args:
      rule: takes batches of `Labelled`.
      model: where it starts.
      data: (train, test).
      steps: how many.
      seed: of the order of rows, and of the rule.
    """
    batches, key = ArrayBatches(data[0], BATCH, seed), jax.random.key(seed)
    start = rule.init(model, key)
    compiled = jax.jit(rule.step).lower(start, batches(0)).compile()
    curve: dict[int, float] = {0: accuracy(rule, start, data[1])}
    every = max(1, steps // 20)

    def evaluate(state: PyTree) -> dict[str, float]:
        value = accuracy(rule, state, data[1])
        curve[len(curve) * every] = value
        return {"test_accuracy": value}

    options = LoopOptions(log_every=0, evaluate_every=every, progress=False)
    first = direction(rule, rule.init(model, key), batches(0))
    outcome = train(rule, model, batches, steps, key=key, evaluate=evaluate, options=options)
    memory, work = compiled.memory_analysis(), compiled.cost_analysis()
    assert memory is not None and work is not None  # all backends that are supported tell
    return Measured(
        sum(leaf.size for leaf in jax.tree.leaves(model)),
        curve,
        memory.temp_size_in_bytes,
        float(work["flops"]),
        (first, direction(rule, outcome.state, batches(0))),
    )


def direction(rule: Rule, state: PyTree, batch: Labelled) -> float:
    """The cosine between what a step takes from an MLP and the gradient of its cross-entropy."""
    model = jax.tree.map(jnp.copy, state.model)
    if not isinstance(model, MLP):
        return math.nan
    gradient = jax.grad(lambda m: labelled(m, tuple(map(jnp.asarray, batch)))[0])(model)
    after = rule.step(jax.tree.map(jnp.copy, state), batch)[0].model
    a, b = (ravel_pytree(x)[0] for x in (jax.tree.map(jnp.subtract, model, after), gradient))
    return float(a @ b / (jnp.linalg.norm(a) * jnp.linalg.norm(b)))


def row(data: str, name: str, m: Measured) -> dict[str, object]:
    """A line of the table."""
    cosines = {} if math.isnan(m.cosines[0]) else {"cosine, first": m.cosines[0]}
    cosines |= {"cosine, last": m.cosines[1]} if cosines else {}
    return {
        "data": data,
        "rule": name,
        "parameters": m.parameters,
        "accuracy": m.accuracy,
        "temporary KiB": m.temporary / 1024,
        "MFLOP a step": m.flops / 1e6,
        **cosines,
    }


def claims_of(data: str, found: dict[str, Measured]) -> list[Claim]:
    """What the side by side shows on some data."""
    through, local, apart = (found[n] for n in ("backprop", "counter-current", "noprop"))
    return [
        Claim(
            f"rules without a backward pass through depth learn {data}",
            "comparable accuracy (counter-current, NoProp)",
            ", ".join(f"{name} {m.accuracy:.3f}" for name, m in found.items()),
            min(local.accuracy, apart.accuracy) >= through.accuracy - 0.03,
            "test accuracy at most .03 below backpropagation's",
        ),
        Claim(
            f"a local rule goes downhill in another direction than the gradient, {data}",
            "-",
            f"cosine {local.cosines[0]:.2f} at first, {local.cosines[1]:.2f} at last",
            0 < local.cosines[0] < 0.99,
            "counter-current's first step against the gradient of the cross-entropy: in (0, .99)",
        ),
        Claim(
            f"a local rule need not store activations for a backward pass, {data}",
            "no storage through depth",
            f"{local.temporary / 1024:.0f} KiB, backprop {through.temporary / 1024:.0f} KiB",
            local.temporary <= through.temporary,
            "temporary memory of the compiled step at most backpropagation's",
        ),
    ]


def curves(figure, found: dict[str, dict[str, Measured]]) -> None:
    """Test accuracy by step, one picture per data."""
    for axes, (data, measured) in zip(
        figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True
    ):
        for name, m in measured.items():
            axes.plot(list(m.curve), list(m.curve.values()), "o-", markersize=3, label=name)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("steps")
        axes.set_ylabel(f"test accuracy, {data}")
        axes.legend(frameon=False, loc="center right")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("One trainer, three rules")
