"""RePaViT: ViTs with idle channels on small images, trained, folded, and beside plain ones.

The paper's questions at our size: what do idle channels cost, does the cost fall with width, does
the fold keep the outputs, and what does it save? Every form is trained with as many rates as the
others, chosen on validation rows.
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
from ffnlab.bench.folding import Settings, compare
from ffnlab.learning import backprop, labelled
from ffnlab.losses import measuring
from ffnlab.models import ViT, account
from ffnlab.rule import Rule
from ffnlab.storage.files import StrPath
from ffnlab.structure.repavit import repa, repa_fold
from ffnlab.studies import STUDIES, tuning
from ffnlab.studies.classify import at_rate, grouped_bars, paced
from ffnlab.studies.digit_images import DIGITS, digit_images, vit
from ffnlab.studies.result import Claim, Result
from ffnlab.studies.tuning import Found, Side, Splits

__all__ = ["run"]

PLAIN, FOLDED = "plain", "folded form trained"
IDLE = (0.0, 0.5, 0.75, 1.0)
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
WIDTHS, LAYERS, BATCH, STEPS = (32, 128), 3, 64, 400
MARGIN, MILD = 0.02, 0.02  # of accuracy: between .5 and 1.0; what .5 and .75 may cost
LIMIT = 1e-4  # of logits of order ten, after a training run


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is run.

    Attributes:
      widths: of the stream.
      idle: ratios that are trained.
      rates: tried for every form.
      steps: of every run.
      seeds: of networks and order of rows.
    """

    widths: tuple[int, ...]
    idle: tuple[float, ...]
    rates: tuple[float, ...]
    steps: int
    seeds: tuple[int, ...]


def run(*, out: StrPath | None = None, quick: bool = False, seed: int = 0) -> Result:
    """The study; arguments as for `ffnlab.studies.run.run_study`."""
    begin = time.perf_counter()
    sizes = Sizes(WIDTHS, IDLE, RATES, STEPS, (seed, seed + 1, seed + 2))
    if quick:
        sizes = Sizes(WIDTHS[:1], (0.5, 1.0), RATES[1:2], 150, (seed,))
    data = digit_images(seed)
    found = {f"width {w}": tuning.compare(sides(w, sizes), data, sizes.seeds) for w in sizes.widths}
    speed = compare(Settings(widths=(512,), turns=5 if quick else 15))
    return Result(
        slug="repavit",
        title=STUDIES["repavit"].title,
        settings={
            "data": DIGITS,
            "network": f"ViT of {LAYERS} blocks, patches of 2 x 2, hidden layers of 4 widths",
            "optimizer": "AdamW, decay 0.05, a tenth of warm-up, then cosine",
            "batch": BATCH,
            "steps": sizes.steps,
            "validation": tuning.trials(found),
            "seeds": list(sizes.seeds),
        },
        seed=seed,
        quick=quick,
        seconds=time.perf_counter() - begin,
        claims=[*accuracy_claims(found), *fold_claims(found, data), speed_claim(speed.ratios[512])],
        table=tuning.table(found),
        pictures={"accuracy": lambda figure: bars(figure, found)},
    ).write(out)


def name_of(idle: float) -> str:
    """A form in the results."""
    return f"idle {idle:g}"


def sides(width: int, sizes: Sizes) -> list[Side]:
    """The plain ViT, those with idle channels, and the folded form trained as it is."""

    def side(name: str, start: Callable[[int], ViT], rule: Rule) -> Side:
        rates = tuning.grid(rate=sizes.rates)
        return Side(name, rates, lambda s: at_rate(rule, s["rate"]), start, BATCH, sizes.steps)

    alone, measured = (rule_of(loss, sizes.steps) for loss in (labelled, norms_measured()))
    forms = [side(PLAIN, functools.partial(plain, width), alone)]
    for idle in sizes.idle:
        forms.append(side(name_of(idle), functools.partial(repaired, width, idle), measured))
    if 0.75 in sizes.idle:
        forms.append(side(FOLDED, functools.partial(bare, width, 0.75), alone))
    return forms


@functools.cache
def norms_measured() -> Callable:
    """The loss of classes by models whose batch norms learn."""
    return measuring(labelled)


@functools.cache
def rule_of(loss: Callable, steps: int) -> Rule:
    """AdamW at a rate of 1 times a schedule."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, steps // 10, steps)
    return backprop(loss, paced(optax.adamw(schedule, weight_decay=0.05)))


def plain(width: int, seed: int) -> ViT:
    """A plain network."""
    return vit(width, LAYERS, jax.random.key(seed))


def repaired(width: int, idle: float, seed: int) -> ViT:
    """The same network with idle channels."""
    return transform.apply(repa(idle=idle), plain(width, seed))[0]


def bare(width: int, idle: float, seed: int) -> ViT:
    """The folded form of an untrained network."""
    return transform.apply(repa_fold(force=True), repaired(width, idle, seed))[0]


def accuracy_claims(found: Found) -> list[Claim]:
    """What idle channels cost."""
    cases = tuple(found)
    half, none = name_of(0.5), name_of(1.0)
    least = min(found[c][half].mean - found[c][none].mean for c in cases)
    claims = [
        tuning.tuned_claim(
            "a nonlinearity on half of the channels is worth two points over none",
            "DeiT-Small: 78.9 % at .5, 63.9 % at 1.0",
            f"mean accuracy of .5 at least {MARGIN} above 1.0 at every width",
            least >= MARGIN,
            found,
            half,
            none,
        )
    ]
    if name_of(0.75) not in found[cases[0]]:
        return claims
    zero, most = name_of(0.0), name_of(0.75)
    lost = max(found[c][zero].mean - found[c][n].mean for c in cases for n in (half, most))
    claims.append(
        tuning.tuned_claim(
            "up to three quarters of the channels may idle",
            "DeiT-Base: 81.8 % plain, 81.4 % at .5, 81.3 % at .75",
            f"mean accuracy of .5 and .75 at most {MILD} below 0 at every width",
            lost <= MILD,
            found,
            zero,
            half,
            most,
        )
    )
    gaps = {c: abs(found[c][most].mean - found[c][PLAIN].mean) for c in cases}
    first, last = (gaps[c] for c in (cases[0], cases[-1]))
    claims.append(
        tuning.tuned_claim(
            "the wider the network, the closer .75 idle channels are to none",
            "ViT-Large and -Huge gain 1.7 and 1.1 points; DeiT-Tiny loses 2.7",
            f"difference of means of .75 and plain: {first:.3f} at {cases[0]}, {last:.3f} at "
            f"{cases[-1]}; the latter no larger",
            last <= first,
            found,
            PLAIN,
            most,
        )
    )
    better = min(found[c][most].mean - found[c][FOLDED].mean for c in cases)
    claims.append(
        tuning.tuned_claim(
            "training the folded form directly is worse",
            "ViT-Large: 80.6 % trained folded, 82.0 % folded after",
            "mean accuracy lower at every width",
            better > 0,
            found,
            most,
            FOLDED,
        )
    )
    return claims


def fold_claims(found: Found, data: Splits) -> list[Claim]:
    """What the fold keeps, and what it saves."""
    errors, moved = [], []
    for tuned in found.values():
        for name, reached in tuned.items():
            for state in reached.states if name.startswith("idle") else ():
                if state is None or reached.rule is None:
                    continue
                error, changed = folding_error(reached.rule.model(state), data.test.x)
                errors.append(error)
                moved.append(changed)
    counts = {name: ratio_of(idle) for name, idle in (("0.5", 0.5), ("0.75", 0.75), ("1", 1.0))}
    wanted = {"0.5": 0.625, "0.75": 0.375, "1": 0.125}
    off = max(abs(counts[name] / wanted[name] - 1) for name in counts)
    seeds = len(next(iter(next(iter(found.values())).values())).seeds)
    return [
        Claim(
            "a folded network gives the outputs of the trained one",
            "identical outputs",
            f"{np.mean(errors):.1e} ({min(errors):.1e} to {max(errors):.1e})",
            max(errors) <= LIMIT and max(moved) == 0,
            f"largest difference of a logit over the largest logit, test images, {len(errors)} "
            f"trained networks: at most {LIMIT:g}, and no class changes ({max(moved)} did)",
            seeds=seeds,
        ),
        Claim(
            "products of an FFN fall to 1 - theta + 1 / (2 rho)",
            "37.5 % at .75, 62.5 % at .5",
            ", ".join(f"{100 * value:.1f} % at {name}" for name, value in counts.items()),
            off <= 0.02,
            "multiplications counted in the compiled slot of width 64, rho 4; within 2 %",
            seeds=0,
        ),
    ]


def folding_error(model: ViT, x: np.ndarray) -> tuple[float, int]:
    """(largest difference of a logit over the largest logit, classes that changed)."""
    folded, _ = transform.apply(repa_fold(), model)
    run = jax.jit(lambda model, x: model(x))
    before, after = (np.asarray(run(m, jnp.asarray(x))) for m in (model, folded))
    changed = int((before.argmax(-1) != after.argmax(-1)).sum())
    return float(np.abs(before - after).max() / np.abs(before).max()), changed


def ratio_of(idle: float) -> float:
    """Multiplications of a folded slot over those of the plain FFN."""
    before, after = repaired(64, idle, 0), bare(64, idle, 0)
    x = jnp.ones((16, 64))

    def products(model: ViT) -> float:
        ffn: Any = model.blocks()[0].ffn
        return float(account.compiled_cost(lambda ffn, x: ffn(x), ffn, x).multiply_adds)

    return products(after) / products(before)


def speed_claim(over: Mapping[str, float]) -> Claim:
    """What the fold is worth in time."""
    return Claim(
        "a folded FFN is faster than it was before the fold",
        "DeiT-Base at .75: +57.8 % images per second, the whole network",
        f"time of the slot at width 512: {over['unfolded']:.2f} of the unfolded one, "
        f"{over['plain']:.2f} of the plain one",
        over["unfolded"] < 1,
        "median over turns of the ratio, 4 x 196 tokens, float32: below 1",
        seeds=0,
        timed=True,
    )


def bars(figure: Any, found: Found) -> None:
    """Accuracy by width and form."""
    axes = figure.subplots()
    values: Mapping[tuple[str, str], Sequence[float]] = tuning.values(found)
    grouped_bars(axes, values)
    low = min(min(v) for v in values.values())
    axes.set_ylim(max(0.0, low - 0.05), 1.0)
    axes.set_ylabel("accuracy on test digits")
