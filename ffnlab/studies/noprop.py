"""NoProp on clusters: ten blocks trained apart, chained from noise to a class.

The discrete kind is compared with backpropagation through a network of the same hidden width, with
and without noise at inference, and with the continuous and the flow kind. The algebra that the
method rests on is checked to rounding.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ffnlab.data import gaussian_clusters
from ffnlab.files import StrPath
from ffnlab.layers import MLP
from ffnlab.learning import (
    LearnedSchedule,
    NoPropNet,
    NoPropOptions,
    backprop,
    labelled,
    noprop,
)
from ffnlab.learning import noprop_core as core
from ffnlab.learning.noprop import block_losses
from ffnlab.studies import STUDIES
from ffnlab.studies.classify import fit
from ffnlab.studies.result import Claim, Result

__all__ = ["run"]

BLOCKS, HIDDEN, BATCH, EPOCHS = 10, 128, 128, 10
KINDS = {
    "discrete": (NoPropOptions(), {"blocks": BLOCKS}),
    "discrete, noisy": (NoPropOptions(noisy=True), {"blocks": BLOCKS}),
    "continuous": (NoPropOptions("continuous", 1.0, integration=100), {"blocks": None}),
    "continuous, learned noise": (
        NoPropOptions("continuous", 1.0, integration=100),
        {"blocks": None, "learns_noise": True},
    ),
    "flow": (
        NoPropOptions("flow", 1.0, integration=100),
        {"blocks": None, "velocity": True},
    ),
}


def run(*, out: StrPath | None = None, quick: bool = False, seed: int = 0) -> Result:
    """The study; arguments as for `ffnlab.studies.run.run_study`."""
    begin = time.perf_counter()
    names = list(KINDS)[:2] if quick else list(KINDS)
    found = {"backprop": by_backprop(seed)} | {name: trained(name, seed) for name in names}
    flow = ode_errors()
    return Result(
        slug="noprop",
        title=STUDIES["noprop"].title,
        settings={
            "data": "gaussian_clusters: 30 centres, 10 classes, width 64, 8000 rows",
            "blocks": BLOCKS,
            "hidden": HIDDEN,
            "batch": BATCH,
            "epochs": EPOCHS,
            "optimizer": "AdamW at 1e-3, decay 1e-3",
        },
        seed=seed,
        seconds=time.perf_counter() - begin,
        claims=[*accuracy_claims(found), locality_claim(seed), algebra_claim(), ode_claim(flow)],
        table=[
            *({"rule": name, "accuracy": value} for name, value in found.items()),
            *({"Heun steps": steps, "error of the end": error} for steps, error in flow.items()),
        ],
        pictures={"accuracy": lambda figure: bars(figure, found)},
    ).write(out)


def steps_of(rows: int) -> int:
    """Steps of the run."""
    return EPOCHS * rows // BATCH


def trained(name: str, seed: int) -> float:
    """Test accuracy of a kind of NoProp."""
    options, shape = KINDS[name]
    data, key = gaussian_clusters(seed), jax.random.key(seed)
    shape = dict(shape)
    if shape.pop("learns_noise", False):
        shape["schedule"] = LearnedSchedule(key=jax.random.fold_in(key, 1))
    model = NoPropNet(64, 10, key=key, hidden=HIDDEN, **shape)
    steps = steps_of(len(data[0].x))
    return fit(noprop(options), model, data, batch=BATCH, steps=steps, seed=seed)


def by_backprop(seed: int) -> float:
    """Test accuracy of a network of the same hidden width, trained through."""
    data = gaussian_clusters(seed)
    rule = backprop(labelled, optax.adamw(1e-3, weight_decay=1e-3))
    model = MLP((64, HIDDEN, HIDDEN, 10), key=jax.random.key(seed))
    return fit(rule, model, data, batch=BATCH, steps=steps_of(len(data[0].x)), seed=seed)


def accuracy_claims(found: dict[str, float]) -> list[Claim]:
    """What the blocks reach together."""
    ours, noisy, through = (found[n] for n in ("discrete", "discrete, noisy", "backprop"))
    claims = [
        Claim(
            "blocks trained apart classify as well as a network trained through",
            "MNIST and CIFAR: on par with backpropagation (recalled)",
            f"NoProp {ours:.3f}, backprop {through:.3f}",
            ours >= 0.97 and ours >= through - 0.02,
            "test accuracy at least .97 and at most .02 below backpropagation's",
        ),
        Claim(
            "inference works with and without its noise",
            "-",
            f"without {ours:.3f}, with {noisy:.3f}",
            min(ours, noisy) >= 0.97,
            "both test accuracies at least .97",
        ),
    ]
    if "flow" in found:
        others = {n: found[n] for n in list(KINDS)[2:]}
        claims.append(
            Claim(
                "continuous time and flow matching learn too",
                "MNIST: 98.6 to 99.0 % (continuous, independent reproduction)",
                ", ".join(f"{n} {value:.3f}" for n, value in others.items()),
                min(others.values()) >= 0.9,
                "test accuracy at least .9 each, one denoiser for all times",
            )
        )
    return claims


def locality_claim(seed: int) -> Claim:
    """Which blocks each block's loss moves."""
    key = jax.random.key(seed)
    model = NoPropNet(64, 10, key=key, hidden=16, blocks=BLOCKS)
    train, _ = gaussian_clusters(seed, train=32, test=1)
    abar = NoPropOptions().levels(BLOCKS)
    x, y = jnp.asarray(train.x), jnp.asarray(train.y)
    losses = jax.jit(jax.jacobian(lambda m: block_losses(m, x, y, abar, key, 0.1)[0]))(model)
    moved = np.zeros((BLOCKS, BLOCKS), bool)
    for leaf in jax.tree.leaves(losses.blocks):
        moved |= np.any(np.asarray(leaf).reshape(BLOCKS, BLOCKS, -1) != 0, axis=-1)
    crossing = int((moved & ~np.eye(BLOCKS, dtype=bool)).sum())
    return Claim(
        "no error crosses a block",
        "each block is trained alone",
        f"{crossing} of {BLOCKS * (BLOCKS - 1)} pairs of blocks have a gradient",
        crossing == 0 and bool(moved.diagonal().all()),
        "Jacobian of all denoising losses by all blocks, 32 inputs",
    )


def algebra_claim() -> Claim:
    """Whether steps of inference keep the distribution that blocks were trained on."""
    with jax.enable_x64(True):
        abar = core.cosine(jnp.linspace(0, 1, BLOCKS + 1, dtype=jnp.float64))
        a, b, c = core.posterior(abar)
        mean = jnp.abs(a + b * jnp.sqrt(abar[:-1]) - jnp.sqrt(abar[1:])).max()
        spread = jnp.abs(b**2 * (1 - abar[:-1]) + c - (1 - abar[1:])).max()
        worst = max(float(mean), float(spread))
    return Claim(
        "inference keeps the marginals that training draws from",
        "a, b, c of the posterior",
        f"largest error {worst:.1e}",
        worst < 1e-10,
        "a + b sqrt(abar[t-1]) = sqrt(abar[t]) and b^2 (1 - abar[t-1]) + c = 1 - abar[t], float64",
    )


def ode_errors() -> dict[int, float]:
    """The error of Heun's method at the end of a flow whose end is known, by steps."""
    with jax.enable_x64(True):
        u, z = jnp.array([1.0, 0.0]), jnp.array([0.3, -1.2])
        first, last = core.cosine(jnp.array([0.0, 1.0]))
        exact = jnp.sqrt(last) * u + jnp.sqrt((1 - last) / (1 - first)) * (z - jnp.sqrt(first) * u)
        field = lambda t, z: core.flow_field(core.cosine, t, z, u)  # noqa: E731
        return {n: float(jnp.abs(core.heun(field, z, n) - exact).max()) for n in (50, 200, 1000)}


def ode_claim(errors: dict[int, float]) -> Claim:
    """Whether the probability flow is integrated as it should be."""
    return Claim(
        "a thousand steps integrate the probability flow exactly enough",
        "1,000 steps",
        ", ".join(f"{n} steps {error:.1e}" for n, error in errors.items()),
        errors[1000] < 1e-5,
        "distance from the closed end of a flow towards a constant, below 1e-5",
    )


def bars(figure, found: dict[str, float]) -> None:
    """Test accuracy by rule."""
    axes = figure.subplots()
    colors = ["0.6", *(f"C{i}" for i in range(len(found) - 1))]
    names = [name.replace(", ", ",\n") for name in found]
    drawn = axes.bar(names, list(found.values()), 0.6, color=colors)
    axes.bar_label(drawn, fmt="%.3f", fontsize=9)
    axes.set_ylim(0, 1.1)
    axes.set_ylabel("test accuracy")
    axes.set_title("NoProp beside backpropagation, ten epochs of clusters")
    axes.spines[["top", "right"]].set_visible(False)
