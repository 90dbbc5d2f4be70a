"""Models with drawn quantized weights, and what those stand for by NumPy alone."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from ffnlab import tree
from ffnlab.formats import safetensors as st
from ffnlab.formats.huggingface.names import Names
from ffnlab.formats.huggingface.plan import variables
from ffnlab.layers import Linear
from ffnlab.weights import Float8, Int4, Int8, SparseInput


def int4(weight, group=32, dtype=jnp.float8_e4m3fn, divisor=4.0, act=None):
    """An INT4 weight of the same shape, its values drawn."""
    rows, columns = weight.shape
    draw = np.random.default_rng(rows + 7 * columns)
    groups = -(-rows // group)
    codes = np.zeros((groups * group, columns), np.uint8)
    codes[:rows] = draw.integers(0, 16, (rows, columns))
    packed = jnp.asarray(codes[::2] | codes[1::2] << 4)
    scales = jnp.asarray(draw.uniform(0.02, 0.2, (groups, columns)).astype(dtype))
    return Int4(packed, scales, jnp.asarray(np.float32(divisor)), group=group, rows=rows, act=act)


def int8(weight, group=None, act=None):
    """An INT8 weight of the same shape, its values drawn."""
    rows, columns = weight.shape
    draw = np.random.default_rng(rows + 7 * columns)
    codes = draw.integers(-128, 128, (rows, columns)).astype(np.int8)
    group = group or rows
    scales = draw.uniform(1e-3, 1e-2, (-(-rows // group), columns)).astype(np.float32)
    return Int8(jnp.asarray(codes), jnp.asarray(scales), group, act)


def float8(weight, act=None):
    """An e4m3 weight of the same shape, its values drawn."""
    draw = np.random.default_rng(weight.shape[0] + 7 * weight.shape[1])
    codes = draw.normal(0, 60, weight.shape).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
    scales = draw.uniform(1e-4, 1e-3, (1, weight.shape[1])).astype(np.float32)
    return Float8(jnp.asarray(codes), jnp.asarray(scales), act)


def quantized(model, fn, where="layers**"):
    """The model with `fn(weight)` in all linear maps that a path names."""
    chosen = tree.at(where) & tree.of_type(Linear)
    return tree.map_at(model, chosen, lambda linear: linear.replace(fn(linear.weight)))


def values(weight):
    """What a weight stands for, [in, out] float32, by NumPy."""
    weight = weight.w if isinstance(weight, SparseInput) else weight
    if isinstance(weight, Int4):
        codes = np.stack([weight.codes, np.asarray(weight.codes) >> 4], axis=1) & 15
        codes = codes.reshape(-1, weight.shape[1])[: weight.rows].astype(np.int8)
        codes = np.where(codes > 7, codes - 16, codes)
        scales = np.asarray(weight.scales).astype(np.float32) / np.float32(weight.divisor)
    elif isinstance(weight, Int8):
        codes, scales = np.asarray(weight.codes), np.asarray(weight.scales).astype(np.float32)
    elif isinstance(weight, Float8):
        return np.asarray(weight.codes).astype(np.float32) * np.asarray(weight.scales)
    else:
        return np.asarray(weight.dense())
    scales = np.repeat(scales, weight.group, axis=0)[: len(codes)]
    return codes.astype(np.float32) * scales


def matrices(model):
    """The weight of each linear map by Hugging Face name; fused ones side by side."""
    names, held, found = Names(model.config.family), variables(model), {}
    for path in held:
        where = names.place(path)
        if where.transposed and where.part == 0:
            parts = [values(held[p].get_value()) for p in where.paths]
            found[where.name.removesuffix(".weight")] = np.concatenate(parts, axis=1).T
    return found


def same(a, b):
    x, y = jax.tree.leaves(a), jax.tree.leaves(b)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        p.dtype == q.dtype and np.array_equal(p, q) for p, q in zip(x, y, strict=True)
    )


def tensors(directory):
    checkpoint = st.open_directory(directory)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def config_of(directory):
    return json.loads((directory / "config.json").read_text())


def rewrite(directory, change):
    """Applies `change` to the tensors of a directory."""
    arrays = tensors(directory)
    change(arrays)
    st.write_directory(directory, {name: st.entry(array) for name, array in arrays.items()})
