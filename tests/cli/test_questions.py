"""Questions on texts by the command line: a span head is trained, saved, scored and resumed."""

import dataclasses
import json
import signal

import jax
import numpy as np
import pytest

from ffnlab import models
from ffnlab.cli.changes import table_at
from ffnlab.cli.inputs.data_kinds import QuestionsConfig
from ffnlab.cli.inputs.questions import load_questions
from ffnlab.cli.train import run
from ffnlab.cli.training import TrainConfig
from ffnlab.data import ArrayBatches
from ffnlab.errors import ConfigError, FormatError
from ffnlab.formats import load
from ffnlab.layers import MoE
from ffnlab.models import Encoder, EncoderConfig
from ffnlab.parallel import from_table
from ffnlab.testing import equal

SIZES = {"vocab": 256, "width": 8, "hidden": 16, "layers": 1, "heads": 2, "head_dim": 4}
ENCODER = {"kind": "encoder", **SIZES, "max_positions": 32, "types": 2}
RUN = {"steps": 6, "log_every": 1, "checkpoint_every": 2, "dtype": "float32"}
DATA = {"kind": "questions", "length": 24, "stride": 6, "batch": 4, "longest": 3}
HEAD = {"name": "top2_head", "experts": 2, "hidden": 8}
LOSS = {"balance": 1.0, "choices": 1, "per_sequence": True, "keyed": True}


def paragraph(i: int) -> dict:
    """A context with a question on its number."""
    context = f"it has {i} of them, no more"
    answer = {"text": str(i), "answer_start": 7}
    asked = {"id": f"q{i}", "question": "how?", "answers": [answer]}
    return {"context": context, "qas": [asked]}


@pytest.fixture
def questions(tmp_path):
    """A file in the format of SQuAD, of twenty articles."""
    articles = [{"title": f"a{i}", "paragraphs": [paragraph(i)]} for i in range(20)]
    (tmp_path / "questions.json").write_text(json.dumps({"data": articles}))
    return str(tmp_path / "questions.json")


def settings(questions, model=ENCODER, **more):
    """A run of a few steps."""
    data = DATA | {"questions": questions}
    return from_table({"model": model, "data": data, "run": RUN} | more, TrainConfig)


def test_a_dense_span_head_learns_where_the_answer_is(tmp_path, questions):
    chosen = settings(
        questions,
        ENCODER | {"head": "span"},
        run=RUN | {"steps": 80, "checkpoint_every": 80},
        optimizer={"rate": 3e-2, "warmup": 2},
    )
    record = run(chosen, tmp_path / "run")
    assert record["held_out_exact"] >= 0.5, "of two held-out questions"
    assert record["held_out_f1"] >= record["held_out_exact"]
    assert record["data"]["train"] == 18 and record["data"]["held_out"] == 2
    assert record["held_out_error"] == pytest.approx(1 - record["held_out_f1"])


@pytest.mark.slow
def test_a_mixture_on_a_loaded_encoder_stopped_and_resumed_to_the_same_bits(
    tmp_path, questions, monkeypatch
):
    # Without a pooler, of which config.json says nothing.
    config = EncoderConfig(**SIZES, max_positions=32, types=2)
    models.save(Encoder(config, key=jax.random.key(0)), tmp_path / "bert")
    start = str(tmp_path / "bert")
    table = {"start": start, "model": table_at(start), "transform": [HEAD], "run": RUN}
    table |= {"data": DATA | {"questions": questions}, "loss": "routed", "loss_options": LOSS}
    whole = from_table(table, TrainConfig)
    record = run(whole, tmp_path / "whole")
    assert record["finished"] and 0 <= record["held_out_f1"] <= 1
    found = load(tmp_path / "whole" / "model")
    assert isinstance(found.layers[-1].ffn, MoE) and found.config.head == "span"
    usual = ArrayBatches.__call__

    def stopped(batches, position):
        if position == 2:
            signal.raise_signal(signal.SIGTERM)
        return usual(batches, position)

    monkeypatch.setattr(ArrayBatches, "__call__", stopped)
    assert not run(whole, tmp_path / "cut")["finished"]
    monkeypatch.undo()
    run(whole, tmp_path / "cut", resume=True)
    assert equal(load(tmp_path / "cut" / "model"), found), "what is drawn too"
    meshed = dataclasses.replace(whole, run=dataclasses.replace(whole.run, mesh="dp=2,ep=2"))
    run(meshed, tmp_path / "meshed")
    rows = [
        [json.loads(line)["loss"] for line in file.read_text().splitlines() if "loss" in line]
        for file in (tmp_path / name / "metrics.jsonl" for name in ("whole", "meshed"))
    ]
    np.testing.assert_allclose(rows[1], rows[0], rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 64}, "length=64 is more than max_positions=32"),
        ({"length": 8}, "leaves .* tokens for the context"),
        ({"questions": "nowhere.json"}, "there is no such file"),
    ],
)
def test_data_that_does_not_fit(questions, change, message):
    options = {"questions": questions, "length": 24, "stride": 6} | change
    data = QuestionsConfig(**options)
    with pytest.raises(ValueError, match=message):
        load_questions(data, EncoderConfig(**SIZES, max_positions=32, head="span"))


def test_few_articles_and_damaged_files(tmp_path, questions):
    data = QuestionsConfig(questions=questions, length=24, stride=6)
    small = dataclasses.replace
    config = EncoderConfig(**SIZES, max_positions=32, head="span")
    text = (tmp_path / "questions.json").read_text()
    few = json.loads(text)
    few["data"] = few["data"][:3]
    (tmp_path / "few.json").write_text(json.dumps(few))
    with pytest.raises(ConfigError, match="3 records; 10 are needed"):
        load_questions(small(data, questions=str(tmp_path / "few.json")), config)
    found = load_questions(small(data, held_out=str(tmp_path / "few.json")), config)
    assert len(found.questions) == 3 and found.identity["train"] == 20
    (tmp_path / "cut.json").write_text(text[: len(text) // 2])
    with pytest.raises(FormatError):
        load_questions(small(data, questions=str(tmp_path / "cut.json")), config)
    with pytest.raises(ConfigError, match="length=0"):
        QuestionsConfig(length=0)
    assert np.all(found.train.end >= found.train.start)


def test_an_encoder_without_a_head_of_spans_is_refused(tmp_path, questions):
    with pytest.raises(ConfigError, match="head='masked': questions are for .* 'top2_head'"):
        run(settings(questions, ENCODER | {"head": "masked"}), tmp_path / "run")
