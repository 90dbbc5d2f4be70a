"""Rows of the harness's requests: token by token."""

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as hs

from ffnlab.errors import ConfigError
from ffnlab.formats import Tokenizer
from ffnlab.formats.tokenizer.backends import LibraryBackend
from ffnlab.formats.tokenizer.files import Beside
from ffnlab.models import DecoderConfig
from ffnlab.text.lm_eval.texts import Row, Texts

VOCAB = ["<s>", "</s>", "<e>", "a", "b", "c", "d", " ", "ab", "cd"]
S, END, E, A, B, C, D, BLANK, AB, CD = range(len(VOCAB))


def texts(before=None, limit=6, **roles) -> Texts:
    """An encoder with merges ab and cd, for a model that reads `limit` tokens."""
    vocab = {token: i for i, token in enumerate(VOCAB)}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("a", "b"), ("c", "d")]))
    inner.add_special_tokens(VOCAB[:3])
    if before:
        pairs = [(token, vocab[token]) for token in ("<s>", "</s>")]
        inner.post_processor = tokenizers.processors.TemplateProcessing(
            before, special_tokens=pairs
        )
    tokenizer = Tokenizer(LibraryBackend(inner), bos=2, beside=Beside(config=roles))
    config = DecoderConfig(
        vocab=len(VOCAB),
        width=8,
        hidden=8,
        layers=1,
        heads=1,
        kv_heads=1,
        head_dim=8,
        max_positions=limit,
    )
    return Texts(tokenizer, config)


BOTH = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize(
    ("before", "roles", "pair", "row"),
    [
        ("<s> $A", BOTH, ("a", "c"), Row([S, A, C], 2)),
        (None, BOTH, ("a", "c"), Row([A, C], 1)),
        # A token spans both: the context keeps its own, the continuation is what is left.
        ("<s> $A", BOTH, ("a", "bc"), Row([S, A, C], 2)),
        ("<s> $A", BOTH, ("da", "bca"), Row([S, D, A, C, A], 3)),
        # Blanks at the context's end belong to the continuation.
        ("<s> $A", BOTH, ("a  ", "c"), Row([S, A, BLANK, BLANK, C], 2)),
        ("<s> $A", BOTH, (" ", "c"), Row([S, BLANK, C], 1)),
        (None, BOTH, (" ", "c"), Row([S, BLANK, C], 1)),
        # What is put behind a text is counted with the context.
        ("<s> $A </s>", BOTH, ("a", "bca"), Row([S, A, END, A, END], 3)),
        # Nothing before the continuation: the prefix token, once.
        ("<s> $A", BOTH, ("", "ab"), Row([S, AB], 1)),
        (None, BOTH, ("", "ab"), Row([S, AB], 1)),
        (None, BOTH, ("", "<s>ab"), Row([S, AB], 1)),
        (None, {"eos_token": "</s>"}, ("", "ab"), Row([END, AB], 1)),
        (None, {"eos_token": "</s>"}, ("", "<e>"), Row([END, E], 1)),
        # A text that begins with the prefix token gets no other.
        ("<s> $A", BOTH, ("<s>a", "c"), Row([S, A, C], 2)),
        ("<s> $A", BOTH, ("</s>a", "c"), Row([S, END, A, C], 3)),
        ("<s> $A", {"eos_token": "</s>"}, ("</s>a", "c"), Row([END, A, C], 2)),
        # Too long: the beginning goes; all of the continuation is there.
        ("<s> $A", BOTH, ("ddddddd", "cc"), Row([D, D, D, D, D, C, C], 5)),
        (None, BOTH, ("d", "cccccc"), Row([D, C, C, C, C, C, C], 1)),
        ("<s> $A", BOTH, ("a", ""), Row([S, A], 2)),
    ],
)
def test_pairs(before, roles, pair, row):
    assert texts(before, **roles).pair(*pair) == row


@pytest.mark.parametrize(
    ("pair", "count"),
    [(("c", "d"), 0), (("", "<s>"), 0), (("d", "ccccccc"), 7), (("", "ccccccc"), 7)],
)
def test_continuations_that_cannot_be_scored_are_named(pair, count):
    with pytest.raises(ConfigError, match=f"has {count} tokens of its own; 1 to 6 are accepted"):
        texts("<s> $A", **BOTH).pair(*pair)


def test_the_prefix_is_the_token_that_the_files_name():
    assert texts(**BOTH).prefix == S
    assert texts(eos_token="</s>").prefix == END  # as for transformers, whatever the ids say
    assert texts().prefix == E  # no names: the ids of the tokenizer
    assert [t.end for t in (texts(**BOTH), texts(bos_token="<s>"))] == ["</s>", ""]
    with pytest.raises(ConfigError, match="no bos or eos id"):
        Texts(
            Tokenizer(LibraryBackend(texts().tokenizer.backend.inner)),
            DecoderConfig(8, 8, 8, 1, 1, 1, 8),
        )


def test_rolling_windows():
    assert texts(limit=4, **BOTH).rolling("aaaacccca") == [
        Row([S, A, A, A, A], 1),
        Row([A, C, C, C, C], 1),
        Row([C, C, C, C, A], 4),  # the last one has all the context that there is room for
    ]
    assert texts("<s> $A", **BOTH).rolling("ab") == [Row([S, S, AB], 1)]
    assert texts("<s> $A", **BOTH).rolling("<s>ab") == [Row([S, S, AB], 1)]
    assert texts(**BOTH).rolling("<s>ab") == [Row([S, S, AB], 1)]
    assert texts(**BOTH).rolling("") == []


@settings(max_examples=100, deadline=None)
@given(hs.text("abcd ", max_size=40), hs.integers(1, 9), hs.booleans())
def test_rolling_scores_every_token_once_with_all_that_fits_before_it(text, limit, begun):
    encoder = texts("<s> $A" if begun else None, limit, **BOTH)
    ids = [S, *encoder.tokenizer.encode(text, special=begun)]
    rows, place = encoder.rolling(text), 1
    for row in rows:
        scored = row.ids[row.first :]
        assert ids[place : place + len(scored)] == scored
        place += len(scored)
        begin = max(place - limit - 1, 0)
        assert row.ids == ids[begin:place] and row.first >= 1
    assert place == len(ids)


def test_prompts():
    begun = texts("<s> $A", **BOTH)
    assert begun.prompt("ab", 5) == begun.prompt("<s>ab", 5) == [S, AB]
    assert begun.prompt("</s>ab", 5) == [S, END, AB]
    assert begun.prompt("dddab", 3) == [D, D, AB]
    assert texts("<s> $A", eos_token="</s>").prompt("</s>ab", 5) == [S, END, AB]
    assert texts(**BOTH).prompt("", 5) == [S]
