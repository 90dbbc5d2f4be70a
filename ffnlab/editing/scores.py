"""What an edit did: efficacy, generality, specificity, fluency, and one score of the first three.

    efficacy     share of facts whose new answer is more likely than the old one
    generality   the same behind paraphrases of the prompt
    specificity  share of neighbours of whom the old answer is still the more likely one
    score        harmonic mean of the three
    fluency      entropy of the pairs and triples of words that the model goes on with, in bits

An answer's likelihood is that of a token of it, on average. Of a fact without an old answer, the
new one counts where each of its tokens is the most likely one. Source: CounterFact, as arXiv
2308.08742 and 2210.07229 measure it; words are found by a pattern here, by a tokenizer there.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ffnlab import weights
from ffnlab.data.text.documents import around
from ffnlab.editing.facts import Fact
from ffnlab.editing.requests import answers
from ffnlab.editing.vectors import Inputs
from ffnlab.errors import ConfigError, at_least
from ffnlab.formats.tokenizer.tokenizer import Tokenizer
from ffnlab.models.decoder import Decoder
from ffnlab.text.generate import generate
from ffnlab.text.sample import Sampling

__all__ = [
    "EditScores",
    "Likelihood",
    "check_questions",
    "edit_scores",
    "fluency",
    "likelihood",
    "ngram_entropy",
]

WORDS = re.compile(r"\w+|[^\w\s]")
WEIGHTS = {2: 2 / 3, 3: 4 / 3}  # of the entropies of pairs and of triples
BATCH, STEP = 64, 16  # rows at once, and what their length is a multiple of
TOP_K = 5


class Likelihood(NamedTuple):
    """How likely answers are behind their prompts.

    Attributes:
      nats: [n], -log p of a token, averaged over the answer.
      tokens: [n], of the answer.
      said: [n], whether each of them is the most likely one.
    """

    nats: Float[np.ndarray, "n"]
    tokens: Int[np.ndarray, "n"]
    said: Bool[np.ndarray, "n"]

    @property
    def probability(self) -> Float[np.ndarray, "n"]:
        """Of the whole answer."""
        return np.exp(-self.nats * self.tokens)


@dataclasses.dataclass(frozen=True)
class EditScores:
    """See the module; NaN where nothing was asked.

    Attributes:
      efficacy, generality, specificity: shares.
      fluency: bits.
    """

    efficacy: float
    generality: float = math.nan
    specificity: float = math.nan
    fluency: float = math.nan

    @property
    def score(self) -> float:
        """Harmonic mean of those of the first three that there are.

        >>> EditScores(1.0, 0.5).score, EditScores(1.0, 0.0).score
        (0.6666666666666666, 0.0)
        """
        found = [self.efficacy, self.generality, self.specificity]
        found = [value for value in found if not math.isnan(value)]
        return len(found) / sum(1 / v for v in found) if all(found) else 0.0


def likelihood(
    model: Decoder, tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]
) -> Likelihood:
    """How likely answers are.

    Args:
      model: any decoder.
      tokenizer: of it.
      pairs: (prompt, answer), one or more, texts that follow each other as they are written.
    Raises:
      ConfigError: no pairs, or texts that the tokenizer or the model does not take.
    """
    if not pairs:
        raise ConfigError("pairs=[]: one or more of (prompt, answer) are needed")
    rows, prepared = answers(pairs, tokenizer, model), weights.prepare(model)
    more = -rows.tokens.shape[1] % STEP
    found = []
    for first in range(0, len(pairs), BATCH):
        part = [x[first : first + BATCH] for x in rows]
        missing = BATCH - len(part[0])
        tokens, valid, labels = (
            np.pad(x, ((0, missing), (left, 0)))
            for x, left in zip(part, (more, more, 0), strict=True)
        )
        labels[BATCH - missing :] = -1
        found.append(
            [np.asarray(x)[: len(part[0])] for x in scored(prepared, tokens, valid, labels)]
        )
    nats, counts, said = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return Likelihood(nats / counts, counts, said)


@jax.jit
def scored(
    model: Decoder,
    tokens: Int[Array | np.ndarray, "b t"],
    valid: Bool[Array | np.ndarray, "b t"],
    labels: Int[Array | np.ndarray, "b m"],
) -> tuple[Float[Array, "b"], Int[Array, "b"], Bool[Array, "b"]]:
    """-log p of the labels of each row, how many there are, and whether all are most likely."""
    h = Inputs.of(tokens, valid).hidden(model)
    logits = model.logits(h[:, -labels.shape[1] :])
    there = labels >= 0
    chosen = jnp.take_along_axis(
        jax.nn.log_softmax(logits), jnp.maximum(labels, 0)[..., None], axis=-1
    )[..., 0]
    said = jnp.all((logits.argmax(-1) == labels) | ~there, axis=1)
    return -jnp.where(there, chosen, 0.0).sum(1), there.sum(1), said


def check_questions(
    model: Decoder, tokenizer: Tokenizer, facts: Sequence[Fact], *, length: int = 1
) -> None:
    """Looks at all that `edit_scores` would ask, before any compute.

    Args:
      model, tokenizer, facts: see `edit_scores`.
      length: tokens that the model is to go on with behind each prompt.
    Raises:
      ConfigError: texts that the tokenizer or the model does not take, or no room to go on.
    """
    at_least(0, length=length)
    asked = [pair for pairs in questions(facts) for pair in pairs]
    answers(pairs_of(asked)[0], tokenizer, model)
    longest = max(map(len, prompts_of(tokenizer, facts)))
    if longest + length > model.config.max_positions:
        raise ConfigError(
            f"a prompt has {longest} tokens and is to go on with {length}; the model has a context "
            f"of {model.config.max_positions}"
        )


def questions(facts: Sequence[Fact]) -> tuple[list[tuple[Fact, str]], ...]:
    """(fact, prompt) of the prompts, of their paraphrases and of the neighbours of facts."""
    asked = [(fact, fact.text) for fact in facts]
    again = [(fact, fact.filled(text)) for fact in facts for text in fact.paraphrases]
    others = [(fact, fact.filled(text)) for fact in facts for text in fact.neighbours]
    return asked, again, others


def pairs_of(asked: Sequence[tuple[Fact, str]]) -> tuple[list[tuple[str, str]], list[int]]:
    """(prompt, answer) of all new answers, then of the old ones that there are; whose these are."""
    olds = [i for i, (fact, _) in enumerate(asked) if fact.old is not None]
    pairs = [(prompt, fact.new) for fact, prompt in asked]
    return pairs + [(asked[i][1], str(asked[i][0].old)) for i in olds], olds


def prompts_of(tokenizer: Tokenizer, facts: Sequence[Fact]) -> list[list[int]]:
    """The tokens of all prompts."""
    begin = around(tokenizer)[0]
    return [[*begin, *tokenizer.encode(fact.text)] for fact in facts]


def edit_scores(
    model: Decoder, tokenizer: Tokenizer, facts: Sequence[Fact], *, length: int = 0, seed: int = 0
) -> EditScores:
    """The scores of a model that was edited, or of one that is to be.

    Args:
      model: any decoder.
      tokenizer: of it.
      facts: with what is asked of each.
      length: tokens that the model goes on with behind each prompt, for fluency; 0: not measured.
      seed: of them; each is drawn among the five most likely ones.
    Raises:
      ConfigError: no facts, or as `likelihood` and `ffnlab.text.generate` say.
    """
    at_least(0, length=length)
    asked, again, others = questions(facts)
    prefers = preferred(model, tokenizer, [*asked, *again, *others])
    ends = np.cumsum([len(asked), len(again), len(others)])
    new, paraphrased, moved = np.split(prefers, ends[:-1])
    return EditScores(
        float(new.mean()),
        float(paraphrased.mean()) if len(again) else math.nan,
        float(1 - moved.mean()) if len(others) else math.nan,
        spoken(model, tokenizer, facts, length, seed) if length else math.nan,
    )


def preferred(
    model: Decoder, tokenizer: Tokenizer, asked: Sequence[tuple[Fact, str]]
) -> Bool[np.ndarray, "n"]:
    """Whether the new answer is given rather than the old one, behind each prompt of a fact."""
    pairs, olds = pairs_of(asked)
    found = likelihood(model, tokenizer, pairs)
    n = len(asked)
    prefers = found.said[:n].copy()
    prefers[olds] = found.nats[:n][olds] < found.nats[n:]
    return prefers


def spoken(
    model: Decoder, tokenizer: Tokenizer, facts: Sequence[Fact], length: int, seed: int
) -> float:
    """The fluency of what a model goes on with behind the prompts of facts."""
    key, sampling = jax.random.key(seed), Sampling(1.0, top_k=TOP_K)
    prompts = prompts_of(tokenizer, facts)
    found = generate(model, prompts, max_tokens=length, sampling=sampling, key=key)
    pairs = zip(facts, found.lists(), strict=True)
    return fluency(fact.text + tokenizer.decode(new, skip_special=True) for fact, new in pairs)


def fluency(texts: Iterable[str]) -> float:
    """The mean of `ngram_entropy` over texts.

    Raises:
      ConfigError: there are none.
    """
    found = [ngram_entropy(text) for text in texts]
    if not found:
        raise ConfigError("texts=[]: one or more are needed")
    return sum(found) / len(found)


def ngram_entropy(text: str) -> float:
    """Mean of 2/3 of the entropy of pairs of words and 4/3 of that of triples, in bits.

    A model that says one thing over and over has little of it.

    Source: `n_gram_entropy` of the authors' code.

    >>> ngram_entropy("a b a b a b"), round(ngram_entropy("a b c d e f"), 3)
    (0.990..., 2.107)
    """
    found = WORDS.findall(text)
    grams = {n: [tuple(found[i : i + n]) for i in range(len(found) - n + 1)] for n in WEIGHTS}
    return sum(weight * entropy(grams[n]) for n, weight in WEIGHTS.items()) / 2


def entropy(items: Iterable[tuple[str, ...]]) -> float:
    """Of how often each item occurs, in bits; 0 of none."""
    counts = Counter(items)
    total = counts.total()
    return -math.fsum(count / total * math.log2(count / total) for count in counts.values())
