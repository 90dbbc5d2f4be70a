"""Questions on texts of a command: read, held out by article, cut into windows and scored."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import PyTree

from ffnlab.cli.inputs.data_kinds import QuestionsConfig
from ffnlab.cli.inputs.labelled import split
from ffnlab.cli.training import TrainConfig
from ffnlab.data import (
    ArrayBatches,
    Question,
    SpanWindows,
    answers_of,
    by_article,
    span_layout,
    span_windows,
    squad,
)
from ffnlab.data.text.documents import check_ids
from ffnlab.errors import ConfigError
from ffnlab.formats import Tokenizer
from ffnlab.models import EncoderConfig
from ffnlab.parallel import held_out_spans
from ffnlab.scores import span_scores

__all__ = ["QuestionsData", "load_questions"]


@dataclasses.dataclass(frozen=True, eq=False)
class QuestionsData:
    """What a run reads.

    Attributes:
      train: windows to learn from.
      held_out: windows of the questions to score on.
      questions: those.
      has_types: the model is told which tokens are of the text.
      tokenizer: that made the tokens.
      identity: what both are, by SHA-256 and number.
    """

    train: SpanWindows
    held_out: SpanWindows
    questions: Sequence[Question]
    has_types: bool
    tokenizer: Tokenizer
    identity: dict[str, str | int]

    watched = "held_out_error"

    def batches(self, settings: TrainConfig) -> Callable[[int], object]:
        """Batches (inputs, ends) by position."""
        rows = self.inputs(self.train), self.train.ends
        return ArrayBatches(rows, settings.data.batch, settings.run.seed)

    def inputs(self, windows: SpanWindows) -> PyTree:
        """What the model is given of windows."""
        return windows.inputs(types=self.has_types)

    def scorer(self, settings: TrainConfig) -> Callable[[Callable], dict[str, float]]:
        """predict -> figures of the held-out questions; 1 - F1 is watched, the lower the better."""
        inputs, longest = self.inputs(self.held_out), settings.data.longest  # type: ignore

        def scores(predict: Callable) -> dict[str, float]:
            logits = held_out_spans(predict, inputs)
            found = answers_of(self.held_out, self.questions, logits, longest=longest)
            exact, f1 = span_scores(found, [q.answers for q in self.questions])
            return {self.watched: 1 - f1, "held_out_f1": f1, "held_out_exact": exact}

        return scores

    def save_beside(self, folder: Path) -> None:
        """Writes the tokenizer beside a model."""
        self.tokenizer.save(folder)

    def record(self, scores: Mapping[str, float], settings: TrainConfig) -> dict[str, object]:
        """What the record of a run says of its data and figures."""
        return {"data": dict(self.identity), **scores}


def load_questions(data: QuestionsConfig, model: EncoderConfig) -> QuestionsData:
    """Reads the questions of a run.

    Raises:
      ConfigError: a model without a head of spans, windows longer than the model, ids that it does
        not have, too few articles.
      FFNLabError: questions or tokenizer cannot be read.
    """
    if model.head != "span":
        raise ConfigError(
            f"head={model.head!r}: questions are for an encoder with head='span', or one that a "
            "transform gives a head of spans, 'top2_head' or 'switch_head'"
        )
    if data.length > model.max_positions:
        raise ConfigError(
            f"length={data.length} is more than max_positions={model.max_positions} of the model"
        )
    whole = squad(None if data.questions == "xquad" else data.questions)
    if data.held_out:
        parts = whole, squad(data.held_out)
    else:
        articles = by_article(whole)
        parts = tuple(sum((articles[i] for i in which), ()) for which in split(len(articles)))
    tokenizer = Tokenizer.load(data.tokenizer) if data.tokenizer else Tokenizer.bytes()
    layout = span_layout(tokenizer, data.length, data.stride)
    train, held_out = (span_windows(part, tokenizer.spans, layout) for part in parts)
    identity: dict[str, str | int] = {"questions": data.questions}
    for name, part, cut in zip(("train", "held_out"), parts, (train, held_out), strict=True):
        check_ids(cut.tokens.ravel(), model.vocab)
        content = hashlib.sha256(np.ascontiguousarray(cut.tokens).tobytes())
        content.update(np.ascontiguousarray(cut.ends).tobytes())
        identity |= {f"{name}_sha256": content.hexdigest(), name: len(part)}
    return QuestionsData(train, held_out, parts[1], model.types > 1, tokenizer, identity)
