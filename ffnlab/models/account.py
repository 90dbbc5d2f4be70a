"""What a model costs: parameters, bytes, and floating-point operations per token, in closed form.

What a program of it needs, `compiled_cost` asks the compiler.

A multiply and an add are two operations. Counted are matrix products: every linear map, the output
head, and attention's scores and weighted sums. Not counted are what grows with a width instead of
a product of two: norms, biases, activations, rotations, softmax, the embedding look-up, and the
dequantization of codes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx

from ffnlab import tree
from ffnlab.errors import ConfigError, SelectionError
from ffnlab.layers import Attention, Linear, SparseGatedFFN
from ffnlab.models.cost import multiply_adds
from ffnlab.models.decoder import Decoder
from ffnlab.models.encoder import Encoder
from ffnlab.models.stack import Pipelined, Stacked, unstack
from ffnlab.weights import SparseInput, cost, is_weight

__all__ = [
    "CompiledCost",
    "cache_bytes_per_token",
    "compiled_cost",
    "flops_per_token",
    "nbytes",
    "parameters",
]


def parameters(model: nnx.Module) -> int:
    """Numbers that a model consists of, whatever they are stored in.

    A quantized matrix has in x out of them (its scales are bytes, not parameters), a low-rank one
    its two factors, a masked one all its entries; biases and gains of norms count. A `Statistic`
    (a threshold, a running mean) does not: it was measured, not learned. Entries that are zero
    count: removing is what makes a model smaller.

    Args:
      model: a decoder or any module, stacked or not; leaves may be abstract.
    Returns:
      the count; a tied head counts once.
    """
    values = [node.get_value() for _, node in tree.walk(model) if isinstance(node, nnx.Param)]
    return sum(
        cost.parameters(v) if is_weight(v) else sum(x.size for x in jax.tree.leaves(v))
        for v in values
    )


def nbytes(model: nnx.Module) -> int:
    """Bytes of all arrays as stored: codes (two INT4 codes per byte), scales, masks, thresholds.

    Args:
      model: a decoder or any module; leaves may be abstract.
    """
    return tree.nbytes(model)


def cache_bytes_per_token(model: Decoder) -> int:
    """Bytes of keys and values that one token of context adds, in each layer's own cache kind."""
    one, two = (
        tree.nbytes(jax.eval_shape(lambda n=n: model.init_cache(1, n).layers)) for n in (1, 2)
    )
    return two - one


def flops_per_token(
    model: nnx.Module,
    context: int,
    *,
    zeros: Mapping[str, float | Sequence[float]] | None = None,
) -> float:
    """Floating-point operations to process one token.

    2 in out per linear map, + 4 heads head_dim min(context, window) per attention, + 2 width vocab

    Quantized matrices count like dense ones: the products are the same. A low-rank matrix costs
    2 r (in + out), LoRA that on top of its base, and a mask saves nothing. A sparse FFN skips the
    dropped channels' share of `up` and `down` (its gate is always whole), a sparse input its share
    of the matrix. A layer with a method `flops_per_token(share)` answers for itself and for all in
    it: a mixture for its router and the experts of a token. One with a method `runs(share)` says
    how often a token runs its parts, by path: a choice, by the share of tokens that take each. What
    an encoder does once for a text (its pooler, the classes of a text) counts for each token; what
    a decoder does with sound (its connectors) does not count.

    Args:
      model: a decoder or another model of linear maps and blocks, stacked or not; leaves may be
        abstract.
      context: tokens that the token attends to, itself included, >= 1.
      zeros: by path, the fraction of zeros in [0, 1] of sparse FFNs and projections as measured
        (`Realised.zeros` of `ffnlab.sparsity`), or what a layer that answers for itself takes as
        its share; those not named count as dense.
    Returns:
      operations.
    Raises:
      SelectionError: a path in `zeros` that the model does not have, or that is not sparse.
    """
    if isinstance(getattr(model, "layers", None), Stacked | Pipelined):
        model = jax.eval_shape(unstack, model)
    zeros, used, total = dict(zeros or {}), set(), 0.0
    nodes = dict(tree.walk(model))
    answered = ""  # path of the last layer that answered for itself
    times: dict[str, float] = {}  # how often a token runs what is at a path
    for path, node in nodes.items():
        if path.startswith("connectors") or (answered and path.startswith(answered)):
            continue
        if isinstance(node, nnx.Module) and hasattr(node, "runs"):
            times |= {f"{path}.{part}.": n for part, n in node.runs(zeros.get(path)).items()}
            used.add(path)
        elif isinstance(node, nnx.Module) and hasattr(node, "flops_per_token"):
            total += node.flops_per_token(zeros.get(path))
            used.add(path)
            answered = f"{path}."
        elif isinstance(node, Attention):
            spec = node.spec
            total += 4 * spec.heads * spec.head_dim * min(context, spec.window or context)
        elif isinstance(node, Linear):
            weight, (parent, _, name) = node.weight, path.rpartition(".")
            own = path if isinstance(weight, SparseInput) else None
            in_gated = isinstance(nodes.get(parent), SparseGatedFFN) and name in ("up", "down")
            gated = parent if in_gated else None
            keep = math.prod(1 - zeros.get(p, 0.0) for p in (own, gated) if p is not None)
            used |= {own, gated}
            runs = math.prod(n for part, n in times.items() if f"{path}.".startswith(part))
            total += runs * keep * cost.flops(weight)
    unknown = sorted(zeros.keys() - used)
    if unknown:
        raise SelectionError(f"zeros names {unknown}, which are no sparse layers of this model")
    return total + (2 * math.prod(model.embed.weight.shape) if reads_embedding(model) else 0)


def reads_embedding(model: nnx.Module) -> bool:
    """Whether a model's head is its embedding."""
    if isinstance(model, Encoder):
        return model.config.head == "masked" and model.head is None
    return isinstance(model, Decoder) and model.head is None


class CompiledCost(NamedTuple):
    """What a compiled program needs.

    Attributes:
      temporary: bytes that it keeps besides its arguments and its results.
      arguments, results: bytes of those.
      multiply_adds: pairs of a multiplication and an addition in matrix products
        (`ffnlab.models.cost.multiply_adds`).
      compiler_flops: operations as the compiler counts them: elementwise ones too, the body of a
        loop once; to be compared between programs of one kind only.
    """

    temporary: int
    arguments: int
    results: int
    multiply_adds: int
    compiler_flops: float


def compiled_cost(fn: Callable[..., Any], *args: Any) -> CompiledCost:
    """Compiles a function for some arguments, without running it, and says what it needs.

    Args:
      fn: of pytrees of arrays; a jitted one is taken without its donations.
      args: what it is called with; leaves may be abstract (`jax.ShapeDtypeStruct`).
    Raises:
      ConfigError: products that cannot be counted (`multiply_adds`), or a backend that does not
        tell what its programs need.

    >>> import jax.numpy as jnp
    >>> found = compiled_cost(lambda x: x @ x.T, jax.ShapeDtypeStruct((4, 3), jnp.float32))
    >>> found.arguments, found.results, found.multiply_adds
    (48, 64, 48)
    """
    counted = multiply_adds(fn, *args)
    compiled = jax.jit(fn).lower(*args).compile()
    memory, work = compiled.memory_analysis(), compiled.cost_analysis()
    if memory is None or work is None:
        raise ConfigError(f"backend {jax.default_backend()!r} does not tell what a program needs")
    return CompiledCost(
        memory.temp_size_in_bytes,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        counted,
        float(work["flops"]),
    )
