"""What the study of PMET measures: a language model that was taught facts, and edits of it.

50 people have a birthplace, an instrument, a profession and a language each: 200 facts, each told
in two ways. A decoder of four layers reads them in an endless stream until it knows them. Then ten
of them are changed at once.

The attention of its first three layers sees the token itself, in the first one the token before it
too, and only the last layer sees the whole text, with few channels in its FFN. So a fact is
recalled at the last token of its subject, as in large models, which is what PMET builds on. An
ordinary decoder of four layers recalls it where the answer is to follow, and what is added at the
subject does not reach it.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Bool, Int

from ffnlab import transform
from ffnlab.data import TextBatches
from ffnlab.editing import EditScores, Fact, PmetStats, edit_scores, likelihood, pmet
from ffnlab.editing.requests import requests
from ffnlab.editing.writing import keys_and_outputs
from ffnlab.errors import require
from ffnlab.formats import Tokenizer
from ffnlab.formats.tokenizer.backends import LibraryBackend
from ffnlab.learning import backprop, members
from ffnlab.losses import next_token
from ffnlab.models import Decoder, DecoderConfig
from ffnlab.studies.side_by_side import learned_members

__all__ = [
    "Drawn",
    "Exact",
    "Outcome",
    "Triple",
    "World",
    "draws",
    "exact",
    "knows",
    "outcome",
    "taught",
    "world",
]

PEOPLE = 50
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
EDITS, CALIBRATION = 10, 4  # facts changed at once; batches of text
LAYERS = (0, 1, 2)  # those that see the subject and nothing of what is asked of it
# Of step 1, for all ways alike: the authors' of GPT-J, but clamp, which is theirs of Llama.
NUMBERS: Mapping[str, Any] = {"rate": 0.2, "steps": 30, "clamp": 1.0, "kl": 1.0}
Setting = Mapping[str, Any]
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
    stream: Int[np.ndarray, "t"]


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


class Drawn(NamedTuple):
    """Ten facts that are to be changed, of ten people.

    Attributes:
      triples: as they are.
      facts: as they are to be.
    """

    triples: tuple[Triple, ...]
    facts: tuple[Fact, ...]


def draws(place: World, seed: int, count: int) -> list[Drawn]:
    """Facts to be changed, of people of whom each is in one draw at most."""
    random = np.random.default_rng(seed)
    people = random.permutation(PEOPLE)[: count * EDITS].reshape(count, EDITS)
    found = []
    for each in people:
        triples = [place.triples[4 * person + random.integers(4)] for person in each]
        facts = [
            Fact(
                triple.subject,
                RELATIONS[triple.relation][0],
                str(random.choice([a for a in answers_of(triple.relation) if a != triple.answer])),
                triple.answer,
                (RELATIONS[triple.relation][1],),
            )
            for triple in triples
        ]
        found.append(Drawn(tuple(triples), tuple(facts)))
    return found


class Outcome(NamedTuple):
    """What became of ten edits.

    Attributes:
      scores: efficacy, generality behind the other way to ask, and for specificity the share of
        all other facts that were known whose answer is still the one that is said.
      said: share of the new answers of which each token is the most likely one.
      same: as specificity, of the other facts of the ten people.
      probabilities: of the new answers behind the prompt after step 1, its vectors in place.
      reach: largest norm of a vector over that of what it is added to.
    """

    scores: EditScores
    said: float
    same: float
    probabilities: Sequence[float]
    reach: float


def outcome(model: Decoder, place: World, drawn: Drawn, setting: Setting) -> Outcome:
    """Changes ten facts and looks at all of them.

    Args:
      model: that was taught.
      place: what it was taught.
      drawn: what is changed.
      setting: options of `pmet`.
    """
    batches = [TextBatches(place.stream, BATCH, LENGTH, 7)(i)[:, :-1] for i in range(CALIBRATION)]
    made = pmet(drawn.facts, place.tokenizer, prefixes=behind(place, drawn), **setting)
    new, stats = transform.apply(made, model, batches, progress=False)
    asked = edit_scores(new, place.tokenizer, drawn.facts)
    rest = [triple for triple in place.triples if triple not in drawn.triples]
    others = [t for t, known in zip(rest, knows(model, place, rest), strict=True) if known]
    people = {triple.subject for triple in drawn.triples}
    kept = knows(new, place, others)
    same = np.array([triple.subject in people for triple in others])
    said = likelihood(new, place.tokenizer, [(f.text, f.new) for f in drawn.facts]).said
    return Outcome(
        dataclasses.replace(asked, specificity=float(kept.mean())),
        float(said.mean()),
        float(kept[same].mean()),
        np.exp(-np.asarray(stats.nats, np.float64)).tolist(),
        reach_of(stats),
    )


def reach_of(stats: PmetStats) -> float:
    """The largest norm of a vector over that of what it is added to."""
    sizes = [
        np.linalg.norm(vectors, axis=1) / np.linalg.norm(before, axis=1)
        for vectors, before in zip(stats.vectors, stats.before, strict=True)
    ]
    return float(np.max(sizes))


def behind(place: World, drawn: Drawn) -> tuple[str, ...]:
    """Sentences of other people, which prompts are put behind."""
    people = {triple.subject for triple in drawn.triples}
    others = [triple for triple in place.triples if triple.subject not in people]
    return tuple(f"{t.prompt()}{t.answer} . " for t in others[:: len(others) // 5][:5])


def knows(model: Decoder, place: World, triples: Sequence[Triple]) -> Bool[np.ndarray, "n"]:
    """Which answers a model says, each of their tokens the most likely one."""
    return likelihood(model, place.tokenizer, [(t.prompt(), t.answer) for t in triples]).said


class Exact(NamedTuple):
    """One fact, written into one layer with next to nothing against it.

    Attributes:
      error: largest difference between what the FFN gives at the subject and what it is to give.
      said: whether the new answer is what the model says.
    """

    error: float
    said: bool


def exact(model: Decoder, place: World, drawn: Drawn, count: int) -> list[Exact]:
    """Writes single facts into the last of the edited layers.

    Args:
      count: of facts, each into a model of its own.
    """
    layer, found = LAYERS[-1], []
    batches = [TextBatches(place.stream, BATCH, LENGTH, 7)(0)[:, :-1]]
    for fact in drawn.facts[:count]:
        options = {"layers": (layer,), "prefixes": (), "preserve": 1e-6, **NUMBERS, "decay": 0.01}
        made = pmet([fact], place.tokenizer, **options)
        new, stats = transform.apply(made, model, batches, progress=False)
        rows = requests([fact], place.tokenizer, new)
        _, outputs = keys_and_outputs(new, rows, (f"layers[{layer}].ffn.down",))
        error = float(np.abs(np.asarray(outputs) - stats.targets).max())
        said = likelihood(new, place.tokenizer, [(fact.text, fact.new)]).said[0]
        found.append(Exact(error, bool(said)))
    return found
