"""CHESS on a drawn FFN, on a trained byte model, and on the clock of a CPU.

Thresholds per channel are compared with one per layer (CATS): on a drawn SwiGLU whose channels
differ in scale as much as one likes, and on the embedded model, whose channels differ as training
left them. Both official versions are run. Then a token is decoded with the inactive channels
skipped: one gated FFN beside the fastest dense form of it, and a whole model beside itself. The
paper's figures are of models a thousand times larger; ours say whether the mechanism works. Every
rule calibrates on the same text, nothing is tuned, every claim is decided over every setting that
was run, and there is one seed.
"""

import dataclasses
import math
import time
from typing import NamedTuple

import jax
import numpy as np

from ffnlab import models
from ffnlab.bench import sparse as bench
from ffnlab.data import TextBatches, stdlib_text
from ffnlab.formats.embedded import embedded
from ffnlab.models import DecoderConfig
from ffnlab.storage.files import StrPath
from ffnlab.studies import STUDIES
from ffnlab.studies.chess_measure import (
    RULES,
    Errors,
    Point,
    Speed,
    decode_speeds,
    drawn_errors,
    sweep,
)
from ffnlab.studies.fireq_measure import loss
from ffnlab.studies.result import Claim, Result

__all__ = ["run"]

SPARSITIES = (0.3, 0.5, 0.7)
SPREADS = (0.0, 0.5, 1.0)
# Of the drawn FFN: error of CHESS over that of CATS that the claim allows, by spread.
ALLOWED = {0.0: 1.0, 0.5: 0.6, 1.0: 0.15}
COLORS = {"CATS": "0.5", "ABS": "C1", "SQ": "C0"}
# Llama-shaped blocks whose matrices lie in memory: 180 MB each.
DECODED = DecoderConfig(
    vocab=256, width=2048, hidden=5632, layers=2, heads=32, kv_heads=8, head_dim=64
)


class Measured(NamedTuple):
    """Everything the claims are judged by.

    Attributes:
      errors: of the drawn FFN, by spread.
      dense: [rows] nats per token of the dense model's held-out rows.
      points: the embedded model sparsified.
      layer: one FFN beside its dense forms.
      speeds: a whole model beside itself.
    """

    errors: list[Errors]
    dense: np.ndarray
    points: list[Point]
    layer: bench.Comparison
    speeds: list[Speed]

    def point(self, rule: str, sparsity: float) -> Point:
        """The point of a rule and sparsity."""
        return next(p for p in self.points if (p.rule, p.sparsity) == (rule, sparsity))


def run(*, out: StrPath | None = None, quick: bool = False, seed: int = 0) -> Result:
    """The study; arguments as for `ffnlab.studies.run.run_study`."""
    begin = time.perf_counter()
    settings = {
        "model": "embedded",
        "calibration": [2 if quick else 8, 8, 256 if quick else 512],
        "held_out": [32 if quick else 768, 256],
        "sparsities": SPARSITIES,
        "decoded": {"blocks": 1 if quick else 2, "width": 2048, "hidden": 5632},
    }
    text = stdlib_text()
    (count, batch, length), (rows, held_length) = settings["calibration"], settings["held_out"]
    source = TextBatches(text.train, batch=batch, length=length, seed=seed)
    held = TextBatches(text.held_out, batch=rows, length=held_length, seed=seed)(0)
    measured = measure([source(i)[:, :-1] for i in range(count)], held, quick=quick, seed=seed)
    return Result(
        slug="chess",
        title=STUDIES["chess"].title,
        settings={**settings, "text": text.identity, "speed": measured.layer.about},
        seed=seed,
        quick=quick,
        seconds=time.perf_counter() - begin,
        claims=[
            *threshold_claims(measured),
            *loss_claims(measured),
            *speed_claims(measured),
        ],
        table=rows_of(measured),
        pictures={
            "loss": lambda figure: draw_losses(figure, measured),
            "error": lambda figure: draw_errors(figure, measured),
            "speed": lambda figure: draw_speed(figure, measured),
        },
    ).write(out)


def measure(calibration: list[np.ndarray], held: np.ndarray, *, quick: bool, seed: int) -> Measured:
    """Runs every measurement."""
    model = models.stack(embedded()[0])
    levels = (
        bench.Settings(sparsities=(0.0, 0.5, 0.7, 0.9), turns=15) if quick else bench.Settings()
    )
    return Measured(
        errors=[drawn_errors(jax.random.key(seed), spread) for spread in SPREADS],
        dense=loss(model, held).nats,
        points=sweep(
            model,
            calibration,
            held,
            sparsities=SPARSITIES,
            attention=("SQ",),
            sites=not quick,
        ),
        layer=bench.compare(levels),
        speeds=decode_speeds(
            dataclasses.replace(DECODED, layers=1) if quick else DECODED,
            (0.5,) if quick else (0.5, 0.7),
            tokens=16,
            turns=3 if quick else 9,
            seed=seed,
        ),
    )


def added(nats: np.ndarray, to: np.ndarray) -> tuple[float, float]:
    """Mean nats per token that are added, and its standard error over rows."""
    difference = nats - to
    return float(difference.mean()), float(difference.std() / math.sqrt(len(difference)))


def said(nats: np.ndarray, to: np.ndarray) -> str:
    """The same for people."""
    mean, error = added(nats, to)
    return f"{mean:+.4f} ± {error:.4f}"


def threshold_claims(found: Measured) -> list[Claim]:
    """What thresholds do: how much they drop, and what dropping costs a drawn FFN."""
    worst = {rule: max(p.deviation for p in found.points if p.rule == rule) for rule in RULES}
    sites = [abs(value - p.sparsity) for p in found.points for value in p.site_zeros.values()]
    asked = ", ".join(f"{k:.0%}" for k in SPARSITIES)
    pairs = [(e, e.cats * ALLOWED[e.spread]) for e in found.errors]
    dropped = [
        Claim(
            "calibrated thresholds of FFNs drop the fraction asked for on other text",
            "-",
            "largest deviation of a layer: "
            + ", ".join(f"{rule} {value:.3f}" for rule, value in worst.items()),
            max(worst.values()) <= 0.02,
            f"zeros of each FFN on held-out text within .02 of {asked}, for every rule",
            seeds=1,
        ),
    ]
    if sites:
        dropped.append(
            Claim(
                "so do those of attention sites, with every site of a model sparsified",
                "-",
                f"largest deviation of a layer: {max(sites):.3f}",
                max(sites) <= 0.02,
                f"zeros at each site on held-out text within .02 of {asked}; calibrated on the "
                "dense model",
                seeds=1,
            )
        )
    return [
        *dropped,
        Claim(
            "a threshold per channel costs less where up channels differ in scale",
            "-",
            "; ".join(
                f"spread {e.spread:g}: CATS {e.cats:.4f}, ABS {e.abs:.4f}, SQ {e.sq:.4f}, "
                f"oracle {e.oracle:.4f}"
                for e in found.errors
            ),
            all(0.95 * e.oracle <= min(e.abs, e.sq) for e, _ in pairs)
            and all(max(e.abs, e.sq) <= bound for e, bound in pairs),
            "relative squared error of a drawn SwiGLU at 50%: at most 1, .6 and .15 times that of "
            "CATS at spreads 0, .5 and 1, and not below the oracle; ABS and SQ; one draw",
            seeds=1,
        ),
    ]


def loss_claims(found: Measured) -> list[Claim]:
    """What dropping costs a trained model."""
    costs = {(p.rule, p.sparsity): added(p.ffn, found.dense)[0] for p in found.points}
    ours = [(rule, k) for rule in RULES if rule != "CATS" for k in SPARSITIES]
    less = {at: added(found.point(*at).ffn, found.point("CATS", at[1]).ffn) for at in ours}
    shares = {at: costs[at] / costs["CATS", at[1]] for at in ours}
    rows = f"{len(found.dense)} held-out rows, one seed"
    levels = "/".join(f"{k:.0%}" for k in SPARSITIES)
    return [
        Claim(
            "CHESS loses less than CATS at equal sparsity of the FFNs",
            "lower average degradation on 8 tasks, Llama-3-8B at 50%",
            "; ".join(
                f"{rule} " + " ".join(f"{costs[rule, k]:+.4f}" for k in SPARSITIES)
                for rule in RULES
            )
            + f" nats per byte at {levels}",
            all(mean < -2 * error for mean, error in less.values()),
            "less CATS: "
            + ", ".join(f"{rule} {k:.0%} {m:+.4f} ± {e:.4f}" for (rule, k), (m, e) in less.items())
            + f"; all below zero by two standard errors, paired over {rows}",
            seeds=1,
        ),
        Claim(
            "the difference is a tenth of the loss or more",
            "-",
            "; ".join(
                f"{rule} adds "
                + " ".join(f"{shares[rule, k]:.3f}" for k in SPARSITIES)
                + f" of what CATS adds at {levels}"
                for rule in RULES
                if rule != "CATS"
            ),
            all(costs[at] <= 0.9 * costs["CATS", at[1]] for at in ours),
            "FFNs only: at most .9 of the loss of CATS, both versions, all sparsities; the scales "
            f"of this model's up channels spread by {found.point('SQ', 0.5).spread:.2f}; {rows}",
            seeds=1,
        ),
        *attention_claims(found, costs, rows),
    ]


def attention_claims(
    found: Measured, costs: dict[tuple[str, float], float], rows: str
) -> list[Claim]:
    """What sparsifying the attention sites too costs, at every sparsity it was tried."""
    points = [p for p in found.points if p.both is not None]
    whole = {p.sparsity: added(p.both, found.dense)[0] for p in points}
    times = {p.sparsity: whole[p.sparsity] / costs[p.rule, p.sparsity] for p in points}
    pairs = {p.sparsity: added(p.both, found.point("CATS", p.sparsity).ffn) for p in points}
    return [
        Claim(
            "sparsifying the query and output projections too costs little more",
            "-",
            "; ".join(
                f"{p.sparsity:.0%}: {said(p.both, found.dense)} nats per byte, "
                f"{times[p.sparsity]:.1f} times the FFNs alone"
                for p in points
            ),
            all(whole[p.sparsity] <= 3 * costs[p.rule, p.sparsity] for p in points),
            f"SQ: at most three times the loss that the FFNs alone add, at every sparsity; {rows}",
            seeds=1,
        ),
        Claim(
            "CHESS with attention loses less than CATS on the FFNs alone",
            "lower average degradation on 8 tasks, fewer parameters active",
            "; ".join(f"{k:.0%}: {whole[k]:+.4f} against {costs['CATS', k]:+.4f}" for k in whole)
            + " nats per byte",
            all(mean < -2 * error for mean, error in pairs.values()),
            "SQ less CATS: "
            + ", ".join(f"{k:.0%} {m:+.4f} ± {e:.4f}" for k, (m, e) in pairs.items())
            + f"; all below zero by two standard errors, paired over {rows}",
            seeds=1,
        ),
    ]


def speed_claims(found: Measured) -> list[Claim]:
    """What skipping buys."""
    layer, first = found.layer, found.speeds[0]
    forms = f"{len(layer.dense)} dense forms, fastest: {layer.peer}; {layer.about}"
    tried = ", ".join(f"{s.sparsity:.0%}" for s in found.speeds)
    bounds = [(level, 2.0 if level.sparsity >= 0.9 else 1.1) for level in layer.levels]
    bounds = [(level, bound) for level, bound in bounds if level.sparsity >= 0.7]
    return [
        Claim(
            "decoding is faster end to end from 50% on",
            "up to 1.27x, FP32, batch 1, i9-12900K, attention sparsified",
            "; ".join(f"{s.sparsity:.0%}: {s.ratio:.2f}x" for s in found.speeds),
            all(s.ratio >= 1.05 for s in found.speeds),
            f"at least 1.05x at {tried}: random model of blocks of {DECODED.width} x "
            f"{DECODED.hidden}, float32 both sides, {1e3 * first.dense:.1f} ms per token dense, "
            f"FFNs {', '.join(f'{s.zeros:.0%}' for s in found.speeds)} zero",
            seeds=1,
            timed=True,
        ),
        Claim(
            "skipping rows beats the fastest dense form of a gated FFN from 70% on",
            "-",
            " ".join(f"{level.ratio:.2f}x at {level.sparsity:.0%}" for level in layer.levels)
            + f"; faster from {layer.crossover:.0%} on",
            all(level.ratio >= bound for level, bound in bounds),
            f"at least 1.1x from 70% and 2x from 90% on; the rows read allow "
            f"{bench.limit(0.7):.2f}x and {bench.limit(0.9):.2f}x; {forms}",
            seeds=1,
            timed=True,
        ),
    ]


def rows_of(found: Measured) -> list[dict[str, object]]:
    """Every sparsified model, then every speed."""
    table: list[dict[str, object]] = []
    for p in found.points:
        mean, error = added(p.ffn, found.dense)
        row = {"rule": p.rule, "sparsity": p.sparsity, "added nats": mean, "standard error": error}
        row["zeros off by"] = p.deviation
        if p.both is not None:
            row["with attention"] = added(p.both, found.dense)[0]
        table.append(row)
    for level in found.layer.levels:
        table.append({"rule": "one FFN", "sparsity": level.sparsity, "speed-up": level.ratio})
    for s in found.speeds:
        table.append({"rule": "whole model", "sparsity": s.sparsity, "speed-up": s.ratio})
    return table


def draw_losses(figure, found: Measured) -> None:
    """Added nats against sparsity: the FFNs alone, and with the attention sites."""
    left, right = figure.subplots(1, 2)
    figure.set_size_inches(10, 4.5)
    for rule in RULES:
        points = [found.point(rule, k) for k in SPARSITIES]
        means, errors = zip(*(added(p.ffn, found.dense) for p in points), strict=True)
        for axes in (left, right):
            axes.errorbar(SPARSITIES, means, errors, marker="o", color=COLORS[rule], label=rule)
        if points[0].both is not None:
            both = [added(p.both, found.dense)[0] for p in points]
            label = f"{rule} with attention"
            right.plot(SPARSITIES, both, "s--", color=COLORS[rule], label=label)
    left.set_title("FFNs")
    right.set_title("FFNs, query and output projections")
    for axes in (left, right):
        axes.set_xlabel("fraction of activations dropped")
        axes.set_xticks(SPARSITIES)
        axes.axhline(0, color="0.8", zorder=0)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_ylabel(f"nats per byte added to {found.dense.mean():.3f}")


def draw_errors(figure, found: Measured) -> None:
    """Error of the drawn FFN by spread and rule."""
    axes = figure.subplots()
    names = {"cats": "CATS", "abs": "ABS", "sq": "SQ", "oracle": "oracle (knows up)"}
    places = np.arange(len(found.errors))
    for i, (field, label) in enumerate(names.items()):
        values = [getattr(e, field) for e in found.errors]
        color = COLORS.get(label, "0.8")
        axes.bar(places + 0.2 * (i - 1.5), values, 0.18, label=label, color=color)
    axes.set_yscale("log")
    axes.set_xticks(places, [f"{e.spread:g}" for e in found.errors])
    axes.set_xlabel("spread of the up channels' scales (standard deviation of the logarithm)")
    axes.set_ylabel("squared error of the output, relative")
    axes.set_title("Half of the channels of a drawn SwiGLU dropped")
    axes.set_ylim(top=0.12)
    axes.legend(frameon=False, loc="upper center", ncols=4)
    axes.spines[["top", "right"]].set_visible(False)


def draw_speed(figure, found: Measured) -> None:
    """Speed-up of one FFN and of a whole model against sparsity."""
    axes = figure.subplots()
    levels = found.layer.levels
    fine = np.linspace(0, max(level.sparsity for level in levels), 50)
    axes.plot(
        fine, [bench.limit(k) for k in fine], ":", color="0.6", label="limit of one FFN: rows read"
    )
    axes.plot(
        [level.sparsity for level in levels],
        [level.ratio for level in levels],
        "o-",
        label="one FFN against its fastest dense form",
    )
    axes.plot(
        [s.sparsity for s in found.speeds],
        [s.ratio for s in found.speeds],
        "s",
        color="C1",
        label="whole model with attention, against itself",
    )
    axes.axhline(1, color="0.8", zorder=0)
    axes.set_xlabel("fraction of activations dropped")
    axes.set_ylabel("times faster than dense")
    axes.set_title("Decoding one token on this CPU, float32")
    axes.legend(frameon=False, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
