"""Labels are checked on the host, wherever a step runs and however many steps are one program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.layers import MLP
from ffnlab.learning import NoPropNet, counter_current, digital_twin, noprop, physical_ff
from ffnlab.learning.labels import check_labels
from ffnlab.models import PhysicalConfig
from ffnlab.parallel import LoopOptions, parse_mesh, train

AROUND = PhysicalConfig(5, 4, (6,))
RULES = {
    "counter_current": (counter_current, lambda key: MLP((5, 8, 4), key=key, bias=False)),
    "noprop": (noprop, lambda key: NoPropNet(5, 4, hidden=6, blocks=2, key=key)),
    "physical_ff": (physical_ff, lambda key: AROUND.make(key=key)),
    "digital_twin": (digital_twin, lambda key: AROUND.make(key=key)),
}


@pytest.mark.parametrize(("mesh", "together"), [("", 1), ("dp=2", 1), ("dp=2", 3)])
@pytest.mark.parametrize("name", RULES)
def test_a_label_of_no_class_ends_the_run_before_it_is_computed_with(
    key, tmp_path, name, mesh, together
):
    make, network = RULES[name]

    def batches(position):
        y = np.arange(4, dtype=np.int32)
        return np.ones((4, 5), np.float32), np.where(y == 2, 9, y) if position == 4 else y

    with pytest.raises(ValueError, match="y has classes from 0 to 9; 0 to 3 are there"):
        train(
            make(),
            network(key),
            batches,
            6,
            key=key,
            folder=tmp_path,
            options=LoopOptions(checkpoint_every=2),
            mesh=parse_mesh(mesh) if mesh else None,
            together=together,
        )
    assert not (tmp_path / "failed").exists()


def test_labels_from_zero_to_the_last_class():
    for y in (np.array([0, 3]), jnp.array([0, 3]), np.zeros(0, int), [3, 0]):
        check_labels(y, 4)
    for y in (np.array([0, 4]), jnp.array([-1, 3]), jax.device_put(np.array([4]))):
        with pytest.raises(ValueError, match="0 to 3 are there"):
            check_labels(y, 4)
