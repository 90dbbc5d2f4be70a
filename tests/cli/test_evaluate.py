"""`ffnlab eval`: what it counts, what it warns of, and that `compress` counts the same."""

import json
import math
import re

import jax
import numpy as np
import pytest

from ffnlab import models
from ffnlab.cli.main import main
from ffnlab.compress import file_text
from ffnlab.compress.text import held_out
from ffnlab.data.text.documents import digest, split
from ffnlab.formats import Tokenizer
from ffnlab.models import Decoder, DecoderConfig
from ffnlab.recipes import Evaluation
from tests.formats.test_tokenizer import bpe

CONFIG = DecoderConfig(
    vocab=300, width=16, hidden=16, layers=1, heads=2, kv_heads=1, head_dim=8, max_positions=64
)


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def folder(request, tmp_path_factory):
    """A model directory with a tokenizer of bytes, or one that puts <s> before texts."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "bytes":
        Tokenizer.bytes().save(folder)
    else:
        bpe(folder)
    models.save(Decoder(CONFIG, key=jax.random.key(1)), folder)
    return folder


def scores(capsys) -> tuple[int, float]:
    """Tokens and bits per byte that the command has printed."""
    out = capsys.readouterr().out
    bits, tokens = re.search(r"([\d.]+) bits per byte \(([\d,]+) tokens", out).groups()
    return int(tokens.replace(",", "")), float(bits)


def by_hand(folder, documents: list[list[int]], start: list[int]) -> float:
    """Nats of documents, each of which follows the one before, without those of what separates."""
    ids = [i for document in documents for i in (*start, *document)]
    scored = [flag for d in documents for flag in (*[False] * len(start), *[True] * len(d))]
    logits = np.asarray(models.load(folder)(jax.numpy.asarray([ids]))[0], np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -sum(logp[i - 1, ids[i]] for i in range(1, len(ids)) if scored[i])


def test_seventeen_bytes_are_seventeen_predictions(folder, tmp_path, capsys):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfabcd efgh. gabah.")
    assert main(["eval", str(folder), "--text", str(tmp_path / "a")]) == 0
    tokens, bits = scores(capsys)
    tokenizer = Tokenizer.load(folder)
    ids = tokenizer.encode("abcd efgh. gabah.")
    assert tokens == len(ids) == (17 if tokenizer.size == 256 else 13)
    nats = by_hand(folder, [ids], [tokenizer.bos])
    assert bits == pytest.approx(nats / math.log(2) / 17, abs=1e-4)


def test_compress_counts_what_eval_counts(folder, tmp_path, capsys):
    text = "".join(f"abcd efgh {i:03} cab.\n" for i in range(60))
    (tmp_path / "a").write_text(text)
    window = 48
    arguments = ["--text", str(tmp_path / "a"), "--held-out", "--window", str(window)]
    assert main(["eval", str(folder), *arguments, "--stride", str(window)]) == 0
    tokens, _ = scores(capsys)
    tokenizer = Tokenizer.load(folder)
    samples = held_out(
        file_text([tmp_path / "a"]), tokenizer, Evaluation(tokens=0, window=window), 300
    )
    rest = split(text.encode())[1]
    assert tokens == samples.counted.sum() == len(tokenizer.encode(rest.decode()))
    assert tokens * samples.bytes_per_token == pytest.approx(len(rest))


def test_documents_are_apart(folder, tmp_path, capsys):
    for name, words in {"a": "abcd cab", "b": "dead beef"}.items():
        (tmp_path / name).write_text(words)
    assert main(["eval", str(folder), "--text", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    tokens, bits = scores(capsys)
    tokenizer = Tokenizer.load(folder)
    documents = [tokenizer.encode("abcd cab"), tokenizer.encode("dead beef")]
    if tokenizer.size == 256:  # a NUL that ends a document is a byte to predict
        assert tokens == 18
        nats = by_hand(folder, [[*documents[0], 0, *documents[1]]], [0])
        assert bits == pytest.approx(nats / math.log(2) / 18, abs=1e-4)
    else:
        assert tokens == sum(map(len, documents))
        nats = by_hand(folder, documents, [tokenizer.bos])
        assert bits == pytest.approx(nats / math.log(2) / 17, abs=1e-4)


def test_a_limit_is_of_bytes_of_text(folder, tmp_path, capsys):
    (tmp_path / "a").write_text("abc é abc")
    for limit, text in {3: "abc", 5: "abc ", 6: "abc é"}.items():
        arguments = ["--text", str(tmp_path / "a"), "--limit", str(limit)]
        assert main(["eval", str(folder), *arguments]) == 0
        tokenizer = Tokenizer.load(folder)
        expected = limit if tokenizer.size == 256 else len(tokenizer.encode(text))
        assert scores(capsys)[0] == expected


@pytest.mark.parametrize(
    ("trained", "more", "warned"),
    [
        (lambda whole: [split(whole)[0]], [], True),
        (lambda whole: [split(whole)[0]], ["--held-out"], False),
        (lambda whole: [whole], ["--held-out"], True),
        (lambda whole: [b"another"], [], False),
    ],
)
def test_text_that_was_trained_on(folder, tmp_path, capsys, trained, more, warned):
    whole = b"abcd cab. \n" * 30
    (tmp_path / "a").write_bytes(whole)
    record = {"documents": {"train": [digest(part) for part in trained(whole)], "held_out": []}}
    (folder / "training.json").write_text(json.dumps(record))
    assert main(["eval", str(folder), "--text", str(tmp_path / "a"), *more]) == 0
    said = capsys.readouterr().err
    assert said.count("ffnlab eval: warning: the model was trained on 1 of the 1") == warned
    assert ("--held-out" in said) == (warned and not more)


def test_the_embedded_model_knows_its_text(tmp_path, capsys):
    from ffnlab.cli.trained import provenance, warn_of_seen
    from ffnlab.data import stdlib_text
    from ffnlab.data.text.documents import documents_of

    record = provenance(None)
    assert len(record["documents"]["train"]) == record["text"]["train_files"]
    text = stdlib_text()
    same = text.identity["train_sha256"] == record["text"]["train_sha256"]
    known = [d for d in documents_of(text.train) if digest(d) in record["documents"]["train"]]
    assert (len(known) == record["text"]["train_files"]) == same
    for document, warned in ((known[-1], True), (b"never seen", False)):
        warn_of_seen("eval", record, [(document, document)])
        assert ("trained on 1 of the 1 documents" in capsys.readouterr().err) == warned
    held = [(d, d) for d in documents_of(text.held_out)]
    warn_of_seen("eval", record, held)
    assert capsys.readouterr().err == ""


def test_held_out_is_of_files(capsys):
    assert main(["eval", "--held-out"]) == 2
    assert "--held-out is of --text" in capsys.readouterr().err
