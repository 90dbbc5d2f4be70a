"""The proxy A-distance: its regression beside scikit-learn's, its ends, what it refuses."""

import importlib

import numpy as np
import pytest
from scipy import sparse
from sklearn.linear_model import LogisticRegression

from ffnlab.errors import ConfigError

module = importlib.import_module("ffnlab.analysis.domain_distance")
PENALTIES, domain_distance, fitted = module.PENALTIES, module.domain_distance, module.fitted


@pytest.mark.parametrize("penalty", [1e-3, 1.0, 10.0])
@pytest.mark.parametrize("kind", [np.asarray, sparse.csr_array])
def test_the_regression_is_scikit_learns(penalty, kind):
    random = np.random.default_rng(0)
    x = random.normal(size=(60, 4)) * [1, 2, 0.5, 1] + 0.3
    signs = np.where(x[:, 0] - x[:, 1] + random.normal(size=60) > 0, 1, -1)
    known = LogisticRegression(C=penalty, tol=1e-8).fit(x, signs)
    found = fitted(kind(x), signs, penalty, np.zeros(5))
    np.testing.assert_allclose(found, [*known.intercept_, *known.coef_[0]], rtol=2e-3, atol=2e-4)


def test_domains_apart_and_alike():
    """2 where a plane parts them; by the error that normal distributions have between."""
    random = np.random.default_rng(1)
    x = random.normal(size=(4000, 3))
    apart = domain_distance(x, x + [9, 0, 0])
    assert apart.distance == 2 and apart.error == 0 and apart.penalty in PENALTIES
    near = domain_distance(x, random.normal(size=(3000, 3)) + [1, 0, 0])
    # The best error is Phi(-1/2) = .3085; of 3500 rows its standard deviation is .008.
    assert near.error == pytest.approx(0.3085, abs=0.025)
    assert near.distance == pytest.approx(2 * (1 - 2 * near.error))
    alike = domain_distance(x, random.normal(size=(3000, 3)))
    assert 0 <= alike.distance < 0.1


def test_domains_of_unequal_size_count_alike():
    """With 20 rows of one and 2000 of the other, to call all of them one domain is no success."""
    random = np.random.default_rng(2)
    found = domain_distance(random.normal(size=(20, 2)), random.normal(size=(2000, 2)))
    assert found.error > 0.2


def test_sparse_rows_give_what_dense_ones_do(monkeypatch):
    random = np.random.default_rng(3)
    counts = random.poisson(0.05, (2, 80, 30)).astype(float)
    counts[1, :, :3] += random.poisson(0.2, (80, 3))
    found = domain_distance(*counts)
    monkeypatch.setattr(module, "SPARSE", 0.0)
    assert domain_distance(*counts) == pytest.approx(found, abs=1e-6)
    assert found.distance > 0


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (np.ones((1, 2)), np.ones((5, 2)), r"source \(1, 2\): two finite rows"),
        (np.ones((5, 0)), np.ones((5, 0)), r"source \(5, 0\): two finite rows"),
        (np.ones((5, 2)), np.ones(5), r"target \(5,\): two finite rows"),
        (np.ones((5, 2)), np.ones((5, 3)), r"source \(5, 2\) and target \(5, 3\) have unequal"),
        (np.full((5, 2), np.nan), np.ones((5, 2)), r"source \(5, 2\): two finite rows"),
    ],
)
def test_rows_that_are_refused(source, target, message):
    with pytest.raises(ConfigError, match=message):
        domain_distance(source, target)
