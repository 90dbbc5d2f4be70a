"""What each search leaves, as users take it further: saved, loaded, pruned, quantized."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ffnlab import formats, transform, tree
from ffnlab.layers import MLP
from ffnlab.losses import labelled, next_token
from ffnlab.models import MetaNetworkConfig, removed
from ffnlab.models.cost import multiply_adds
from ffnlab.pruning import finercut, group_norm, meta_prune, tas
from ffnlab.pruning.search import supernet
from ffnlab.quantization import nearest
from ffnlab.testing import batches, equal, tiny
from ffnlab.weights import Int8
from tests.often import often

KEY = jax.random.key(0)
ROWS = jax.random.normal(jax.random.key(1), (5, 6))
TOKENS = batches()[0]
run = jax.jit(lambda model, x: model(x))


def mlp() -> MLP:
    """A network of two hidden layers."""
    return MLP((6, 12, 10, 3), key=KEY)


def by_tas(model: Any, x: Any) -> Any:
    """The network of the second choice of every size, as if a search had ended there."""
    loss, example = (labelled if isinstance(model, MLP) else next_token), x[:1]
    example = jax.ShapeDtypeStruct(example.shape, example.dtype)
    rule = tas(loss, optax.sgd(0.1), example=example, steps=2)
    state = rule.init(model, KEY)
    kept = jax.tree.map(lambda logits: logits.at[:, 1].set(9.0), state.kept)
    return rule.finished(state._replace(kept=kept, met=jnp.int32(1)))


def by_supernet(model: Any, x: Any, *, form: str) -> Any:
    """A network of the super-network of FFNs."""
    net = supernet(model, (8, 16, 32), depths=(2, 3), formats=("float", "int8"))
    return net.cut(model, {"depth": (2,), "width": (8, 32, 8), "format": ("float", form, form)})


def by_meta(model: Any, x: Any) -> Any:
    """Pruned after a metanetwork."""
    kinds = 1 if isinstance(model, MLP) else 2
    net = MetaNetworkConfig(nodes=kinds, edges=kinds, layers=1, width=4).make(key=KEY)
    return transform.apply(meta_prune(metanetwork=net, rate=0.5), model)[0]


def by_norm(model: Any, x: Any) -> Any:
    """Pruned by group norms."""
    return transform.apply(group_norm(rate=0.5), model)[0]


SYSTEMS: dict[str, Callable[[Any, Any], Any]] = {
    "tas": by_tas,
    "supernet": functools.partial(by_supernet, form="float"),
    "supernet, int8": functools.partial(by_supernet, form="int8"),
    "meta_prune": by_meta,
    "group_norm": by_norm,
}
CASES = [(name, base) for name in SYSTEMS for base in ("decoder", "mlp")]
CASES = [case for case in CASES if case[1] == "decoder" or not case[0].startswith("supernet")]
# One of each search; a decoder takes six programs.
OFTEN = ("tas", "mlp"), ("supernet, int8", "decoder"), ("meta_prune", "mlp")


def again(model: Any, x: Any, folder: Any) -> Any:
    """The model from its files, which computes the same bits."""
    formats.save(model, folder, format="ffnlab")
    back = formats.load(folder, progress=False)
    assert equal(back, model)
    np.testing.assert_array_equal(run(back, x), run(model, x))
    return back


@pytest.mark.standard_promotion  # optax's Adam mixes its counter with floats
@pytest.mark.parametrize("case", often(CASES, *OFTEN), ids=", ".join)
def test_it_is_saved_loaded_pruned_and_quantized(case, tmp_path):
    system, base = case
    model, x = (tiny(), TOKENS) if base == "decoder" else (mlp(), ROWS)
    found = again(SYSTEMS[system](model, x), x, tmp_path / "found")
    work = functools.partial(multiply_adds, lambda m, x: m(x))
    assert 0 < work(found, x) < work(model, x)
    if base == "decoder":
        gone = len(removed(found))
        found, _ = transform.apply(finercut(remove=1, protect=None), found, [x])
        assert len(removed(found)) == gone + 1
        found = again(found, x, tmp_path / "cut")
    small, _ = transform.apply(nearest(format="int8", group=None), found)
    forms = [type(node) for _, node in tree.walk(small) if isinstance(node, Int8)]
    assert len(forms) >= (3 if base == "mlp" else 8)
    small = again(small, x, tmp_path / "small")
    want = np.asarray(run(found, x))
    assert 0 < np.abs(run(small, x) - want).max() < 0.1 * np.abs(want).max()
    assert tree.nbytes(small) < tree.nbytes(found)
