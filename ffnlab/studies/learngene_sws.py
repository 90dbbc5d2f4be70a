"""Learngene SWS on digits: a network of shared stages is taught, its descendants are tuned briefly.

A teacher of eight layers; an auxiliary network of three stages of two layers each, which learns the
teacher's scores alone; descendants of several depths, tuned for a tenth of the steps that networks
of the same depths are trained for from scratch; the same with the stages in reversed order. Every
side tries as many rates, chosen on validation rows.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ffnlab import transform
from ffnlab.learning import backprop, labelled
from ffnlab.losses import Taught, distilled
from ffnlab.models import ViT
from ffnlab.rule import Rule
from ffnlab.storage.files import StrPath
from ffnlab.structure.learngene_sws import even_source, expand, share
from ffnlab.studies import STUDIES, tuning
from ffnlab.studies.classify import accuracy, at_rate, grouped_bars, paced
from ffnlab.studies.digit_images import DIGITS, digit_images, vit
from ffnlab.studies.result import Claim, Result
from ffnlab.studies.side_by_side import spread
from ffnlab.studies.tuning import Found, Side, Splits, Tuned

__all__ = ["run"]

WIDTH, BATCH = 32, 64
TEACHER_LAYERS, STAGES = 8, (2, 2, 2)
TUNED, SCRATCH, REVERSED = "descendant", "from scratch", "reversed"
EQUAL = "from scratch, as few steps"
TEACHER, AUXILIARY = "teacher", "auxiliary"
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
AHEAD, BEHIND, UNTUNED, CLOSE = 0.15, 0.3, 0.3, 0.03  # accuracies that decide


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is run.

    Attributes:
      depths: of the descendants.
      rates: tried by every side.
      teacher, auxiliary, tuning, scratch: steps of each.
      seeds: of networks and order of rows.
    """

    depths: tuple[int, ...]
    rates: tuple[float, ...]
    teacher: int
    auxiliary: int
    tuning: int
    scratch: int
    seeds: tuple[int, ...]


def run(*, out: StrPath | None = None, quick: bool = False, seed: int = 0) -> Result:
    """The study; arguments as for `ffnlab.studies.run.run_study`."""
    begin = time.perf_counter()
    sizes = Sizes((3, 4, 6, 9), RATES, 800, 1000, 20, 200, (seed, seed + 1, seed + 2))
    if quick:
        sizes = Sizes((3, 6), RATES[2:3], 300, 400, 20, 200, (seed,))
    data = digit_images(seed)
    first = teaching(data, sizes)
    auxiliary = {s: learned(first, AUXILIARY, i) for i, s in enumerate(sizes.seeds)}
    found = {
        f"{n} layers": tuning.compare(sides(n, auxiliary, sizes), data, sizes.seeds)
        for n in sizes.depths
    }
    every: Found = {"before": first, **found}
    return Result(
        slug="learngene-sws",
        title=STUDIES["learngene-sws"].title,
        settings={
            "data": DIGITS,
            "network": f"ViT of width {WIDTH}, {sum(STAGES)} layers in stages of {STAGES}",
            "teacher": f"{TEACHER_LAYERS} layers, the one of the first seed, for all seeds",
            "optimizer": "AdamW, decay 0.05, a tenth of warm-up, then cosine",
            "batch": BATCH,
            "steps": {name: getattr(sizes, name) for name in STEPS},
            "validation": tuning.trials(every),
            "seeds": list(sizes.seeds),
        },
        seed=seed,
        quick=quick,
        seconds=time.perf_counter() - begin,
        claims=[
            close_claim(first),
            ahead_claim(found, EQUAL, "as many steps"),
            ahead_claim(found, SCRATCH, "a tenth of the steps"),
            order_claim(found),
            untuned_claim(auxiliary, data, sizes),
            cost_claim(sizes),
        ],
        table=tuning.table(every),
        pictures={"accuracy": lambda figure: bars(figure, found)},
    ).write(out)


STEPS = ("teacher", "auxiliary", "tuning", "scratch")


@functools.cache
def rule_of(steps: int, taught: bool = False) -> Rule:
    """AdamW at a rate of 1 times a schedule, on classes or on a teacher's scores alone."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(steps // 10, 1), steps)
    loss = distilled(weight=1.0) if taught else labelled
    return backprop(loss, paced(optax.adamw(schedule, weight_decay=0.05)))


def side(
    name: str, start: Callable[[int], ViT], steps: int, sizes: Sizes, taught: bool = False
) -> Side:
    """A way of training, with the rates that it tries."""
    rule, rates = rule_of(steps, taught), tuning.grid(rate=sizes.rates)
    return Side(name, rates, lambda s: at_rate(rule, s["rate"]), start, BATCH, steps)


def network(layers: int, seed: int) -> ViT:
    """A ViT, drawn."""
    return vit(WIDTH, layers, jax.random.key(seed))


def shared(seed: int) -> ViT:
    """A ViT whose layers share the blocks of their stages, drawn."""
    return transform.apply(share(repeats=STAGES), network(sum(STAGES), seed))[0]


def teaching(data: Splits, sizes: Sizes) -> dict[str, Tuned]:
    """The teacher, and the auxiliary networks that learned from it."""
    start = functools.partial(network, TEACHER_LAYERS)
    teacher = side(TEACHER, start, sizes.teacher, sizes)
    found = tuning.compare([teacher], data, sizes.seeds)
    taught = scores_of(learned(found, TEACHER, 0), data.train.x)
    rows = Splits(Taught(data.train.x, data.train.y, taught), data.validation, data.test)
    auxiliary = side(AUXILIARY, shared, sizes.auxiliary, sizes, taught=True)
    return {**found, **tuning.compare([auxiliary], rows, sizes.seeds)}


def learned(found: Mapping[str, Tuned], name: str, i: int) -> ViT:
    """What a side learned with its i-th seed.

    Raises:
      RuntimeError: that run diverged.
    """
    tuned = found[name]
    state = tuned.states[i]
    if state is None or tuned.rule is None:
        raise RuntimeError(f"{name} diverged with seed {tuned.seeds[i]}")
    return tuned.rule.model(state)


@jax.jit
def forward(model: ViT, x: jax.Array) -> jax.Array:
    """A network's scores."""
    return model(x)


def scores_of(model: ViT, x: np.ndarray) -> np.ndarray:
    """A network's scores of all rows, a few at a time."""
    parts = [np.asarray(forward(model, jnp.asarray(part))) for part in np.array_split(x, 8)]
    return np.concatenate(parts)


def source_of(layers: int, is_reversed: bool) -> tuple[int, ...]:
    """The stage of every layer of a descendant."""
    found = even_source(layers, len(STAGES))
    return tuple(len(STAGES) - 1 - stage for stage in found) if is_reversed else found


def descendant(auxiliary: Mapping[int, ViT], layers: int, is_reversed: bool, seed: int) -> ViT:
    """A network that begins with the stages of the auxiliary one of a seed."""
    change = expand(source=source_of(layers, is_reversed), allow_unordered=is_reversed)
    return transform.apply(change, auxiliary[seed])[0]


def sides(layers: int, auxiliary: Mapping[int, ViT], sizes: Sizes) -> list[Side]:
    """From scratch, from the stages in order, and from them in reversed order."""
    begin = functools.partial(descendant, auxiliary, layers)
    fresh = functools.partial(network, layers)
    return [
        side(SCRATCH, fresh, sizes.scratch, sizes),
        side(EQUAL, fresh, sizes.tuning, sizes),
        side(TUNED, functools.partial(begin, False), sizes.tuning, sizes),
        side(REVERSED, functools.partial(begin, True), sizes.tuning, sizes),
    ]


def close_claim(first: Mapping[str, Tuned]) -> Claim:
    """Whether shared stages learn what the teacher knows."""
    gap = first[TEACHER].mean - first[AUXILIARY].mean
    return tuning.tuned_claim(
        "a network of shared stages comes close to its teacher",
        "-",
        f"mean accuracies differ by {gap:.3f}: at most {CLOSE}",
        gap <= CLOSE,
        {"digits": first},
        TEACHER,
        AUXILIARY,
    )


def ahead_claim(found: Found, theirs: str, steps: str) -> Claim:
    """Whether descendants are ahead of networks trained from scratch for so many steps."""
    gap = -tuning.deficit(found, TUNED, theirs)
    return tuning.tuned_claim(
        f"tuned for {steps}, descendants beat networks of their depth trained from scratch",
        "consistently better on ImageNet-1k, sometimes after one epoch",
        f"at every depth and seed at least {AHEAD} ahead; the least is {gap:.3f}",
        gap >= AHEAD,
        found,
        theirs,
        TUNED,
    )


def order_claim(found: Found) -> Claim:
    """Whether the order of stages matters after tuning."""
    gap = -tuning.deficit(found, TUNED, REVERSED)
    return tuning.tuned_claim(
        "stages belong in their order",
        "stages at their positions",
        f"reversed at least {BEHIND} behind after the same tuning at every depth and seed; the "
        f"least is {gap:.3f}",
        gap >= BEHIND,
        found,
        TUNED,
        REVERSED,
    )


def untuned_claim(auxiliary: Mapping[int, ViT], data: Splits, sizes: Sizes) -> Claim:
    """What reversed stages know before tuning."""
    rule = rule_of(sizes.tuning)

    def reversed_score(layers: int, seed: int) -> float:
        model = descendant(auxiliary, layers, True, seed)
        return accuracy(rule, rule.init(model, jax.random.key(seed)), data.test)

    reached = {n: [reversed_score(n, s) for s in sizes.seeds] for n in sizes.depths}
    worst = max(max(values) for values in reached.values())
    return Claim(
        "reversed stages know little without tuning",
        "-",
        ", ".join(f"{depth} layers: {spread(values)}" for depth, values in reached.items()),
        worst <= UNTUNED,
        f"accuracy on test rows at most {UNTUNED} at every depth and seed",
        seeds=len(sizes.seeds),
    )


def cost_claim(sizes: Sizes) -> Claim:
    """Whether all of it is cheaper than training every depth from scratch."""
    total = sum(sizes.depths)
    ours = sizes.teacher * TEACHER_LAYERS + sizes.auxiliary * sum(STAGES) + sizes.tuning * total
    theirs = sizes.scratch * total
    return Claim(
        "a family of networks costs less to train than from scratch",
        "6.6 times less in all on ImageNet-1k",
        f"{ours:,} blocks run on a batch, {theirs:,} from scratch",
        ours < theirs,
        f"steps times layers of teacher, auxiliary network and {len(sizes.depths)} descendants, "
        f"against {sizes.scratch} steps of each depth",
        seeds=0,
    )


def bars(figure: Any, found: Found) -> None:
    """Accuracy by depth and side."""
    axes = figure.subplots()
    values: Mapping[tuple[str, str], Sequence[float]] = tuning.values(found)
    grouped_bars(axes, values)
    axes.set_ylim(0, 1.1)
    axes.set_ylabel("accuracy on test digits")
