"""What a model said before an edit and says after it, as a table, as figures and as a picture."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ffnlab.editing.facts import Fact
from ffnlab.editing.scores import EditScores, edit_scores, likelihood, prompts_of
from ffnlab.formats.tokenizer.tokenizer import Tokenizer
from ffnlab.models.decoder import Decoder
from ffnlab.report import Report
from ffnlab.text.generate import generate

__all__ = ["EditReport", "Said", "compare_edit"]

MORE = 12  # tokens that a model goes on with in the table
BARS = 24  # facts that the picture has room for
SCORES = ("efficacy", "generality", "specificity", "fluency", "score")


class Said(NamedTuple):
    """What is said of a fact.

    Attributes:
      prompt: with the subject in it.
      new: what is wanted.
      before, after: how the model goes on, the most likely token each time.
      p_before, p_after: probability of the new answer.
    """

    prompt: str
    new: str
    before: str
    after: str
    p_before: float
    p_after: float


@dataclasses.dataclass(frozen=True)
class EditReport(Report):
    """An edit, judged.

    Attributes:
      said: of each fact.
      before, after: the scores.
      dense: matrices that were in another format and are dense now, with the format.
      bits: bits per byte of text that was held out, before and after; None where none was.
    """

    said: tuple[Said, ...]
    before: EditScores
    after: EditScores
    dense: tuple[str, ...] = ()
    bits: tuple[float, float] | None = None

    def rows(self) -> list[dict[str, object]]:
        """A row for each fact; characters that do not print are escaped."""
        return [
            {
                "prompt": shown(each.prompt),
                "wanted": shown(each.new),
                "before": shown(each.before),
                "after": shown(each.after),
                "p before": each.p_before,
                "p after": each.p_after,
            }
            for each in self.said
        ]

    def figures(self) -> dict[str, float]:
        """Scores before and after, those that were measured; bits; matrices that became dense."""
        found = {
            f"{name}/{when}": getattr(scores, name)
            for name in SCORES
            for when, scores in (("before", self.before), ("after", self.after))
        }
        if self.bits is not None:
            found |= {"bits_per_byte/before": self.bits[0], "bits_per_byte/after": self.bits[1]}
        measured = {name: value for name, value in found.items() if not math.isnan(value)}
        return measured | {"dense_now": float(len(self.dense))}

    def draw(self, figure: Any) -> None:
        """The probability of each new answer, before and after."""
        said = self.said[:BARS]
        figure.set_size_inches(8, 1.5 + 0.32 * len(said))
        axes = figure.subplots()
        places = np.arange(len(said))
        before, after = [s.p_before for s in said], [s.p_after for s in said]
        axes.barh(places - 0.2, before, 0.4, color="C7", label="before")
        axes.barh(places + 0.2, after, 0.4, color="C0", label="after")
        labels = [f"{shown(s.prompt)[-32:]} |{shown(s.new)[:16]}" for s in said]
        axes.set_yticks(places, [label.replace("$", r"\$") for label in labels], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.set_xlabel("probability of the new answer")
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)


def shown(text: str) -> str:
    """A text as it may be printed.

    >>> print(shown("a\\x1b[2J\\n\\u00e9"))
    a\\x1b[2J\\né
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def compare_edit(
    model: Decoder,
    new: Decoder,
    tokenizer: Tokenizer,
    facts: Sequence[Fact],
    *,
    dense: Sequence[str] = (),
    bits: tuple[float, float] | None = None,
    length: int = 0,
    seed: int = 0,
) -> EditReport:
    """Asks a model and an edited one the same.

    Args:
      model, new: before and after.
      tokenizer: of both.
      facts: that were written, with what is asked of each.
      dense, bits: see `EditReport`.
      length, seed: of the texts for fluency, see `edit_scores`.
    """
    sides = [
        (likelihood(m, tokenizer, [(f.text, f.new) for f in facts]), goes_on(m, tokenizer, facts))
        for m in (model, new)
    ]
    (p_before, before), (p_after, after) = sides
    said = tuple(
        Said(fact.text, fact.new, before[i], after[i], float(a), float(b))
        for i, (fact, a, b) in enumerate(
            zip(facts, p_before.probability, p_after.probability, strict=True)
        )
    )
    asked = {"facts": facts, "length": length, "seed": seed}
    first, then = (edit_scores(m, tokenizer, **asked) for m in (model, new))
    return EditReport(said, first, then, tuple(dense), bits)


def goes_on(model: Decoder, tokenizer: Tokenizer, facts: Sequence[Fact]) -> list[str]:
    """How a model goes on behind each prompt."""
    prompts = prompts_of(tokenizer, facts)
    room = model.config.max_positions - max(map(len, prompts))
    found = generate(model, prompts, max_tokens=max(1, min(MORE, room)))
    return [tokenizer.decode(ids, skip_special=True) for ids in found.lists()]
