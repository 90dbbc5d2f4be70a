"""Counter-current learning on clusters and digits, beside backpropagation and its own ablations.

The same network is trained by backpropagation, by counter-current learning, with the feedback
network frozen, and with feedback of zero, which leaves only the last map to learn. Locality is
measured as the Jacobian of every layer's loss. Autoencoders are in `counter_current_autoencoder`.
"""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ffnlab.data import Labelled, digits, gaussian_clusters
from ffnlab.files import StrPath
from ffnlab.layers import MLP
from ffnlab.learning import backprop, counter_current, labelled
from ffnlab.learning.counter_current import local_losses, mirrored
from ffnlab.rule import Rule
from ffnlab.studies import STUDIES
from ffnlab.studies import counter_current_autoencoder as autoencoder
from ffnlab.studies.classify import fit, grouped_bars
from ffnlab.studies.result import Claim, Result

__all__ = ["run"]

HIDDEN, BATCH = (128, 128, 128), 256
ORDER = ("backprop", "counter-current", "feedback frozen", "feedback zero")


def rules() -> dict[str, Callable[[], Rule]]:
    """What is compared, by name."""
    rest = optax.set_to_zero()

    def zero(model: MLP, key: jax.Array) -> MLP:
        return jax.tree.map(jnp.zeros_like, mirrored(model, key))

    return {
        "backprop": lambda: backprop(labelled, optax.sgd(0.3)),
        "counter-current": counter_current,
        "feedback frozen": lambda: counter_current(mirror_optimizer=rest),
        "feedback zero": lambda: counter_current(mirror_optimizer=rest, mirror=zero),
    }


def run(*, out: StrPath | None = None, quick: bool = False, seed: int = 0) -> Result:
    """The study; arguments as for `ffnlab.studies.run.run_study`."""
    begin = time.perf_counter()
    seeds = [seed] if quick else [seed, seed + 1]
    sets = {"clusters": (gaussian_clusters, 15), "digits": (digits, 60)}
    found = {
        (name, rule): [accuracy(make(), *sets[name], s) for s in seeds]
        for name in sets
        for rule, make in rules().items()
    }
    lost = autoencoder.measured([seed] if quick else range(seed, seed + 3))
    return Result(
        slug="counter-current",
        title=STUDIES["counter-current"].title,
        settings={
            "hidden": list(HIDDEN),
            "activation": "elu",
            "batch": BATCH,
            "epochs": {name: epochs for name, (_, epochs) in sets.items()},
            "optimizer": "SGD at 1, clipped to norm 1 (backprop: SGD at .3)",
            "autoencoders": autoencoder.settings(),
            "seeds": seeds,
        },
        seed=seed,
        seconds=time.perf_counter() - begin,
        claims=[*accuracy_claims(found), locality_claim(seed), autoencoder.claim(lost)],
        table=[
            {"data": name, "rule": rule, "accuracy": float(np.mean(values))}
            for (name, rule), values in found.items()
        ]
        + autoencoder.rows(lost),
        pictures={
            "accuracy": lambda figure: bars(figure, found),
            "autoencoders": lambda figure: autoencoder.bars(figure, lost),
        },
    ).write(out)


def accuracy(
    rule: Rule, load: Callable[[int], tuple[Labelled, Labelled]], epochs: int, seed: int
) -> float:
    """Test accuracy of a fresh network after training by a rule."""
    data = load(seed)
    sizes = (data[0].x.shape[1], *HIDDEN, 10)
    first, second, third = jax.random.split(jax.random.key(seed), 3)
    shape = MLP(sizes, key=first, activation="elu", bias=False)
    model = mirrored(mirrored(shape, second), third)  # the shape again, drawn as the authors draw
    steps = epochs * len(data[0].x) // BATCH
    return fit(rule, model, data, batch=BATCH, steps=steps, seed=seed)


def accuracy_claims(found: dict[tuple[str, str], list[float]]) -> list[Claim]:
    """How the ways of learning compare."""
    mean = {key: float(np.mean(values)) for key, values in found.items()}
    names = list(dict.fromkeys(name for name, _ in found))

    def say(*rules: str) -> str:
        parts = (", ".join(f"{r} {mean[n, r]:.3f}" for r in rules) for n in names)
        return "; ".join(f"{n}: {part}" for n, part in zip(names, parts, strict=True))

    ours = {n: mean[n, "counter-current"] for n in names}
    return [
        Claim(
            "accuracy is comparable to backpropagation",
            "MNIST, FashionMNIST, CIFAR: comparable to other plausible rules (no figures)",
            say("counter-current", "backprop"),
            all(ours[n] >= mean[n, "backprop"] - 0.02 for n in names),
            "mean test accuracy at most .02 below backpropagation's",
        ),
        Claim(
            "hidden layers learn something",
            "-",
            say("counter-current", "feedback zero"),
            ours["clusters"] >= mean["clusters", "feedback zero"] + 0.05,
            "clusters: at least .05 above learning the last map alone, which zero feedback leaves",
        ),
        Claim(
            "feedback need not be frozen to be good",
            "the feedback network learns too",
            say("counter-current", "feedback frozen"),
            all(ours[n] >= mean[n, "feedback frozen"] - 0.01 for n in names),
            "mean test accuracy at most .01 below that with random, frozen feedback",
        ),
    ]


def locality_claim(seed: int) -> Claim:
    """Which layers each loss moves."""
    model = MLP((64, *HIDDEN, 10), key=jax.random.key(seed), activation="elu", bias=False)
    pair = model, mirrored(model, jax.random.key(seed + 1))
    train, _ = gaussian_clusters(seed, train=64, test=1)
    x, y = jnp.asarray(train.x), jnp.asarray(train.y)
    crossing, count = 0, len(model.maps)
    for i in range(count + 1):
        up, down = jax.grad(lambda both, i=i: local_losses(both[0], both[1], x, y)[0][i])(pair)
        moved = [bool(np.any(m.weight.dense() != 0)) for m in (*up.maps, *down.maps)]
        allowed = {i - 1, 2 * count - 1 - i} if i < count else {count - 1}
        crossing += sum(yes for j, yes in enumerate(moved) if j not in allowed)
    return Claim(
        "no error crosses a layer",
        "every layer detaches its input",
        f"{crossing} of {(count + 1) * 2 * count} pairs of loss and foreign layer have a gradient",
        crossing == 0,
        "gradient of each of the losses by each map of both networks, 64 inputs",
    )


def bars(figure, found: dict[tuple[str, str], list[float]]) -> None:
    """Test accuracy by rule and data."""
    axes = figure.subplots()
    grouped_bars(axes, found)
    axes.set_ylim(0.5, 1.08)
    axes.set_ylabel("test accuracy (axis from 0.5)")
    axes.set_title("Counter-current learning beside backpropagation and its ablations")
