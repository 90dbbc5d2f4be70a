"""Which loss moves which layer, against losses whose reach is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.lax import stop_gradient

from ffnlab import models
from ffnlab.analysis import LocalityReport, locality
from ffnlab.errors import NumericalError, SelectionError
from ffnlab.layers import MLP
from ffnlab.report import as_png
from ffnlab.testing import tiny


@pytest.fixture
def net(key):
    return MLP((3, 4, 4, 2), key=key)


def losses(net, *, detached=True):
    """The mean square of what each layer gives, on the same rows."""
    x, found = jnp.linspace(-1, 1, 15).reshape(5, 3), []
    for linear in net.maps:
        x = jnp.tanh(linear(stop_gradient(x) if detached else x))
        found.append(jnp.mean(x**2))
    return jnp.stack(found)


def test_detached_layers_learn_alone(net):
    found = locality(losses, net)
    names = [f"maps[{i}]" for i in range(3)]
    assert list(found.layers) == names and found.reached == [(name,) for name in names]
    assert found.figures() == {"share": 1 / 3, "layers of a loss": 1.0}
    assert found.rows()[1] == {"loss": 1, "maps[0]": 0, "maps[1]": found.slopes[1, 1], "maps[2]": 0}


def test_norms_are_those_of_the_jacobian(net):
    through = lambda net: losses(net, detached=False)  # noqa: E731
    found = locality(through, net)
    jacobian = jax.jacobian(through)(net)
    for i in range(3):
        assert found.reached[i] == found.layers[: i + 1]
        for j, linear in enumerate(jacobian.maps):
            rows = [np.ravel(leaf[i]) for leaf in jax.tree.leaves(linear)]
            assert found.slopes[i, j] == pytest.approx(
                np.linalg.norm(np.concatenate(rows)), rel=1e-5
            )


def test_a_gradient_too_small_for_its_square_is_one(net):
    small = locality(lambda net: 1e-30 * losses(net), net)
    assert [len(names) for names in small.reached] == [1, 1, 1]


def test_layers_are_grouped_and_selected(net):
    found = locality(losses, net, group=lambda path: path.rpartition(".")[2])
    whole = locality(losses, net)
    assert found.layers == ("b", "w")
    np.testing.assert_allclose(np.linalg.norm(found.slopes, axis=1), whole.slopes.sum(1), rtol=1e-6)
    last = locality(losses, net, select="maps[2]")
    assert last.layers == ("maps[2]",) and last.reached == [(), (), ("maps[2]",)]


def test_stacked_blocks_are_apart():
    ids = jnp.arange(6).reshape(1, 6)
    mean = lambda model: model(ids).mean()[None]  # noqa: E731
    flat, stacked = (locality(mean, m) for m in (tiny(), models.stack(tiny())))
    assert flat.layers == stacked.layers
    np.testing.assert_allclose(flat.slopes, stacked.slopes, rtol=1e-4, atol=1e-7)


def test_it_is_drawn(net):
    assert len(as_png(locality(losses, net).draw)) > 2000
    assert len(as_png(LocalityReport(("a",), np.zeros((2, 1))).draw)) > 1000


def test_bad_arguments_are_named(net):
    with pytest.raises(ValueError, match=r"losses gives shape \(\)"):
        locality(lambda net: losses(net).sum(), net)
    with pytest.raises(SelectionError, match="nothing"):
        locality(losses, net, select="nothing")
    with pytest.raises(NumericalError, match="not finite"):
        locality(lambda net: losses(net) / 0, net)
