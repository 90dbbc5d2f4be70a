"""The harness's own model class, HFLM: its answers, recorded and live, are those of the adapter."""

import json

import jax
import numpy as np
import pytest

from ffnlab import models
from ffnlab.errors import ConfigError
from ffnlab.formats import Tokenizer
from ffnlab.models import Decoder, DecoderConfig
from ffnlab.text.lm_eval.adapter import Requests, harness_model
from peer_scripts import runner
from tests.fixtures.harness.record import (
    CHATS,
    DOCS,
    HERE,
    NAMED,
    PAIRS,
    PROMPTS,
    ROLLING,
    TEMPLATES,
    assemble,
    samples,
)

# Both sides compute in float32 on other kernels; a text has up to some hundred tokens.
NATS = 1e-3
# Of a model all of whose files are ours.
CONFIG = DecoderConfig(
    vocab=256, width=16, hidden=16, layers=1, heads=2, kv_heads=1, head_dim=8, max_positions=64
)


@pytest.fixture(scope="module")
def recorded():
    """Answers of HFLM by kind of tokenizer."""
    return json.loads((HERE / "expected.json").read_text(encoding="utf-8"))


def opened(folder, **options) -> Requests:
    """The adapter for a model's folder."""
    return Requests(models.load(folder), Tokenizer.load(folder), **options)


@pytest.mark.parametrize("kind", NAMED)
def test_answers_are_those_of_hflm(kind, recorded, tmp_path):
    requests, want = opened(assemble(kind, tmp_path), batch=8), recorded[kind]
    scored = [(p, w) for p, w in zip(PAIRS, want["loglikelihood"], strict=True) if w is not None]
    assert len(scored) > len(PAIRS) / 2
    found = requests.loglikelihood([pair for pair, _ in scored])
    np.testing.assert_allclose(
        [nats for nats, _ in found], [nats for _, (nats, _) in scored], atol=NATS
    )
    assert [best for _, best in found] == [best for _, (_, best) in scored]
    for pair, answer in zip(PAIRS, want["loglikelihood"], strict=True):
        if answer is None:  # HFLM fails
            with pytest.raises(ConfigError, match="tokens of its own"):
                requests.loglikelihood([pair])
    found = requests.rolling(ROLLING)
    np.testing.assert_allclose(found, want["loglikelihood_rolling"], atol=NATS)
    assert requests.generate(PROMPTS) == want["generate_until"]


@pytest.mark.parametrize("kind", TEMPLATES)
def test_chats_are_those_of_hflm(kind, recorded, tmp_path):
    requests = opened(assemble(kind, tmp_path))
    for chat, want in zip(CHATS, recorded[kind]["chats"], strict=True):
        prompted = chat[-1]["role"] == "user"
        assert requests.chat(chat, add_generation_prompt=prompted) == want


def check(mine: dict, theirs: dict) -> int:
    """Compares the requests and answers of all samples of all tasks; returns how many there are."""
    assert mine.keys() == theirs.keys()
    count = 0
    for task, want in theirs.items():
        found = mine[task]
        assert [asked for asked, _ in found] == [asked for asked, _ in want], task
        answers = [[a for _, answers in side for a in answers] for side in (found, want)]
        if task in ("tiny_until", "tiny_prefilled"):
            assert answers[0] == answers[1], task
        else:
            np.testing.assert_allclose(*(np.asarray(a, float) for a in answers), atol=NATS)
        count += len(answers[0])
    return count


@pytest.mark.parity
# The harness's own dependencies warn.
@pytest.mark.filterwarnings("default")
def test_samples_of_local_tasks_are_those_of_hflm_live(tmp_path, monkeypatch, fixtures):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (extra `eval`)")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    folders = [tmp_path / kind for kind in (*TEMPLATES, "ours")]
    for folder in folders:
        folder.mkdir()
        if folder.name != "ours":
            assemble(folder.name, folder)
    models.save(Decoder(CONFIG, key=jax.random.key(0)), folders[-1])
    Tokenizer.bytes().save(folders[-1])
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (folders[-1] / "chat_template.jinja").write_text(template)
    runner(fixtures / "harness", "lm_eval")("record.py", *folders)
    choices = sum(len(doc["choices"]) for doc in DOCS)
    for folder in folders:
        lm = harness_model(models.load(folder), Tokenizer.load(folder), batch=2)
        mine = json.loads(json.dumps(samples(lm)))
        want = json.loads((folder / "samples.json").read_text(encoding="utf-8"))
        assert want["plain"] != want["chat"]
        for way, theirs in want.items():
            assert check(mine[way], theirs) == choices + 3 * len(DOCS), (folder.name, way)
