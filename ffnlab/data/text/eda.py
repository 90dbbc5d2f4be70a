"""EDA of questions: contexts with other words, in which the answers stand as they did.

Easy data augmentation (arXiv 1901.11196) as arXiv 2204.09598 has it for span answers: words are
replaced by synonyms, put in, swapped or left out, but never a word of an answer. Positions of the
answers are counted anew, so that punctuation and case of the context stay, which the authors drop
to find the answers again.
"""

import re
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from ffnlab.data.text.squad import Answer, Question
from ffnlab.errors import ConfigError, at_least, check_seed
from ffnlab.formats import Tokenizer

__all__ = ["Synonyms", "eda", "nearest_words"]

Synonyms = Callable[[str], Sequence[str]]
PIECES = re.compile(r"\w+|\W+")
# What says nothing by itself: no synonym stands for one, as in the published lists.
STOP = frozenset(
    "a about above after again all am an and any are as at be because been before being below both "
    "but by can did do does doing don down during each few for from further had has have having he "
    "her here hers him his how i if in into is it its just me more most my no nor not now of off "
    "on once only or other our ours out over own s same she should so some such t than that the "
    "their theirs them then there these they this those through to too under until up very was we "
    "were what when where which while who whom why will with you your yours".split()
)


def eda(
    questions: Sequence[Question],
    synonyms: Synonyms,
    *,
    copies: int = 4,
    replaced: float = 0.3,
    inserted: float = 0.0,
    swapped: float = 0.0,
    left_out: float = 0.0,
    seed: int = 0,
) -> tuple[Question, ...]:
    """Questions on changed contexts, `copies` of each; the originals are not among them.

    Every copy is changed in one way, by turns of those whose share is above 0.

    Args:
      questions: at least one.
      synonyms: of a word in lower case those to choose from; () for none. `nearest_words` makes
        them of a model.
      copies: of a question, >= 1.
      replaced: share of the words of a context for which a synonym is put in, everywhere that the
        word stands; 0.3 are the authors', whose other shares are 0.
      inserted: synonyms that are put after some word, as a share of the words.
      swapped: pairs of words that change places, as a share of the words.
      left_out: chance that a word goes.
      seed: of the draws.
    Returns:
      new questions, named after the old ones; no word of an answer is changed in them, wherever in
      the context it stands, and each answer is where it says.
    Raises:
      ConfigError: no questions, a share outside 0 to 1, or none above 0.

    >>> asked = Question("1", "Who?", "The old man saw Ann.", (Answer("Ann", 16),), "")
    >>> found = eda([asked], lambda word: {"man": ["boy"]}.get(word, ()), copies=1)
    >>> found[0].context, found[0].answers, found[0].name
    ('The old boy saw Ann.', (Answer(text='Ann', start=16),), '1/eda0')
    """
    at_least(1, copies=copies)
    check_seed(seed)
    shares = {"replaced": replaced, "inserted": inserted, "swapped": swapped, "left_out": left_out}
    if not all(0 <= share <= 1 for share in shares.values()) or not any(shares.values()):
        raise ConfigError(f"{shares}: shares in 0..1 are accepted, one of them above 0")
    if not questions:
        raise ConfigError("questions: none; at least one is needed")
    ways = [(WAYS[name], share) for name, share in shares.items() if share > 0]
    random, found = np.random.default_rng(seed), []
    for question in questions:
        for i in range(copies):
            way, share = ways[i % len(ways)]
            text = Context(question)
            way(text, share, synonyms, random)
            context, answers = text.written()
            name = f"{question.name}/eda{i}"
            found.append(question._replace(name=name, context=context, answers=answers))
    return tuple(found)


class Context:
    """A context in pieces, words and what is between them, of which some are not to be touched.

    Attributes:
      pieces: joined they are the context.
      is_free: of each piece, whether it is a word that is no part of an answer and equal to none.
      may_follow: of each piece, whether something may be put after it: not within an answer.
    """

    def __init__(self, question: Question):
        self.question = question
        self.pieces = PIECES.findall(question.context)
        ends = np.cumsum([0, *map(len, self.pieces)])
        self.starts = ends[:-1]
        of_answers = {
            word.lower() for answer in question.answers for word in PIECES.findall(answer.text)
        }
        inside = np.zeros(len(self.pieces), bool)
        self.may_follow = np.ones(len(self.pieces), bool)
        for text, start in question.answers:
            stop = start + len(text)
            inside |= (ends[1:] > start) & (ends[:-1] < stop)
            self.may_follow &= (ends[1:] <= start) | (ends[1:] >= stop)
        words = np.array([piece.isalpha() for piece in self.pieces], bool)
        equal = np.array([piece.lower() in of_answers for piece in self.pieces], bool)
        self.is_free = words & ~inside & ~equal

    def words(self) -> list[int]:
        """Pieces that are words and may be touched."""
        return np.flatnonzero(self.is_free).tolist()

    def known(self, synonyms: Synonyms) -> dict[str, list[int]]:
        """Words that have a synonym, stop words not among them, and where they stand."""
        found: dict[str, list[int]] = {}
        for i in self.words():
            found.setdefault(self.pieces[i].lower(), []).append(i)
        return {word: at for word, at in found.items() if word not in STOP and synonyms(word)}

    def count(self, share: float) -> int:
        """So many words, one at least."""
        return max(1, int(share * sum(piece.isalpha() for piece in self.pieces)))

    def written(self) -> tuple[str, tuple[Answer, ...]]:
        """The context that the pieces are now, and the answers where they are in it."""
        ends = np.cumsum([0, *map(len, self.pieces)])
        moved = []
        for text, start in self.question.answers:
            i = int(np.searchsorted(self.starts, start, side="right")) - 1
            moved.append(Answer(text, int(ends[i] + start - self.starts[i])))
        return "".join(self.pieces), tuple(moved)


def replace(text: Context, share: float, synonyms: Synonyms, random: np.random.Generator) -> None:
    """A synonym for some of the words, wherever they stand."""
    known = text.known(synonyms)
    for word in random.permutation(sorted(known))[: text.count(share)]:
        chosen = random.choice(list(synonyms(str(word))))
        for i in known[str(word)]:
            is_title = text.pieces[i][:1].isupper()
            text.pieces[i] = str(chosen).capitalize() if is_title else str(chosen)


def insert(text: Context, share: float, synonyms: Synonyms, random: np.random.Generator) -> None:
    """Synonyms of some words after other words."""
    known = sorted(text.known(synonyms))
    places = [i for i, piece in enumerate(text.pieces) if piece.isalpha() and text.may_follow[i]]
    if not known or not places:
        return
    for _ in range(text.count(share)):
        word, place = random.choice(known), random.choice(places)
        text.pieces[place] += " " + str(random.choice(list(synonyms(str(word)))))


def swap(text: Context, share: float, synonyms: Synonyms, random: np.random.Generator) -> None:
    """Some pairs of words change places."""
    words = text.words()
    for _ in range(text.count(share) if len(words) > 1 else 0):
        i, j = random.choice(words, 2, replace=False)
        text.pieces[i], text.pieces[j] = text.pieces[j], text.pieces[i]


def leave_out(text: Context, share: float, synonyms: Synonyms, random: np.random.Generator) -> None:
    """Some words go."""
    for i in text.words():
        if random.random() < share:
            text.pieces[i] = ""


WAYS = {"replaced": replace, "inserted": insert, "swapped": swap, "left_out": leave_out}


def nearest_words(
    embedding: Float[np.ndarray, "v d"], tokenizer: Tokenizer, *, k: int = 5, least: float = 0.5
) -> Synonyms:
    """Synonyms by the rows of a token embedding: the words whose rows point the same way.

    A word is a token that is the whole of it; pieces of words and other words have none. Forms of
    the same word are among them, and so may be its opposite: rows say what stands in like places.

    Args:
      embedding: row by token id.
      tokenizer: of those ids.
      k: words at most, >= 1.
      least: their cosine, -1 to 1.
    Returns:
      word -> its nearest words, the nearest first.
    """
    at_least(1, k=k)
    size = min(tokenizer.size, len(embedding))
    tokens = [tokenizer.backend.token(i) or "" for i in range(size)]
    ids = np.array([i for i, word in enumerate(tokens) if is_word(word)], int)
    places = {tokens[i]: place for place, i in enumerate(ids)}
    rows = np.asarray(embedding, np.float32)[ids]
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    found: dict[str, tuple[str, ...]] = {}

    def nearest(word: str) -> Sequence[str]:
        if word not in places:
            return ()
        if word not in found:
            cosines = rows @ rows[places[word]]
            cosines[places[word]] = -np.inf
            order = np.argsort(-cosines, kind="stable")[:k]
            found[word] = tuple(tokens[ids[i]] for i in order if cosines[i] >= least)
        return found[word]

    return nearest


def is_word(token: str) -> bool:
    """Whether a token is a word of two letters or more in lower case, no stop word."""
    return len(token) > 1 and token.isalpha() and token.islower() and token not in STOP
