"""Tokenizers: exact round trips, streams without half characters, files others load."""

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as hs

from ffnlab.errors import FormatError
from ffnlab.formats.tokenizer.backends import LibraryBackend
from ffnlab.formats.tokenizer.tokenizer import Tokenizer

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
    assert again.beside.config["chat_template"] == "kept"
    assert again.encode("a é") == loaded.encode("a é")


def test_generation_config_lists_several_ends(tmp_path):
    folder = bpe(tmp_path / "b")
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.eos == (2, 5)
    tokenizer.save(tmp_path / "c")
    assert Tokenizer.load(tmp_path / "c").eos == (2, 5)


def test_truncation_and_padding_are_switched_off(tmp_path):
    folder = bpe(tmp_path / "b")
    inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    inner.enable_truncation(max_length=8)
    inner.enable_padding(pad_token="<unk>", length=16)
    inner.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.load(folder)
    assert len(tokenizer.encode("abcd. " * 50)) == 3 * 50
    assert tokenizer.encode("ab", special=True) == [1, 269]
    tokenizer.save(tmp_path / "c")
    content = json.loads((tmp_path / "c" / "tokenizer.json").read_text())
    assert content["truncation"] is None and content["padding"] is None


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_ids_beyond_the_tokenizer_are_no_text(tmp_path, kind):
    tokenizer = Tokenizer.bytes() if kind == "bytes" else Tokenizer.load(bpe(tmp_path / "b"))
    ids = tokenizer.encode("ab cd")
    beyond = [tokenizer.size, *ids[:1], 511, *ids[1:], 2**31 - 1, 2**40]
    assert tokenizer.decode(beyond) == "ab cd" == tokenizer.decode(beyond, skip_special=True)
    stream = tokenizer.stream()
    assert "".join([*map(stream.push, beyond), stream.finish()]) == "ab cd"
    with pytest.raises(ValueError, match="ids holds -1"):
        tokenizer.decode([5, -1])


def test_ids_with_gaps_are_all_there(tmp_path):
    folder = bpe(tmp_path / "b")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["abcd"] = 500
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.size == 501
    assert tokenizer.encode("abcd") == [500] and tokenizer.decode([500, 400]) == "abcd"


def test_an_end_beyond_the_tokenizer_is_kept(tmp_path):
    folder = bpe(tmp_path / "b")
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 500]}')
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.eos == (2, 500)
    tokenizer.save(tmp_path / "c")
    assert Tokenizer.load(tmp_path / "c").eos == (2, 500)


def spaced(name: str) -> Tokenizer:
    """A tokenizer of words whose decoder treats the first word of a text in its own way."""
    words = ["<unk>", "hello", "world", "!", "\u2581hello", "\u2581world", "\u2581", "hello</w>"]
    words += ["world</w>", "##lo", "##!", "\u2581\u2581"]
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")
    )
    strip = tokenizers.decoders.Strip(" ", 1, 0)
    replace = tokenizers.decoders.Replace("\u2581", " ")
    inner.decoder = {
        "metaspace": tokenizers.decoders.Metaspace(),
        "llama": tokenizers.decoders.Sequence([replace, tokenizers.decoders.Fuse(), strip]),
        "wordpiece": tokenizers.decoders.WordPiece(),
        "suffix": tokenizers.decoders.BPEDecoder(),
        "fuse": tokenizers.decoders.Fuse(),
    }[name]
    return Tokenizer(LibraryBackend(inner))


def test_the_space_before_the_first_streamed_word_is_there():
    tokenizer = spaced("metaspace")
    prompt, new = [4], [5, 3, 20, 4, 6, 11, 5]
    stream = tokenizer.stream(after=prompt)
    assert [stream.push(i) for i in new] == [" world", "!", "", " hello", " ", "  ", " world"]
    assert [tokenizer.stream().push(i) for i in (5, 2)] == ["world", "world"]


@pytest.mark.parametrize("name", ["metaspace", "llama", "wordpiece", "suffix", "fuse"])
@settings(max_examples=150, deadline=None)
@given(ids=hs.lists(hs.integers(0, 15), min_size=1, max_size=10), data=hs.data())
def test_a_stream_goes_on_where_the_text_stands(name, ids, data):
    tokenizer = spaced(name)
    cut = data.draw(hs.integers(0, len(ids)))
    before, whole = tokenizer.decode(ids[:cut]), tokenizer.decode(ids)
    stream = tokenizer.stream(after=ids[:cut])
    pieces = [*map(stream.push, ids[cut:]), stream.finish()]
    if whole.startswith(before):  # a suffix of the last word is no space
        assert before + "".join(pieces) == whole


def test_all_special_tokens_are_skipped(tmp_path):
    folder = bpe(tmp_path / "b")
    content = json.loads((folder / "tokenizer.json").read_text())
    usual = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    for index, name, special in (
        (300, "<tool>", True),
        (301, "<plain>", False),
        (302, "<m>", False),
    ):
        content["added_tokens"].append(usual | {"id": index, "content": name, "special": special})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "special_tokens_map.json").write_text('{"mask_token": {"content": "<m>"}}')
    tokenizer = Tokenizer.load(folder)
    tools = [tokenizer.encode(t)[0] for t in ("<tool>", "<plain>", "<m>")]
    ids = [1, *tools[:2], 271, tools[2], 2]
    assert tokenizer.decode(ids) == "<s><tool><plain>abcd<m></s>"
    assert tokenizer.decode(ids, skip_special=True) == "<plain>abcd"
    assert Tokenizer.bytes().decode([0, 65, 0], skip_special=True) == "A"


def test_special_tokens_in_a_text_are_split_where_the_file_says_so(tmp_path):
    folder = bpe(tmp_path / "b")
    assert Tokenizer.load(folder).encode("<s>a") == [1, 259]
    config = {"split_special_tokens": True, "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode("<s>a") == [3 + ord("<"), 3 + ord("s"), 3 + ord(">"), 259]
    assert tokenizer.encode("a", special=True) == [1, 259]
    (folder / "tokenizer_config.json").write_text('{"split_special_tokens": "yes"}')
    with pytest.raises(FormatError, match="split_special_tokens='yes': no boolean"):
        Tokenizer.load(folder)


def test_minus_one_is_no_id(tmp_path):
    folder = bpe(tmp_path / "b")
    table = {"pad_token_id": -1, "eos_token_id": [2, -1], "bos_token_id": -1}
    (folder / "generation_config.json").write_text(json.dumps(table))
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.pad, tokenizer.eos) == (None, (2,))
    assert tokenizer.bos == 1  # of tokenizer_config.json
    (folder / "generation_config.json").write_text('{"pad_token_id": -2}')
    with pytest.raises(FormatError, match="pad=-2 is no token id"):
        Tokenizer.load(folder)


def test_the_files_beside_are_written_again(tmp_path):
    folder = bpe(tmp_path / "b")
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 77}')
    tables = {
        "special_tokens_map.json": {"bos_token": "<s>", "eos_token": {"content": "</s>"}},
        "generation_config.json": {"do_sample": True, "temperature": 0.6, "eos_token_id": [2, 5]},
    }
    for name, table in tables.items():
        (folder / name).write_text(json.dumps(table))
    template = "{{ bos_token }}\r\n{{ messages[0].content }} é"
    (folder / "chat_template.jinja").write_bytes(template.encode())
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.bos, tokenizer.eos) == (1, (2, 5))
    tokenizer.save(tmp_path / "c")
    again = Tokenizer.load(tmp_path / "c")
    assert (again.bos, again.eos, again.beside.chat_template()) == (1, (2, 5), template)
    assert (tmp_path / "c" / "chat_template.jinja").read_bytes() == template.encode()
    for name, table in tables.items():
        found = json.loads((tmp_path / "c" / name).read_text())
        assert found | table == found, name
    assert again.beside.config["model_max_length"] == 77
    Tokenizer.bytes().save(tmp_path / "c")  # another tokenizer, which has none of these
    left = {file.name for file in (tmp_path / "c").iterdir()}
    assert left == {"tokenizer.json", "tokenizer_config.json"}


def test_roles_are_those_that_the_files_name(tmp_path):
    folder = bpe(tmp_path / "b")
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>", "bos_token": null}')
    (folder / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": [259, 2]}')
    tokenizer = Tokenizer.load(folder)
    tokenizer.save(tmp_path / "c")
    for found in (tokenizer, Tokenizer.load(tmp_path / "c")):
        assert found.roles == {"eos_token": "</s>"}
        assert (found.role("bos"), found.role("eos")) == (None, 2)
        assert (found.bos, found.eos) == (1, (259, 2))
    assert Tokenizer.bytes().roles == dict.fromkeys(("bos_token", "eos_token", "pad_token"), "\0")


def test_a_digest_is_that_of_all_files(tmp_path):
    folder = bpe(tmp_path / "b")
    seen = {Tokenizer.load(folder).digest(), Tokenizer.bytes().digest()}
    assert Tokenizer.load(folder).digest() in seen
    (folder / "chat_template.jinja").write_text("another")
    seen.add(Tokenizer.load(folder).digest())
    content = json.loads((folder / "tokenizer.json").read_text())
    content["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(content))
    seen.add(Tokenizer.load(folder).digest())
    assert len(seen) == 4


def test_a_text_that_begins_twice(tmp_path):
    tokenizer = Tokenizer.load(bpe(tmp_path / "b"))
    assert tokenizer.begins_twice(tokenizer.encode("<s>ab", special=True))
    assert not tokenizer.begins_twice(tokenizer.encode("<s>ab"))
    assert not tokenizer.begins_twice(tokenizer.encode("ab", special=True))


def test_bad_input_is_named(tmp_path):
    ours = Tokenizer.bytes()
    with pytest.raises(ValueError, match="surrogate"):
        ours.encode("\ud800")
    with pytest.raises(FormatError, match="eos=-3"):
        Tokenizer(ours.backend, eos=(-3,))
    with pytest.raises(FormatError, match=f"pad={2**31}"):
        Tokenizer(ours.backend, pad=2**31)
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
