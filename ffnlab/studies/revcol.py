"""RevCol: columns that are undone, their memory, their exactness, and what they learn.

Numbers of parameters are of the paper's networks, nothing allocated; memory is read from compiled
programs (`ffnlab bench columns`), which the full form also runs for their time. What rounding does
to gradients, whether rebuilt and plain columns learn alike, and, in the full form, what more
columns and supervision on the way do, is asked of small networks on 8 x 8 digits.
"""

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ffnlab.bench import columns as bench
from ffnlab.data import ArrayBatches
from ffnlab.learning import backprop
from ffnlab.learning.optimizers.trust import matrices
from ffnlab.losses import Moment
from ffnlab.models import (
    ImageInput,
    RevCol,
    RevColConfig,
    account,
    keep_invertible,
    revcol_of,
    stack,
)
from ffnlab.parallel import LoopOptions, train
from ffnlab.rule import Rule
from ffnlab.storage.files import StrPath
from ffnlab.structure import gradient_error, supervised
from ffnlab.structure.revcol import saving, with_alphas
from ffnlab.studies import STUDIES, tuning
from ffnlab.studies.classify import at_rate, grouped_bars, paced
from ffnlab.studies.digit_images import DIGITS, digit_images
from ffnlab.studies.result import Claim, Result
from ffnlab.studies.tuning import Found, Side, Splits

__all__ = ["Sizes", "run"]

# Black is no zero to the network: norms of nothing would make features of rounding.
PIXELS = ImageInput((0.3,), (0.35,))
NETWORK = RevColConfig((8, 8), (12, 24), (1, 1), 4, 10, channels=1, patch=1, preprocess=PIXELS)
# Of the official code: without the heads and decoders of supervision.
OFFICIAL = {"tiny": 30_456_168, "small": 60_568_424, "base": 138_616_408}
ALONE, SUPERVISED, MORE = "4 columns", "4 columns, supervised", "8 columns"
EXACT = 1e-4  # of gradients, what the constructor accepts
ALIKE = 1e-3  # of losses
FLAT, DEAR = 1.1, 1.6  # of memory, and of time
BATCH = 32

Errors = Mapping[tuple[float, int], Sequence[float]]  # (alpha, columns rebuilt) -> by seed


class Sizes(NamedTuple):
    """How much is run.

    Attributes:
      seeds: of networks.
      rates: of AdamW, that each side tries.
      steps: of training.
      bench: what memory and time are measured of.
      rebuilt, alphas: columns rebuilt in a row, and scales, whose gradients are looked at.
    """

    seeds: Sequence[int]
    rates: Sequence[float]
    steps: int
    bench: bench.Settings
    rebuilt: Sequence[int] = (1, 2, 4, 8, 16)
    alphas: Sequence[float] = (1.0, 0.7, 0.5)


def run(*, out: StrPath | None = None, quick: bool = False, seed: int = 0) -> Result:
    """The study; arguments as for `ffnlab.studies.run.run_study`."""
    begin = time.perf_counter()
    sizes = Sizes((seed, seed + 1, seed + 2), (3e-3, 1e-2, 3e-2, 1e-1, 3e-1), 300, bench.Settings())
    if quick:
        few = bench.Settings(columns=(4, 32), turns=0, forms=("plain", "rebuilt"))
        sizes = Sizes((seed,), (), 0, few, (4, 16), (1.0, 0.5))
    data = digit_images(seed)
    measured = bench.compare(sizes.bench)
    errors = rounding_errors(data, sizes)
    found = {} if quick else {"digits": tuning.compare(sides(sizes), data, sizes.seeds)}
    pictures = {
        "memory": lambda figure: bench.draw(figure, measured),
        "gradients": lambda figure: lines(figure, errors),
    }
    return Result(
        slug="revcol",
        title=STUDIES["revcol"].title,
        settings={
            "data": DIGITS,
            "network": "levels of 12 and 24 channels on 8 x 8 and 4 x 4 places",
            "optimizer": "AdamW, decay 0.05, a tenth of warm-up, then cosine; alphas held",
            "batch": BATCH,
            "steps": sizes.steps,
            "validation": tuning.trials(found),
            "seeds": list(sizes.seeds),
            "errors of gradients": {
                f"alpha {alpha:g}, {n} rebuilt": max(each) for (alpha, n), each in errors.items()
            },
        },
        seed=seed,
        quick=quick,
        seconds=time.perf_counter() - begin,
        claims=[
            counted_claim(),
            memory_claim(measured),
            *([time_claim(measured)] if measured.ratios else []),
            exact_claim(errors),
            spoiled_claim(errors),
            *([] if quick else [alike_claim(curves(data, seed))]),
            *learned_claims(found),
        ],
        table=[*measured.rows(), *tuning.table(found)],
        pictures=pictures | ({"accuracy": lambda figure: bars(figure, found)} if found else {}),
    ).write(out)


def network(columns: int, is_supervised: bool, seed: int) -> RevCol:
    """Columns, drawn."""
    config = dataclasses.replace(NETWORK, columns=columns, supervision=is_supervised)
    return stack(RevCol(config, key=jax.random.key(seed)))


@functools.cache
def rule_of(steps: int) -> Rule:
    """AdamW at a rate of 1 times a schedule; the end of the chain holds alphas."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(steps // 10, 1), steps)
    adamw = paced(optax.adamw(schedule, weight_decay=0.05, mask=matrices))
    return backprop(supervised(), optax.chain(adamw, keep_invertible()), informed=True)


def sides(sizes: Sizes) -> list[Side]:
    """Columns alone, supervised, and more of them."""
    rule, rates = rule_of(sizes.steps), tuning.grid(rate=sizes.rates)
    made = {ALONE: (4, False), SUPERVISED: (4, True), MORE: (8, False)}
    return [
        Side(
            name,
            rates,
            lambda setting: at_rate(rule, setting["rate"]),
            functools.partial(network, *form),
            BATCH,
            sizes.steps,
        )
        for name, form in made.items()
    ]


def rounding_errors(data: Splits, sizes: Sizes) -> Errors:
    """Relative errors of gradients of drawn columns, against plain autodiff."""
    batch, found = (jnp.asarray(data.train.x[:BATCH]), jnp.asarray(data.train.y[:BATCH])), {}
    config = dataclasses.replace(NETWORK, columns=max(sizes.rebuilt) + 1)
    for seed in sizes.seeds:
        drawn = stack(RevCol(config, key=jax.random.key(seed)))
        for alpha in sizes.alphas:
            model = with_alphas(drawn, alpha)
            for n in sizes.rebuilt:
                error = gradient_error(saving(model, n), batch)
                found.setdefault((alpha, n), []).append(error)
    return found


def curves(data: Splits, seed: int, steps: int = 100) -> dict[str, list[float]]:
    """Losses of supervised columns after every tenth step, rebuilt and plain, from one draw."""
    optimizer = optax.chain(optax.sgd(0.02, momentum=0.9), keep_invertible())
    loss, drawn, found = supervised(), network(4, True, seed), {}
    rule = backprop(loss, optimizer, informed=True)
    rows = tuple(jnp.asarray(part[:BATCH]) for part in data.train)
    moment = Moment(jnp.int32(0), jax.random.key(seed))
    asked = jax.jit(lambda model: loss(model, rows, moment)[0])
    for name, every in (("rebuilt", 1), ("plain", 0)):
        outcome = train(
            rule,
            saving(drawn, every),
            ArrayBatches(data.train, BATCH, seed),
            steps,
            key=jax.random.key(seed),
            evaluate=lambda state: {"loss": float(asked(rule.model(state)))},
            options=LoopOptions(log_every=0, evaluate_every=steps // 10, progress=False),
        )
        found[name] = [figures["loss"] for figures in outcome.evaluations.values()]
    return found


def counted_claim() -> Claim:
    """Parameters of the paper's networks."""
    counts, missing = {}, {}
    for size in OFFICIAL:
        config = revcol_of(size, supervision=False)
        model = jax.eval_shape(lambda key, c=config: RevCol(c, key=key), jax.random.key(0))
        counts[size] = account.parameters(model)
        missing[size] = sum(config.widths)
    return Claim(
        "networks of the paper's sizes have its parameters",
        "T 30 M, S 60 M, B 138 M",
        ", ".join(f"{size} {n:,}" for size, n in counts.items()),
        all(counts[size] + missing[size] == n for size, n in OFFICIAL.items()),
        f"the official code's {', '.join(f'{n:,}' for n in OFFICIAL.values())}, less the first "
        "column's alphas, which scale zeros there; nothing is allocated",
        seeds=0,
    )


def memory_claim(found: bench.Comparison) -> Claim:
    """Whether rebuilt columns take as much memory, however many there are."""
    counts = list(found.temporary["plain"])
    saved = found.temporary["plain"][counts[-1]] / found.temporary["rebuilt"][counts[-1]]
    growth = {form: found.growth(form) for form in found.temporary}
    return Claim(
        "memory of training does not grow with the number of columns",
        "O(1) in columns",
        ", ".join(f"{form} x {by:.2f}" for form, by in growth.items())
        + f"; plain columns take {saved:.1f} times what rebuilt ones do",
        growth["rebuilt"] <= FLAT,
        f"temporary bytes of a step of {counts[-1]} columns over {counts[0]}, of the compiled "
        f"program, at most {FLAT} rebuilt; {found.about}",
        seeds=0,
    )


def time_claim(found: bench.Comparison) -> Claim:
    """What rebuilding costs."""
    return Claim(
        "rebuilding costs about one more forward pass",
        "-",
        ", ".join(f"{form} {ratio:.2f}" for form, ratio in found.ratios.items()),
        found.ratios["rebuilt"] <= DEAR,
        f"time of a step over that of plain columns, at most {DEAR}; median of turns, "
        f"{found.about}",
        seeds=0,
        timed=True,
    )


def said(each: Sequence[float]) -> str:
    """The least and the most of some errors."""
    ends = f"{min(each):.0e} to {max(each):.0e}"
    return ends if len(each) > 1 else f"{each[0]:.0e}"


def exact_claim(errors: Errors) -> Claim:
    """Whether gradients are exact where the constructor says so."""
    near = {(0.5, 4): errors[0.5, 4], (1.0, 16): errors[1.0, 16]}
    worst = max(max(each) for each in near.values())
    return Claim(
        "gradients of rebuilt float32 columns are those of autodiff",
        "-",
        "; ".join(f"{n} columns at alpha {a:g}: {said(each)}" for (a, n), each in near.items()),
        worst <= EXACT,
        f"relative error over all parameters at most {EXACT:g} (most: {worst:.1e})",
        seeds=len(near[0.5, 4]),
    )


def spoiled_claim(errors: Errors) -> Claim:
    """Whether what the constructor refuses is bad."""
    each = errors[0.5, 16]
    return Claim(
        "at the usual alpha of .5, 16 columns cannot be rebuilt in float32",
        "-",
        f"off by {said(each)} of their norm",
        min(each) > EXACT,
        f"relative error of gradients above {EXACT:g} with each seed: so the features of every "
        "column are kept by default, as the authors do",
        seeds=len(each),
    )


def alike_claim(found: Mapping[str, Sequence[float]]) -> Claim:
    """Whether rebuilt and plain columns learn alike."""
    apart = float(np.abs(np.subtract(found["rebuilt"], found["plain"])).max())
    is_falling = found["plain"][-1] < found["plain"][0]
    return Claim(
        "rebuilt and plain columns learn alike",
        "-",
        f"losses at {len(found['plain'])} moments at most {apart:.1e} apart, falling from "
        f"{found['plain'][0]:.2f} to {found['plain'][-1]:.2f}",
        apart <= ALIKE and is_falling,
        f"at most {ALIKE} on one batch after every tenth of 100 steps of SGD, from one draw",
        seeds=1,
    )


def learned_claims(found: Found) -> list[Claim]:
    """What supervision and more columns do at one budget; none where nothing was tuned."""
    if not found:
        return []
    loss = tuning.deficit(found, SUPERVISED, ALONE)
    gain = found["digits"][MORE].mean - found["digits"][ALONE].mean
    return [
        tuning.tuned_claim(
            "columns that decode the image and the class on the way lose no accuracy",
            "-",
            f"supervised at most {tuning.CLOSE} below with each seed (most: {loss:.3f})",
            loss <= tuning.CLOSE,
            found,
            ALONE,
            SUPERVISED,
        ),
        tuning.tuned_claim(
            "more columns learn more",
            "ImageNet-1k 82.2 % (4 columns), 83.5 % (8), 84.1 % (16, wider)",
            f"mean accuracy of 8 columns at least that of 4 ({gain:+.3f})",
            gain >= 0,
            found,
            ALONE,
            MORE,
        ),
    ]


def lines(figure: Any, errors: Errors) -> None:
    """Errors of gradients by columns rebuilt in a row."""
    axes = figure.subplots()
    for alpha in dict.fromkeys(alpha for alpha, _ in errors):
        counts = [n for a, n in errors if a == alpha]
        axes.plot(counts, [max(errors[alpha, n]) for n in counts], "o-", label=f"alpha {alpha:g}")
    axes.axhline(EXACT, color="0.6", linestyle="--", linewidth=1)
    axes.set_yscale("log")
    axes.set_xlabel("columns rebuilt in a row")
    axes.set_ylabel("relative error of gradients, float32")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def bars(figure: Any, found: Found) -> None:
    """Accuracy by side."""
    axes = figure.subplots()
    values: Mapping[tuple[str, str], Sequence[float]] = tuning.values(found)
    grouped_bars(axes, values)
    axes.set_ylim(0, 1.2)
    axes.set_ylabel("accuracy on test digits")
