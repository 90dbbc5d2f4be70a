"""The LoRA-Mixer study: its claims are decided by all figures; its parts run on a little text."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import transform
from ffnlab.data import find_folder
from ffnlab.routing import mixed
from ffnlab.studies import lora_mixer_measure as measure
from ffnlab.studies.lora_mixer_measure import Score
from ffnlab.testing import equal, tiny

study = importlib.import_module("ffnlab.studies.lora_mixer")

TEXTS = ("a", "b", "c")


def scores(**changed: list[float]) -> dict:
    """Accuracies of two seeds, the same on each text: a mixture as the paper claims."""
    ways = {
        "base": [0.2],
        "adapter of a": [0.5],
        "adapter of b": [0.5],
        "adapter of c": [0.5],
        "average": [0.3],
        "specialized": [0.55, 0.56],
        "specialized, top 1": [0.55, 0.56],
        "balance alone": [0.5, 0.5],
    } | {name.replace("_", " "): values for name, values in changed.items()}
    return {
        way: {text: [Score(1.0, value) for value in values] for text in TEXTS}
        for way, values in ways.items()
    }


def held(found: dict) -> list[bool]:
    """Which claims on the mixture hold."""
    return [claim.holds for claim in study.mixture_claims(found, TEXTS, 2)]


def test_claims_on_the_mixture_need_every_seed():
    assert held(scores()) == [True] * 4
    assert held(scores(specialized=[0.46, 0.56])) == [False, False, True, True]
    assert held(scores(specialized=[0.39, 0.56])) == [False, False, False, True]
    sharp = scores() | {"specialized, top 1": scores(x=[0.55, 0.54])["x"]}
    assert held(sharp) == [True, True, True, False]
    single = scores() | {"adapter of b": scores(x=[0.6])["x"]}
    assert held(single)[1] is False


def test_claims_on_the_loss_need_every_seed():
    entropies = {"specialized": [0.1, 0.2], "balance alone": [0.2, 0.3], "as printed": [0.3, 0.4]}
    shares = {"specialized": [0.4, 0.45], "none": [0.9, 0.9]}
    decide = lambda e, s, f: [c.holds for c in study.loss_claims(f, e, s, 2)]  # noqa: E731
    assert decide(entropies, shares, scores()) == [True, True, True]
    assert decide(entropies | {"as printed": [0.3, 0.3]}, shares, scores())[0] is False
    assert decide(entropies, shares | {"specialized": [0.4, 0.51]}, scores())[1] is False
    even = scores(balance_alone=[0.5, 0.56])
    assert decide(entropies, shares, even)[2] is False


def test_a_directory_must_keep_the_bits_of_logits():
    assert study.directory_claim(1e-6).holds and not study.directory_claim(1e-4).holds


def test_texts_are_there_without_data(monkeypatch):
    monkeypatch.delenv("FFNLAB_DATA", raising=False)
    texts, kind = measure.three_texts()
    assert "ciphers" in kind and len({text[:200] for text in texts.values()}) == 3
    assert measure.rotated(13)[ord("a")] == ord("n") and measure.rotated(-1)[ord("a")] == ord("z")
    assert texts["rotated"].translate(measure.rotated(13)).count(b"import") > 100


def test_texts_are_real_where_data_is(data, monkeypatch):
    monkeypatch.setenv("FFNLAB_DATA", str(data))
    for name in ("tinyshakespeare", "wikitext2", "xquad"):
        if find_folder(name) is None:
            pytest.skip(f"no {name} in the data folder")
    texts, kind = measure.three_texts()
    assert kind == "real" and "für" in texts["German"].decode()


@pytest.mark.slow
def test_adapters_and_routers_learn_on_little_text(monkeypatch):
    """Small shapes: each adapter learns its own text; routers of each setting start by the seed."""
    monkeypatch.setattr(measure, "LENGTH", 5)
    monkeypatch.setattr(measure, "RANK", 2)
    monkeypatch.setattr(measure, "LOSSES", {"specialized": (0.01, 0.001), "none": (0.0, 0.0)})
    sizes = measure.Sizes(1, 2, 2, 2, 3, 2)
    random = np.random.default_rng(0)
    texts = {name: random.integers(0, 64, 2000, np.uint8).tobytes() for name in TEXTS}
    own = measure.adapted(tiny(), list(texts.values()), sizes, 0)
    assert len(own) == 3 and not equal(own[0], own[1])
    tokens = {n: jnp.asarray(random.integers(0, 64, (2, 6)), jnp.int32) for n in TEXTS}
    experts, difference = measure.through_directories(tiny(), own, tokens)
    assert difference < 1e-5
    together, _ = transform.apply(mixed(experts), tiny())
    even = measure.averaged(together).layers[0].attn.q
    x = jax.random.normal(jax.random.key(0), (1, 2, 16))
    np.testing.assert_allclose(even.mixture(x), np.full((1, 2, 3), 1 / 3), rtol=1e-6)
    found, entropies, shares = measure.routed(together, texts, tokens, sizes, 0)
    assert set(found) == {"specialized", "none", "specialized, top 1", "none, top 1"}
    assert all(0 < e[0] <= np.log(3) for e in entropies.values())
    assert all(1 / 3 <= s[0] <= 1 for s in shares.values())
    for by_text in found.values():
        assert all(0 <= s.accuracy <= 1 and 0 < s.bits < 20 for (s,) in by_text.values())


def test_a_score_is_of_all_windows():
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (16, 5)), jnp.int32)
    model = tiny()
    logits = np.asarray(model(tokens[:, :-1]), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = -np.take_along_axis(log_p, np.asarray(tokens)[:, 1:, None], -1).mean()
    found = measure.score(model, tokens)
    assert found.bits == pytest.approx(nats / np.log(2), rel=1e-5)
    assert found.accuracy == pytest.approx((logits.argmax(-1) == tokens[:, 1:]).mean())
