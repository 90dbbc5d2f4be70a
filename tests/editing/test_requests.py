"""Facts as rows of tokens: where subjects end, what follows, what is refused."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edited_models import FACTS, small
from ffnlab.editing.facts import Fact
from ffnlab.editing.requests import WORDS, answers, requests, sampled_prefixes
from ffnlab.errors import ConfigError
from ffnlab.formats import Tokenizer
from ffnlab.models import Decoder, DecoderConfig
from tests.formats.test_tokenizer import bpe, spaced

BYTES = Tokenizer.bytes()
WIDE = Decoder(
    DecoderConfig(300, 8, 8, layers=1, heads=1, kv_heads=1, head_dim=8, max_positions=200),
    key=jax.random.key(0),
)


def test_rows_by_hand():
    rows = requests(FACTS[:2], BYTES, small(), ("A. ",))
    assert rows.tokens.shape == (2, 3, 1 + len("A. Now Bo Lee plays g"))
    assert rows.labels[0].tolist() == [[-1, -1, 120], [-1, -1, 120], [-1, -1, -1]]
    assert rows.labels[1, 0].tolist() == list(b" go")
    for i, texts in enumerate(
        (["Al is", "A. Al is", "Al is a"], ["Now Bo Lee plays g", "A. Now Bo Lee plays g", None])
    ):
        for j, text in enumerate(texts):
            ids = rows.tokens[i, j][rows.valid[i, j]]
            assert text is None or bytes(ids.tolist()) == b"\0" + text.encode()
            assert not rows.valid[i, j][: len(rows.valid[i, j]) - len(ids)].any(), "on the left"
    last = rows.tokens[np.arange(2)[:, None], np.arange(3), rows.place]
    assert bytes(last.reshape(-1).tolist()) == b"llleee"


words = st.text(st.sampled_from("ab \u00e9\u20ac\U0001f389.{}"), max_size=6)


@settings(max_examples=40)
@given(before=words, subject=words, after=words, new=words, prefix=words)
def test_rows_are_the_texts(before, subject, after, new, prefix):
    if "{}" in before + subject + after or not subject.strip() or not new or "\0" in prefix:
        return
    fact = Fact(subject.strip(), before + "{}" + after, new)
    rows = requests([fact], BYTES, WIDE, (prefix or "x",))
    for j, text in enumerate((fact.text, (prefix or "x") + fact.text)):
        ids, labels = rows.tokens[0, j][rows.valid[0, j]], rows.labels[0, j]
        whole = [*ids, labels[-1]]
        assert bytes(np.uint8(whole)).decode() == "\0" + text + new
        assert bytes(np.uint8(labels[labels >= 0])).decode() == new
        upto = rows.tokens[0, j][: rows.place[0, j] + 1][rows.valid[0, j][: rows.place[0, j] + 1]]
        head = fact.head if j == 0 else (prefix or "x") + fact.head
        assert bytes(np.uint8(upto)).decode() == "\0" + head
    upto = rows.tokens[0, 2][: rows.place[0, 2] + 1][rows.valid[0, 2][: rows.place[0, 2] + 1]]
    assert bytes(np.uint8(upto)).decode() == "\0" + fact.subject


def test_tokens_of_several_characters(tmp_path):
    tokenizer = Tokenizer.load(bpe(tmp_path / "bpe"))
    rows = requests([Fact("ab", "{} cd", " abcd")], tokenizer, WIDE)
    ab, cd, abcd = (tokenizer.encode(text)[0] for text in ("ab", "cd", "abcd"))
    space = tokenizer.encode(" ")[0]
    assert rows.tokens[0, 0][rows.valid[0, 0]].tolist() == [1, ab, space, cd, space]
    assert rows.place[0, 0] == rows.tokens.shape[2] - 4 and rows.labels[0, 0].tolist() == [
        space,
        abcd,
    ]
    for fact, said in (
        (Fact("a", "{}b is", " c"), r"'a' ends at no boundary of tokens; its last token is 'ab'"),
        (Fact("e", "{} a", "b"), r"'e a' ends at no boundary"),
        (Fact("e", "{} a</s>", "b"), r"the special token 2"),
        (Fact("e", "{} a", "<s>"), r"the special token 1"),
    ):
        with pytest.raises(ConfigError, match=said):
            requests([fact], tokenizer, WIDE)
    with pytest.raises(ConfigError, match=r"(?s)'ab'.*special token"):  # all that is wrong
        requests([Fact("a", "{}b is", " c"), Fact("e", "{} a", "<s>")], tokenizer, WIDE)
    with pytest.raises(ConfigError, match="prefixes: one is empty"):
        requests([Fact("e", "{} a", " b")], tokenizer, WIDE, ("",))


def test_a_tokenizer_that_drops_what_it_reads():
    with pytest.raises(ConfigError, match="no boundary"):
        requests([Fact("hello world", "{} !", "x")], spaced("fuse"), WIDE)


def test_models_that_do_not_fit():
    with pytest.raises(ConfigError, match=r"token 195; the model has 0\.\.127"):
        requests([Fact("\xe9", "{} is", " x")], BYTES, small())
    with pytest.raises(ConfigError, match="68 tokens; the model has a context of 64"):
        requests([Fact("x" * 60, "{} is ", "some")], BYTES, small())


def test_answers_end_together():
    rows = answers([("ab", "c"), ("d", "efg")], BYTES, small())
    assert rows.labels.tolist() == [[-1, -1, 99], [101, 102, 103]]
    assert rows.tokens.tolist() == [[0, 0, 97, 98], [0, 100, 101, 102]]
    assert rows.valid.tolist() == [[False, True, True, True], [True] * 4]


def test_prefixes_of_the_model_are_texts():
    found = sampled_prefixes(small(), BYTES, 0)
    assert [text[: len(word)] for text, word in zip(found, WORDS, strict=True)] == list(WORDS)
    assert all(text.endswith(". ") and "\0" not in text for text in found)
    assert found == sampled_prefixes(small(), BYTES, 0) != sampled_prefixes(small(), BYTES, 1)
    requests(FACTS, BYTES, WIDE, found)
