"""The harness's own model class, HFLM: its answers, recorded and live, are those of the adapter."""

import json

import jax
import numpy as np
import pytest

from ffnlab import models
from ffnlab.errors import ConfigError
from ffnlab.models import Decoder, DecoderConfig, Tokenizer
from ffnlab.models.lm_eval_adapter import Requests, harness_model
from peer_scripts import runner
from tests.fixtures.harness.record import (
    CHATS,
    HERE,
    NAMED,
    PAIRS,
    PROMPTS,
    ROLLING,
    TEMPLATES,
    assemble,
    evaluate,
)

# Both sides compute in float32 on other kernels; a text has up to some hundred tokens.
NATS = 1e-3
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


def check(samples: dict, want: dict) -> int:
    """Compares all samples of all tasks; returns how many there are."""
    assert samples.keys() == want.keys()
    count = 0
    for task, theirs in want.items():
        for (asked, answers), (their_asked, their_answers) in zip(
            samples[task], theirs, strict=True
        ):
            assert asked == their_asked, task
            for mine, other in zip(answers, their_answers, strict=True):
                if "until" in task or "prefilled" in task:
                    assert mine == other, task
                else:
                    np.testing.assert_allclose(
                        np.asarray(mine, float), np.asarray(other, float), atol=NATS
                    )
                count += 1
    return count


@pytest.mark.parity
# The harness's own dependencies warn.
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("kind", ["bos", "unnamed", "metaspace", "saved"])
def test_samples_of_local_tasks_are_those_of_hflm_live(kind, chat, tmp_path, monkeypatch, fixtures):
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (extra `eval`)")
    if kind == "saved":  # all by us
        models.save(Decoder(CONFIG, key=jax.random.key(0)), tmp_path)
        Tokenizer.bytes().save(tmp_path)
        template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        (tmp_path / "chat_template.jinja").write_text(template)
    else:
        assemble(kind, tmp_path)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "tasks").mkdir()
    lm = harness_model(models.load(tmp_path), Tokenizer.load(tmp_path), batch=2)
    samples = json.loads(json.dumps(evaluate(lm, tmp_path / "tasks", chat=chat)))
    out = tmp_path / "samples.json"
    options = ["--chat"] if chat else []
    runner(fixtures / "harness", "lm_eval")("record.py", tmp_path, out, *options)
    assert check(samples, json.loads(out.read_text(encoding="utf-8"))) > 15
