"""Predictors of a search: ridge and RBF support-vector regression, the better of the two.

After DyNAS-T, the code of "A Hardware-Aware System for Accelerating Deep Neural Network
Optimization" (2022): labels are divided by a power of ten, features that never vary are dropped,
each regression is tuned over a grid by cross-validation, and the better is fitted to all points.
scikit-learn fits; what is kept are arrays, and NumPy predicts.

What differs: the grid is coarse by default (their 100 + 100 values cost 13 s per refit of 400
points); where a label is near 0 the score is the mean absolute error, for relative errors are
without bound there; constant labels or features give their mean.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from ffnlab.errors import ConfigError, require

__all__ = ["COARSE", "OFFICIAL", "Grid", "Predictor", "fit", "predict"]

FOLDS = 5
MOST_STEPS = 1_000_000  # of the solver of support vectors, as in the authors' code
NEAR_ZERO = 0.01  # of the largest label: below it relative errors say little


class Grid(NamedTuple):
    """What is tried.

    Attributes:
      alphas: penalties of ridge regression, > 0, for labels scaled to 10 .. 100.
      costs: C of support-vector regression, > 0, for the same.
    """

    alphas: tuple[float, ...]
    costs: tuple[float, ...]


COARSE = Grid((0.1, 0.3, 1.0, 3.0, 10.0), (1.0, 3.0, 10.0, 30.0, 100.0))
OFFICIAL = Grid(tuple(i / 10 for i in range(1, 101)), tuple(float(i) for i in range(1, 101)))


class Predictor(NamedTuple):
    """A fitted regression: scale (intercept + kernel(x[columns], points) weights).

    Attributes:
      kind: "ridge" (the kernel is the product, points the identity), "svr" (the kernel is
        exp(-gamma |x - p|^2)), or "constant" (no columns).
      parameter: the alpha or C that was chosen; 0 of a constant.
      error: cross-validated, of `measure`; 0 of a constant.
      measure: "mape", the mean of |y - p| / |y|, or "mae", in units of the labels.
      columns: bool [f], features that vary.
      points: f64 [s, c], support vectors; [0, c] for ridge.
      weights: f64 [s], or [c] for ridge.
      intercept: of scaled labels.
      scale: the power of ten that labels were divided by.
    """

    kind: Literal["ridge", "svr", "constant"]
    parameter: float
    error: float
    measure: Literal["mape", "mae"]
    columns: np.ndarray
    points: np.ndarray
    weights: np.ndarray
    intercept: float
    scale: float


def fit(
    features: Float[np.ndarray, "b f"],
    labels: Float[np.ndarray, "b"],
    *,
    grid: Grid = COARSE,
    measure: Literal["mape", "mae"] | None = None,
) -> Predictor:
    """Fits the better of two tuned regressions.

    Folds are runs of consecutive rows, five where there are as many rows, as scikit-learn's
    `GridSearchCV` makes them; of equal errors the first value of the grid wins, and ridge.

    Args:
      features: of the points, one-hot for networks.
      labels: of the points, finite, in any unit.
      grid: what is tried; COARSE, or OFFICIAL as the authors have it.
      measure: the error compared; None: "mape", or "mae" where the smallest |label| is below a
        hundredth of the largest.
    Returns:
      the predictor, in units of the labels.
    Raises:
      ConfigError: no rows, labels or features that are not finite, or an empty or bad grid.
      MissingExtraError: scikit-learn is not installed.
    """
    check(features, labels)
    check_grid(grid)
    sizes = np.abs(labels)
    largest = float(sizes.max())
    scale = 10.0 ** (math.floor(math.log10(largest)) - 1) if largest > 0 else 1.0
    if measure is None:
        measure = "mae" if sizes.min() < NEAR_ZERO * largest else "mape"
    columns = np.ptp(features, axis=0) > 0
    x, y = features[:, columns], labels / scale
    if not np.ptp(y) or not columns.any():
        never, none = np.zeros_like(columns), np.zeros((0, 0))
        level = float(y.mean())
        return Predictor("constant", 0.0, 0.0, measure, never, none, none.sum(axis=1), level, scale)
    candidates = [
        *(("ridge", ridge(alpha), alpha) for alpha in grid.alphas),
        *(("svr", support_vectors(cost), cost) for cost in grid.costs),
    ]
    errors = [validated(model, x, y, measure) for _, model, _ in candidates]
    kind, model, parameter = candidates[int(np.argmin(errors))]
    error = min(errors) * (scale if measure == "mae" else 1.0)
    quietly(model, x, y)
    points = model.support_vectors_ if kind == "svr" else np.zeros((0, x.shape[1]))
    weights = (model.dual_coef_ if kind == "svr" else model.coef_).reshape(-1)
    intercept = float(np.reshape(model.intercept_, ()))
    return Predictor(kind, parameter, error, measure, columns, points, weights, intercept, scale)


def predict(predictor: Predictor, features: Float[np.ndarray, "b f"]) -> Float[np.ndarray, "b"]:
    """Predictions for features, in units of the labels.

    Raises:
      ConfigError: features of another width than those it was fitted to.
    """
    if features.shape[1] != len(predictor.columns):
        raise ConfigError(
            f"features has width {features.shape[1]}; it must be {len(predictor.columns)}"
        )
    x = features[:, predictor.columns]
    if predictor.kind == "svr":
        points = predictor.points
        squares = (x**2).sum(axis=1)[:, None] + (points**2).sum(axis=1) - 2 * x @ points.T
        x = np.exp(-squares / x.shape[1])  # gamma = 1 / columns
    return predictor.scale * (predictor.intercept + x @ predictor.weights)


def ridge(alpha: float) -> Any:
    """Ridge regression with an intercept."""
    return require("sklearn.linear_model", extra="run").Ridge(alpha=alpha)


def support_vectors(cost: float) -> Any:
    """RBF support-vector regression with the authors' gamma, margin and limit of steps."""
    make = require("sklearn.svm", extra="run").SVR
    return make(kernel="rbf", gamma="auto", epsilon=0.0, C=cost, max_iter=MOST_STEPS)


def quietly(model: Any, x: np.ndarray, y: np.ndarray) -> Any:
    """Fits; a solver that stops at its limit of steps is as good as it got."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Solver terminated early", category=UserWarning)
        return model.fit(x, y)


def validated(model: Any, x: np.ndarray, y: np.ndarray, measure: str) -> float:
    """The mean over folds of the mean error of scaled labels."""
    folds = np.array_split(np.arange(len(y)), min(FOLDS, len(y)))
    errors = []
    for held in folds:
        rest = np.delete(np.arange(len(y)), held)
        wrong = np.abs(quietly(model, x[rest], y[rest]).predict(x[held]) - y[held])
        if measure == "mape":
            wrong /= np.maximum(np.abs(y[held]), np.finfo(float).eps)  # as scikit-learn's
        errors.append(wrong.mean())
    return float(np.mean(errors))


def check(features: np.ndarray, labels: np.ndarray) -> None:
    """Raises ConfigError for data that no regression takes."""
    if not len(labels):
        raise ConfigError("labels has no rows; a predictor needs at least one measured point")
    for name, values in (("labels", labels), ("features", features)):
        if not np.isfinite(values).all():
            raise ConfigError(f"{name} must be finite: drop measurements that failed")


def check_grid(grid: Grid) -> None:
    """Raises ConfigError unless all values of a grid are positive and there is one."""
    tried: Sequence[float] = (*grid.alphas, *grid.costs)
    if not tried or not all(0 < value < math.inf for value in tried):
        raise ConfigError(f"grid={grid} must have at least one value, all positive and finite")
