"""INT4 weights prepared for a GPU: the same values, sharded by tiles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ffnlab import weights
from pallas_kernels.aot import lower_for, topology
from pallas_kernels.backend import JAX_VERSION

OLDER = JAX_VERSION >= (0, 11, 2)  # whose kernels reach below Hopper


def int4(rows=300, columns=512, *, group=128, act="e4m3", lowest=-7):
    random = np.random.default_rng(0)
    q = jnp.asarray(random.integers(lowest, 8, (rows, columns)), jnp.int8)
    scales = random.uniform(0.01, 0.1, (-(-rows // group), columns))
    scales = jnp.asarray(scales, jnp.float32)
    return weights.Int4.from_codes(q, scales, group=group, divisor=2.0, act=act)


@pytest.mark.parametrize(("lowest", "encoding"), [(-7, "sm"), (-8, "tc")])
def test_prepared_for_a_gpu_it_is_packed_and_keeps_its_values(lowest, encoding):
    w = int4(lowest=lowest)
    packed = weights.prepare(w, "cuda")
    assert isinstance(packed, weights.PackedInt4) and packed.encoding == encoding
    assert packed.shape == w.shape and packed.nbytes == w.nbytes  # 512 columns need no padding
    np.testing.assert_array_equal(packed.dense(), w.dense())
    np.testing.assert_array_equal(packed.codes(), w.codes)
    x = jax.random.normal(jax.random.key(0), (3, 300))
    np.testing.assert_array_equal(packed.matmul(x), w.matmul(x))
    dense = weights.prepare(packed, "cpu")
    assert isinstance(dense, weights.Dense) and dense.act == "e4m3"


def test_a_column_more_than_whole_tiles_takes_two_more():
    w = int4(columns=129)
    packed = weights.prepare(w, "cuda")
    assert packed.words.shape[:2] == (4, 3) and packed.shape == (300, 129)
    np.testing.assert_array_equal(packed.dense(), w.dense())


def test_under_jit_any_code_may_come():
    packed = jax.jit(lambda w: weights.prepare(w, "cuda"))(int4())
    assert packed.encoding == "tc"
    np.testing.assert_array_equal(packed.dense(), int4().dense())


@pytest.mark.parametrize("change", [{"group": 64}, {"act": None}])
def test_what_the_kernel_cannot_read_stays(change):
    w = int4(**change)
    assert weights.prepare(w, "cuda") is w


@pytest.mark.parametrize(
    ("chip", "packs"), [("h200", True), ("a100", OLDER), ("l4", OLDER), ("t4", False)]
)
def test_the_gpu_at_hand_decides(chip, packs):
    with topology.abstract_mesh(chip, 1, "x"):
        assert isinstance(weights.prepare(int4(), "cuda"), weights.PackedInt4) == packs


def test_on_a_hopper_its_product_is_the_kernel():
    w = weights.prepare(int4(), "cuda")
    x, w = jax.eval_shape(lambda: (jnp.ones((2, 300), jnp.bfloat16), w))
    assert "mosaic_gpu" in lower_for(lambda x, w: w.matmul(x), (x, w), "h200")


def test_stacked_layers_are_packed_one_by_one():
    one, other = int4(), int4(lowest=-8)
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), one, other)
    packed = weights.prepare(stack, "cuda")
    assert packed.words.shape == (2, 8, 3, 8, 128)
    np.testing.assert_array_equal(packed.dense(), stack.dense())


@pytest.mark.parametrize("axes", [("embed", "mlp"), ("mlp", "embed")])
def test_its_tiles_are_sharded_as_the_matrix_would_be(axes):
    w = weights.prepare(int4(512), "cuda")
    names = w.leaf_axes(axes)
    assert names.words == (axes[1], axes[0], None, None) and names.scales == axes
    mesh = jax.make_mesh((4,), ("tp",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = lambda name: P(*("tp" if axis == "mlp" else None for axis in name))  # noqa: E731
    specs = jax.tree.map(spec, names, is_leaf=lambda node: isinstance(node, weights.AxisNames))
    x = jax.random.normal(jax.random.key(0), (3, 512))
    split_rows = axes[0] == "mlp"

    def one(x, w):
        # A device holds a quarter of the matrix; each rounds its own part of x.
        w = weights.PackedInt4(
            w.words, w.scales, w.divisor, 128 if split_rows else 512, w.encoding, None
        )
        y = w.matmul(x)
        return jax.lax.psum(y, "tp") if split_rows else y

    parallel = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
    y = jax.jit(
        parallel(
            one,
            in_specs=(P(None, "tp") if split_rows else P(), specs),
            out_specs=P() if split_rows else P(None, "tp"),
        )
    )(x, w)
    np.testing.assert_allclose(y, x @ w.dense(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"words": jnp.zeros((8, 3, 128), jnp.int32)}, r"words must be \[out / 64"),
        ({"scales": jnp.ones((2, 512))}, "do not fit 8 tiles of 64 columns and 3 of 128 rows"),
        ({"scales": jnp.ones((3, 600))}, "do not fit 8 tiles"),
        ({"rows": 256}, "rows=256 does not fit 3 groups"),
        ({"act": "int8"}, "act='int8'"),
    ],
)
def test_bad_fields_name_themselves(change, message):
    w = weights.prepare(int4(), "cuda")
    fields = {
        "words": w.words,
        "scales": w.scales,
        "divisor": w.divisor,
        "rows": w.rows,
        "encoding": w.encoding,
        "act": w.act,
    }
    with pytest.raises(ValueError, match=message):
        weights.PackedInt4(**(fields | change))
