"""What the authors' own search logs say: hypervolumes, repeats, and how well predictors do."""

import numpy as np
import pytest
from scipy.stats import kendalltau

from ffnlab.pruning.search import Space, Variable, fit, hypervolume, predict

SPACE = Space(
    (
        Variable("depth", (2, 3, 4), count=5),
        Variable("kernel", (3, 5, 7), count=20, within="depth"),
        Variable("expand", (3, 4, 6), count=20, within="depth"),
    )
)


@pytest.fixture(scope="module")
def logs(fixtures):
    """Per search (vectors, figures): top-1 accuracy in % and MACs."""
    recorded = np.load(fixtures / "search" / "dynas.npz")
    parts = {"depth": slice(0, 5), "kernel": slice(5, 25), "expand": slice(25, 45)}
    return {
        name: (
            np.array([SPACE.encode({k: r[at].tolist() for k, at in parts.items()}) for r in rows]),
            recorded[f"{name}_figures"],
        )
        for name, rows in ((name, recorded[name]) for name in ("nsga2", "linas"))
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [("linas", [3.26, 3.47, 3.64, 3.71, 3.78]), ("nsga2", [3.19, 3.33, 3.55, 3.63, 3.70])],
)
def test_hypervolumes_of_the_card(logs, name, expected):
    """Below 70 % and 700 M MACs, in 1e9 MAC %, after 50, 100, 200, 300 and 500 measurements."""
    accuracy, macs = logs[name][1].T
    points = np.stack([-accuracy, macs], axis=1)
    volumes = [hypervolume(points[:n], (-70.0, 7e8)) / 1e9 for n in (50, 100, 200, 300, 500)]
    assert volumes == pytest.approx(expected, abs=0.0051)


def test_repeats_are_seen_in_canonical_form_only(logs):
    vectors, figures = logs["linas"]
    keys = SPACE.keys(vectors)
    assert len({row.tobytes() for row in vectors}) == 554 and len(set(keys)) == 515
    # Equal keys are equal networks: they were measured to have the same MACs.
    macs: dict[bytes, set[float]] = {}
    for key, (_, cost) in zip(keys, figures, strict=True):
        macs.setdefault(key, set()).add(cost)
    assert all(len(found) == 1 for found in macs.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("figure", "plain", "better"), [(0, (0.20, 0.93), (0.14, 0.94)), (1, (3.1, 0.91), (0.9, 0.97))]
)
def test_predictors_of_the_card(logs, figure, plain, better):
    """400 rows of NSGA-II predict 200 of LINAS as the card says; canonical features do better."""
    (train, known), (test, wanted) = logs["nsga2"], logs["linas"]
    train, known, test, wanted = train[:400], known[:400, figure], test[:200], wanted[:200, figure]
    found = []
    for form in (np.copy, SPACE.canonical):
        predictor = fit(SPACE.one_hot(form(train)), known)
        said = predict(predictor, SPACE.one_hot(form(test)))
        mape = 100 * np.mean(np.abs(said - wanted) / wanted)
        found.append((mape, kendalltau(said, wanted)[0]))
        print(("top-1", "MACs")[figure], predictor.kind, predictor.parameter, *found[-1])
    assert found[0] == (pytest.approx(plain[0], abs=0.06), pytest.approx(plain[1], abs=0.005))
    assert found[1][0] < better[0] and found[1][1] > better[1]
