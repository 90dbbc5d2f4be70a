"""The text of a run by a tokenizer of one's own, in rows that keep documents apart."""

import dataclasses

import numpy as np
import pytest

from ffnlab.cli.inputs.corpus import load_corpus, with_ends
from ffnlab.cli.train import TrainConfig, run
from ffnlab.cli.training import DataConfig
from ffnlab.compress import file_text
from ffnlab.data.text.documents import digest, documents_of, read_documents, split
from ffnlab.errors import ConfigError
from ffnlab.formats import Tokenizer, load
from ffnlab.parallel import from_table, held_out_bits
from tests.formats.test_tokenizer import bpe

MODEL = {"width": 8, "hidden": 16, "layers": 1, "heads": 1, "kv_heads": 1, "head_dim": 8}


@pytest.fixture
def texts(tmp_path):
    """Paths of texts made of the letters that `bpe` knows."""
    paths = []
    for i, line in enumerate(("abcd efgh. ", "dead beef. ", "a bad cab. ")):
        path = tmp_path / f"{i}.txt"
        path.write_text(line * (40 + 10 * i))
        paths.append(str(path))
    return paths


def test_documents_have_their_special_tokens(tmp_path):
    tokenizer = Tokenizer.load(bpe(tmp_path / "bpe"))
    one, two = with_ends([b"abcd", b"cab"], tokenizer)
    assert one[0] == two[0] == tokenizer.bos and one[-1] == two[-1] == tokenizer.eos[0]
    assert tokenizer.decode(one.tolist(), skip_special=True) == "abcd" and len(one) == 3
    assert [d.tolist() for d in with_ends([b"ab", b"c"], Tokenizer.bytes())] == [
        [0, 97, 98, 0],
        [0, 99, 0],
    ]


def test_bytes_per_token_and_identity(texts, tmp_path):
    folder = bpe(tmp_path / "bpe")
    data = DataConfig(tuple(texts[:2]), (texts[2],), tokenizer=str(folder))
    corpus = load_corpus(data, 512)
    assert corpus.held_out.nbytes == 11 * 60
    assert corpus.held_out.bytes_per_token < 1.5 and "tokenizer_sha256" in corpus.identity
    as_bytes = load_corpus(dataclasses.replace(data, tokenizer=""), 256)
    assert as_bytes.held_out.bytes_per_token == 1 and as_bytes.held_out.nbytes == 11 * 60
    with pytest.raises(ConfigError, match=r"the model has ids 0..255: they do not belong together"):
        load_corpus(data, 256)
    with pytest.raises(ConfigError, match=r"id 104, the model has ids 0..103: they do not belong"):
        load_corpus(dataclasses.replace(data, tokenizer=""), 104)


def test_training_holds_out_what_compressing_holds_out(tmp_path):
    paths = []
    for name, line in (("a", "Satz {} für Anfänger\n"), ("b", "zwei {}\n"), ("c", "дрей{}")):
        paths.append(str(tmp_path / name))
        words = "".join(map(line.format, range(50)))
        (tmp_path / name).write_text(words, encoding="utf-8")
    corpus = load_corpus(DataConfig(text=tuple(paths)), 256)
    text = file_text(paths)
    assert corpus.text == text.held_out and corpus.train == text.train + b"\0"
    whole = read_documents(paths)
    assert documents_of(corpus.text) == [split(document)[1] for document in whole]
    for document in documents_of(corpus.text):
        document.decode()
        assert digest(document) in corpus.digests["held_out"] and document not in corpus.train
    assert corpus.digests["train"] == [digest(split(document)[0]) for document in whole]
    assert corpus.held_out.counted.sum() == len(corpus.text) - 1


@pytest.mark.parametrize("tokenizer", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_a_run_with_documents_apart(texts, tmp_path, tokenizer, packed):
    folder = bpe(tmp_path / "bpe")
    table = {
        "model": MODEL | {"vocab": 300},
        "run": {"steps": 6, "evaluate_every": 3},
        "data": {"text": texts[:2], "held_out": texts[2:], "batch": 2, "length": 16, "stride": 8},
        "extension": {"steps": 2, "batch": 2, "length": 24},
    }
    table["data"] |= {"packed": packed, "tokenizer": str(folder) if tokenizer else ""}
    settings = from_table(table, TrainConfig, "the test")
    corpus = load_corpus(settings.data, 300)
    batches = corpus.batches(settings)
    shapes = [np.shape(batches(p).tokens if packed else batches(p)) for p in (0, 7)]
    assert shapes == [(2, 17), (2, 25)]
    record = run(settings, tmp_path / "run")
    bits = held_out_bits(load(tmp_path / "run" / "model"), corpus.windows(settings))
    assert record["steps"] == 8
    np.testing.assert_allclose(
        record["held_out_bits_per_byte"], bits / corpus.held_out.bytes_per_token, rtol=1e-5
    )
    saved = Tokenizer.load(tmp_path / "run" / "model")
    assert saved.encode("abcd") == (
        Tokenizer.load(folder) if tokenizer else Tokenizer.bytes()
    ).encode("abcd")


def test_the_validation_text_is_part_of_the_training_text():
    whole, part = (load_corpus(DataConfig(text), 256) for text in ("stdlib", "stdlib-validation"))
    assert part.text != whole.text and part.train != whole.train
    assert len(part.train) + len(part.text) == len(whole.train) + 1
    held = [module for module in whole.text.split(b"\0") if module]
    assert held and not any(module in part.train + part.text for module in held)
    with pytest.raises(ConfigError, match="'stdlib', 'stdlib-validation' or a list of files"):
        load_corpus(DataConfig("stdlib-test"), 256)
