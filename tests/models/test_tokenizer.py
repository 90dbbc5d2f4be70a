"""Tokenizers: exact round trips, streams without half characters, files others load."""

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as hs

from ffnlab.errors import FormatError
from ffnlab.models.tokenizer import Tokenizer

# Characters of every length in UTF-8, and those that look like special tokens.
TEXT = hs.text(
    hs.one_of(hs.characters(exclude_categories=["Cs"]), hs.sampled_from("\0Āā<0x>\u20ac🎉\ufffd"))
)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The byte-level tokenizer as `tokenizers` reads it."""
    folder = tmp_path_factory.mktemp("bytes")
    Tokenizer.bytes().save(folder)
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def bpe(folder):
    """A tokenizer with merges, special tokens and byte fallback, as Llama files have."""
    alphabet = "abcdefgh ."
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *alphabet]
    tokens += ["ab", "cd", "abcd"]
    model = tokenizers.models.BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[("a", "b"), ("c", "d"), ("ab", "cd")],
        unk_token="<unk>",
        byte_fallback=True,
    )
    inner = tokenizers.Tokenizer(model)
    inner.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    inner.add_special_tokens(["<s>", "</s>"])
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    folder.mkdir(exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": "kept"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@settings(max_examples=300)
@given(text=TEXT)
def test_bytes_are_exact_and_the_library_agrees(library, text):
    ours = Tokenizer.bytes()
    ids = ours.encode(text)
    assert ids == list(text.encode())
    assert ours.decode(ids) == text
    assert ours.encode(text, special=True) == [0, *ids]
    assert library.encode(text, add_special_tokens=False).ids == ids
    assert library.encode(text).ids == [0, *ids]
    assert library.decode(ids, skip_special_tokens=False) == text


@settings(max_examples=300)
@given(ids=hs.lists(hs.integers(0, 255), max_size=12))
def test_streams_of_any_bytes_join_to_the_whole(library, ids):
    ours = Tokenizer.bytes()
    stream = ours.stream()
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.finish() == ours.decode(ids)
    assert ours.decode(ids) == library.decode(ids, skip_special_tokens=False)


@settings(max_examples=100, deadline=None)
@given(text=TEXT)
def test_streams_of_byte_fallback_join_to_the_whole(tmp_path_factory, text):
    folder = tmp_path_factory.getbasetemp() / "bpe"
    tokenizer = Tokenizer.load(folder if folder.exists() else bpe(folder))
    ids = tokenizer.encode(text)
    stream = tokenizer.stream()
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_comes_when_it_is_whole():
    stream = Tokenizer.bytes().stream()
    assert [stream.push(i) for i in "a€🎉".encode()] == ["a", "", "", "€", "", "", "", "🎉"]
    assert [stream.push(i) for i in b"\xe2\x82"] == ["", ""]
    assert stream.finish() == "\ufffd"


def test_files_round_trip(tmp_path):
    Tokenizer.bytes().save(tmp_path / "a")
    back = Tokenizer.load(tmp_path / "a")
    assert (back.size, back.bos, back.eos, back.pad) == (256, 0, (0,), 0)
    assert back.encode("x\0") == [120, 0]
    loaded = Tokenizer.load(bpe(tmp_path / "b"))
    assert (loaded.bos, loaded.eos, loaded.pad) == (1, (2,), None)
    assert loaded.encode("abcd.", special=True) == [1, 271, 268]
    assert loaded.decode([1, 271, 2]) == "<s>abcd</s>"
    assert loaded.decode([1, 271, 2], skip_special=True) == "abcd"
    loaded.save(tmp_path / "c")
    again = Tokenizer.load(tmp_path / "c")
    assert again.config["chat_template"] == "kept"
    assert again.encode("a é") == loaded.encode("a é")


def test_generation_config_lists_several_ends(tmp_path):
    folder = bpe(tmp_path / "b")
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.eos == (2, 5)
    tokenizer.save(tmp_path / "c")
    assert Tokenizer.load(tmp_path / "c").eos == (2, 5)


def test_bad_input_is_named(tmp_path):
    ours = Tokenizer.bytes()
    with pytest.raises(ValueError, match="surrogate"):
        ours.encode("\ud800")
    with pytest.raises(ValueError, match=r"256.*0\.\.255"):
        ours.decode([256])
    with pytest.raises(FormatError, match="eos=300"):
        Tokenizer(ours.backend, eos=(300,))
    with pytest.raises(FormatError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": 3}')
    with pytest.raises(FormatError, match="not a tokenizer"):
        Tokenizer.load(tmp_path)
    folder = bpe(tmp_path / "b")
    (folder / "tokenizer_config.json").write_text('{"eos_token": "gone"}')
    with pytest.raises(FormatError, match="eos_token='gone' is not a token"):
        Tokenizer.load(folder)
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(FormatError, match="JSON object"):
        Tokenizer.load(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"eos_token_id": [true]}')
    with pytest.raises(FormatError, match="no token id"):
        Tokenizer.load(folder)
