"""Texts with classes, and their tokens in rows of one length.

A file of them is JSON lines, an object {"text": "…", "label": …} each; a label is a number from 0
on, or a name. The sentences of the polarity data set come from the archive that it is given out in.
"""

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from ffnlab.data.folders import folder
from ffnlab.data.text.documents import Encoder, around
from ffnlab.errors import ConfigError, FFNLabError, FormatError, first_line
from ffnlab.storage.files import JSON_LIMIT, parse_json
from ffnlab.storage.npz import READ_ERRORS

__all__ = ["LabelledTexts", "TokenRows", "labelled_texts", "sentence_polarity", "token_rows"]

POLARITY = {"negative": "rt-polarity.neg", "positive": "rt-polarity.pos"}
MOST_CLASSES = 2**15


class LabelledTexts(NamedTuple):
    """Texts with classes.

    Attributes:
      texts: n of them, none empty.
      y: class of each, [n] int32.
      classes: names by class; () where the file has numbers.
    """

    texts: tuple[str, ...]
    y: Int32[np.ndarray, "n"]
    classes: tuple[str, ...]


class TokenRows(NamedTuple):
    """Texts as tokens, n rows of one length t, filled up at their ends.

    Attributes:
      tokens: [n, t] int32.
      valid: [n, t], false on padding.
    """

    tokens: Int32[np.ndarray, "n t"]
    valid: Bool[np.ndarray, "n t"]


def sentence_polarity(path: str | Path | None = None) -> LabelledTexts:
    """5,331 negative and as many positive sentences of film reviews (arXiv cs/0506075).

    Args:
      path: the archive sentence_polarity.zip; that of FFNLAB_DATA when None.
    Returns:
      the negative ones (class 0), then the positive ones, in the order of their files.
    Raises:
      FFNLabError: there is no file.
      FormatError: it is no such archive.
    """
    name = "sentence_polarity"
    file = folder(name) / f"{name}.zip" if path is None else Path(path)
    if not file.is_file():
        raise FFNLabError(f"{file}: there is no such file")
    texts: list[str] = []
    y: list[int] = []
    try:
        with zipfile.ZipFile(file) as archive:
            for number, member in enumerate(POLARITY.values()):
                with archive.open(f"{name}/{member}") as stream:
                    content = stream.read(JSON_LIMIT + 1)
                if len(content) > JSON_LIMIT:
                    raise FormatError(f"{file}: {member} has more than {JSON_LIMIT} bytes")
                lines = [line.strip() for line in content.decode("latin-1").split("\n")]
                found = [line for line in lines if line]
                texts += found
                y += [number] * len(found)
    except READ_ERRORS as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{file} is not the polarity archive: {first_line(error)}") from None
    if not texts:
        raise FormatError(f"{file}: no sentences")
    return LabelledTexts(tuple(texts), np.asarray(y, np.int32), tuple(POLARITY))


def labelled_texts(path: str | Path, classes: Sequence[str] = ()) -> LabelledTexts:
    """Texts with classes from a file of JSON lines.

    Args:
      path: UTF-8, an object with "text" and "label" on every line that is not blank; the labels
        are all numbers (0, 1, …) or all names.
      classes: names by class; those of the file in the order of the alphabet when ().
    Raises:
      FFNLabError: the file cannot be read.
      FormatError: a line that is no such object, labels of both sorts, or a name that is not in
        `classes`; the line is named.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise FFNLabError(f"{path} cannot be read: {error.strerror}") from None
    texts, labels, places = [], [], []
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            text, label = _entry(line, f"{path}, line {number}")
            texts.append(text)
            labels.append(label)
            places.append(number)
    if not texts:
        raise FormatError(f"{path}: no texts")
    sorts = {type(label) for label in labels}
    if len(sorts) > 1:
        raise FormatError(f"{path}: some labels are numbers and some are names; one sort is needed")
    if sorts == {int}:
        return LabelledTexts(tuple(texts), np.asarray(labels, np.int32), tuple(classes))
    names = tuple(classes) or tuple(sorted(set(labels)))
    index = {name: i for i, name in enumerate(names)}
    for label, place in zip(labels, places, strict=True):
        if label not in index:
            raise FormatError(
                f"{path}, line {place}: label {label[:60]!r} is none of {list(names)[:20]}"
            )
    return LabelledTexts(tuple(texts), np.array([index[x] for x in labels], np.int32), names)


def _entry(line: bytes, where: str) -> tuple[str, int | str]:
    """Text and label of one line."""
    entry = parse_json(line, where)
    text = entry.get("text") if isinstance(entry, dict) else None
    label = entry.get("label") if isinstance(entry, dict) else None
    is_number = type(label) is int and 0 <= label < MOST_CLASSES
    if not isinstance(text, str) or not text or not (is_number or (type(label) is str and label)):
        example = json.dumps({"text": "a fine film", "label": 1})
        raise FormatError(f"{where} is not like {example}: a text, and a number or a name")
    return text, label  # type: ignore[return-value]


def token_rows(texts: Sequence[str], tokenizer: Encoder, length: int) -> TokenRows:
    """Texts as rows of tokens, each between what the tokenizer puts around a text.

    Args:
      texts: at least one.
      tokenizer: of the model.
      length: longest row; a longer text loses its end. Rows are as long as the longest.
    Raises:
      ConfigError: no texts, or a length that leaves no room for a token.

    >>> from ffnlab.formats import Tokenizer
    >>> token_rows(["ab", "c"], Tokenizer.bytes(), length=8).tokens.tolist()
    [[0, 97, 98], [0, 99, 0]]
    """
    first, last = around(tokenizer)
    room = length - len(first) - len(last)
    if room < 1 or not texts:
        raise ConfigError(
            f"length={length} with {len(first) + len(last)} tokens around each of {len(texts)} "
            "texts; at least one text and room for one token are needed"
        )
    rows = [[*first, *tokenizer.encode(text)[:room], *last] for text in texts]
    width = max(map(len, rows))
    tokens = np.zeros((len(rows), width), np.int32)
    valid = np.arange(width) < np.array([len(row) for row in rows])[:, None]
    for place, row in zip(tokens, rows, strict=True):
        place[: len(row)] = row
    return TokenRows(tokens, valid)
