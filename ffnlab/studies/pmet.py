"""PMET: ten facts written into a model that was taught here, and into the embedded one.

A decoder learns 200 facts about made-up people, and ten of them are changed at once: by PMET, with
one vector instead of two, and with MEMIT's linear spread. Each way tries as many settings; the one
with the best score on ten facts that nobody is tested on is chosen with the first seed. Then what
the embedded model continues after an import line is changed, settings of each way chosen on other
modules, both of those that change and of those that are to stay.
The paper's models are four orders of magnitude larger, and its tables were not available to us.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ffnlab.data import stdlib_text
from ffnlab.editing import EditScores
from ffnlab.formats.embedded import embedded
from ffnlab.models import Decoder
from ffnlab.storage.files import StrPath
from ffnlab.studies import STUDIES
from ffnlab.studies import pmet_embedded as own
from ffnlab.studies import pmet_measure as measure
from ffnlab.studies.pmet_embedded import Edited
from ffnlab.studies.pmet_measure import Exact, Outcome, Setting, World
from ffnlab.studies.result import Claim, Result
from ffnlab.studies.side_by_side import spread

__all__ = ["Sizes", "Tuned", "run"]

WAYS: Mapping[str, Setting] = {
    "PMET": {},
    "one vector": {"vectors": "ffn"},
    "linear spread": {"spread": "linear"},
}
SLACK = 1e-9  # of rounding, where shares meet a limit


class Sizes(NamedTuple):
    """How much is run.

    Attributes:
      seeds: of the taught model.
      steps: of its training.
      draws: of ten facts each that every way is tested on, per seed.
      single: facts that are written alone.
      preserve, decay: values that every way tries on the taught model.
      own_preserve, own_decay: values that are tried on the embedded model.
      held_out: bytes of held-out text.
    """

    seeds: int
    steps: int
    draws: int
    single: int
    preserve: tuple[float, ...]
    decay: tuple[float, ...]
    own_preserve: tuple[float, ...]
    own_decay: tuple[float, ...]
    held_out: int


# Grids end where a number means nothing more: no decay, and next to nothing that is preserved.
FULL = Sizes(
    seeds=3,
    steps=800,
    draws=3,
    single=10,
    preserve=(0.1, 3.0, 100.0, 3000.0),
    decay=(8.0, 2.0, 0.5, 0.05, 0.0),
    own_preserve=(0.1, 3.0, 300.0),
    own_decay=(30.0, 8.0, 2.0, 0.5, 0.05, 0.0),
    held_out=65536,
)
QUICK = Sizes(1, 500, 1, 3, (3.0, 100.0), (0.01,), (3.0,), (0.05,), 8192)


class Tuned(NamedTuple):
    """A way to edit.

    Attributes:
      setting: that was chosen.
      tried: every setting with its score on the facts to choose by.
      outcomes: of each draw of each seed with the chosen one, seed by seed.
    """

    setting: Setting
    tried: Sequence[tuple[Setting, float]]
    outcomes: Sequence[Sequence[Outcome]]

    def means(self, name: str) -> list[float]:
        """A share, of all draws of a seed, by seed."""
        value = lambda o: getattr(o if name in Outcome._fields else o.scores, name)  # noqa: E731
        return [float(np.mean([value(o) for o in each])) for each in self.outcomes]

    @property
    def scores(self) -> list[float]:
        """Harmonic means of efficacy, generality and specificity, by seed."""
        parts = zip(
            *(self.means(n) for n in ("efficacy", "generality", "specificity")), strict=True
        )
        return [EditScores(*each).score for each in parts]


def run(*, out: StrPath | None = None, quick: bool = False, seed: int = 0) -> Result:
    """The study; arguments as for `ffnlab.studies.run.run_study`."""
    begin = time.perf_counter()
    sizes = QUICK if quick else FULL
    place = measure.world(seed)
    taught = measure.taught(list(range(seed, seed + sizes.seeds)), sizes.steps, place)
    known = [float(measure.knows(model, place, place.triples).mean()) for model in taught]
    ways = {name: tuned(taught, place, name, sizes, seed) for name in WAYS}
    chosen = ways["PMET"].setting
    drawn = measure.draws(place, seed, 1 + sizes.draws)[1]
    single = [measure.exact(model, place, drawn, sizes.single) for model in taught]
    text, (model, tokenizer) = stdlib_text(), embedded()
    given = (model, tokenizer, text)
    own_ways = {"PMET": WAYS["PMET"]} if quick else WAYS
    own_found = {name: own_chosen(*given, way, sizes) for name, way in own_ways.items()}
    edits = {
        name: own.edited(*given, *own.TEST, {**own_found[name][0], **way}, sizes.held_out)
        for name, way in own_ways.items()
    }
    return Result(
        slug="pmet",
        title=STUDIES["pmet"].title,
        settings={
            "world": {"people": measure.PEOPLE, "facts": len(place.triples)},
            "model": measure.CONFIG,
            "taught": {"steps": sizes.steps, "batch": [measure.BATCH, measure.LENGTH]},
            "layers": list(measure.LAYERS),
            "numbers": dict(measure.NUMBERS),
            "sizes": sizes._asdict(),
            "known": known,
            "tried": {n: [[dict(s), v] for s, v in w.tried] for n, w in ways.items()},
            "chosen": {name: dict(way.setting) for name, way in ways.items()},
            "embedded": {
                "layers": list(own.LAYERS),
                "numbers": dict(own.NUMBERS),
                "chosen": {name: setting for name, (setting, _) in own_found.items()},
                "tried": {n: [[s, v] for s, v in tried] for n, (_, tried) in own_found.items()},
            },
            "text": text.identity,
        },
        seed=seed,
        quick=quick,
        seconds=time.perf_counter() - begin,
        claims=[
            *exact_claims(single),
            *search_claims(ways["PMET"], chosen),
            *batch_claims(ways["PMET"]),
            way_claim(ways),
            *own_claims(edits["PMET"]),
        ],
        table=[*rows_of(ways), *own_rows(edits)],
        pictures={
            "ways": lambda figure: columns(figure, ways),
            "embedded": edits["PMET"].report.draw,
        },
    ).write(out)


def grid(preserve: Sequence[float], decay: Sequence[float]) -> list[dict[str, float]]:
    """Every setting."""
    return [{"preserve": p, "decay": d} for p in preserve for d in decay]


def tuned(taught: Sequence[Decoder], place: World, name: str, sizes: Sizes, seed: int) -> Tuned:
    """One way, its setting chosen with the first model on the first draw, tested on the others."""
    first, *rest = measure.draws(place, seed, 1 + sizes.draws)
    fixed = {"layers": measure.LAYERS, **measure.NUMBERS, **WAYS[name]}
    tried = [
        (setting, measure.outcome(taught[0], place, first, {**fixed, **setting}).scores.score)
        for setting in grid(sizes.preserve, sizes.decay)
    ]
    setting, _ = max(tried, key=lambda each: each[1])
    given = {**fixed, **setting}
    outcomes = [[measure.outcome(m, place, each, given) for each in rest] for m in taught]
    return Tuned(setting, tried, outcomes)


def own_chosen(
    model: Decoder, tokenizer: Any, text: Any, way: Setting, sizes: Sizes
) -> tuple[dict[str, float], list[tuple[dict[str, float], float]]]:
    """The setting of a way for the embedded model, on modules that nothing is tested on."""
    settings = grid(sizes.own_preserve, sizes.own_decay)
    if len(settings) == 1:
        return settings[0], []
    changed, others = own.VALIDATION
    edits = (own.edited(model, tokenizer, text, changed, others, {**s, **way}, 0) for s in settings)
    tried = [(s, edit.report.after.score) for s, edit in zip(settings, edits, strict=True)]
    return max(tried, key=lambda each: each[1])[0], tried


def seeded(count: int) -> str:
    """How many taught models a claim is over, in words.

    >>> seeded(1), seeded(3)
    ('one seed', '3 seeds')
    """
    return "one seed" if count == 1 else f"{count} seeds"


def exact_claims(single: Sequence[Sequence[Exact]]) -> list[Claim]:
    """Single facts in one layer."""
    errors = [max(each.error for each in of) for of in single]
    said = [float(np.mean([each.said for each in of])) for of in single]
    setting = f"{len(single[0])} facts one by one, layer {measure.LAYERS[-1]}, lambda 1e-6"
    shown = f"{max(errors):.1e}" if len(errors) == 1 else f"{min(errors):.1e} to {max(errors):.1e}"
    return [
        Claim(
            "a fact alone in one layer is written exactly: the FFN gives what step 1 asks for",
            "-",
            f"largest difference {shown}",
            max(errors) <= 1e-4,
            f"{setting}; at most 1e-4 at the subject; {seeded(len(errors))}",
            seeds=len(errors),
        ),
        Claim(
            "and the model then says the new answer",
            "-",
            f"{spread(said)} of the facts",
            min(said) == 1.0,
            f"{setting}; all tokens of all answers the most likely ones, without what the vector "
            f"beside the attention did in step 1; {seeded(len(said))}",
            seeds=len(said),
        ),
    ]


def search_claims(way: Tuned, setting: Setting) -> list[Claim]:
    """Step 1."""
    shares = [
        float(np.mean([p >= 0.9 for outcome in of for p in outcome.probabilities]))
        for of in way.outcomes
    ]
    reach = [max(outcome.reach for outcome in of) for of in way.outcomes]
    clamp = measure.NUMBERS["clamp"]
    count = sum(len(outcome.probabilities) for outcome in way.outcomes[0])
    steps = measure.NUMBERS["steps"]
    return [
        Claim(
            "step 1 makes the new answer likely: p of at least 0.9 for 95 % of the facts",
            "-",
            f"{spread(shares)} of the facts",
            min(shares) >= 0.95,
            f"{count} facts of each model, at most {steps} evaluations, decay "
            f"{setting['decay']:g}; the authors' rule ends a fact once its answer is the most "
            f"likely one and the divergence at most 0.01; {seeded(len(shares))}",
            seeds=len(shares),
        ),
        Claim(
            "its vectors stay within their balls",
            "-",
            f"largest norm {spread(reach)} of what it is added to",
            max(reach) <= clamp * (1 + 1e-5),
            f"at most clamp = {clamp:g} times, to rounding of float32; both vectors, all facts; "
            f"{seeded(len(shares))}",
            seeds=len(shares),
        ),
    ]


def batch_claims(way: Tuned) -> list[Claim]:
    """Ten facts at once."""
    efficacy, kept, same = (way.means(name) for name in ("efficacy", "specificity", "same"))
    draws = len(way.outcomes[0])
    how = f"{draws} draw(s) of ten facts written at once; {seeded(len(efficacy))}"
    return [
        Claim(
            "of ten edits at once at least 90 % take: the new answer is likelier than the old one",
            "best overall on CounterFact with GPT-J and GPT-NeoX, up to 10,000 edits (abstract)",
            f"efficacy {spread(efficacy)}, all tokens said {spread(way.means('said'))}, other "
            f"wording {spread(way.means('generality'))}",
            min(efficacy) >= 0.9 - SLACK,
            f"efficacy at least 0.9 of every model; {how}",
            seeds=len(efficacy),
        ),
        Claim(
            "at least 90 % of all other facts are still said",
            "-",
            f"{spread(kept)}; of those of the ten people {spread(same)}",
            min(kept) >= 0.9 - SLACK,
            f"all other facts that were known, at least 0.9 of every model; {how}",
            seeds=len(kept),
        ),
    ]


def way_claim(ways: Mapping[str, Tuned]) -> Claim:
    """PMET against its variants."""
    scores = {name: way.scores for name, way in ways.items()}
    best = max(float(np.mean(s)) for name, s in scores.items() if name != "PMET")
    ahead = float(np.mean(scores["PMET"])) - best
    first = next(iter(ways.values()))
    chosen = "; ".join(f"{n}: {dict(w.setting)}" for n, w in ways.items())
    return Claim(
        "neither one vector nor the linear spread is better by more than two points",
        "ahead of MEMIT, which has both, on CounterFact and zsRE (abstract)",
        "; ".join(f"{name} {spread(values)}" for name, values in scores.items()),
        ahead >= -0.02 - SLACK,
        "harmonic mean of efficacy, generality and specificity, means over draws and models; each "
        f"way the best of {len(first.tried)} settings on ten facts that are not tested, chosen "
        f"with the first model ({chosen}); {seeded(len(first.outcomes))}",
        seeds=len(first.outcomes),
    )


def own_claims(edit: Edited) -> list[Claim]:
    """The embedded model."""
    after, (before_bits, after_bits) = edit.report.after, edit.report.bits or (np.nan, np.nan)
    others = len(own.TEST.others)
    return [
        Claim(
            "what the embedded model continues after an import line is changed for ten modules",
            "-",
            f"efficacy {after.efficacy:.2f}, said {edit.said:.2f}, other prompts "
            f"{after.generality:.2f}; as before after {after.specificity:.2f} of {others} "
            "other modules",
            after.efficacy >= 0.9 - SLACK and after.specificity >= 0.9 - SLACK,
            "ten modules at once, efficacy and the share of other modules whose next two bytes "
            "stay, each at least 0.9; one model, nothing drawn",
            seeds=0,
        ),
        Claim(
            "held-out text is predicted as well as before, to 0.02 bits per byte",
            "-",
            f"{before_bits:.4f} before, {after_bits:.4f} after: {edit.worse:+.4f}",
            abs(edit.worse) <= 0.02,
            "modules of the standard library that neither trained nor calibrated anything, in "
            f"windows of {own.WINDOW} bytes; one model, nothing drawn",
            seeds=0,
        ),
    ]


def rows_of(ways: Mapping[str, Tuned]) -> list[dict[str, object]]:
    """The taught model, by way."""
    names = ("efficacy", "said", "generality", "specificity", "same")
    return [
        {"model": "taught", "way": way, "score": float(np.mean(found.scores))}
        | {name: float(np.mean(found.means(name))) for name in names}
        | {"chosen": " ".join(f"{k} {v:g}" for k, v in found.setting.items())}
        for way, found in ways.items()
    ]


def own_rows(edits: Mapping[str, Edited]) -> list[dict[str, object]]:
    """The embedded model, by way."""
    return [
        {
            "model": "embedded",
            "way": way,
            "score": edit.report.after.score,
            "efficacy": edit.report.after.efficacy,
            "said": edit.said,
            "generality": edit.report.after.generality,
            "specificity": edit.report.after.specificity,
            "bits": edit.worse,
        }
        for way, edit in edits.items()
    ]


def columns(figure: Any, ways: Mapping[str, Tuned]) -> None:
    """Scores of every way, and their range over models."""
    names = ("efficacy", "said", "generality", "specificity", "score")
    axes = figure.subplots()
    width = 0.8 / len(ways)
    for i, (way, found) in enumerate(ways.items()):
        values = [found.scores if n == "score" else found.means(n) for n in names]
        means = np.array([np.mean(v) for v in values])
        off = np.abs(np.array([[min(v), max(v)] for v in values]).T - means)
        places = np.arange(len(names)) + (i - (len(ways) - 1) / 2) * width
        bars = {"yerr": off, "capsize": 2} if len(found.outcomes) > 1 else {}
        axes.bar(places, means, width * 0.92, color=f"C{i}", label=way, **bars)
    axes.set_xticks(np.arange(len(names)), names)
    axes.set_ylim(0, 1.08)
    axes.set_ylabel("share of facts")
    axes.set_title("Ten facts written at once")
    axes.legend(frameon=False, ncols=len(ways), loc="upper center", bbox_to_anchor=(0.5, -0.08))
    axes.spines[["top", "right"]].set_visible(False)
