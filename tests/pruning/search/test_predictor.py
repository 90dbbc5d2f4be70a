"""Predictors against scikit-learn's grid search, as the authors call it."""

import numpy as np
import pytest
import sklearn.linear_model
import sklearn.model_selection
import sklearn.svm

from ffnlab.errors import ConfigError
from ffnlab.pruning.search import COARSE, OFFICIAL, Grid, Space, Variable, fit, predict

SMALL = Grid((0.1, 1.0, 10.0), (1.0, 10.0, 100.0))
SPACE = Space((Variable("width", (16, 32, 48, 64), count=6),))


def official(x, y, grid, scoring):
    """What the authors' Predictor does, with scikit-learn alone: (predict, name, parameter)."""
    varies = np.nonzero(np.var(x, 0))[0]
    scale = 10 ** (np.floor(np.log10(np.abs(y).max())) - 1.0)
    regressions = (
        (sklearn.linear_model.Ridge(), {"alpha": grid.alphas}),
        (sklearn.svm.SVR(kernel="rbf", gamma="auto", epsilon=0.0), {"C": grid.costs}),
    )
    searches = [
        sklearn.model_selection.GridSearchCV(model, options, scoring=scoring).fit(
            x[:, varies], y / scale
        )
        for model, options in regressions
    ]
    best = max(searches, key=lambda s: s.best_score_)
    (parameter,) = best.best_params_.values()
    kind = ("ridge", "svr")[searches.index(best)]
    return lambda z: best.predict(z[:, varies]) * scale, kind, parameter, -best.best_score_


def points(kind, rows, seed=0):
    """Features and labels: sums of what each entry adds, or of its products too."""
    rng = np.random.default_rng(seed)
    vectors = SPACE.sample(rng, rows)
    vectors[:, 5] = np.minimum(vectors[:, 5], 2)  # one feature never varies
    each = rng.random((6, 4))
    adds = each[np.arange(6), vectors]
    if kind == "sums":
        return SPACE.one_hot(vectors), 7e8 + 3e8 * adds.sum(1) + 1e7 * rng.normal(size=rows)
    pairs = (adds[:, :3] - 0.5) * (adds[:, 3:] - 0.5)
    return SPACE.one_hot(vectors), 3e-3 * (8 + 10 * pairs.sum(axis=1))


@pytest.mark.parametrize(
    ("kind", "rows", "chosen"),
    [("sums", 43, "ridge"), ("products", 60, "svr"), ("mae", 43, "ridge")],
)
def test_predictions_are_scikit_learns(kind, rows, chosen):
    x, y = points(kind, rows)
    if kind == "mae":
        y -= y[3]  # a label of 0: relative errors would be of that row alone
    scoring = {"mae": "neg_mean_absolute_error"}.get(kind, "neg_mean_absolute_percentage_error")
    found = fit(x, y, grid=SMALL)
    expected, name, parameter, error = official(x, y, SMALL, scoring)
    assert (found.kind, found.parameter) == (name, parameter) == (chosen, parameter)
    assert found.measure == ("mae" if kind == "mae" else "mape")
    scale = found.scale if kind == "mae" else 1.0
    assert found.error == pytest.approx(error * scale, rel=1e-6)
    fresh = SPACE.one_hot(SPACE.sample(np.random.default_rng(9), 200))
    # The card asks for 1e-3; only the order of sums differs.
    np.testing.assert_allclose(predict(found, fresh), expected(fresh), rtol=1e-7, atol=1e-9)
    assert not found.columns[-1] and found.columns.sum() == 23


def test_relative_error_can_be_asked_for_where_a_label_is_zero():
    x, y = points("sums", 20)
    y[3] = 0.0
    asked = fit(x, y, grid=SMALL, measure="mape")
    assert asked.measure == "mape" and asked.error > 1e6
    assert fit(x, y, grid=SMALL).measure == "mae"
    y[3] = 0.011 * y.max()
    assert fit(x, y, grid=SMALL).measure == "mape"


@pytest.mark.parametrize("level", [0.0, -3.5, 7e8])
def test_constant_labels_give_themselves(level):
    x, _ = points("sums", 12)
    found = fit(x, np.full(12, level))
    assert found.kind == "constant"
    np.testing.assert_allclose(predict(found, x), np.full(12, level), rtol=1e-12)


def test_one_point_or_equal_points_give_the_mean():
    x, y = points("sums", 3)
    assert predict(fit(x[:1], y[:1]), x).tolist() == pytest.approx([y[0]] * 3)
    same = np.repeat(x[:1], 3, axis=0)
    assert predict(fit(same, y), x).tolist() == pytest.approx([y.mean()] * 3)
    two = fit(x[:2], y[:2], grid=SMALL)  # two folds of one point
    assert np.isfinite(predict(two, x)).all()


def test_units_do_not_matter():
    x, y = points("products", 30)
    found, other = fit(x, y, grid=SMALL), fit(x, 1e9 * y, grid=SMALL)
    assert (found.kind, found.parameter) == (other.kind, other.parameter)
    np.testing.assert_allclose(predict(other, x), 1e9 * predict(found, x), rtol=1e-6)


def test_grids():
    assert (len(OFFICIAL.alphas), len(OFFICIAL.costs)) == (100, 100)
    assert (OFFICIAL.alphas[0], OFFICIAL.alphas[-1]) == (0.1, 10.0)
    assert (OFFICIAL.costs[0], OFFICIAL.costs[-1]) == (1.0, 100.0)
    assert set(COARSE.alphas) <= set(OFFICIAL.alphas) and set(COARSE.costs) <= set(OFFICIAL.costs)
    x, y = points("products", 20)
    assert fit(x, y, grid=Grid((1.0,), ())).kind == "ridge"
    assert fit(x, y, grid=Grid((), (1.0,))).kind == "svr"


def test_bad_input():
    x, y = points("sums", 6)
    for wrong in (np.nan, np.inf):
        with pytest.raises(ConfigError, match="labels must be finite: drop measurements"):
            fit(x, np.where(np.arange(6) == 2, wrong, y))
        with pytest.raises(ConfigError, match="features must be finite"):
            fit(np.full_like(x, wrong), y)
    with pytest.raises(ConfigError, match="labels has no rows"):
        fit(x[:0], y[:0])
    for grid in (Grid((), ()), Grid((0.0,), (1.0,)), Grid((1.0,), (-1.0,)), Grid((np.inf,), ())):
        with pytest.raises(ConfigError, match="all positive and finite"):
            fit(x, y, grid=grid)
    with pytest.raises(ConfigError, match="width 5; it must be 24"):
        predict(fit(x, y, grid=SMALL), x[:, :5])
