"""Facts: what a language model is to say of a subject, and the files that list them.

    [[fact]]
    subject = "Ada"
    prompt = "{} was born in"              # {} is the subject
    new = " Rome"                          # what is to follow, as it is written: spaces count
    old = " London"                        # what followed before; may be left out
    paraphrases = ["The birthplace of {} is"]
    neighbours = ["Bob was born in"]       # of whom `old` is true too, and stays so

JSON holds the same: `{"fact": [{"subject": …}, …]}`. A file is untrusted: its size, its number of
texts and their lengths are bounded, texts are filled in by replacing and never by formatting, and
control characters, which a terminal would obey, are refused. All problems are reported at once.
"""

import dataclasses
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ffnlab.errors import ConfigError, FormatError
from ffnlab.formats.untrusted import file_size, parse_toml, quoted
from ffnlab.options import nearest
from ffnlab.storage.files import StrPath, parse_json

__all__ = ["Fact", "checked", "parse_facts", "read_facts"]

FILE_LIMIT = 16 << 20  # bytes
FACTS_LIMIT = 20_000  # the paper edits 10,000 at once
TEXTS_LIMIT = 200  # paraphrases, or neighbours, of a fact
TEXT_LIMIT = 4_000  # characters
PLACE = "{}"
ALLOWED = "\n\t"  # of control characters: text of programs has them


@dataclasses.dataclass(frozen=True)
class Fact:
    """What a model is to say.

    Attributes:
      subject: of whom or of what, without spaces around it.
      prompt: text before the answer; "{}" stands in it once, for the subject.
      new: the answer that is wanted; it follows the prompt as it is written.
      old: the answer before, or None.
      paraphrases: other prompts for the same answer; "{}" in them is the subject.
      neighbours: prompts whose answer is `old` and stays so; only where that is given.
    Raises:
      ConfigError: a text that is none of this.

    >>> fact = Fact("Ada", "{} was born in", " Rome")
    >>> fact.text, fact.head
    ('Ada was born in', 'Ada')
    """

    subject: str
    prompt: str
    new: str
    old: str | None = None
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise ConfigError(f"fact of subject {quoted(self.subject)}: " + "; ".join(problems))

    def _problems(self) -> Iterator[str]:
        for name in ("subject", "prompt", "new", "old"):
            text = getattr(self, name)
            if text is not None:
                yield from (f"{name} {problem}" for problem in problems_of(text))
        for name in ("paraphrases", "neighbours"):
            texts = getattr(self, name)
            if len(texts) > TEXTS_LIMIT:
                yield f"{name} has {len(texts)} texts; at most {TEXTS_LIMIT} are accepted"
            else:
                found = (problem for text in texts for problem in problems_of(text))
                yield from (f"one of its {name} {problem}" for problem in found)
        if self.subject != self.subject.strip():
            yield "subject has spaces around it, which are not a part of it"
        if PLACE in self.subject:
            yield f"subject has {PLACE!r} in it, which stands for itself"
        if self.prompt.count(PLACE) != 1:
            yield (
                f"prompt={quoted(self.prompt)} has {PLACE!r} {self.prompt.count(PLACE)} times; "
                "it stands once, for the subject"
            )
        if self.neighbours and self.old is None:
            yield "neighbours are prompts whose answer is old, which is not given"
        if self.new == self.old:
            yield f"new and old are both {quoted(self.new)}"

    @property
    def text(self) -> str:
        """The prompt with the subject in it."""
        return self.filled(self.prompt)

    @property
    def head(self) -> str:
        """The text up to the end of the subject: what decides the key of the edit."""
        return self.prompt.partition(PLACE)[0] + self.subject

    def filled(self, text: str) -> str:
        """A prompt with the subject in it, where it has a place for it."""
        return text.replace(PLACE, self.subject)


def problems_of(text: str) -> Iterator[str]:
    """What is wrong with a text of a fact, a sentence each."""
    if not text:
        yield "is empty"
    if len(text) > TEXT_LIMIT:
        yield f"has {len(text)} characters; at most {TEXT_LIMIT} are accepted"
        return
    strange = [c for c in text if unicodedata.category(c) in ("Cc", "Cs") and c not in ALLOWED]
    if strange:
        yield f"has the character {strange[0]!a}; control characters are not accepted"


def read_facts(path: StrPath) -> tuple[Fact, ...]:
    """The facts of a file.

    Args:
      path: `NAME.toml` or `NAME.json`, see the module.
    Returns:
      as `checked`.
    Raises:
      FormatError: no such file, none of the two formats, too large, or not what its name says.
      ConfigError: what is in it are no facts, or they contradict each other; all is listed.
    """
    path = Path(path)
    if path.suffix not in (".toml", ".json"):
        raise FormatError(f"{path}: facts are read from a .toml or a .json file")
    size = file_size(path)
    if size > FILE_LIMIT:
        raise FormatError(f"{path}: {size} bytes of facts; at most {FILE_LIMIT} are read")
    parse = parse_json if path.suffix == ".json" else parse_toml
    return parse_facts(parse(path.read_bytes(), str(path)), str(path))


def parse_facts(content: object, source: str = "facts") -> tuple[Fact, ...]:
    """Facts of what a file holds.

    Args:
      content: {"fact": [{"subject": …, "prompt": …, "new": …}, …]}.
      source: its name, for messages.
    Raises:
      ConfigError: see `read_facts`.

    >>> table = {"subject": "Ada", "prompt": "{} lives in", "new": " Rome"}
    >>> parse_facts({"fact": [table]})[0].old is None
    True
    """
    entries = content.get("fact") if isinstance(content, Mapping) else None
    if not isinstance(content, Mapping) or not isinstance(entries, list) or len(content) > 1:
        raise ConfigError(f"{source}: a list of tables named 'fact' is accepted, and nothing else")
    if len(entries) > FACTS_LIMIT:
        raise ConfigError(f"{source}: {len(entries)} facts; at most {FACTS_LIMIT} are accepted")
    facts, problems = [], []
    for number, entry in enumerate(entries, 1):
        try:
            facts.append(fact_of(entry))
        except ConfigError as error:
            problems.append(f"fact {number}: {error}")
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems[:20])
        raise ConfigError(f"{source}: {len(problems)} of {len(entries)} are no facts\n{listed}")
    return checked(facts, source)


def fact_of(entry: object) -> Fact:
    """One table of a file as a fact; ConfigError where it is none."""
    fields = {field.name: field for field in dataclasses.fields(Fact)}
    if not isinstance(entry, dict):
        raise ConfigError(f"{type(entry).__name__} is no table")
    unknown = [name for name in entry if name not in fields]
    if unknown:
        said = ", ".join(f"{quoted(name)}{nearest(name, fields)}" for name in unknown[:5])
        raise ConfigError(f"unknown {said}; there are {', '.join(fields)}")
    missing = [name for name in ("subject", "prompt", "new") if name not in entry]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} missing")
    given: dict[str, object] = {}
    for name, value in entry.items():
        if name in ("paraphrases", "neighbours"):
            if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
                raise ConfigError(f"{name} must be a list of strings")
            given[name] = tuple(value)
        elif isinstance(value, str):
            given[name] = value
        else:
            raise ConfigError(f"{name} is {type(value).__name__}, not a string")
    return Fact(**given)  # type: ignore[arg-type]


def checked(facts: Sequence[Fact], source: str = "facts") -> tuple[Fact, ...]:
    """Facts that can be written together, as they are.

    Args:
      facts: one or more.
      source: where they are from, for messages.
    Warns:
      UserWarning: different prompts share all text up to the end of the subject, and so the key of
        the edit, which can hold a compromise only; or a neighbour is the prompt of another fact.
    Raises:
      ConfigError: no facts, or one prompt twice, with one answer or two.
    """
    if not facts:
        raise ConfigError(f"{source}: no facts; one or more are needed")
    kept: dict[str, Fact] = {}
    against, twice = [], []
    for fact in facts:
        first = kept.setdefault(fact.text, fact)
        if first.new != fact.new:
            said = f"{quoted(first.new)} and {quoted(fact.new)}"
            against.append(f"after {quoted(fact.text)} both {said} are to follow")
        elif first is not fact:
            twice.append(quoted(fact.text))
    if against:
        raise ConfigError(f"{source}: facts contradict each other: " + "; ".join(against[:20]))
    if twice:
        raise ConfigError(
            f"{source}: each fact is given once; there twice: {', '.join(twice[:20])}"
        )
    warn_of(tuple(facts), source)
    return tuple(facts)


def warn_of(facts: tuple[Fact, ...], source: str) -> None:
    """Warns of facts that are in each other's way, see `checked`."""
    texts = {fact.text for fact in facts}
    near = [fact.filled(text) for fact in facts for text in fact.neighbours]
    moved = [quoted(text) for text in dict.fromkeys(near) if text in texts]
    if moved:
        warnings.warn(
            f"{source}: neighbours, whose answers are to stay, that are changed themselves: "
            + ", ".join(moved[:5]),
            stacklevel=3,
        )
    counts = Counter(fact.head for fact in facts)
    shared = {head: count for head, count in counts.items() if count > 1}
    if shared:
        heads = ", ".join(quoted(head) for head in list(shared)[:5])
        warnings.warn(
            f"{source}: {sum(shared.values())} facts share all text up to the end of their subject "
            f"with another ({heads}): what is written there is a compromise between them",
            stacklevel=3,
        )
