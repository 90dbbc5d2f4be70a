"""The FinerCut study: what the search buys on trained models, and the study as a whole."""

from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest

from ffnlab import models
from ffnlab.data import TextBatches
from ffnlab.learning import backprop
from ffnlab.parallel import LoopOptions, train
from ffnlab.pruning import removal_order
from ffnlab.studies import finercut, load
from ffnlab.studies.finercut import Comparison, Score, compare


def byte_lm(width: int, layers: int, heads: int) -> models.Decoder:
    """A random byte-level model."""
    config = models.DecoderConfig(
        vocab=256,
        width=width,
        hidden=3 * width,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
    )
    return models.Decoder(config, key=jax.random.key(0))


def trained(model, text: bytes, *, steps: int, batch: int, length: int) -> models.Decoder:
    """The model after some steps of AdamW; scanned, so that it compiles quickly."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, 4e-3, steps // 10, steps)
    rule = backprop(optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule)))
    outcome = train(
        rule,
        models.stack(model),
        TextBatches(text, batch=batch, length=length),
        steps,
        key=jax.random.key(1),
        options=LoopOptions(progress=False),
    )
    return models.unstack(outcome.state.model)


def sentences(count: int, seed: int) -> bytes:
    """Sentences of a small grammar, in which a word late in a sentence repeats an early one."""
    rng = np.random.default_rng(seed)
    names, verbs = ("anna", "bert", "cleo", "dora", "emil"), ("sees", "hears", "calls", "meets")
    lines = []
    for _ in range(count):
        a, b = rng.permutation(names)[:2]
        lines.append(f"{a} {rng.choice(verbs)} {b} and then {b} {rng.choice(verbs)} {a}.\n")
    return "".join(lines).encode()


def nats(scores) -> np.ndarray:
    return np.array([score.nats for score in scores])


@pytest.mark.slow
def test_greedy_beats_blocks_and_random_on_a_small_trained_model():
    """The deterministic twin of the acceptance run below."""
    model = trained(byte_lm(32, 4, 2), sentences(4000, 0), steps=250, batch=8, length=64)
    rows = TextBatches(sentences(400, 1), batch=16, length=64)
    found = compare(model, rows(0)[:8, :-1], rows(1), draws=6, seed=0)
    dense = found.greedy[0].nats
    assert dense < 1.2  # it has learned something: a uniform byte costs 5.5
    # Up to half of the units: with 6 of 8 gone nothing is left to choose.
    greedy, blocks = nats(found.greedy)[2:5:2], nats(found.blocks)[1:3]
    assert (greedy <= blocks + 0.05).all()
    assert (greedy < np.mean([nats(draw)[1:3] for draw in found.random], axis=0)).all()
    assert sorted(removal_order(found.search)) == list(range(8))
    assert found.cut_gap <= 1e-5


@pytest.mark.slow
def test_acceptance_on_a_six_block_byte_model(data):
    """Card finercut, point 3: d = 64, N = 12, trained minutes on a CPU, x = 0."""
    text = (data / "tinyshakespeare" / "input.txt").read_bytes()
    cut = len(text) * 9 // 10
    model = trained(byte_lm(64, 6, 4), text[:cut], steps=1500, batch=16, length=128)
    calibration = TextBatches(text[:cut], batch=10, length=256)(0)[:, :-1]
    found = compare(
        model, calibration, TextBatches(text[cut:], batch=64, length=256)(0), draws=10, seed=0
    )
    greedy, one_shot, blocks = map(nats, (found.greedy, found.one_shot, found.blocks))
    print("dense and greedy", greedy, "one-shot", one_shot, "blocks", blocks)
    assert greedy[0] < 2.2  # it has learned more than pairs of bytes, which leave 2.45
    assert (greedy[2::2] < blocks[1:]).all()
    assert (greedy <= one_shot + 0.05).all() and greedy[-1] < one_shot[-1]
    random = np.mean([nats(draw)[1:] for draw in found.random], axis=0)
    assert (greedy[2::2] - greedy[0] < 0.5 * (random - greedy[0])).all()


def compared(**changes) -> Comparison:
    """A comparison in which every claim holds, but for changes."""
    units = iter([4, 14, 12, 10, 1, 8, 6, 2, 0, 3, 5, 7, 9, 11, 13, 15])  # 2 i: attention of i
    step = np.zeros(16, np.int64)
    for place, unit in enumerate(units):
        step[unit] = place
    levels = [1.0, 1.01, 1.02, 1.04, 1.08, 1.2, 1.4]
    scores = [Score(n, 0.8 - 0.01 * k) for k, n in enumerate(levels)]
    found = {
        "search": SimpleNamespace(step=step.reshape(8, 2)),
        "greedy": scores,
        "one_shot": [*scores[:-1], Score(1.5, 0.7)],
        "blocks": [Score(n, 0.7) for n in (1.0, 1.1, 1.2, 1.5)],
        "random": [[Score(n, 0.5) for n in (1.0, 2.0, 3.0, 4.0)] for _ in range(3)],
        "cut_gap": 1e-7,
    }
    return Comparison(**(found | changes))


def verdicts(found: Comparison, monkeypatch) -> list[bool]:
    def order(search, count=None):
        return np.argsort(search.step.ravel()).tolist()[:count]

    monkeypatch.setattr(finercut, "removal_order", order)
    return [c.holds for c in (*finercut.quality_claims(found), *finercut.order_claims(found))]


def test_claims_hold_only_where_every_setting_does(monkeypatch):
    whole = compared()
    assert verdicts(whole, monkeypatch) == [True] * 6

    def changed(name, index, value):
        scores = list(getattr(whole, name))
        scores[index] = value
        return verdicts(compared(**{name: scores}), monkeypatch)

    for index in (1, 2, 3):  # a tie with blocks at 2, 4 or 6 units
        assert changed("blocks", index, whole.greedy[2 * index]) == [False, *[True] * 5]
    for index in range(1, 7):  # one-shot a little better anywhere
        worse = whole.greedy[index]._replace(nats=whole.greedy[index].nats - 0.001)
        assert changed("one_shot", index, worse) == [True, False, *[True] * 4]
    assert not changed("one_shot", 6, whole.greedy[6])[1]
    for index in (1, 2, 3):  # one lucky draw
        lucky = list(whole.random[0])
        lucky[index] = whole.greedy[2 * index]
        assert changed("random", 0, lucky) == [True, True, False, *[True] * 3]


def test_what_remains_is_decided_over_accuracy_and_nats(monkeypatch):
    def at_a_quarter(score):
        greedy = list(compared().greedy)
        greedy[4] = score
        (claim,) = [finercut.remaining_claim(compared(greedy=greedy))]
        return claim.holds

    assert at_a_quarter(Score(1.0 / 0.91, 0.8 * 0.91))
    assert not at_a_quarter(Score(1.0 / 0.89, 0.8))  # nats
    assert not at_a_quarter(Score(1.0, 0.8 * 0.89))  # accuracy


def test_attention_goes_first_in_every_prefix(monkeypatch):
    step = compared().search.step.copy().ravel()
    step[[1, 4]] = step[[4, 1]]  # an FFN is the very first
    found = compared(search=SimpleNamespace(step=step.reshape(8, 2)))
    assert verdicts(found, monkeypatch)[4:] == [False, True]


@pytest.mark.slow
def test_study_writes_its_result_and_pictures(monkeypatch, tmp_path):
    monkeypatch.setattr(finercut, "embedded", lambda: (byte_lm(16, 4, 2), None))
    result = load("finercut").run(out=tmp_path, quick=True, seed=1)
    assert {file.name for file in tmp_path.iterdir()} == {
        "result.json",
        "removal_map.png",
        "held_out.png",
    }
    exact = [claim for claim in result.claims if "same function" in claim.claim]
    assert exact[0].holds
    assert sorted(result.settings["order"]) == list(range(8))
    other = finercut.run(quick=True, seed=2)
    assert other.table != result.table  # the seed changes the draw
