"""Answers from logits against a search over all spans, and the pieces of a window's layout."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffnlab.data import (
    Answer,
    Question,
    SpanLayout,
    answers_of,
    by_article,
    find_folder,
    span_layout,
    span_windows,
    squad,
)
from ffnlab.errors import ConfigError
from ffnlab.formats import Tokenizer
from ffnlab.scores import exact_match, span_f1, span_scores
from ffnlab.storage.files import write_json

TEXTS = ("abcdefgh", "xyz", "no")
QUESTIONS = [Question(t, "?", t, (Answer(t[1], 1),), t[:2]) for t in TEXTS]


def letters(text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """A token for each letter."""
    return [ord(c) for c in text], [(i, i + 1) for i in range(len(text))]


WINDOWS = span_windows(QUESTIONS, letters, SpanLayout(6, 2, last=(3,)))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), longest=st.integers(1, 5))
def test_the_best_span_of_all_windows(seed, longest):
    logits = np.random.default_rng(seed).normal(size=(*WINDOWS.tokens.shape, 2))
    logits = logits.astype(np.float32)
    found = answers_of(WINDOWS, QUESTIONS, logits, longest=longest)
    for i, question in enumerate(QUESTIONS):
        best, text = -np.inf, ""
        for w in np.flatnonzero(WINDOWS.question == i):
            inside = np.flatnonzero(WINDOWS.offsets[w, :, 0] >= 0)
            for s in inside:
                for e in inside:
                    total = float(logits[w, s, 0]) + float(logits[w, e, 1])
                    if s <= e < s + longest and total > best:
                        a, b = WINDOWS.offsets[w, s, 0], WINDOWS.offsets[w, e, 1]
                        best, text = total, question.context[a:b]
        assert found[i] == text


def test_logits_that_are_no_numbers_give_no_answer():
    logits = np.full((*WINDOWS.tokens.shape, 2), np.nan, np.float32)
    logits[WINDOWS.question == 1] = 0
    assert answers_of(WINDOWS, QUESTIONS, logits)[::2] == ["", ""]
    with pytest.raises(ConfigError, match=r"logits \(2, 6, 2\)"):
        answers_of(WINDOWS, QUESTIONS, logits[:2])
    with pytest.raises(ConfigError, match="longest=0"):
        answers_of(WINDOWS, QUESTIONS, logits, longest=0)


def test_articles_keep_their_order_and_their_questions():
    more = [*QUESTIONS, QUESTIONS[0]._replace(name="again")]
    found = by_article(more)
    assert [[q.name for q in each] for each in found] == [[TEXTS[0], "again"], ["xyz"], ["no"]]


def test_means_of_scores():
    predicted, right = ["The cat!", "a dog", ""], [["cat"], ["a big dog", "cow"], []]
    exact, f1 = span_scores(predicted, right)
    assert exact == pytest.approx(2 / 3)
    assert f1 == pytest.approx((1 + span_f1("a dog", ["a big dog"]) + 1) / 3)
    as_answers = [[Answer(text, 0) for text in each] for each in right]
    assert span_scores(predicted, as_answers) == (exact, f1)
    assert exact_match("THE cat", ["a cat"]) == 1
    with pytest.raises(ConfigError, match="0 predictions for 0 questions"):
        span_scores([], [])
    with pytest.raises(ConfigError, match="1 predictions for 2 questions"):
        span_scores(["a"], [["a"], ["b"]])


def test_windows_of_a_bert(tmp_path):
    library = pytest.importorskip("tokenizers", reason="the extra 'run' is not installed")
    vocab = {w: i for i, w in enumerate("[PAD] [UNK] [CLS] [SEP] who is it is old".split()[:8])}
    inner = library.Tokenizer(library.models.WordLevel(vocab, unk_token="[UNK]"))
    inner.pre_tokenizer = library.pre_tokenizers.Whitespace()
    inner.save(str(tmp_path / "tokenizer.json"))
    roles = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    write_json(tmp_path / "tokenizer_config.json", roles)
    tokenizer = Tokenizer.load(tmp_path)
    assert span_layout(tokenizer, 9, 2) == SpanLayout(9, 2, (2,), (3,), (3,), 0)
    assert tokenizer.spans("is  né who") == (
        [vocab["is"], 1, vocab["who"]],
        [(0, 2), (4, 6), (7, 10)],
    )
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"] == vocab
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ConfigError, match="no id to begin a text with"):
        span_layout(Tokenizer.load(tmp_path), 9, 2)


def test_bytes_of_a_character_stand_for_it():
    tokenizer = Tokenizer.bytes()
    ids, offsets = tokenizer.spans("a€b")
    assert bytes(ids) == "a€b".encode() and offsets == [(0, 1), (1, 2), (1, 2), (1, 2), (2, 3)]
    with pytest.raises(ValueError, match="cannot be encoded"):
        tokenizer.spans("\ud800")


def test_minilm_finds_the_answers_of_xquad_again():
    folder = find_folder("minilm")
    if folder is None or find_folder("xquad") is None:
        pytest.skip("no minilm and xquad in FFNLAB_DATA: `make minilm` puts the first there")
    tokenizer, questions = Tokenizer.load(folder), squad()[:60]
    windows = span_windows(questions, tokenizer.spans, span_layout(tokenizer, 160, 80))
    has = np.flatnonzero(windows.end > 0)
    logits = np.zeros((*windows.tokens.shape, 2), np.float32)
    logits[has, windows.start[has], 0] = logits[has, windows.end[has], 1] = 1
    found = answers_of(windows, questions, logits, longest=60)
    exact, f1 = span_scores(found, [q.answers for q in questions])
    assert exact > 0.98 and f1 > 0.99  # an answer may end within a token
