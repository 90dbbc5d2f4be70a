"""What tests of studies share: results as `ffnlab.studies.tuning.compare` gives them, and what a
claim about them must say."""

import re
from collections.abc import Mapping, Sequence

from ffnlab.studies.result import Claim
from ffnlab.studies.tuning import Found, Tuned, grid


def reached(scores: Sequence[float], **options) -> Tuned:
    """A side of 1,234 parameters that tried two rates and reached these test scores."""
    settings = grid(rate=(0.1, 0.3))
    made = {
        "setting": settings[1],
        "tried": ((settings[0], 0.5), (settings[1], 0.6)),
        "parameters": 1234,
        "mirror": 0,
        "seeds": tuple(range(len(scores))),
        "scores": tuple(scores),
    }
    return Tuned(**made | options)


def cases(**scores: Mapping[str, Sequence[float]]) -> dict[str, dict[str, Tuned]]:
    """Case -> side -> what it reached."""
    return {case: {n: reached(s) for n, s in sides.items()} for case, sides in scores.items()}


def with_scores(found: Found, case: str, side: str, scores: Sequence[float]) -> Found:
    """The same results, but for one side of one case."""
    return {**found, case: {**found[case], side: reached(scores)}}


def assert_tuned(claim: Claim, *names: str) -> None:
    """Evidence names settings tried, seeds and, for each side, parameters and what was chosen."""
    tested = re.search(r"tested with seeds ((?:\d+, )*\d+) of", claim.evidence)
    assert tested and claim.seeds == len(tested[1].split(", ")) and not claim.timed
    how = r"best of \d+ settings on validation rows, chosen with seed \d+, tested with seeds \d+"
    assert re.search(how, claim.evidence), claim.evidence
    for name in names:
        said = rf"{re.escape(name)}: [\d,]+ parameters[^;]*; tried \w+ of [^;]+; chosen \w+ "
        assert re.search(said, claim.evidence), (name, claim.evidence)
        assert re.search(rf"{re.escape(name)} \d\.\d{{3}}", claim.ours), (name, claim.ours)
