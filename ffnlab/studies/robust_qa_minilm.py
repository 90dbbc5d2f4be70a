"""MiniLM on the English questions of XQuAD, by article: heads on frozen states, then all of it."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from ffnlab import transform, tree
from ffnlab.data import (
    ArrayBatches,
    FeatureCache,
    Question,
    SpanWindows,
    answers_of,
    by_article,
    eda,
    find_folder,
    nearest_words,
    span_layout,
    span_windows,
    squad,
)
from ffnlab.formats import Tokenizer, load
from ffnlab.layers import Embedding
from ffnlab.learning import backprop
from ffnlab.models import Encoder
from ffnlab.parallel import LoopOptions, train
from ffnlab.scores import span_scores
from ffnlab.storage.files import StrPath
from ffnlab.studies.robust_qa_measure import Design, logits_of
from ffnlab.transform import Transform

__all__ = ["FULL", "QUICK", "Part", "Sizes", "Texts", "behind", "finetuned", "is_there", "texts"]


class Sizes(NamedTuple):
    """How much of XQuAD is read, and for how long.

    Attributes:
      articles: to train, to validate and to test on.
      questions: of an article, at most.
      length, stride: of windows.
      experts, hidden: of a head.
      steps: of a head on frozen states.
      rates: of Adam, for that.
      tuned, tuned_seeds: steps in which the whole model learns on, at `rate`, and with how many of
        the seeds.
      batch: windows of a batch.
    """

    articles: tuple[int, int, int]
    questions: int
    length: int
    stride: int
    experts: int
    hidden: int
    steps: int
    rates: tuple[float, ...]
    tuned: int
    tuned_seeds: int = 2
    rate: float = 1e-4
    batch: int = 8


FULL = Sizes((24, 6, 6), 10, 160, 80, 4, 256, 100, (3e-4, 1e-3, 3e-3), 12)
QUICK = Sizes((8, 2, 2), 4, 128, 64, 4, 64, 40, (1e-3,), 0)


class Part(NamedTuple):
    """Questions for one purpose.

    Attributes:
      questions: with their answers.
      windows: of them.
      features: MiniLM's last states of each window, [w, t, d].
    """

    questions: Sequence[Question]
    windows: SpanWindows
    features: Float[np.ndarray, "w t d"]

    def inputs(self) -> dict[str, np.ndarray]:
        """What a head on frozen states is given."""
        return {"embeddings": self.features, "valid": self.windows.valid}

    def scores(self, model: Any, *, frozen: bool = True) -> tuple[float, float]:
        """(exact match, F1) of a model, a whole one or what is behind frozen states."""
        inputs, rows = self.inputs() if frozen else self.windows.inputs(), 32
        n = len(self.windows.tokens)
        found = []
        for start in range(0, n, rows):  # of one shape, so that it is compiled once
            chosen = (start + np.arange(rows)) % n
            found.append(logits_of(model, {name: x[chosen] for name, x in inputs.items()}))
        texts = answers_of(self.windows, self.questions, np.concatenate(found)[:n])
        return span_scores(texts, [question.answers for question in self.questions])


class Texts(NamedTuple):
    """What is read: MiniLM, and three parts of XQuAD without a common article.

    Attributes:
      encoder, tokenizer: MiniLM.
      train, validation, test: see `Part`.
    """

    encoder: Encoder
    tokenizer: Tokenizer
    train: Part
    validation: Part
    test: Part


def is_there() -> bool:
    """Whether both MiniLM and XQuAD are in FFNLAB_DATA."""
    return find_folder("minilm") is not None and find_folder("xquad") is not None


def texts(sizes: Sizes, cache: StrPath) -> Texts:
    """Reads all; states are computed once and kept in a folder."""
    folder = find_folder("minilm")
    assert folder is not None, "asked for where `is_there`"
    encoder, tokenizer = load(folder), Tokenizer.load(folder)
    layout, articles = span_layout(tokenizer, sizes.length, sizes.stride), by_article(squad())
    compute = lambda model, inputs: model.hidden(**inputs)  # noqa: E731
    parts, begin = [], 0
    for count in sizes.articles:
        own = [q for article in articles[begin : begin + count] for q in article[: sizes.questions]]
        windows = span_windows(own, tokenizer.spans, layout)
        states = FeatureCache(cache, rows=32)("hidden", compute, encoder, windows.inputs())
        parts.append(Part(own, windows, states))
        begin += count
    return Texts(encoder, tokenizer, *parts)


def with_answers(windows: SpanWindows) -> np.ndarray:
    """Windows that hold their answer: those that are trained on."""
    return np.flatnonzero(windows.end > 0)


def frozen_batches(part: Part, batch: int, seed: int) -> Callable[[int], PyTree]:
    """Batches of states and ends of answers."""
    rows = with_answers(part.windows)
    inputs = {name: x[rows] for name, x in part.inputs().items()}
    return ArrayBatches((inputs, part.windows.ends[rows]), batch, seed)


def behind(encoder: Encoder, head: Transform) -> Encoder:
    """What a head adds to an encoder, as an encoder of its own that is given hidden states."""
    whole, _ = transform.apply(head, encoder)
    count = len(encoder.layers)
    new = tree.copy(whole)
    new.layers = nnx.List(list(whole.layers)[count:])
    new.embed = Embedding(1, encoder.config.width, key=jax.random.key(0))
    new.position_embed = new.type_embed = new.embed_norm = new.pooler = nnx.data(None)
    new.config = dataclasses.replace(
        whole.config, vocab=1, layers=len(new.layers), positions=None, types=0, pooler=None
    )
    return new


def joined(encoder: Encoder, head: Transform, tail: Encoder) -> Encoder:
    """The encoder with a head as it is after training behind frozen states."""
    new, _ = transform.apply(head, encoder)
    new.layers = nnx.List([*encoder.layers, *tail.layers])  # type: ignore
    new.head, new.norm = nnx.data(tail.head), nnx.data(tail.norm)
    return new


def finetuned(
    found: Texts,
    design: Design,
    head: Transform,
    tail: Encoder,
    sizes: Sizes,
    seed: int,
    *,
    copies: int = 0,
) -> Encoder:
    """The whole model, head and all, trained on from frozen states.

    Args:
      copies: of each question with other words (`ffnlab.data.eda`), which are trained on too.
    """
    questions = list(found.train.questions)
    if copies:
        words = nearest_words(np.asarray(found.encoder.embed.weight.dense()), found.tokenizer)
        questions += eda(questions, words, copies=copies, seed=seed)
    layout = span_layout(found.tokenizer, sizes.length, sizes.stride)
    windows = span_windows(questions, found.tokenizer.spans, layout)
    rows = with_answers(windows)
    inputs = {name: x[rows] for name, x in windows.inputs().items()}
    ends: Int[Array, "w 2"] = windows.ends[rows]  # type: ignore
    rule = backprop(design.loss, optax.adamw(sizes.rate), informed=design.keyed)
    outcome = train(
        rule,
        joined(found.encoder, head, tail),
        ArrayBatches((inputs, ends), sizes.batch, seed),
        sizes.tuned,
        key=jax.random.key(seed),
        options=LoopOptions(0, progress=False),
    )
    if not outcome.finished:
        raise KeyboardInterrupt(f"stopped at step {outcome.position} of {sizes.tuned}")
    return rule.model(outcome.state)
