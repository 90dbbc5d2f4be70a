"""Sample efficiency of the three searches on a landscape with interactions (the card's point 5)."""

import numpy as np
import pytest

from ffnlab.pruning.search import SearchOptions, Space, Variable, hypervolume, search

ENTRIES, VALUES, SEEDS = 12, 4, range(5)
SPACE = Space((Variable("width", tuple(range(VALUES)), ENTRIES),))


def landscape(seed: int):
    """Loss: what each width adds, and each pair; cost: a sum. Both from 0 to 1 of 2,000 draws."""
    rng = np.random.default_rng([99, seed])
    single = np.cumsum(rng.random((ENTRIES, VALUES)), axis=1)
    pair = 0.35 * rng.normal(size=(ENTRIES, ENTRIES, VALUES, VALUES))
    cost = rng.random(ENTRIES) + 0.3
    first, second = np.triu_indices(ENTRIES, 1)

    def raw(x):
        gain = single[np.arange(ENTRIES), x].sum() + pair[first, second, x[first], x[second]].sum()
        return -gain, cost @ (x + 1)

    drawn = np.array([raw(x) for x in SPACE.sample(rng, 2000)])
    low, span = drawn.min(axis=0), np.ptp(drawn, axis=0)

    def measure(config):
        loss, macs = (np.array(raw(np.array(config["width"]))) - low) / span
        return {"loss": loss, "macs": macs}

    return measure


@pytest.mark.slow
def test_linas_needs_half_of_the_measurements():
    """Hypervolumes below (1, 1) after 50, 100 and 200 measurements, population 25."""
    volumes = {}
    for tactic in ("random", "evolution", "linas"):
        rows = []
        for seed in SEEDS:
            options = SearchOptions(("loss", "macs"), 200, tactic, 25, inner=2000, seed=seed)
            values = search(SPACE, landscape(seed), options).values
            rows.append([hypervolume(values[:count], (1.0, 1.0)) for count in (50, 100, 200)])
        volumes[tactic] = np.array(rows)
        print(tactic, volumes[tactic].mean(axis=0).round(3), volumes[tactic].round(3).tolist())
    linas, evolution = volumes["linas"], volumes["evolution"]
    assert (linas[:, 1] > evolution[:, 1]).sum() >= 4
    assert linas[:, 1].mean() >= 0.99 * evolution[:, 2].mean()
    assert evolution[:, 2].mean() > volumes["random"][:, 2].mean()
