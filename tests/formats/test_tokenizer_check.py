"""Hostile tokenizer files: all that they can do ends in an error with the file's name."""

import base64
import copy
import json
import random
import subprocess
import sys

import pytest

from ffnlab.errors import FormatError
from ffnlab.formats.tokenizer.backends import native
from ffnlab.formats.tokenizer.check import check
from ffnlab.formats.tokenizer.tokenizer import Tokenizer

WORDS = "Hello world, ab abc."
MODEL = {
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
    "vocab": {c: i for i, c in enumerate("abcdeHlowrld ")},
    "merges": [],
}
PLAIN = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": None,
    "post_processor": None,
    "decoder": None,
    "model": MODEL,
}
TEXT = {"Sequence": {"id": "A", "type_id": 0}}
EXTRA = {"SpecialToken": {"id": "x", "type_id": 0}}


def replace(pattern: dict, content: str) -> dict:
    """A step that replaces text."""
    return {"type": "Replace", "pattern": pattern, "content": content}


def template(single: list, ids: int = 1) -> dict:
    """A template of one text, with a special token of so many ids."""
    special = {"x": {"id": "x", "ids": [0] * ids, "tokens": ["a"] * ids}}
    return {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": special}


def charsmap(table: bytes) -> dict:
    """A normalizer with a table of characters."""
    encoded = base64.b64encode(table).decode()
    return {"type": "Precompiled", "precompiled_charsmap": encoded}


TEN = replace({"String": "a"}, "a" * 10)
LONGER = {
    "replacements in a row": {"normalizer": {"type": "Sequence", "normalizers": [TEN] * 4}},
    "replaced between all": {"normalizer": replace({"Regex": ""}, "a" * 2000)},
    "a step without its type": {"normalizer": {"pattern": {"String": ""}, "content": "a" * 2000}},
    "decoded": {"decoder": {"type": "Sequence", "decoders": [TEN] * 4}},
    "decoded between all": {"decoder": [{"type": "BPEDecoder", "suffix": ""}] * 11},
    "before a text": {"normalizer": {"type": "Prepend", "prepend": "x" * 2000}},
    "letters for bytes": {"pre_tokenizer": {"pretokenizers": [{"type": "ByteLevel"}] * 11}},
    "a table's size": {"normalizer": charsmap(b"\xff\xff\xff\xff")},
    "a table's end": {"normalizer": charsmap(b"\x08\0\0\0\0\0\0\0")},
    "no table": {"normalizer": charsmap(b"")},
    "a table's text": {"normalizer": charsmap(b"\x04\0\0\0\0\0\0\0" + b"a" * 2000 + b"\0")},
    "special tokens": {"post_processor": template([EXTRA] * 50 + [TEXT], ids=100)},
    "copies": {"post_processor": template([TEXT] * 17)},
    "copies of copies": {"post_processor": {"processors": [template([TEXT] * 5)] * 2}},
    "a prefix": {"model": MODEL | {"continuing_subword_prefix": "#" * 65}},
    "words": {"model": {"type": "WordPiece", "max_input_chars_per_word": 2**40}},
    "added tokens": {"added_tokens": [{"content": "a" * 2**21}] * 3},
    "a pattern": {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "a" * 2**15}}},
}


@pytest.mark.parametrize("name", LONGER)
def test_parts_that_make_a_text_longer_are_bounded(name):
    with pytest.raises(FormatError, match=r"x\.json: not a tokenizer: .*at most"):
        check(PLAIN | LONGER[name], "x.json")


@pytest.mark.parametrize(
    "part",
    [
        {},
        # As in the files of Llama 2, T5 and Gemma.
        {
            "normalizer": {
                "normalizers": [{"prepend": "\u2581"}, replace({"String": " "}, "\u2581")]
            }
        },
        {"normalizer": {"normalizers": [replace({"Regex": " {2,}"}, "\u2581")]}},
        {"decoder": {"decoders": [replace({"String": "\u2581"}, " "), {"type": "Fuse"}]}},
        {"pre_tokenizer": {"pretokenizers": [{"type": "Split"}, {"type": "ByteLevel"}]}},
        {"post_processor": template([EXTRA, TEXT, EXTRA])},
        {"normalizer": charsmap(b"\x04\0\0\0\0\0\0\0" + b"one\0two\0")},
        {"model": {"type": "WordPiece", "max_input_chars_per_word": 100}},
    ],
)
def test_usual_parts_pass(part):
    check(PLAIN | part, "x.json")


def test_a_file_that_is_no_object(tmp_path):
    (tmp_path / "tokenizer.json").write_text("[1]")
    with pytest.raises(FormatError, match=r"tokenizer\.json: not a tokenizer: must hold a JSON"):
        Tokenizer.load(tmp_path)


# What the library raises is a bare Exception, or a panic, which is none.
BROKEN = {
    "panics at a text": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "panics at a table": {"normalizer": charsmap(b"\x08\0\0\0" + b"a" * 40)},
    "panics at an order": {"post_processor": template([{"Sequence": {"id": "B", "type_id": 0}}])},
    "panics at a merge": {
        "model": MODEL
        | {
            "continuing_subword_prefix": "##",
            "vocab": {"a": 0, "b": 1, "": 2},
            "merges": [["a", "b"]],
        }
    },
    "fails at a text": {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "gone"}},
    "fails at once": {"model": MODEL | {"dropout": 7.0}},
    "panics at ids": {
        "decoder": {"type": "Strip", "content": "a", "start": 0, "stop": 10},
        "normalizer": {"type": "Strip", "strip_left": True, "strip_right": True},
    },
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_the_library_raises_is_ours(tmp_path, name, capfd):
    (tmp_path / "tokenizer.json").write_text(json.dumps(PLAIN | BROKEN[name]))
    with pytest.raises(FormatError, match=r"tokenizer\.json: "):
        tokenizer = Tokenizer.load(tmp_path)
        tokenizer.encode(WORDS, special=True)
        tokenizer.decode([0, 0, 0])


def test_other_interruptions_pass():
    for error in (KeyboardInterrupt, SystemExit, GeneratorExit):
        with pytest.raises(error), native("x"):
            raise error
    with pytest.raises(FormatError, match="x: 'told'"), native("x"):
        raise Exception("told")


CHILD = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
resource.setrlimit(resource.RLIMIT_CPU, (900, 900))
import tokenizers
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
from ffnlab.errors import FFNLabError
from ffnlab.models.tokenizer import Tokenizer
for folder in sys.argv[1:]:
    print(folder, flush=True)
    try:
        tokenizer = Tokenizer.load(folder)
        for text in ("", "Hello world, ab abc.", "a" * 3000, "\\u00e9\\u4e2d\\U0001f389 \\0"):
            ids = tokenizer.encode(text, special=True)
            tokenizer.decode(ids), tokenizer.decode(range(20), skip_special=True)
    except FFNLabError:
        pass
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert peak - before < 2 << 20, f"{(peak - before) >> 10} MiB"
print("done")
"""


def mutated(draw: random.Random, value: object) -> object:
    """A value in the place of another: extreme, of another type, or much longer."""
    choices = [None, True, -1, 0, 2**31, 2**40, 1e308, "", "a" * 1000, [], {}, [value] * 50]
    if isinstance(value, str):
        choices += [value * 1000, value[1:], value + "\0", "(?:a|a)*" * 30]
    return draw.choice(choices)


def mutate(draw: random.Random, content: object) -> None:
    """Changes one place of a JSON document."""
    places = []
    todo = [content]
    while todo:
        found = todo.pop()
        keys = list(found) if isinstance(found, dict) else range(len(found))
        for key in keys:
            places.append((found, key))
            if isinstance(found[key], dict | list):
                todo.append(found[key])
    holder, key = draw.choice(places)
    holder[key] = mutated(draw, holder[key])


def seeds() -> list[dict]:
    """Files with parts of every kind."""
    unigram = {
        "type": "Unigram",
        "unk_id": 0,
        "vocab": [["a", 0.0], ["b", -1.0]],
        "byte_fallback": False,
    }
    piece = {
        "type": "WordPiece",
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
        "vocab": {"[UNK]": 0, "a": 1, "##b": 2},
    }
    added = {"id": 20, "content": "<x>", "single_word": False, "lstrip": True, "rstrip": False}
    parts = {
        "added_tokens": [added | {"normalized": True, "special": True}],
        "truncation": {
            "max_length": 5,
            "strategy": "LongestFirst",
            "stride": 0,
            "direction": "Right",
        },
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, TEN, {"type": "NFKD"}],
        },
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": "\\w+"},
                    "behavior": "Isolated",
                    "invert": True,
                },
                {
                    "type": "ByteLevel",
                    "add_prefix_space": True,
                    "trim_offsets": True,
                    "use_regex": True,
                },
            ],
        },
        "post_processor": template([EXTRA, TEXT]),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "ByteFallback"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 1},
                {"type": "WordPiece", "prefix": "##", "cleanup": True},
                {"type": "CTC", "pad_token": "a", "word_delimiter_token": "|", "cleanup": True},
            ],
        },
    }
    table = {"normalizer": charsmap(b"\x10\0\0\0" + b"\0\1\2\3" * 4 + b"one\0two\0")}
    return [
        PLAIN | parts,
        PLAIN | parts | {"model": unigram},
        PLAIN | {"model": piece},
        PLAIN | table,
    ]


@pytest.mark.fuzz
@pytest.mark.parametrize("seed", range(8))
def test_mutated_files_neither_crash_nor_fill_the_memory(tmp_path, seed):
    draw, folders = random.Random(seed), []
    for number in range(250):
        content = copy.deepcopy(draw.choice(seeds()))
        for _ in range(draw.randint(1, 3)):
            mutate(draw, content)
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "tokenizer.json").write_text(json.dumps(content))
        folders.append(str(folder))
    command = [sys.executable, "-c", CHILD, *folders]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    last = done.stdout.splitlines()[-1]
    assert last == "done", f"{last}: status {done.returncode}: {done.stderr[-600:]}"
