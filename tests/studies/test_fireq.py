"""The FireQ study: its measurements on drawn tensors and tiny models, and the study as a whole."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from ffnlab import models
from ffnlab.quantization import nearest
from ffnlab.studies import fireq_measure as measure
from ffnlab.studies.fireq_measure import Loss, Rounding, Underflow

study = importlib.import_module("ffnlab.studies.fireq")


def test_underflow_is_the_cards_second_point(key):
    found = {u.spread: u for u in measure.underflow(key)}
    small, usual = found[2e-4], found[2e-2]
    assert small.plain > 0.99 and small.scaled <= 0.125 and small.divisor in (32, 64)
    assert usual.divisor == 1 and usual.plain == usual.scaled


def test_rounding_is_the_cards_third_point(key):
    found = measure.rounding(key)
    assert found.promote < found.table < 1.02 * found.promote
    assert found.gap <= 1e-3


@pytest.mark.parametrize("seed", [0, 1])
def test_score_errors_are_the_cards_fifth_point(seed):
    found = measure.score_errors(seed, offsets=True, draws=3)
    assert min(found["pre"], found["both"]) * 5 <= found["none"]
    assert found["post"] * 2 <= found["none"]


def test_planted_outliers_leave_the_function_as_it_is(key):
    config = models.DecoderConfig(
        vocab=32, width=16, hidden=32, layers=2, heads=4, kv_heads=2, head_dim=8
    )
    model = models.Decoder(config, key=key)
    planted = models.unstack(measure.plant_outliers(models.stack(model), 8.0, seed=0))
    tokens = jax.random.randint(key, (2, 12), 0, 32)
    logits = jax.jit(lambda model: model(tokens))
    np.testing.assert_allclose(logits(planted), logits(model), rtol=1e-4, atol=1e-4)
    for old, new in zip(model.layers, planted.layers, strict=True):
        ratio = (new.attn.k.weight.w / old.attn.k.weight.w)[0].reshape(2, 8)
        assert ((ratio == 8).sum(axis=1) == 4).all() and ((ratio == 1).sum(axis=1) == 4).all()


def test_losses_and_sizes(key):
    config = models.DecoderConfig(
        vocab=32, width=16, hidden=32, layers=2, heads=2, kv_heads=1, head_dim=8
    )
    model = models.stack(models.Decoder(config, key=key))
    tokens = np.asarray(jax.random.randint(key, (19, 12), 0, 32))
    found = measure.compare(model, {"int8": nearest(format="int8")}, tokens[:2], tokens)
    logits = jax.nn.log_softmax(model(jnp.asarray(tokens[:, :-1])))
    expected = -jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0].mean(axis=1)
    np.testing.assert_allclose(found["dense"].nats, expected, rtol=1e-5)
    assert found["int8"].nbytes < found["dense"].nbytes
    assert found["int8"].nats.shape == (19,)


def drawn_measurements(models_found):
    """A Measured as a run would give it, from a random generator."""
    random = np.random.default_rng(0)
    names = ["dense", *measure.variants(2, quick=False)]

    def losses(names):
        return {name: Loss(3 + random.random(5), 1000 + len(name)) for name in names}

    errors = dict(zip(("none", "pre", "post", "both"), (0.04, 0.005, 0.01, 0.005), strict=True))
    return study.Measured(
        underflow=[Underflow(s, 1.0, 0.12, 64.0) for s in measure.SPREADS],
        rounding=Rounding(0.12, 0.1203, 1e-7),
        offset=errors,
        wide=errors,
        gap=1e-6,
        losses={name: losses(names) for name in models_found},
        planted=losses(["dense", *errors]),
    )


@pytest.mark.parametrize("models_found", [("embedded",), ("embedded", "stories260k")])
def test_claims_rows_and_pictures_follow_the_measurements(models_found):
    found = drawn_measurements(models_found)
    tensor, losses = study.tensor_claims(found), study.loss_claims(found)
    assert all(claim.holds for claim in tensor)
    assert len(losses) == 1 + 3 * len(models_found)
    rows = study.rows_of(found)
    assert sum(row["variant"] == "dense" for row in rows) == 1 + len(models_found)
    for draw in (study.draw_losses, study.draw_mechanisms):
        figure = Figure()
        draw(figure, found)
        assert figure.axes


def with_losses(**means):
    """Measured losses of the embedded model, 5 rows all at the means of a few variants."""
    found = drawn_measurements(("embedded",))
    fixed = {name.replace("_", " "): Loss(np.full(5, m), 1000) for name, m in means.items()}
    return found._replace(losses={"embedded": found.losses["embedded"] | fixed})


def holds(claims, words):
    """The verdict of the one claim that says these words."""
    (claim,) = (c for c in claims if words in c.claim)
    return claim.holds


@pytest.mark.parametrize("kind", ["offset", "wide"])
def test_protection_is_decided_over_both_kinds_of_outliers(kind):
    found = drawn_measurements(("embedded",))
    assert holds(study.tensor_claims(found), "outlier channels")
    for name, error in (("pre", 0.009), ("both", 0.009), ("post", 0.021)):
        worse = found._replace(**{kind: getattr(found, kind) | {name: error}})
        assert not holds(study.tensor_claims(worse), "outlier channels")


def test_underflow_is_decided_over_every_spread():
    found = drawn_measurements(("embedded",))
    for i in range(len(measure.SPREADS)):
        worse = list(found.underflow)
        worse[i] = worse[i]._replace(scaled=0.13)
        assert not holds(study.tensor_claims(found._replace(underflow=worse)), "per-tensor")


def test_cost_is_a_share_of_the_nats_whatever_a_token_is():
    # The paper: ln 7.06 / ln 6.13, 7.79 % more nats; ln 7.06 / ln 7.03, 0.218 %.
    for dense in (0.5, 1.0, 4.0):
        for share, within in ((0.077, True), (0.079, False)):
            found = with_losses(dense=dense, FireQ=dense * (1 + share))
            assert holds(study.loss_claims(found), "cost little") == within
        for share, within in ((0.0021, True), (0.0023, False)):
            wide = {"FireQ, bf16 scales": Loss(np.full(5, dense), 1000)}
            found = with_losses(FireQ=dense * (1 + share))
            found.losses["embedded"].update(wide)
            assert holds(study.loss_claims(found), "e4m3 weight scales") == within


def test_a_cost_within_its_error_of_the_papers_is_not_shown_to_be_little():
    spread = np.array([-1, 1, -1, 1, 0.0])
    for noise, within in ((0.001, True), (0.2, False)):
        found = with_losses(dense=1.0)
        found.losses["embedded"]["FireQ"] = Loss(1.05 + noise * spread, 1000)
        found.losses["embedded"]["FireQ, bf16 scales"] = Loss(np.full(5, 1.05), 1000)
        claims = study.loss_claims(found)
        assert holds(claims, "cost little") == holds(claims, "e4m3 weight scales") == within


def test_a_missing_second_model_is_said(monkeypatch, tmp_path):
    monkeypatch.delenv("FFNLAB_DATA", raising=False)
    assert study.stories_model() is None
    monkeypatch.setenv("FFNLAB_DATA", str(tmp_path))
    assert study.stories_model() is None
