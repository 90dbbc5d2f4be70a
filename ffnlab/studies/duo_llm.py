"""Duo-LLM: what choosing an FFN for each token could gain, and what a trained router gains.

A byte model on Python source has a small FFN beside the big one of every layer, both trained with
choices drawn at random. An oracle then tries all patterns of choices on held-out modules, and
routers are trained to a budget each. The same is asked of the embedded model, whose FFNs get small
ones beside them. Nothing is tuned on the held-out modules, and all figures are of the last step.
Seeds, and the budgets of the routers, are members of one run (`ffnlab.learning.members`).
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from ffnlab import models, transform
from ffnlab.data import TextBatches, stdlib_text
from ffnlab.formats.embedded import embedded
from ffnlab.learning import backprop, members
from ffnlab.losses import next_token
from ffnlab.models import Decoder, DecoderConfig
from ffnlab.routing import (
    BIG,
    ROUTERS,
    OracleReport,
    budgeted,
    duo,
    oracle,
    random_choices,
    softened,
    with_routers,
)
from ffnlab.rule import Rule
from ffnlab.storage.files import StrPath
from ffnlab.studies import STUDIES
from ffnlab.studies.result import Claim, Result
from ffnlab.studies.side_by_side import learned_members, spread

__all__ = ["Routed", "Sizes", "run"]

LAYERS, WIDTH, HIDDEN, RATIO = 6, 64, 256, 16
BATCH, LENGTH, RATE = 24, 64, 3e-3
ALPHA, ROUTER_RATE, TEMPERATURES = 10.0, 1e-2, (1.0, 0.1)
CONFIG = DecoderConfig(
    vocab=256, width=WIDTH, hidden=HIDDEN, layers=LAYERS, heads=4, kv_heads=4, head_dim=16
)


class Sizes(NamedTuple):
    """How much is run.

    Attributes:
      seeds: of the byte model.
      steps, router_steps, small_steps: of its two stages, and of the embedded model's first.
      held_out, embedded_held_out: windows of held-out text that oracles are asked of.
    """

    seeds: int
    steps: int
    router_steps: int
    small_steps: int
    held_out: int
    embedded_held_out: int


FULL = Sizes(3, 1500, 300, 300, 96, 16)
QUICK = Sizes(1, 200, 60, 20, 16, 2)


class Routed(NamedTuple):
    """A trained router.

    Attributes:
      budget: big branches of a token that it was trained for.
      big: mean number that it takes on held-out text, by the probabilities of its last step's
        temperature.
      nats: held-out loss of its hard choices.
    """

    budget: int
    big: float
    nats: float


def run(*, out: StrPath | None = None, quick: bool = False, seed: int = 0) -> Result:
    """The study; arguments as for `ffnlab.studies.run.run_study`."""
    begin = time.perf_counter()
    sizes = QUICK if quick else FULL
    text = stdlib_text()
    held = jnp.asarray(TextBatches(text.held_out, sizes.held_out, LENGTH, seed)(0))
    duos = trained(list(range(seed, seed + sizes.seeds)), text.train, sizes.steps)
    reports = [oracle_of(model, held, seed) for model in duos]
    routed = [routers(model, text.train, held, sizes.router_steps, seed) for model in duos]
    upcycled = small_beside_embedded(text.train, sizes.small_steps, seed)
    real = oracle_of(upcycled, held[: sizes.embedded_held_out], seed)
    return Result(
        slug="duo-llm",
        title=STUDIES["duo-llm"].title,
        settings={
            "model": dataclasses.asdict(CONFIG),
            "ratio": RATIO,
            "batch": [BATCH, LENGTH],
            "optimizer": f"Adam, {RATE} falling to 0 by a cosine; routers {ROUTER_RATE}",
            "router": {"alpha": ALPHA, "temperature": list(TEMPERATURES)},
            "sizes": sizes._asdict(),
            "text": text.identity,
        },
        seed=seed,
        quick=quick,
        seconds=time.perf_counter() - begin,
        claims=[
            *logical_claims([*reports, real]),
            *oracle_claims(reports, "", 0.05),
            *oracle_claims([real], "the embedded model with small FFNs beside its own: ", 0.0),
            *stage_claims(reports),
            *router_claims(reports, routed),
            *place_claims(reports),
        ],
        table=[*rows_of("byte model", reports, routed), *rows_of("embedded", [real], [])],
        pictures={
            "losses": lambda figure: losses(figure, reports, routed),
            "oracle": reports[0].draw,
            "embedded_oracle": real.draw,
        },
    ).write(out)


def duo_of(config: DecoderConfig, seed: int) -> Decoder:
    """A stacked decoder with small FFNs, all of it drawn by one seed."""
    model = Decoder(config, key=jax.random.key(seed))
    return models.stack(transform.apply(duo(ratio=RATIO, seed=seed), model)[0])


def trained(seeds: Sequence[int], text: bytes, steps: int) -> list[Decoder]:
    """Stage 1, all seeds side by side: a model of each."""
    joined = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(duo_of(CONFIG, s) for s in seeds))
    rule = members(lambda: stage_1(steps, RATE), len(seeds))
    return learned_members(rule, joined, batches_of(text, seeds[0]), steps, seeds[0], len(seeds))


def stage_1(steps: int, rate: float) -> Rule:
    """Backpropagation with a choice drawn for each token and layer."""
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))
    return backprop(random_choices(), optimizer, informed=True)


def batches_of(text: bytes, seed: int) -> TextBatches:
    """What the models learn from."""
    return TextBatches(text, BATCH, LENGTH, seed)


def oracle_of(model: Decoder, held: Int[Array, "b t"], seed: int) -> OracleReport:
    """The oracle on held-out windows, eight at a time."""
    batches = [held[i : i + 8] for i in range(0, len(held), 8)]
    found = oracle()(model, batches, progress=False)
    assert isinstance(found, OracleReport)
    return OracleReport(found.losses, found.patterns, seed)


def routers(
    model: Decoder, text: bytes, held: Int[Array, "b t"], steps: int, seed: int
) -> list[Routed]:
    """Stage 3 for each budget of 1 to L - 1 big branches, side by side, on a frozen model."""
    budgets = list(range(1, LAYERS))
    ready, _ = transform.apply(with_routers(seed=seed), model)
    joined = jax.tree.map(lambda leaf: jnp.stack([leaf] * len(budgets)), ready)

    def stage_3(budget: float | Array) -> Rule:
        loss = budgeted(budget, alpha=ALPHA, temperatures=TEMPERATURES, steps=steps)
        optimizer = optax.adam(ROUTER_RATE)
        return backprop(loss, optimizer, trainable=ROUTERS, informed=True)

    shares = [budget / LAYERS for budget in budgets]
    rule = members(stage_3, len(budgets), vary={"budget": shares})
    found = learned_members(rule, joined, batches_of(text, seed), steps, seed, len(budgets))
    pairs = zip(budgets, found, strict=True)
    return [Routed(budget, *hard(made, held, TEMPERATURES[1])) for budget, made in pairs]


def hard(model: Decoder, held: Int[Array, "b t"], temperature: float) -> tuple[float, float]:
    """(expected big branches of a token at a temperature, loss of hard choices)."""
    nats = jax.jit(lambda model, held: next_token(model, held)[0])(model, held)

    @jax.jit
    def expected(model: Decoder, held: Array) -> Array:
        soft = softened(model, temperature)
        _, outputs = soft.run(held[:, :-1])
        return outputs.reports["ffn"].scores[..., BIG].sum(0).mean()

    return float(expected(model, held)), float(nats)


def small_beside_embedded(text: bytes, steps: int, seed: int) -> Decoder:
    """The embedded model with small FFNs beside its own, both trained on by random choices."""
    model, _ = transform.apply(duo(ratio=RATIO, seed=seed), embedded()[0])
    rule = members(lambda: stage_1(steps, RATE / 3), 1)
    joined = jax.tree.map(lambda leaf: leaf[None].astype(jnp.float32), models.stack(model))
    return learned_members(rule, joined, batches_of(text, seed), steps, seed, 1)[0]


def by_budget(reports: Sequence[OracleReport], of: Callable[[OracleReport, int], float]) -> str:
    """Figures for each number of big branches."""
    budgets = range(reports[0].layers + 1)
    return ", ".join(f"{b}: {spread([of(report, b) for report in reports])}" for b in budgets)


def logical_claims(reports: Sequence[OracleReport]) -> list[Claim]:
    """What must hold of any model."""
    worst = max(
        max(r.oracle() - r.oracle(b), r.oracle(b) - r.fixed(b), r.fixed(b) - r.mean(b))
        for r in reports
        for b in range(r.layers + 1)
    )
    return [
        Claim(
            "a freer choice is never worse: oracle, oracle of a budget, fixed pattern, mean",
            "by definition",
            f"largest violation {max(worst, 0.0):.1e} nats",
            worst <= 1e-6,
            "every number of big branches of every model",
            seeds=0,
        )
    ]


def oracle_claims(reports: Sequence[OracleReport], which: str, margin: float) -> list[Claim]:
    """What the oracle gains over a model that takes the big branch everywhere."""
    seeds, top = len(reports), reports[0].layers
    one, big = ([r.oracle(b) for r in reports] for b in (1, top))
    best = [int(np.argmin([r.oracle(b) for b in range(top + 1)])) for r in reports]
    equal = [equal_choice(r) for r in reports]
    return [
        Claim(
            f"{which}one big layer, chosen for each token, beats the big one in all layers",
            "oracle with 1 of 12 beats 12 of 12",
            f"{spread(one)} nats against {spread(big)}",
            all(b - a > margin for a, b in zip(one, big, strict=True)),
            f"held-out loss lower by more than {margin} with each seed; the oracle reads labels",
            seeds=seeds,
        ),
        Claim(
            f"{which}the oracle's best number of big layers is neither none nor all",
            "6 of 12",
            f"best: {', '.join(map(str, best))} of {top}; "
            + by_budget(reports, lambda r, b: r.oracle(b)),
            all(0 < b < top for b in best),
            "held-out loss of the oracle by number of big layers, each seed",
            seeds=seeds,
        ),
        Claim(
            f"{which}with equally many patterns to choose among, fewer big layers are no better",
            "the authors say that much of the gain is selection among more patterns",
            "; ".join(", ".join(f"{v:.3f}" for v in values) for values in equal)
            + f" for 1 to {top - 1} big layers"
            + (f" ({min(map(min, equal)):.3f} to {max(map(max, equal)):.3f})" if seeds > 1 else ""),
            all(all(np.diff(values) <= 0.01) for values in equal),
            f"oracle among {top} patterns drawn for each number, mean of 20 draws; no step up of "
            "more than .01",
            seeds=seeds,
        ),
    ]


def equal_choice(report: OracleReport) -> list[float]:
    """The oracle among L patterns of each budget that has as many."""
    return [report.sampled(report.layers, b) for b in range(1, report.layers)]


def stage_claims(reports: Sequence[OracleReport]) -> list[Claim]:
    """What stage 1 must have made: branches that can stand for each other."""
    steps = [float(np.diff([r.fixed(b) for b in range(LAYERS + 1)]).max()) for r in reports]
    small, big = ([r.fixed(b) for r in reports] for b in (0, LAYERS))
    gaps = [float(r.gap().min()) for r in reports]
    correlations = [r.correlation() for r in reports]
    return [
        Claim(
            "the best fixed pattern improves with every big layer",
            "fixed and router improve monotonically",
            f"all small {spread(small)}, all big {spread(big)} nats; "
            + by_budget(reports, lambda r, b: r.fixed(b)),
            max(steps) <= 0.01 and all(b < a for a, b in zip(small, big, strict=True)),
            "no step up of more than .01 nats, each seed",
            seeds=len(reports),
        ),
        Claim(
            "a difficult token is not the same as one of high loss",
            "difficulty is how far a loss can fall",
            f"rank correlation of the two {spread(correlations)}; least gap {min(gaps):.3f} nats",
            min(gaps) >= 0 and max(correlations) < 0.99,
            "loss with small branches against its fall to the oracle's, all held-out tokens",
            seeds=len(reports),
        ),
    ]


def router_claims(
    reports: Sequence[OracleReport], routed: Sequence[Sequence[Routed]]
) -> list[Claim]:
    """What a trained router reaches."""
    every = [
        (r, found) for r, all_found in zip(reports, routed, strict=True) for found in all_found
    ]
    off = [abs(f.big - f.budget) / LAYERS for _, f in every]
    above = [f.nats - r.oracle(f.budget) for r, f in every]
    below = [r.mean(f.budget) - f.nats for r, f in every]
    fixed = [f.nats - r.fixed(f.budget) for r, f in every]
    return [
        Claim(
            "a router keeps to its budget",
            "-",
            f"share of big branches off by {spread(off)}",
            max(off) <= 0.05,
            "at most .05 of the layers on held-out text, every budget and seed; alpha is not tuned",
            seeds=len(reports),
        ),
        Claim(
            "a trained router does not reach the oracle",
            "close to fixed and random patterns, far from the oracle",
            f"{spread(above)} nats above the oracle of its budget",
            min(above) > 0,
            "hard choices, every budget and seed",
            seeds=len(reports),
        ),
        Claim(
            "a trained router is better than patterns at random",
            "close to the best of 100 random patterns",
            f"{spread(below)} nats below the mean over patterns, {spread(fixed)} above the best "
            "fixed one",
            min(below) > 0,
            "hard choices, every budget and seed",
            seeds=len(reports),
        ),
    ]


def place_claims(reports: Sequence[OracleReport]) -> list[Claim]:
    """Where the oracle spends its big branches."""
    half = LAYERS // 2
    claims = []
    for budget, wanted, paper in (
        (2, "late", "4 of 12: late layers"),
        (4, "early", "8 of 12: early layers"),
    ):
        shares = [report.shares(budget).mean(1) for report in reports]
        late = [float(share[half:].sum() / share.sum()) for share in shares]
        claims.append(
            Claim(
                f"with {budget} of {LAYERS} big layers the oracle takes them in {wanted} layers",
                paper,
                f"{spread(late)} of them in the later half",
                all(x > 0.5 if wanted == "late" else x < 0.5 for x in late),
                "share of the oracle's big branches in the later half of the layers, each seed",
                seeds=len(reports),
            )
        )
    return claims


def rows_of(
    name: str, reports: Sequence[OracleReport], routed: Sequence[Sequence[Routed]]
) -> list[dict[str, object]]:
    """A row for each number of big branches: means over seeds."""
    rows = []
    for budget in range(reports[0].layers + 1):
        row: dict[str, object] = {"model": name, "big layers": budget}
        for column in ("oracle", "fixed", "mean"):
            row[column] = float(np.mean([getattr(r, column)(budget) for r in reports]))
        row["best of 100"] = float(np.mean([r.random(100, budget) for r in reports]))
        found = [f for all_found in routed for f in all_found if f.budget == budget]
        rows.append(row | ({"router": float(np.mean([f.nats for f in found]))} if found else {}))
    return rows


def losses(figure, reports: Sequence[OracleReport], routed: Sequence[Sequence[Routed]]) -> None:
    """Loss by number of big branches, means over seeds."""
    axes = figure.subplots()
    for name in ("oracle", "fixed", "mean"):
        values = [np.mean([getattr(r, name)(b) for r in reports]) for b in range(LAYERS + 1)]
        axes.plot(range(LAYERS + 1), values, marker="o", label=name)
    points = [f for found in routed for f in found]
    axes.scatter([f.big for f in points], [f.nats for f in points], label="router", color="k", s=14)
    axes.axhline(np.mean([r.oracle() for r in reports]), color="0.6", linestyle="--")
    axes.set_xlabel("big branches of a token (dashed: the oracle with any number)")
    axes.set_ylabel("held-out nats per byte")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
