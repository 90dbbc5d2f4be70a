"""Comparing ways of learning so that neither side is favoured.

Every side tries as many settings as the others. The setting with the best score on validation
rows, which are rows of the training set that nobody trains on, is chosen with the first seed:

    chosen = argmax over the grid of score(setting, first seed, validation rows)

and only then is it scored on test rows, with every seed. A claim is decided over all cases (data,
networks, batch sizes) and all seeds that were run; its evidence is written here, from the runs.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from ffnlab.errors import ConfigError, NumericalError
from ffnlab.rule import Rule
from ffnlab.studies.classify import accuracy, learned
from ffnlab.studies.result import Claim

__all__ = [
    "CLOSE",
    "Found",
    "Setting",
    "Side",
    "Splits",
    "Tuned",
    "compare",
    "deficit",
    "evidence",
    "first_of",
    "grid",
    "numbers",
    "says",
    "scores",
    "splits",
    "table",
    "trials",
    "tuned_claim",
    "values",
]

CLOSE = 0.02  # of accuracy, what the cards of the papers call comparable
SLACK = 1e-9  # of rounding, where a difference of accuracies meets a limit

Setting = Mapping[str, float]


class Splits(NamedTuple):
    """Rows to learn from, to choose settings by, and to report; no row is in two of them.

    Attributes:
      train, validation, test: trees of arrays, rows on the first axis.
    """

    train: PyTree
    validation: PyTree
    test: PyTree


@dataclasses.dataclass(frozen=True)
class Side:
    """A way of learning, and the settings tried for it.

    Attributes:
      name: in the results.
      grid: the settings, for instance `grid(rate=(.1, .3))`.
      rule: setting -> the rule.
      model: seed -> the network it starts from.
      batch, steps: of every run.
    """

    name: str
    grid: Sequence[Setting]
    rule: Callable[[Setting], Rule]
    model: Callable[[int], PyTree]
    batch: int
    steps: int


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What a side reached with the setting chosen for it.

    Attributes:
      setting: the chosen one.
      tried: every setting with its validation score; `math.inf` or 0 where a run diverged.
      parameters: numbers in the network that predicts.
      mirror: numbers in the network that learns beside it, of a rule that has one.
      seeds: of the runs that were tested; the first one chose.
      scores: on test rows, by seed.
      states: of the rule after training, by seed; None where a run diverged.
      rule: the rule at the chosen setting.
    """

    setting: Setting
    tried: Sequence[tuple[Setting, float]]
    parameters: int
    mirror: int
    seeds: Sequence[int]
    scores: Sequence[float]
    states: Sequence[PyTree] = dataclasses.field(default=(), repr=False)
    rule: Rule | None = dataclasses.field(default=None, repr=False)

    @property
    def mean(self) -> float:
        """Of the test scores."""
        return float(np.mean(self.scores))

    @property
    def text(self) -> str:
        """The mean of the test scores, with their range where there are several."""
        if len(self.scores) == 1:
            return f"{self.mean:.3f}"
        return f"{self.mean:.3f} ({min(self.scores):.3f} to {max(self.scores):.3f})"

    @property
    def size(self) -> str:
        """Its numbers of parameters in words."""
        mirror = f" + {self.mirror:,} of a mirror" if self.mirror else ""
        return f"{self.parameters:,} parameters{mirror}"


Found = Mapping[str, Mapping[str, Tuned]]  # case -> side -> what it reached


def grid(**options: Sequence[float]) -> list[dict[str, float]]:
    """Every combination of the options' values, the last option varying fastest.

    >>> grid(eta=(0.0,), rate=(0.1, 0.3))
    [{'eta': 0.0, 'rate': 0.1}, {'eta': 0.0, 'rate': 0.3}]
    """
    found: list[dict[str, float]] = [{}]
    for name, values in options.items():
        found = [{**setting, name: value} for setting in found for value in values]
    return found


def splits(data: tuple[PyTree, PyTree], *, fraction: float = 0.2, seed: int = 0) -> Splits:
    """Holds rows of a training set out for validation.

    Args:
      data: (train, test).
      fraction: of the training rows that are held out, in (0, 1).
      seed: of the draw of rows.
    Raises:
      ConfigError: nothing would be left on one side.
    """
    rows = len(jax.tree.leaves(data[0])[0])
    count = round(fraction * rows)
    if not 0 < count < rows:
        raise ConfigError(
            f"fraction={fraction} of {rows} rows leaves none to train or to choose by"
        )
    order = np.random.default_rng(seed).permutation(rows)
    take = lambda which: jax.tree.map(lambda leaf: leaf[which], data[0])  # noqa: E731
    return Splits(take(order[count:]), take(order[:count]), data[1])


def compare(
    sides: Sequence[Side],
    data: Splits,
    seeds: Sequence[int],
    *,
    score: Callable[[Rule, PyTree, PyTree], float] = accuracy,
    lower: bool = False,
) -> dict[str, Tuned]:
    """Tunes each side on validation rows and tests what was chosen.

    Args:
      sides: with grids of equal size.
      data: see `splits`.
      seeds: of networks, order of rows and rules; the first one chooses.
      score: (rule, state, rows) -> a number.
      lower: whether less is better.
    Returns:
      side's name -> what it reached.
    Raises:
      ConfigError: grids of unequal sizes, names that repeat, or no seeds.
    """
    sizes = {side.name: len(side.grid) for side in sides}
    if len(set(sizes.values())) != 1 or 0 in sizes.values() or len(sizes) != len(sides):
        raise ConfigError(f"settings tried: {sizes}; sides need names of their own and as many")
    if not len(seeds):
        raise ConfigError("seeds=[]: at least one run is needed")
    worst = math.inf if lower else 0.0
    return {side.name: tuned(side, data, seeds, score, worst) for side in sides}


def tuned(
    side: Side, data: Splits, seeds: Sequence[int], score: Callable[..., float], worst: float
) -> Tuned:
    """One side of `compare`; a run that diverged scores `worst`."""

    def judged(rule: Rule, state: PyTree | None, rows: PyTree) -> float:
        value = worst if state is None else score(rule, state, rows)
        return value if math.isfinite(value) else worst

    rules = [side.rule(setting) for setting in side.grid]
    states = [trained(side, rule, data.train, seeds[0]) for rule in rules]
    found = [judged(*run, data.validation) for run in zip(rules, states, strict=True)]
    best = found.index((min if worst else max)(found))
    kept = [states[best], *(trained(side, rules[best], data.train, s) for s in seeds[1:])]
    made = jax.eval_shape(rules[best].init, side.model(seeds[0]), jax.random.key(0))
    return Tuned(
        setting=side.grid[best],
        tried=tuple(zip(side.grid, found, strict=True)),
        parameters=numbers(rules[best].model(made)),
        mirror=numbers(getattr(made, "mirror", ())),
        seeds=tuple(seeds),
        scores=tuple(judged(rules[best], state, data.test) for state in kept),
        states=tuple(kept),
        rule=rules[best],
    )


def trained(side: Side, rule: Rule, rows: PyTree, seed: int) -> PyTree | None:
    """The state after a run of a side; None where it diverged."""
    try:
        return learned(rule, side.model(seed), rows, batch=side.batch, steps=side.steps, seed=seed)
    except NumericalError:
        return None


def numbers(network: PyTree) -> int:
    """How many numbers a tree holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(network))


def deficit(found: Found, ours: str, *theirs: str, cases: Sequence[str] | None = None) -> float:
    """The most that a side's test score lies below others', over all cases and seeds.

    Args:
      found: see `Found`.
      ours, theirs: names of sides; a case without one of them does not count.
      cases: all when None.
    Returns:
      negative where ours is above all of theirs everywhere; less a bit of rounding.
    """
    gaps = [
        b - a
        for case in (found if cases is None else cases)
        for name in theirs
        if {ours, name} <= set(found[case])
        for a, b in zip(found[case][ours].scores, found[case][name].scores, strict=True)
    ]
    return max(gaps) - SLACK


def scores(found: Found, name: str) -> list[float]:
    """A side's test scores of all cases and seeds."""
    return [value for sides in found.values() if name in sides for value in sides[name].scores]


def values(found: Found) -> dict[tuple[str, str], Sequence[float]]:
    """Test scores of the seeds by (case, side)."""
    return {(c, name): t.scores for c, sides in found.items() for name, t in sides.items()}


def says(found: Found, *names: str) -> str:
    """Test scores in words, by case: the mean and the range over seeds."""
    return "; ".join(
        f"{case}: " + ", ".join(f"{name} {sides[name].text}" for name in names if name in sides)
        for case, sides in found.items()
    )


def value_text(setting: Setting) -> str:
    """A setting in words.

    >>> value_text({"eta": 0.3, "rate": 0.1})
    'eta 0.3 rate 0.1'
    """
    return " ".join(f"{name} {value:g}" for name, value in setting.items())


def grid_text(settings: Sequence[Setting]) -> str:
    """Every option with the values it took.

    >>> grid_text(grid(eta=(0.1, 0.3), rate=(1.0, 3.0)))
    'eta of 0.1, 0.3 and rate of 1, 3'
    """
    values = {name: dict.fromkeys(s[name] for s in settings) for name in settings[0]}
    return " and ".join(
        f"{name} of {', '.join(f'{v:g}' for v in each)}" for name, each in values.items()
    )


def by_case(texts: Mapping[str, str]) -> str:
    """One text where all cases have the same, else each with its case."""
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return ", ".join(f"{text} ({case})" for case, text in texts.items())


def first_of(found: Found) -> Tuned:
    """A side of a case: all have the same seeds, and tried as many settings."""
    return next(iter(next(iter(found.values())).values()))


def evidence(found: Found, *names: str) -> str:
    """How the sides of a comparison were tuned: settings, seeds, parameters, by side."""
    first = first_of(found)
    seeds = ", ".join(map(str, first.seeds))
    parts = [
        f"each side the best of {len(first.tried)} settings on validation rows, chosen with seed "
        f"{first.seeds[0]}, tested with seeds {seeds} of networks and order of rows"
    ]
    for name in names:
        mine = {case: sides[name] for case, sides in found.items() if name in sides}
        if not mine:
            continue
        sizes = by_case({case: side.size for case, side in mine.items()})
        tried = by_case({case: grid_text([s for s, _ in t.tried]) for case, t in mine.items()})
        chosen = by_case({case: value_text(side.setting) for case, side in mine.items()})
        parts.append(f"{name}: {sizes}; tried {tried}; chosen {chosen}")
    return ". ".join(parts)


def tuned_claim(claim: str, paper: str, rule: str, holds: bool, found: Found, *names: str) -> Claim:
    """A claim about sides that were tuned; its figures and its evidence are those of the runs.

    Args:
      claim, paper, holds: see `Claim`.
      rule: how `holds` was decided.
      found: every case that it was decided over.
      names: the sides it is about.
    """
    how = f"{rule}; {evidence(found, *names)}"
    return Claim(claim, paper, says(found, *names), holds, how, seeds=len(first_of(found).seeds))


def table(found: Found, score: str = "accuracy") -> list[dict[str, Any]]:
    """Rows of a study's table: by case and side the size, what was chosen, and its test scores."""
    return [
        {
            "case": case,
            "side": name,
            "parameters": t.parameters + t.mirror,
            "chosen": value_text(t.setting),
            score: t.mean,
            "lowest": min(t.scores),
            "highest": max(t.scores),
        }
        for case, sides in found.items()
        for name, t in sides.items()
    ]


def trials(found: Found) -> dict[str, dict[str, dict[str, float]]]:
    """Validation scores of all settings by case and side, for a study's settings."""
    return {
        case: {name: {value_text(s): v for s, v in t.tried} for name, t in sides.items()}
        for case, sides in found.items()
    }
