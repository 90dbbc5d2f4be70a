"""What the study of PMET measures: a language model that was taught facts, and edits of it.

60 people have a birthplace, an instrument, a profession and a language each: 240 facts, each told
in two ways. A decoder of four layers reads them in an endless stream until it knows them. Then ten
of them are changed at once.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ffnlab.data import TextBatches
from ffnlab.errors import require
from ffnlab.formats import Tokenizer
from ffnlab.formats.tokenizer.backends import LibraryBackend
from ffnlab.learning import backprop, members
from ffnlab.losses import next_token
from ffnlab.models import Decoder, DecoderConfig
from ffnlab.studies.side_by_side import learned_members

__all__ = ["World", "taught", "world"]

PEOPLE = 60
# A way to ask and another one; and what the answers are.
RELATIONS = (
    ("{} was born in", "the birthplace of {} is"),
    ("{} plays the", "the instrument of {} is the"),
    ("{} is a", "the profession of {} is a"),
    ("{} speaks", "the language of {} is"),
)
OBJECTS = (
    "rome oslo paris cairo lima quito delhi seoul|new york|san juan|cape town|hong kong",
    "harp flute oboe viola cello lute drum horn|french horn|bass guitar|grand piano|slide trombone",
    "baker painter sailor miner tailor farmer pilot judge|fire fighter|night guard|street sweeper"
    "|tax collector",
    "greek latin dutch czech thai welsh danish norse|old english|high german|low german|old irish",
)
FIRST = (
    "ada bo cy dan eve fay gus hal ida jo kit lee mae ned ola pat ray sue tom uma vic wes zoe ann"
)
LAST = (
    "stone brook field marsh hill wood lake reed thorn vale cliff moor dale ford glen heath isle "
    "knoll ledge mead peak ridge shore wold"
)
CONFIG = {
    "width": 64,
    "hidden": 256,
    "hiddens": (256, 256, 256, 32),
    "layers": 4,
    "windows": (2, 1, 1, None),
    "heads": 4,
    "kv_heads": 4,
    "head_dim": 16,
}
BATCH, LENGTH, RATE = 32, 32, 3e-3
START = "<s>"


class Triple(NamedTuple):
    """A fact of the world.

    Attributes:
      subject: of whom.
      relation: number in `RELATIONS`.
      answer: what follows, with its space.
    """

    subject: str
    relation: int
    answer: str

    def prompt(self, way: int = 0) -> str:
        """The text before the answer, in one of the two ways."""
        return RELATIONS[self.relation][way].replace("{}", self.subject)


@dataclasses.dataclass(frozen=True)
class World:
    """People and what is true of them.

    Attributes:
      triples: four of each person.
      tokenizer: of words.
      stream: tokens of all that is told, in an order that was drawn.
    """

    triples: tuple[Triple, ...]
    tokenizer: Tokenizer
    stream: np.ndarray

    def answers(self, relation: int) -> list[str]:
        """All answers of a relation."""
        return answers_of(relation)


def answers_of(relation: int) -> list[str]:
    """All answers of a relation, those of two words behind those of one."""
    ones, *twos = OBJECTS[relation].split("|")
    return [f" {text}" for text in (*ones.split(), *twos)]


def tokenizer_of_words() -> Tokenizer:
    """A tokenizer whose tokens are the words of the world; every text begins with one more."""
    library = require("tokenizers", extra="run")
    texts = [text.replace("{}", "") for pair in RELATIONS for text in pair]
    texts += [answer for relation in range(len(RELATIONS)) for answer in answers_of(relation)]
    words = dict.fromkeys(" ".join([FIRST, LAST, *texts, "."]).split())
    ids = {word: i for i, word in enumerate([START, *words])}
    inner = library.Tokenizer(library.models.WordLevel(ids, unk_token=START))
    inner.pre_tokenizer = library.pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens([START])
    inner.post_processor = library.processors.TemplateProcessing(
        single=f"{START} $A", pair=f"{START} $A $B", special_tokens=[(START, ids[START])]
    )
    return Tokenizer(LibraryBackend(inner), bos=ids[START])


@functools.cache
def world(seed: int, texts: int = 20_000) -> World:
    """A world that a seed draws, and what is told of it.

    Args:
      seed: of names, answers and the order of the texts.
      texts: of one to three sentences each.
    """
    random, tokenizer = np.random.default_rng(seed), tokenizer_of_words()
    pairs = [f"{a} {b}" for a in FIRST.split() for b in LAST.split()]
    people = [pairs[i] for i in random.choice(len(pairs), PEOPLE, replace=False)]
    triples = tuple(
        Triple(person, relation, str(random.choice(answers_of(relation))))
        for person in people
        for relation in range(len(RELATIONS))
    )
    told = [
        tokenizer.encode(triple.prompt(way) + triple.answer) for triple in triples for way in (0, 1)
    ]
    end, start = tokenizer.encode(" ."), tokenizer.encode("", special=True)
    ids: list[int] = []
    for count in random.integers(1, 4, texts):
        ids += start
        for number, i in enumerate(random.integers(len(told), size=count)):
            ids += [*(end if number else ()), *told[i]]
    return World(triples, tokenizer, np.asarray(ids, np.int32))


def taught(seeds: Sequence[int], steps: int, place: World) -> list[Decoder]:
    """Models that learned the world, one of each seed, side by side."""
    config = DecoderConfig(vocab=place.tokenizer.size, max_positions=64, **CONFIG)
    made = [Decoder(config, key=jax.random.key(seed)) for seed in seeds]
    joined = jax.tree.map(lambda *leaves: jnp.stack(leaves), *made)
    optimizer = optax.adam(optax.cosine_decay_schedule(RATE, steps))
    rule = members(lambda: backprop(next_token, optimizer), len(seeds))
    batches = TextBatches(place.stream, BATCH, LENGTH, seeds[0])
    return learned_members(rule, joined, batches, steps, seeds[0], len(seeds))
