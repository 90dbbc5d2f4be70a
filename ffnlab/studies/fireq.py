"""FireQ on drawn tensors and on small trained models: what each of its scalings is for.

The per-tensor scale, the rounding of products and the RoPE scales are tested on tensors with the
property that each is made for. Then trained models are quantized, with every scaling and without,
and scored on held-out text. The paper's figures are of models a thousand times larger, whose keys
have outliers; ours have none, so outliers are also planted without changing the function. Speed is
not measured: it needs the authors' kernels or ours on a Hopper GPU.

What quantization costs is compared with the paper as a share of the nats that the dense model needs
for the same text: nats per token of one tokenizer and nats per byte are not the same unit, their
shares are. Nothing is tuned, every claim is decided over every setting that was run, and there is
one seed.
"""

import math
import os
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from ffnlab import models
from ffnlab.data import TextBatches, stdlib_text
from ffnlab.formats.embedded import embedded
from ffnlab.formats.llama2c import load_model
from ffnlab.models import Decoder
from ffnlab.storage.files import StrPath
from ffnlab.studies import STUDIES
from ffnlab.studies.fireq_measure import (
    Loss,
    Rounding,
    Underflow,
    cache_variants,
    compare,
    plant_outliers,
    rounding,
    scaling_gap,
    score_errors,
    underflow,
    variants,
)
from ffnlab.studies.result import Claim, Result
from ffnlab.text import Sampling, generate

__all__ = ["run"]

# Shares of the nats of a text, from perplexities of Llama3-8B on WikiText.
PAPER_COST = math.log(7.06) / math.log(6.13) - 1
PAPER_SCALES = math.log(7.06) / math.log(7.03) - 1
TINY = 2e-4  # spread of weights, and below, whose group scales all underflow e4m3
FACTOR = 8.0  # of planted outliers
TOP_K = {"embedded": 8, "stories260k": 2}  # at most half of the head's 32 and 8 channels
UNSCALED = "W4A8KV4, no scaling"
ROPE_SCALES = ("none", "pre", "post", "both")


class Measured(NamedTuple):
    """Everything the claims are judged by.

    Attributes:
      underflow, rounding: of drawn weights.
      offset, wide: score errors of keys with offset and with wide channels.
      gap: change of the embedded model's logits by all scalings without rounding.
      losses: by model, then by variant.
      planted: by RoPE scales, of the embedded model with planted outliers.
    """

    underflow: list[Underflow]
    rounding: Rounding
    offset: dict[str, float]
    wide: dict[str, float]
    gap: float
    losses: dict[str, dict[str, Loss]]
    planted: dict[str, Loss]


def run(*, out: StrPath | None = None, quick: bool = False, seed: int = 0) -> Result:
    """The study; arguments as for `ffnlab.studies.run.run_study`."""
    begin = time.perf_counter()
    settings = {
        "calibration": [8 if quick else 10, 256 if quick else 512],
        "held_out": [32 if quick else 192, 256],
        "planted": {"factor": FACTOR, "pairs per head": 2},
        "not measured": "throughput: needs a Hopper GPU",
    }
    text = stdlib_text()
    (rows, length), (held_rows, held_length) = settings["calibration"], settings["held_out"]
    calibration = TextBatches(text.train, batch=rows, length=length, seed=seed)(0)[:, :-1]
    held = TextBatches(text.held_out, batch=held_rows, length=held_length, seed=seed)(0)
    stories = None if quick else stories_model()
    measured = measure(calibration, held, stories, quick=quick, seed=seed)
    claims = [*tensor_claims(measured), *loss_claims(measured)]
    return Result(
        slug="fireq",
        title=STUDIES["fireq"].title,
        settings={
            **settings,
            "text": text.identity,
            "stories260k": "left out: quick, or no FFNLAB_DATA"
            if stories is None
            else "scored on its own samples",
        },
        seed=seed,
        quick=quick,
        seconds=time.perf_counter() - begin,
        claims=claims,
        table=rows_of(measured),
        pictures={
            "loss": lambda figure: draw_losses(figure, measured),
            "mechanisms": lambda figure: draw_mechanisms(figure, measured),
        },
    ).write(out)


def stories_model() -> Decoder | None:
    """The model in `$FFNLAB_DATA/stories260k`, or None where there is none."""
    folder = os.environ.get("FFNLAB_DATA")
    file = Path(folder or ".") / "stories260k" / "stories260K.bin"
    return load_model(file) if folder and file.exists() else None


def measure(
    calibration: Int[np.ndarray, "b t"],
    held: Int[np.ndarray, "n u"],
    stories: Decoder | None,
    *,
    quick: bool,
    seed: int,
) -> Measured:
    """Runs every measurement."""
    weight_key, product_key, sample_key = jax.random.split(jax.random.key(seed), 3)
    model = models.stack(embedded()[0])
    top_k = TOP_K["embedded"]
    losses = {"embedded": compare(model, variants(top_k, quick=quick), calibration, held)}
    planted = plant_outliers(model, FACTOR, seed)
    if stories is not None:
        tokens = own_samples(stories, sample_key)
        made = variants(TOP_K["stories260k"], quick=quick)
        losses["stories260k"] = compare(models.stack(stories), made, tokens[:8], tokens[8:])
    return Measured(
        underflow=underflow(weight_key),
        rounding=rounding(product_key),
        offset=score_errors(seed, offsets=True),
        wide=score_errors(seed, offsets=False),
        gap=scaling_gap(model, calibration, top_k),
        losses=losses,
        planted=compare(planted, cache_variants(top_k), calibration, held),
    )


def own_samples(model: Decoder, key: jax.Array) -> Int[np.ndarray, "40 201"]:
    """Texts that the model wrote itself: a quantized copy can only predict them worse."""
    begin = model.config.bos or 1
    sampling = Sampling(temperature=1.0)
    found = generate(model, [[begin]] * 40, max_tokens=200, sampling=sampling, key=key)
    return np.pad(found.tokens, ((0, 0), (1, 0)), constant_values=begin)


def added(losses: dict[str, Loss], name: str, to: str = "dense") -> tuple[float, float]:
    """Nats per token that a variant adds to another, and the standard error over rows."""
    difference = losses[name].nats - losses[to].nats
    return float(difference.mean()), float(difference.std() / math.sqrt(len(difference)))


def share(losses: dict[str, Loss], name: str, to: str = "dense") -> tuple[float, float]:
    """The same as a share of the nats that the other needs for the text."""
    mean, error = added(losses, name, to)
    whole = float(losses[to].nats.mean())
    return mean / whole, error / whole


def said(losses: dict[str, Loss], name: str, to: str = "dense") -> str:
    """The same for people."""
    mean, error = added(losses, name, to)
    return f"{mean:+.4f} ± {error:.4f}"


def tensor_claims(found: Measured) -> list[Claim]:
    """What must hold for tensors of the stated kind."""
    tiny = [u for u in found.underflow if u.spread <= TINY]
    worst = max(found.underflow, key=lambda u: u.scaled)
    extra = found.rounding.table / found.rounding.promote - 1
    return [
        Claim(
            "a per-tensor scale keeps e4m3 group scales from underflowing",
            "-",
            "weight error "
            + ", ".join(f"{u.plain:.3f} -> {u.scaled:.3f} (c {u.divisor:g})" for u in tiny)
            + f" at spreads up to {TINY:g}; at most {worst.scaled:.3f}, at {worst.spread:g}",
            all(u.plain > 0.99 for u in tiny)
            and worst.scaled <= 0.125
            and tiny[-1].divisor in (32, 64),
            f"{len(found.underflow)} spreads of drawn weights, {found.underflow[0].spread:g} to "
            f"{found.underflow[-1].spread:g}, groups of 128: at most .125 with it at all, above "
            f".99 without it up to {TINY:g}, where c is 32 or 64; one draw",
            seeds=1,
        ),
        Claim(
            "rounding q * s to e4m3 in the product costs little",
            "kernel: table of e4m3 products",
            f"weight error {found.rounding.promote:.4f} -> {found.rounding.table:.4f} "
            f"({extra:+.2%}); product off its formula by {found.rounding.gap:.1e}",
            0 < extra < 0.02 and found.rounding.gap <= 1e-3,
            "less than 2% more weight error; product against float64 within 1e-3, both ways; one "
            "draw of N(0, .02), 1024 x 256",
            seeds=1,
        ),
        protection_claim(found),
        Claim(
            "all scalings together leave the function as it is",
            "exact by construction",
            f"largest change of a logit {found.gap:.1e} of the largest",
            found.gap <= 1e-5,
            "embedded model in float32 with every scaling and no rounding",
            seeds=1,
        ),
    ]


def protection_claim(found: Measured) -> Claim:
    """What RoPE scales do for drawn keys, over both kinds of outlier channels."""
    kinds = {"offset": found.offset, "wide": found.wide}
    times = {
        kind: {name: errors["none"] / errors[name] for name in ROPE_SCALES[1:]}
        for kind, errors in kinds.items()
    }
    return Claim(
        "RoPE scales protect scores over INT4 keys from outlier channels",
        "-",
        "; ".join(
            f"{kind} channels: error 1/{t['pre']:.1f} with pre, 1/{t['post']:.1f} post, "
            f"1/{t['both']:.1f} both"
            for kind, t in times.items()
        ),
        all(min(t["pre"], t["both"]) >= 5 and t["post"] >= 2 for t in times.values()),
        "pre and both at least 5 times below none and post 2, for both kinds: 3 of 64 channels "
        "offset by 8 to 12, or 8 to 12 times as wide; mean of 4 draws",
        seeds=1,
    )


def loss_claims(found: Measured) -> list[Claim]:
    """What quantization costs trained models."""
    planted = found.planted
    plain, both = added(planted, "none")[0], added(planted, "both")[0]
    models_of = found.losses.items()
    narrow = [(name, losses) for name, losses in models_of if "FireQ, bf16 scales" in losses]
    return [
        *(cost_claim(name, losses) for name, losses in models_of),
        *(scaling_claim(name, losses) for name, losses in models_of),
        *(scales_claim(name, losses) for name, losses in narrow),
        Claim(
            "with outlier key channels pre- and post-RoPE scales together save the model",
            "-",
            f"INT4 KV adds {plain:.3f} nats per byte, with pre {added(planted, 'pre')[0]:.3f}, "
            f"post {added(planted, 'post')[0]:.3f}, both {both:.3f}",
            both <= plain / 5,
            f"2 RoPE pairs per head of the embedded model times {FACTOR:g}, function unchanged: "
            f"with both scales at most a fifth of the loss; {rows_said(planted)}",
            seeds=1,
        ),
    ]


def rows_said(losses: dict[str, Loss]) -> str:
    """What a loss is a mean of."""
    return f"{len(losses['dense'].nats)} held-out rows, nothing tuned, one seed"


def cost_claim(name: str, losses: dict[str, Loss]) -> Claim:
    """What the whole of FireQ costs one trained model."""
    mean, error = share(losses, "FireQ")
    return Claim(
        f"INT4 weights and KV with FP8 activations cost little ({name})",
        f"Llama3-8B, WikiText: perplexity 6.13 -> 7.06 per token, {PAPER_COST:+.1%} nats",
        f"{mean:+.2%} ± {error:.2%} nats, "
        f"{losses['dense'].nbytes / losses['FireQ'].nbytes:.1f} times smaller",
        mean + 2 * error <= PAPER_COST,
        "two standard errors above it still no larger a share of the text's nats than in the "
        f"paper; {rows_said(losses)}",
        seeds=1,
    )


def scales_claim(name: str, losses: dict[str, Loss]) -> Claim:
    """What e4m3 group scales cost against bfloat16 ones."""
    mean, error = share(losses, "FireQ", "FireQ, bf16 scales")
    return Claim(
        f"e4m3 weight scales lose almost nothing against bf16 scales ({name})",
        f"Llama3-8B, WikiText: perplexity 7.06 against 7.03 per token, {PAPER_SCALES:+.2%} nats",
        f"{mean:+.2%} ± {error:.2%} nats",
        mean + 2 * error <= PAPER_SCALES,
        "two standard errors above it still no larger a share of the text's nats than in the "
        f"paper; {rows_said(losses)}",
        seeds=1,
    )


def scaling_claim(name: str, losses: dict[str, Loss]) -> Claim:
    """What FireQ's scalings buy one trained model."""
    mean, error = added(losses, "FireQ", UNSCALED)
    return Claim(
        f"the scalings lower that cost ({name})",
        "-",
        f"{said(losses, 'FireQ')} nats per token instead of {said(losses, UNSCALED)}: "
        f"{mean:+.4f} ± {error:.4f}",
        mean < -2 * error,
        f"lower by more than two standard errors, paired over rows; {rows_said(losses)}",
        seeds=1,
    )


def rows_of(found: Measured) -> list[dict[str, object]]:
    """Every quantized model: what it adds to the loss, and its size."""
    tables = found.losses | {"embedded, outliers planted": found.planted}
    table = []
    for model, losses in tables.items():
        for name, loss in losses.items():
            label = f"INT4 KV, RoPE scales: {name}" if losses is found.planted else name
            mean, error = added(losses, name)
            table.append(
                {
                    "model": model,
                    "variant": "dense" if name == "dense" else label,
                    "perplexity": math.exp(float(loss.nats.mean())),
                    "added nats": mean,
                    "share": share(losses, name)[0],
                    "standard error": error,
                    "bytes": loss.nbytes,
                }
            )
    return table


def draw_losses(figure, found: Measured) -> None:
    """Added nats of every variant, one panel per model."""
    figure.set_size_inches(9, 2 + 2 * len(found.losses))
    panels = figure.subplots(len(found.losses), squeeze=False)[:, 0]
    for axes, (model, losses) in zip(panels, found.losses.items(), strict=True):
        names = [name for name in losses if name != "dense"]
        means, errors = zip(*(added(losses, name) for name in names), strict=True)
        colors = ["C0" if name.startswith("FireQ") else "0.65" for name in names]
        axes.barh(names, means, xerr=errors, color=colors, error_kw={"lw": 1})
        axes.invert_yaxis()
        axes.set_title(f"{model}: perplexity {math.exp(losses['dense'].nats.mean()):.2f} dense")
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("nats per token added to the dense model (bars: standard error)")


def draw_mechanisms(figure, found: Measured) -> None:
    """Underflow, score errors and planted outliers, side by side."""
    figure.set_size_inches(12, 4)
    left, middle, right = figure.subplots(1, 3)
    spreads = [u.spread for u in found.underflow]
    left.semilogx(spreads, [u.plain for u in found.underflow], "s--", color="0.5", label="without")
    left.semilogx(spreads, [u.scaled for u in found.underflow], "o-", label="with the search")
    left.set_xlabel("standard deviation of the weights")
    left.set_ylabel("relative weight error")
    left.set_ylim(0, 1.05)
    left.set_title("Per-tensor scale")
    left.legend(frameon=False)
    names, places = list(ROPE_SCALES), np.arange(4)
    for shift, (label, errors) in enumerate((("offset", found.offset), ("wide", found.wide))):
        values = [errors[name] for name in names]
        middle.bar(places + 0.4 * shift - 0.2, values, 0.38, label=f"{label} outlier channels")
    middle.set_xticks(places, names)
    middle.set_xlabel("RoPE scales")
    middle.set_ylabel("squared error of scores, relative")
    middle.set_title("INT4 keys, drawn")
    middle.legend(frameon=False, loc="upper right")
    means = [added(found.planted, name)[0] for name in names]
    errors = [added(found.planted, name)[1] for name in names]
    right.bar(names, means, yerr=errors, color=["0.65", "C0", "C0", "C0"])
    right.set_xlabel("RoPE scales")
    right.set_ylabel("nats per byte added by INT4 KV")
    right.set_title("Embedded model, outliers planted")
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
