"""The search as data: the authors' candidates, and accounting that holds for any scores."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from ffnlab.errors import ConfigError
from ffnlab.pruning.finercut_search import (
    candidates,
    decide,
    eligible,
    goal,
    removal_order,
    removed,
    start,
)


def official_targets(n: int, units: str, x: float) -> tuple[list, list, int]:
    """The authors' candidate list, written out by module name: (free, protected, N)."""
    modules = {"both": ("self_attn.o_proj", "mlp.down_proj"), "attention": ("self_attn.o_proj",)}
    modules = {**modules, "ffn": ("mlp.down_proj",)}[units]
    names = sorted(f"layers.{i}.{module}" for i in range(n) for module in modules)
    excluded = [f".{i}." for i in range(int(len(names) * x / 2) + 1)]
    held = [name for name in names if any(part in name for part in excluded)]
    return [name for name in names if name not in held], held, len(names)


def unit(name: str) -> int:
    _, block, kind, _ = name.split(".")
    return 2 * int(block) + (kind == "mlp")


@pytest.mark.parametrize("units", ["both", "attention", "ffn"])
@pytest.mark.parametrize("x", [0.0, 0.2, 0.4, 0.9])
@pytest.mark.parametrize("n", [1, 3, 12, 32])
def test_candidates_are_the_official_ones(n, x, units):
    free, held, total = official_targets(n, units, x)
    ours = candidates(np.ones((n, 2), bool), units, x)
    assert [int(d.reshape(-1).argmax()) for d in ours.drops] == [unit(m) for m in free + held]
    assert ours.protected.tolist() == [False] * len(free) + [True] * len(held)
    assert ours.reentry == int(total * x) + 1
    assert (ours.drops.sum(axis=(1, 2)) == 1).all()


def test_thirteen_of_thirty_two_blocks_are_protected_at_two_fifths():
    pool = candidates(np.ones((32, 2), bool), "both", 0.4)
    blocks = np.flatnonzero(pool.drops[pool.protected].any(axis=(0, 2)))
    assert blocks.tolist() == list(range(13)) and pool.reentry == 26


def test_blocks_are_whole_and_never_protected():
    present = np.array([[True, True], [True, False], [False, False]])
    pool = candidates(present, "block", 0.0)
    assert pool.drops.tolist() == [
        [[True, True], [False, False], [False, False]],
        [[False, False], [True, False], [False, False]],
    ]
    assert not pool.protected.any()


OPTIONS = st.fixed_dictionaries(
    {
        "units": st.sampled_from(["both", "attention", "ffn", "block"]),
        "protect": st.sampled_from([None, 0.0, 0.1, 0.3, 0.4]),
        "one_shot": st.booleans(),
    }
)


def run(present, scores, *, units, protect, one_shot, count):
    """A search whose scores come from a table; values may tie."""
    protect = None if units == "block" and protect else protect
    pool, stats = candidates(present, units, protect), start(present)
    while (gone := removed(pool, stats)).sum() < count:
        open_ = eligible(pool, gone, one_shot=one_shot)
        assert open_.any() and not (open_ & gone).any()
        row = np.where(pool.drops[open_].any(axis=0), scores[stats.passes], 0.0)
        if units == "block":
            row = row.max(axis=1, keepdims=True) * present
        stats = stats._replace(sums=row, count=np.asarray(1.0))
        stats = decide(pool, open_, stats, count, one_shot)
    return pool, stats


@hypothesis.given(
    n=st.integers(3, 12), options=OPTIONS, seed=st.integers(0, 10**6), holes=st.booleans()
)
def test_order_is_a_permutation_nested_and_respects_the_prefix(n, options, seed, holes):
    rng = np.random.default_rng(seed)
    present = rng.random((n, 2)) < 0.8 if holes else np.ones((n, 2), bool)
    scores = rng.integers(0, 4, (2 * n, n, 2)).astype(float)
    pool = candidates(present, options["units"], options["protect"])
    try:
        total = goal(pool, "all", None, one_shot=options["one_shot"])
    except ConfigError:
        hypothesis.assume(False)
    pool, stats = run(present, scores, count=total, **options)
    order = removal_order(stats)
    expected = np.flatnonzero(pool.drops.any(axis=0).reshape(-1))
    assert sorted(order) == expected.tolist()
    assert stats.step.max() == len(pool.drops) - 1
    held = pool.drops[pool.protected].any(axis=0)
    if held.any():  # one-shot holds them back until no other is left
        first = (~pool.protected).sum() if options["one_shot"] else pool.reentry
        assert stats.step[held].min() >= first
    _, half = run(present, scores, count=total // 2, **options)
    assert removal_order(half) == removal_order(stats, total // 2)


@hypothesis.given(seed=st.integers(0, 10**6))
def test_each_choice_is_the_first_smallest(seed):
    scores = np.random.default_rng(seed).integers(0, 3, (8, 4, 2)).astype(float)
    options = {"units": "both", "protect": 0.0, "one_shot": False}
    pool, stats = run(np.ones((4, 2), bool), scores, count=8, **options)
    ids = [int(d.reshape(-1).argmax()) for d in pool.drops]
    for r, chosen in enumerate(removal_order(stats)):
        row = stats.scores[r].reshape(-1)[ids]
        assert ids[int(np.nanargmin(row))] == chosen


def test_a_pass_leaves_the_search_before_it_as_it_was():
    pool = candidates(np.ones((3, 2), bool), "both", None)
    before = start(np.ones((3, 2), bool))._replace(
        sums=np.arange(6.0).reshape(3, 2), count=np.asarray(2.0)
    )
    copy = [np.copy(part) for part in before]
    after = decide(pool, np.ones(6, bool), before, 2, False)
    for a, b in zip(copy, before, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(after.scores[0], before.sums / 2)
    assert removal_order(after) == [0] and after.passes == 1
    assert after.count == 0 and not after.sums.any()
    with pytest.raises(ConfigError, match="calibration set is empty"):
        decide(pool, np.ones(6, bool), after, 2, False)


def test_goal_floors_as_the_authors_do():
    pool = candidates(np.ones((50, 2), bool), "both", None)
    assert goal(pool, None, 0.29, one_shot=False) == int(100 * 0.29) == 28
    assert goal(pool, None, 1.0, one_shot=False) == goal(pool, "all", None, one_shot=False) == 100


def test_a_model_without_units_has_nothing_to_remove():
    pool = candidates(np.zeros((3, 2), bool), "both", 0.0)
    assert pool.drops.shape == (0, 3, 2) and goal(pool, "all", None, one_shot=False) == 0
    with pytest.raises(ConfigError, match="has 0 such units"):
        goal(pool, 1, None, one_shot=False)
