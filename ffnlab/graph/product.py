"""y = A x for the sparse matrix of a graph, and its transpose, by native products.

On a CPU the product and, by a custom rule, its gradient for x are the compiled CSR product behind
`jax.experimental.sparse.BCSR`: the transpose is one more such product over the edges by sender,
where JAX's own rule scatters. On other devices both are sorted segment sums. The gradient for the
weights of edges is a sampled product, taken in pieces that fit a cache.

The rule is one of reverse mode: `jax.jvp` through it is refused, gradients of gradients are not.
"""

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, Int

from ffnlab.errors import FFNLabError
from ffnlab.graph.edges import Edges
from ffnlab.graph.segments import check_values, wide

__all__ = ["aggregate"]

# Edges of a piece of the sampled product. A million edges of 64 channels, two cores: whole 1,700
# ms, pieces of 8,192 edges 560, of 2,048 126, of 512 270.
PIECE = 2048


def aggregate(
    edges: Edges, weights: Float[Array, "e"] | None, x: Float[Array, "m d"]
) -> Float[Array, "n d"]:
    """y[i] = sum of weights[k] * x[senders[k]] over the edges k of receiver i.

    The sums of each receiver are taken in the order of its edges. float32 (or float64) throughout:
    x in a lower dtype is widened, and the result is rounded to it once, so bfloat16 saves no time
    here. Under `vmap`, members of x alone are further columns of one product; where weights or
    edges differ too, products follow one another.

    Args:
      edges: a Graph or Bipartite, an argument of the jitted function (see `ffnlab.graph`).
      weights: [e] in the order of the edges; ones when None.
      x: [m, d], a row for each sender.
    Returns:
      [n, d] in the dtype of x; 0 for a receiver without edges.
    Raises:
      FFNLabError: not a weight for each edge, not a row for each sender, or no floats.

    >>> from ffnlab.graph import Graph
    >>> graph = Graph.make([0, 1, 2], [1, 1, 0], nodes=3)
    >>> aggregate(graph, None, jnp.array([[1.0], [10.0], [100.0]])).ravel().tolist()
    [100.0, 11.0, 0.0]
    """
    check_values("x", x, edges.num_senders, "senders")
    if x.ndim != 2:
        raise FFNLabError(f"x has shape {x.shape}; [senders, d] is accepted (vmap for more)")
    values = jnp.ones(edges.num_edges, wide(x).dtype) if weights is None else weights
    check_values("weights", values, edges.num_edges, "edges")
    if values.ndim != 1:
        raise FFNLabError(f"weights has shape {values.shape}; [edges] is accepted (vmap for more)")
    return weighted(edges, values.astype(wide(x).dtype), wide(x)).astype(x.dtype)


@jax.custom_vjp
def weighted(edges: Edges, weights: Array, x: Array) -> Array:
    """`aggregate` of one wide dtype."""
    return product(edges.starts, edges.receivers, edges.senders, weights, x)


def forward(edges: Edges, weights: Array, x: Array) -> tuple[Array, tuple]:
    return weighted(edges, weights, x), (edges, weights, x)


def backward(saved: tuple, gradient: Array) -> tuple[None, Array, Array]:
    edges, weights, x = saved
    of_x = weighted(edges.transpose(), weights[edges.by_sender], gradient)
    return None, sampled(edges, gradient, x), of_x


weighted.defvjp(forward, backward)


@custom_vmap
def product(
    starts: Int[Array, "n1"],
    rows: Int[Array, "e"],
    columns: Int[Array, "e"],
    values: Float[Array, "e"],
    x: Float[Array, "m d"],
) -> Float[Array, "n d"]:
    """The product of a CSR matrix; `rows` says again, for each value, what `starts` says."""
    return jax.lax.platform_dependent(
        starts, rows, columns, values, x, cpu=by_rows, default=by_values
    )


@product.def_vmap
def product_of_members(size: int, is_batched: list[bool], *operands: Array) -> tuple[Array, bool]:
    """Members of x alone as columns of one product; other members one after the other."""
    if not any(is_batched[:-1]):
        *matrix, x = operands
        flat = product(*matrix, jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1))
        return jnp.moveaxis(flat.reshape(len(flat), size, -1), 1, 0), True
    batched = [x for x, is_one in zip(operands, is_batched, strict=True) if is_one]

    def one(members: list[Array]) -> Array:
        rest = iter(members)
        chosen = zip(operands, is_batched, strict=True)
        return product(*(next(rest) if is_one else x for x, is_one in chosen))

    return jax.lax.map(one, batched), True


def by_rows(starts: Array, rows: Array, columns: Array, values: Array, x: Array) -> Array:
    """The native product of a CPU, which checks no index."""
    # With it comes SciPy, half a second of import that models without a graph do not need.
    from jax.experimental.sparse import BCSR

    del rows
    if not values.size or not x.size:  # there it divides by what there is none of
        return jnp.zeros((len(starts) - 1, x.shape[1]), x.dtype)
    return BCSR((values, columns, starts), shape=(len(starts) - 1, len(x))) @ x


def by_values(starts: Array, rows: Array, columns: Array, values: Array, x: Array) -> Array:
    """Gathered, multiplied and added up: what the product means."""
    terms = values[:, None] * x[columns]
    return jax.ops.segment_sum(terms, rows, len(starts) - 1, indices_are_sorted=True)


def sampled(edges: Edges, a: Float[Array, "n d"], b: Float[Array, "m d"]) -> Float[Array, "e"]:
    """a[receivers[k]] . b[senders[k]] for every edge k."""
    if not edges.num_edges:  # perhaps no node either, and an axis of 0 takes no index
        return jnp.zeros(0, a.dtype)

    def whole(i: Array, j: Array) -> Array:
        return jnp.sum(a[i] * b[j], axis=-1)

    def in_pieces(i: Array, j: Array) -> Array:
        return jax.lax.map(lambda k: whole(*k), (i, j), batch_size=PIECE)

    return jax.lax.platform_dependent(edges.receivers, edges.senders, cpu=in_pieces, default=whole)
