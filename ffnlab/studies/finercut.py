"""FinerCut on a trained byte model: which sublayers go first, and what the search buys.

Greedy removal of single sublayers is compared at equal numbers of removed units with a one-shot
ranking, with the removal of whole blocks, and with random choices, on held-out text. The model is
the embedded one, calibrated on a few windows of its training text as the paper calibrates on a few
of WikiText. The paper's figures are of models a thousand times larger; ours say whether the
mechanism works, not what a large model would lose. All ways of choosing see the same calibration
text and the same dense model, nothing is tuned, every claim is decided over all numbers of units
that were removed, and there is one seed.
"""

import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ffnlab import models
from ffnlab.data import TextBatches, stdlib_text
from ffnlab.formats.embedded import embedded
from ffnlab.layers import LayerInputs
from ffnlab.models import Decoder
from ffnlab.pruning import Search, finercut, removal_map, removal_order
from ffnlab.storage.files import StrPath
from ffnlab.studies import STUDIES
from ffnlab.studies.result import Claim, Result
from ffnlab.transform import calibrate

__all__ = ["Comparison", "compare", "run"]

REMOVALS = 6  # units, as in the card's reference run; three whole blocks


class Score(NamedTuple):
    """Quality on held-out text.

    Attributes:
      nats: mean negative log-likelihood of the next token.
      accuracy: fraction of next tokens that have the largest logit.
    """

    nats: float
    accuracy: float


class Comparison(NamedTuple):
    """Held-out scores after removing 0, 1, … units.

    Attributes:
      search: the greedy ranking of all units.
      greedy, one_shot: [REMOVALS + 1] scores; entry k without the first k units of the order.
      blocks: [REMOVALS / 2 + 1] scores; entry k without k whole blocks, that is 2 k units.
      random: [draws, REMOVALS / 2 + 1] scores; entry k of a draw without 2 k units.
      cut_gap: largest |difference| between the logits with a quarter of the units masked and those
        of the model without them, over the largest logit.
    """

    search: Search
    greedy: list[Score]
    one_shot: list[Score]
    blocks: list[Score]
    random: list[list[Score]]
    cut_gap: float


def run(*, out: StrPath | None = None, quick: bool = False, seed: int = 0) -> Result:
    """The study; arguments as for `ffnlab.studies.run.run_study`."""
    begin = time.perf_counter()
    settings = {
        "model": "embedded",
        "calibration": [4 if quick else 10, 256],
        "held_out": [16 if quick else 96, 256],
        "draws": 4 if quick else 12,
        "distance": "js",
        "protect": 0.0,
    }
    text = stdlib_text()
    (rows, length), (held_rows, held_length) = settings["calibration"], settings["held_out"]
    calibration = TextBatches(text.train, batch=rows, length=length, seed=seed)(0)[:, :-1]
    held = TextBatches(text.held_out, batch=held_rows, length=held_length, seed=seed)(0)
    found = compare(embedded()[0], calibration, held, draws=settings["draws"], seed=seed)
    order_map = removal_map(found.search)
    return Result(
        slug="finercut",
        title=STUDIES["finercut"].title,
        settings={**settings, "text": text.identity, "order": removal_order(found.search)},
        seed=seed,
        quick=quick,
        seconds=time.perf_counter() - begin,
        claims=[*quality_claims(found), *order_claims(found), *exactness_claims(found)],
        table=rows_of(found),
        pictures={"removal_map": order_map.draw, "held_out": lambda figure: curves(figure, found)},
    ).write(out)


def compare(
    model: Decoder,
    calibration: Int[np.ndarray, "b t"],
    held_out: Int[np.ndarray, "rows length"],
    *,
    draws: int,
    seed: int,
) -> Comparison:
    """Removes up to `REMOVALS` units in four ways and scores each model.

    Args:
      model: at least four blocks, none of them pruned.
      calibration: tokens for the searches, [b, t].
      held_out: tokens to score, [rows, length].
      draws: random orders.
      seed: of those orders.
    """
    model = models.stack(model)
    n = model.config.layers

    def ranked(**options) -> Search:
        return calibrate(finercut(**options), model, [calibration])

    def scores(order: list[int], counts: range) -> list[Score]:
        return [score(model, held_out, gates_without(n, order[:k])) for k in counts]

    search = ranked(remove="all")
    one_shot = removal_order(ranked(remove=REMOVALS, one_shot=True))
    blocks = removal_order(ranked(remove=REMOVALS // 2, units="block"))
    units = np.random.default_rng(seed).permuted(np.tile(np.arange(2 * n), (draws, 1)), axis=1)
    whole = range(REMOVALS + 1)
    return Comparison(
        search=search,
        greedy=scores(removal_order(search), whole),
        one_shot=scores(one_shot, whole),
        blocks=scores(blocks, whole[::2]),
        random=[scores(order, whole[::2]) for order in units.tolist()],
        cut_gap=cut_gap(model, calibration, search),
    )


def gates_without(n: int, units: list[int]) -> Float[np.ndarray, "n 2"]:
    """Gates that mask the units (2 i attention, 2 i + 1 FFN of block i)."""
    gates = np.ones(2 * n, np.float32)
    gates[units] = 0
    return gates.reshape(n, 2)


def score(model: Decoder, rows: Int[np.ndarray, "b t"], gates: Float[np.ndarray, "n 2"]) -> Score:
    """Scores every token of the rows but the first, eight rows at a time."""
    parts = np.split(rows, range(8, len(rows), 8))
    sums = np.array([sum_scores(model, part, gates) for part in parts], np.float64).sum(axis=0)
    return Score(nats=sums[0] / rows[:, 1:].size, accuracy=sums[1] / rows[:, 1:].size)


@jax.jit
def sum_scores(
    model: Decoder, rows: Int[Array, "b t"], gates: Float[Array, "n 2"]
) -> Float[Array, "2"]:
    """Summed (negative log-likelihood, number of right guesses) of the rows' next tokens."""
    logits, targets = model(rows[:, :-1], inputs=LayerInputs(gates=gates)), rows[:, 1:]
    likely = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)
    return jnp.stack([-likely.sum(), (logits.argmax(-1) == targets).sum().astype(jnp.float32)])


def cut_gap(model: Decoder, tokens: Int[np.ndarray, "b t"], search: Search) -> float:
    """Masked against physically removed, a quarter of the units; see `Comparison`."""
    quarter = removal_order(search, search.step.size // 4)
    forward = jax.jit(lambda model, tokens, gates: model(tokens, inputs=LayerInputs(gates=gates)))
    masked = forward(model, tokens, gates_without(len(search.step), quarter))
    cut = forward(finercut(remove=len(quarter)).rewrite(model, search), tokens, None)
    return float(jnp.abs(masked - cut).max() / jnp.abs(cut).max())


def nats(scores: list[Score]) -> str:
    """Scores in nats, for people."""
    return " ".join(f"{s.nats:.3f}" for s in scores)


def quality_claims(found: Comparison) -> list[Claim]:
    """What the greedy choice of single sublayers buys."""
    greedy, one_shot, blocks = found.greedy, found.one_shot, found.blocks
    pairs = greedy[2::2]
    worst = max(a.nats - b.nats for a, b in zip(greedy, one_shot, strict=True))
    return [
        Claim(
            "single sublayers beat whole blocks at equal numbers of units removed",
            "Llama3-8B at 25%: FinerCut 53.97 average, ShortGPT (blocks) 36.88",
            f"2/4/6 units: {nats(pairs)} nats, blocks {nats(blocks[1:])}",
            bool(all(a.nats < b.nats for a, b in zip(pairs, blocks[1:], strict=True))),
            "held-out nats per byte lower at 2, 4 and 6 units; both chosen greedily by the same "
            "distance on the same text; one seed",
            seeds=1,
        ),
        Claim(
            "a new score in every round is never worse than the ranking of the first round",
            "-",
            f"1 to {REMOVALS} units: {nats(greedy[1:])} nats, one-shot {nats(one_shot[1:])}; at "
            f"most {worst:+.3f} above it",
            bool(worst <= 0 and greedy[-1].nats < one_shot[-1].nats),
            f"held-out nats per byte not above one-shot at 1 to {REMOVALS} units, and below it at "
            f"{REMOVALS}; one seed",
            seeds=1,
        ),
        random_claim(found),
        remaining_claim(found),
    ]


def random_claim(found: Comparison) -> Claim:
    """The greedy choice against random ones."""
    pairs, dense = found.greedy[2::2], found.greedy[0].nats
    draws = np.array([[s.nats for s in draw[1:]] for draw in found.random])
    mean, best = draws.mean(axis=0), draws.min(axis=0)
    cost = np.array([s.nats for s in pairs]) - dense
    return Claim(
        "the choice matters: random removal is far worse",
        "-",
        f"2/4/6 units: {nats(pairs)} nats, random "
        + " ".join(f"{value:.3f}" for value in mean)
        + ", best draws "
        + " ".join(f"{value:.3f}" for value in best),
        bool((cost < 0.5 * (mean - dense)).all() and (cost + dense < best).all()),
        f"at 2, 4 and 6 units below the best of {len(draws)} draws, and loss over the dense model "
        "less than half of their mean; one seed of calibration and held-out rows",
        seeds=1,
    )


def remaining_claim(found: Comparison) -> Claim:
    """What is left without a quarter of the units, by both measures."""
    greedy, size = found.greedy, found.search.step.size
    quarter = min(REMOVALS, size // 4)
    kept = greedy[quarter].accuracy / greedy[0].accuracy
    nats_kept = greedy[0].nats / greedy[quarter].nats
    return Claim(
        "with a quarter of the units removed 90% of the performance remains",
        "Llama3-8B, 25%: 90% of the mean of 9 benchmarks",
        f"{quarter} of {size} units: {kept:.1%} of the next-byte accuracy; "
        f"{greedy[0].nats:.3f} -> {greedy[quarter].nats:.3f} nats per byte, {nats_kept:.1%}",
        bool(kept >= 0.9 and nats_kept >= 0.9),
        f"held-out text: at least 90% both of the accuracy ({greedy[0].accuracy:.3f} dense) and, "
        "dense over pruned, of the nats; no benchmarks at this size, one seed",
        seeds=1,
    )


def order_claims(found: Comparison) -> list[Claim]:
    """What the order looks like."""
    order, n = removal_order(found.search), len(found.search.step)
    attention = np.cumsum([unit % 2 == 0 for unit in order[:REMOVALS]])
    half = order[: len(order) // 2]
    blocks = sorted(unit // 2 for unit in half if unit % 2 == 0)
    depth = float(np.mean(blocks)) if blocks else 0.0
    return [
        Claim(
            "attention sublayers go first",
            "mostly attention; 34 of 80 attention sublayers of Llama3-70B keep 99%",
            f"attention among the first 1 to {REMOVALS} units: " + " ".join(map(str, attention)),
            bool((2 * attention > np.arange(1, len(attention) + 1)).all()),
            f"more than half of the first k units of the greedy order, every k up to {REMOVALS}; "
            "one seed",
            seeds=1,
        ),
        Claim(
            "attention is removed in the deeper blocks",
            "mostly deeper, often consecutive blocks",
            f"blocks {', '.join(map(str, blocks))} of 0..{n - 1}, mean {depth:.2f}",
            bool(depth > (n - 1) / 2),
            "mean block of the attention in the first half of the order: in the upper half; "
            "one seed",
            seeds=1,
        ),
    ]


def exactness_claims(found: Comparison) -> list[Claim]:
    """What must hold for any model."""
    order, steps = removal_order(found.search), found.search.step
    is_nested = sorted(order) == list(range(steps.size)) and (steps.max() == steps.size - 1)
    return [
        Claim(
            "masking a sublayer and removing it are the same function",
            "code: output times zero, or the module replaced by zero",
            f"largest difference {found.cut_gap:.1e} of the largest logit",
            bool(found.cut_gap <= 1e-5),
            "logits on the calibration text without a quarter of the units, float32",
            seeds=1,
        ),
        Claim(
            "smaller models are nested in larger ones",
            "masks are prefixes of one order",
            f"one order of all {len(order)} units",
            bool(is_nested),
            "the order is a permutation; `rewrite` removes a prefix of it",
            seeds=1,
        ),
    ]


def rows_of(found: Comparison) -> list[dict[str, object]]:
    """Held-out nats by units removed."""
    table = []
    for k, (a, b) in enumerate(zip(found.greedy, found.one_shot, strict=True)):
        row = {"units removed": k, "greedy": a.nats, "one-shot": b.nats, "accuracy": a.accuracy}
        if k % 2 == 0:
            row["blocks"] = found.blocks[k // 2].nats
            row["random"] = float(np.mean([draw[k // 2].nats for draw in found.random]))
        table.append(row)
    return table


def curves(figure, found: Comparison) -> None:
    """Held-out nats against units removed, four ways."""
    axes = figure.subplots()
    whole, pairs = range(REMOVALS + 1), range(0, REMOVALS + 1, 2)
    draws = np.array([[s.nats for s in draw] for draw in found.random])
    axes.fill_between(pairs, draws.min(0), draws.max(0), color="0.9", label="random, range")
    axes.plot(pairs, draws.mean(0), color="0.55", linestyle=":", label="random, mean")
    axes.plot(pairs, [s.nats for s in found.blocks], "s--", color="C1", label="whole blocks")
    axes.plot(whole, [s.nats for s in found.one_shot], "^-", color="C2", label="one-shot ranking")
    axes.plot(whole, [s.nats for s in found.greedy], "o-", color="C0", label="greedy (FinerCut)")
    dense = found.greedy[0].nats
    span = max(s.nats for s in (*found.blocks, *found.one_shot, *found.greedy)) - dense
    span = max(span, 1e-3)  # a model that nothing changes still has an axis
    axes.set_ylim(dense - 0.1 * span, dense + 1.7 * span)  # random choices may run off the top
    axes.set_xlabel(f"sublayers removed, of {found.search.step.size}")
    axes.set_ylabel("held-out nats per byte")
    axes.set_title("What is lost with each way of choosing")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
