"""Sample efficiency of the three searches on a landscape with interactions (the card's point 5)."""

import pytest

from ffnlab.studies.hardware_aware_nas_known import efficiency


@pytest.mark.slow
def test_linas_needs_half_of_the_measurements():
    """Hypervolumes below (1, 1) after 50, 100 and 200 measurements, population 25."""
    volumes = efficiency(range(5))
    for tactic, found in volumes.items():
        print(tactic, found.mean(axis=0).round(3), found.round(3).tolist())
    linas, evolution = volumes["linas"], volumes["evolution"]
    assert (linas[:, 1] > evolution[:, 1]).sum() >= 4
    assert linas[:, 1].mean() >= 0.99 * evolution[:, 2].mean()
    assert evolution[:, 2].mean() > volumes["random"][:, 2].mean()
