"""PAL: by which way, and from which layer on, the features of audio encoders enter a decoder.

Every design is a configuration of one decoder (`AudioInput`). On the card's key-value task each is
trained at as many rates from as many seeds, all as members of one rule, and scored while it
learns. The full form asks the embedded model which digit was spoken, where the recordings and
Whisper's encoder are present: the encoder's states, kept in files, and patches of the log-mel
picture are the ensemble's two unlike encoders, and one speaker is heard in the test alone. Whisper
was made for 30 s of sound and is given one second here.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ffnlab.models import AudioInput, Decoder, DecoderConfig
from ffnlab.models.cost import multiply_adds
from ffnlab.routing import pal
from ffnlab.storage.files import StrPath
from ffnlab.studies import STUDIES, pal_tasks, status
from ffnlab.studies.classify import grouped_bars
from ffnlab.studies.pal_measure import Learned, learned
from ffnlab.studies.result import Claim, Result

__all__ = ["run"]

STEPS, QUICK_STEPS, EARLY, BATCH = 600, 400, 200, 64
RATES, QUICK_RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3), (2e-3,)
PLITS, LATE, PLAIN, BOTH, DEAF = "PLITS", "late PLITS", "attention only", "late attention", "deaf"
DESIGNS = {
    PLITS: ("prepended", 0),
    LATE: ("prepended", 1),
    PLAIN: ("attended", 0),
    BOTH: ("attended", 1),
    DEAF: ("attended", pal_tasks.SIZES["layers"]),
}
TOGETHER, FIRST, SECOND = "both encoders", "the first alone", "the second alone"
HEARD = {TOGETHER: (True, True), FIRST: (True, False), SECOND: (False, True)}
SPEECH_STEPS, SPEECH_BATCH, SPEECH_START = 100, 32, 2
SPEECH_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
CHANCE = 0.1  # of ten digits
WHISPER, MEL = pal_tasks.ENCODERS
ENSEMBLE = f"{WHISPER} and {MEL}"
SPEECH = {
    f"PLITS, {WHISPER}": ((WHISPER,), "prepended", 0),
    f"PAL, {WHISPER}": ((WHISPER,), "attended", 0),
    f"PAL, {MEL}": ((MEL,), "attended", 0),
    f"PAL, {ENSEMBLE}": ((WHISPER, MEL), "attended", 0),
    f"late PAL, {ENSEMBLE}": ((WHISPER, MEL), "attended", SPEECH_START),
}
LENGTHS = (1, 2, 4, 8)  # rows of sound for a token of text

Found = Mapping[str, Learned]


def run(*, out: StrPath | None = None, quick: bool = False, seed: int = 0) -> Result:
    """The study; arguments as for `ffnlab.studies.run.run_study`."""
    begin = time.perf_counter()
    seeds = [seed] if quick else [seed, seed + 1]
    rates = QUICK_RATES if quick else RATES
    steps = QUICK_STEPS if quick else STEPS
    names = [name for name in DESIGNS if not (quick and name == LATE)]
    designs, ensemble = facts(names, steps, rates, seeds), halves(steps, rates, seeds)
    speech = {} if quick or not pal_tasks.has_speech() else spoken(seeds)
    ratios = {n: cost("attended", n) / cost("prepended", n) for n in LENGTHS}
    pictures = {"facts": lambda figure: curves(figure, designs, ensemble)}
    pictures["cost"] = lambda figure: costs(figure, ratios)
    if speech:
        pictures["spoken_digits"] = lambda figure: bars(figure, speech)
    return Result(
        slug="pal",
        title=STUDIES["pal"].title,
        settings={
            "decoder": dict(pal_tasks.SIZES),
            "keys": pal_tasks.KEYS,
            "values": pal_tasks.VALUES,
            "noise": pal_tasks.NOISE,
            "batch": BATCH,
            "steps": steps,
            "rates": list(rates),
            "spoken digits": len(speech) > 0,
            "validation": {k: {str(r): v for r, v in m.rates.items()} for k, m in designs.items()},
            "seeds": seeds,
        },
        seed=seed,
        quick=quick,
        seconds=time.perf_counter() - begin,
        claims=[
            *fact_claims(designs, steps),
            *half_claims(ensemble, steps),
            *cost_claims(designs[PLAIN].model, ratios),
            *(speech_claims(speech) if speech else []),
        ],
        table=rows_of({"facts": designs, "halves": ensemble, "spoken digits": speech}),
        pictures=pictures,
    ).write(out)


def facts(
    names: Sequence[str], steps: int, rates: Sequence[float], seeds: Sequence[int]
) -> dict[str, Learned]:
    """Designs on the key-value task."""
    task = pal_tasks.facts(steps, batch=BATCH, every=EARLY // 2)
    found = {}
    for name in names:
        way, start = DESIGNS[name]
        audio = AudioInput(pal_tasks.WIDTHS[:1], (way,), start=start)
        make = lambda seed, audio=audio: pal_tasks.facts_model(audio, seed)  # noqa: E731
        found |= {name: learned(make, task, rates, seeds)[""]}
    return found


def halves(steps: int, rates: Sequence[float], seeds: Sequence[int]) -> dict[str, Learned]:
    """Two encoders with half of the facts each, attended to: together, and either alone."""
    audio = AudioInput(pal_tasks.WIDTHS, ("attended", "attended"))
    make = lambda seed: pal_tasks.facts_model(audio, seed)  # noqa: E731
    task = pal_tasks.facts(steps, batch=BATCH, every=EARLY // 2, encoders=2)
    return learned(make, task, rates, seeds, present=HEARD)


def spoken(seeds: Sequence[int]) -> dict[str, Learned]:
    """Designs on spoken digits; connectors are trained, encoders and language model are not."""
    cache, found = status.folder() / "features", {}
    for name, (encoders, way, start) in SPEECH.items():
        task = pal_tasks.speech(
            encoders, SPEECH_STEPS, batch=SPEECH_BATCH, every=SPEECH_STEPS // 4, cache=Path(cache)
        )
        widths = tuple(pal_tasks.ENCODERS[encoder] for encoder in encoders)
        audio = AudioInput(widths, (way,) * len(widths), start=start, hidden=64)
        make = lambda seed, audio=audio: pal_tasks.speech_model(audio, seed)  # noqa: E731
        found |= {name: learned(make, task, SPEECH_RATES, seeds, trainable=pal.TRAINS)[""]}
    return found


def cost(way: str, factor: int, tokens: int = 16) -> int:
    """Multiply-adds of the decoder with so many rows of sound for a token of text, by one way."""
    audio = AudioInput((32,), (way,))
    config = DecoderConfig(
        vocab=64, width=64, hidden=192, layers=4, heads=4, kv_heads=4, head_dim=16, audio=audio
    )
    model = jax.eval_shape(lambda key: Decoder(config, key=key), jax.random.key(0))
    features = jax.ShapeDtypeStruct((1, factor * tokens, 32), jnp.float32)
    text = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    return multiply_adds(lambda m, f, x: pal.hear(m, pal.Sounds((f,)))(x), model, features, text)


def evidence(found: Found, rule: str) -> str:
    """How a claim was decided, and on what runs."""
    first = next(iter(found.values()))
    tried = ", ".join(f"{rate:g}" for rate in first.rates)
    chosen = ", ".join(f"{name} {m.rate:g}" for name, m in found.items())
    count = len(next(iter(first.curves.values())))
    seeds = "one seed" if count == 1 else f"each of {count} seeds"
    if len(first.rates) == 1:
        return f"{rule}, with {seeds} of the parameters; Adam at rate {tried} on each side"
    return (
        f"{rule}, with {seeds} of the parameters; each side the best of {len(first.rates)} rates "
        f"({tried}) of Adam on other problems with the first seed: {chosen}"
    )


def says(found: Found, step: int, *names: str) -> str:
    """Test accuracies in words."""
    return "; ".join(f"{name} {found[name].text(step)}" for name in names)


def not_below(found: Found, step: int, better: str, worse: str, slack: float = 0.0) -> bool:
    """Whether one side is at most `slack` below another with every seed."""
    pairs = zip(found[better].at(step), found[worse].at(step), strict=True)
    return all(a >= b - slack - 1e-9 for a, b in pairs)


def fact_claims(found: Found, steps: int) -> list[Claim]:
    """What the card says of the key-value task."""
    hearing = [name for name in found if name != DEAF]
    count = len(found[PLITS].at(steps))
    early = (
        ("a later start learns faster, attention only", BOTH, PLAIN),
        ("a later start learns faster, all of a layer", LATE, PLITS),
        ("attention alone learns as fast as PLITS", PLAIN, PLITS),
    )
    return [
        Claim(
            f"every design reads the facts within {steps} steps",
            "at least .99 (card, pilot)",
            says(found, steps, *hearing),
            all(min(found[name].at(steps)) >= 0.99 for name in hearing),
            evidence(found, f"test accuracy at least .99 after {steps} steps for each design"),
            seeds=count,
        ),
        Claim(
            "without sound it can only guess",
            f"{1 / pal_tasks.VALUES} ± .03",
            says(found, steps, DEAF),
            all(abs(x - 1 / pal_tasks.VALUES) <= 0.03 for x in found[DEAF].at(steps)),
            evidence(found, "no layer hears: test accuracy within .03 of chance"),
            seeds=count,
        ),
        *(
            Claim(
                claim,
                "1.00 / 1.00 against .49 to .51 against .26 to .27 at 200 steps: start 1 or 2, "
                "start 0, PLITS (card, pilot)",
                says(found, EARLY, better, worse),
                not_below(found, EARLY, better, worse),
                evidence(found, f"test accuracy after {EARLY} steps not below"),
                seeds=count,
            )
            for claim, better, worse in early
            if better in found
        ),
    ]


def half_claims(found: Found, steps: int) -> list[Claim]:
    """What an ensemble of encoders knows."""
    alone = [name for name in HEARD if name != TOGETHER]
    return [
        Claim(
            "two encoders side by side know what neither knows alone",
            "at least .98 together, at most .6 alone (card)",
            says(found, steps, *HEARD),
            min(found[TOGETHER].at(steps)) >= 0.98
            and max(max(found[name].at(steps)) for name in alone) <= 0.6,
            evidence(found, "each encoder has half of the facts: these limits on test accuracy"),
            seeds=len(found[TOGETHER].at(steps)),
        )
    ]


def cost_claims(model: Decoder, ratios: Mapping[int, float]) -> list[Claim]:
    """What holds of any weights: cost, decoding, and silence."""
    task = pal_tasks.facts(EARLY, batch=2, every=EARLY).test
    sounds, tokens = jax.tree.map(lambda x: jnp.asarray(x[:2]), (task.sounds, task.asked[0]))
    silent = sounds._replace(valid=tuple(jnp.zeros_like(mask) for mask in sounds.valid))
    alone = model(tokens)
    apart = float(jnp.abs(pal.hear(model, silent)(tokens) - alone).max() / jnp.abs(alone).max())
    step = lambda m: m.extend(tokens[:, :1], m.init_cache(2, 4))[0]  # noqa: E731
    more = multiply_adds(step, pal.hear(model, sounds)) - multiply_adds(step, model)
    config, rows = model.config, sounds.features[0].shape[1]
    looks = 2 * 2 * rows * config.heads * config.head_dim * config.layers
    return [
        Claim(
            "attention alone costs at most .35 of PLITS with 8 rows of sound a token",
            "at most .35, falling as sound grows (card); memory -64 %, throughput +248 % (v2)",
            ", ".join(f"{n} rows {ratio:.3f}" for n, ratio in ratios.items()),
            ratios[8] <= 0.35 and list(ratios.values()) == sorted(ratios.values(), reverse=True),
            "multiply-adds counted from the jaxpr, hidden three times the width, 16 tokens",
            seeds=0,
        ),
        Claim(
            "a decoded token pays for looking at the sound and for nothing else",
            "keys and values cacheable once a layer",
            f"{more:,} multiply-adds more than without sound; scores and sums alone {looks:,}",
            more == looks,
            "one token with a cache, counted from the jaxpr",
            seeds=0,
        ),
        Claim(
            "without sound it is the text model",
            "the same to 1e-6",
            f"largest difference of logits {apart:.1e} of the largest",
            apart <= 1e-6,
            "all rows of sound masked, weights as trained; float32",
            seeds=1,
        ),
    ]


def speech_claims(found: Found) -> list[Claim]:
    """What the designs hear of a speaker that they were not trained on."""
    plits, whisper, mel, both, late = found
    count, last = len(found[plits].at(SPEECH_STEPS)), SPEECH_STEPS
    share = found[whisper].products / found[plits].products
    gains = [b / a - 1 for a, b in zip(found[plits].at(last), found[late].at(last), strict=True)]
    gain = f"{np.mean(gains):+.1%} ({min(gains):+.1%} to {max(gains):+.1%})"
    rule = f"digits of speaker {pal_tasks.HELD_OUT}, connectors trained for {last} steps"
    return [
        Claim(
            "attention alone hears spoken digits as well as PLITS, cheaper",
            "on par (v2); up to +30 % (LAL, v2)",
            f"{says(found, last, whisper, plits)}; {share:.2f} of the multiply-adds",
            not_below(found, last, whisper, plits, 0.02) and share < 1,
            evidence(found, f"{rule}: at most .02 below"),
            seeds=count,
        ),
        Claim(
            "two unlike encoders hear at least as well as either",
            "an ensemble is richer",
            says(found, last, both, whisper, mel),
            not_below(found, last, both, whisper) and not_below(found, last, both, mel),
            evidence(found, f"{rule}: test accuracy not below either{blame(found, mel)}"),
            seeds=count,
        ),
        Claim(
            "late start, attention alone and ensemble are 10 % above PLITS with one encoder",
            "+10 % to +60 % relative (v1)",
            f"{gain}; {says(found, last, late, plits)}",
            min(gains) >= 0.1,
            evidence(found, f"{rule}: test accuracy over that of {plits}"),
            seeds=count,
        ),
    ]


def blame(found: Found, name: str) -> str:
    """What must be said where an encoder alone knows nothing."""
    if np.mean(found[name].at(SPEECH_STEPS)) > 2 * CHANCE:
        return ""
    return f"; {name} alone only guesses, so nothing shows what that encoder adds"


def rows_of(cases: Mapping[str, Found]) -> list[dict[str, object]]:
    """Lines of the table."""
    return [
        {
            "task": case,
            "side": name,
            "trained": m.trained,
            "parameters": m.parameters,
            "MMAC a problem": m.products / 1e6,
            "rate": m.rate,
            **{
                f"accuracy, {when}": float(np.mean(m.at(step)))
                for when, step in (
                    ("early", min(EARLY // 2, max(m.curves))),
                    ("last", max(m.curves)),
                )
            },
            "lowest": min(m.at(max(m.curves))),
            "highest": max(m.at(max(m.curves))),
        }
        for case, found in cases.items()
        for name, m in found.items()
    ]


def curves(figure, designs: Found, ensemble: Found) -> None:
    """Test accuracy by step: designs, and encoders with half of the facts."""
    figure.set_size_inches(9, 4)
    for axes, found, title in zip(
        figure.subplots(1, 2, sharey=True),
        (designs, ensemble),
        ("One encoder, by design", "Two encoders, attention only"),
        strict=True,
    ):
        for name, m in found.items():
            values = np.array(list(m.curves.values()))
            axes.plot(list(m.curves), values.mean(axis=1), "o-", markersize=3, label=name)
            axes.fill_between(list(m.curves), values.min(axis=1), values.max(axis=1), alpha=0.15)
        axes.axhline(1 / pal_tasks.VALUES, color="0.6", linewidth=1, linestyle=":")
        axes.set_title(title)
        axes.set_xlabel("steps")
        axes.set_ylim(0, 1.02)
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("test accuracy")


def costs(figure, ratios: Mapping[int, float]) -> None:
    """Cost of attention alone over PLITS, by the length of the sound."""
    axes = figure.subplots()
    axes.plot(list(ratios), list(ratios.values()), "o-")
    axes.axhline(0.35, color="0.6", linewidth=1, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(ratios), [str(n) for n in ratios])
    axes.set_ylim(0, 1)
    axes.set_xlabel("rows of sound for a token of text")
    axes.set_ylabel("multiply-adds, attention only over PLITS")
    axes.spines[["top", "right"]].set_visible(False)


def bars(figure, found: Found) -> None:
    """Accuracy on spoken digits, by design and encoders."""
    figure.set_size_inches(7, 4)
    axes = figure.subplots()
    last = {name: m.at(SPEECH_STEPS) for name, m in found.items()}
    grouped_bars(axes, {(name.replace(" and ", ",\n"), "test"): v for name, v in last.items()})
    axes.get_legend().remove()
    axes.set_ylim(0, 1.1)
    axes.set_ylabel(f"accuracy on the digits of {pal_tasks.HELD_OUT}")
