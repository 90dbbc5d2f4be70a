"""What tests of searches share."""

import numpy as np
import pytest


@pytest.fixture(scope="module")
def official(fixtures):
    """What pymoo gives (`tests/fixtures/search/record.py`)."""
    return np.load(fixtures / "search" / "pymoo.npz")
