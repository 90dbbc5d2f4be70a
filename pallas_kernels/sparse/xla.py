"""Sparse products that skip work in plain XLA, for the one row of a decoding step on a CPU.

The indices of the active rows are compacted, and a loop of dynamic length takes them in blocks.
What makes the loop as fast as memory allows (measured on two cores):

- A block's rows are gathered inside elementwise fusions, so they are read once and never written.
- `matvec` keeps `partial` sums that take turns over the rows. Each fusion then adds `unroll` rows
  to [partial, n] at once, and XLA splits the partial sums over its threads.
- `rows` folds each row of d products into d / chunks lanes in one fusion and sums the lanes by a
  product with ones: XLA reduces the last axis of a fusion one number at a time.
- `hold_open` keeps XLA from compiling the loop into one single-threaded function (jax 0.12 does so
  with every loop that holds no sort, scatter or library call, at half the speed).

With many active rows (`rows_until`, `matvec_until`) and for weights that fit in a cache the masked
dense product is faster and runs instead. The crossover moves with the machine: a loop over
scattered rows is bound by latency, the dense product by bandwidth.
"""

import dataclasses
import math

import jax.numpy as jnp
from jax import lax

from pallas_kernels.sparse import dense
from pallas_kernels.sparse.packed import Int4Rows, nbytes, unpack
from pallas_kernels.sparse.reference import only_listed


@dataclasses.dataclass(frozen=True)
class Config:
    """How the loop is cut and when it runs.

    Attributes:
      partial: partial sums of `matvec`, >= 1.
      unroll: rows added to each of them per step, a multiple of 4, 4 to 32. Memory delivers twice
        as much to eight rows read side by side as to one.
      lanes: lanes that the d products of one row are folded into, roughly, >= 1.
      rows_until: largest share of active rows for which `rows`, also inside `glu`, runs the loop.
      matvec_until: the same for `matvec`. Both are 0 to 1.
      min_bytes: with a weight smaller than this the dense product always runs.
    """

    partial: int = 16
    unroll: int = 12
    lanes: int = 512
    rows_until: float = 0.4
    matvec_until: float = 0.7
    min_bytes: int = 4 << 20

    def __post_init__(self):
        sizes, shares = (self.partial, self.lanes), (self.rows_until, self.matvec_until)
        good_unroll = self.unroll in range(4, 33, 4)
        if min(sizes) < 1 or not good_unroll or min(shares) < 0 or max(shares) > 1:
            raise ValueError(
                f"{self} is out of range: partial >= 1, lanes >= 1, unroll a multiple of 4 up to "
                "32, rows_until and matvec_until from 0 to 1"
            )

    @property
    def block(self):
        """Rows per turn of the loop."""
        return self.partial * self.unroll


def compact(active, size):
    """Indices of the true entries in ascending order, then the first of them again and again.

    Args:
      active: [f], bool, f < 2**24 (counted in float32).
      size: length of the result, >= f.
    Returns:
      indices [size] int32; place [f] int32, where each active entry went; their count [] int32.
      All indices are 0 where nothing is active.
    """
    f, width = active.shape[0], 64
    ones = jnp.pad(active, (0, -f % width)).reshape(-1, width).astype(jnp.float32)
    # A prefix sum by a triangular product: half the time of cumsum.
    inside = ones @ jnp.triu(jnp.ones((width, width), jnp.float32))
    before = jnp.cumsum(inside[:, -1]) - inside[:, -1]
    place = (inside + before[:, None]).reshape(-1)[:f].astype(jnp.int32) - 1
    count = place[-1] + 1
    target = jnp.where(active, place, size)
    ids = jnp.zeros(size, jnp.int32).at[target].set(jnp.arange(f, dtype=jnp.int32), mode="drop")
    # Padding repeats an active row: another row could hold inf, and 0 * inf is NaN.
    ids = jnp.where(jnp.arange(size, dtype=jnp.int32) < count, ids, ids[0])
    return ids, place, count


def hold_open(i):
    """i, by way of a sort, which XLA does not compile into a single-threaded loop (see above)."""
    return lax.sort(jnp.stack([i, i]))[0]


def picked(w, ids):
    """Rows of w in float32: w [f, d] or `Int4Rows`, ids [b] int32 in range -> [b, d]."""
    if isinstance(w, Int4Rows):
        return unpack(Int4Rows(*(a.at[ids].get(mode="promise_in_bounds") for a in w)))
    return w.at[ids].get(mode="promise_in_bounds").astype(jnp.float32)


def fold_rows(w_rows, ids, x, lanes):
    """<w_rows[i, :], x> for each i of ids: w_rows [f, d], ids [b], x [d] -> [b] float32."""
    if isinstance(w_rows, Int4Rows):
        return picked(w_rows, ids) @ x
    f, d = w_rows.shape
    chunks = min((c for c in range(1, 9) if d % c == 0), key=lambda c: abs(d // c - lanes))
    w, x = w_rows.reshape(f * chunks, d // chunks), x.reshape(chunks, -1)
    products = sum(picked(w, ids * chunks + c) * x[c] for c in range(chunks))
    return products @ jnp.ones(d // chunks, jnp.float32)


def add_rows(sums, w, ids, v):
    """sums + v_i * w[i, :], rows dealt in turn: sums [p, n], w [k, n], ids and v [4 * s * p]."""
    ids, v = (a.reshape(-1, 4, sums.shape[0]) for a in (ids, v))
    for four, scale in zip(ids, v, strict=True):
        for u in range(4):
            sums = sums + scale[u][:, None] * picked(w, four[u])
    return sums


def over_blocks(values, step, start, config):
    """Runs `step` over blocks of the active rows.

    Args:
      values: [f] float32; the rows with a value other than 0 are active.
      step: (carry, ids [block], values [block], first [] int32) -> carry; values are 0 in padding.
      start: size -> the first carry; size is f rounded up to whole blocks.
    Returns:
      the last carry, and `place` of `compact`.
    """
    size = values.shape[0] + -values.shape[0] % config.block
    ids, place, count = compact(values != 0, size)
    packed = jnp.where(jnp.arange(size, dtype=jnp.int32) < count, values[ids], jnp.float32(0))

    def turn(state):
        first, carry = state
        here = lax.dynamic_slice(ids, (first,), (config.block,))
        now = lax.dynamic_slice(packed, (first,), (config.block,))
        return hold_open(first + config.block), step(carry, here, now, first)

    end = lax.while_loop(lambda state: state[0] < count, turn, (jnp.int32(0), start(size)))
    return end[1], place


def pays(values, weights, config):
    """Whether the loop may run at all: one row, and every weight too large for a cache."""
    large = all(nbytes(w) >= config.min_bytes for w in weights)
    return values.shape[0] == 1 and values.size > 0 and large


def sparse_matvec(x, w, config):
    """x @ w by the loop: x [k] float32, w [k, n] -> [n] float32."""
    zeros = jnp.zeros((config.partial, w.shape[1]), jnp.float32)
    step = lambda sums, ids, now, _: add_rows(sums, w, ids, now)  # noqa: E731
    return over_blocks(x, step, lambda _: zeros, config)[0].sum(0)


def sparse_rows(x, w_rows, gate, config):
    """gate * (w_rows @ x) by the loop: x [d] and gate [f] float32, w_rows [f, d] -> [f] float32."""

    def step(packed, ids, now, first):
        m = now * fold_rows(w_rows, ids, x, config.lanes)
        return lax.dynamic_update_slice(packed, m, (first,))

    packed, place = over_blocks(gate, step, lambda size: jnp.zeros(size, jnp.float32), config)
    return jnp.where(gate != 0, packed[place], jnp.float32(0))


def sparse_glu(gate, up_rows, down, x, config):
    """`glu` by one loop over both matrices: gate [f] and x [d] float32 -> [n] float32."""

    def step(sums, ids, now, _):
        return add_rows(sums, down, ids, now * fold_rows(up_rows, ids, x, config.lanes))

    zeros = jnp.zeros((config.partial, down.shape[1]), jnp.float32)
    return over_blocks(gate, step, lambda _: zeros, config)[0].sum(0)


def at_most(values, share):
    """Whether at most `share` of values [f] are not 0; [] bool."""
    return jnp.count_nonzero(values) <= math.floor(share * values.shape[0])


def matvec(x, w, *, config=Config()):
    """`reference.matvec`, skipping the rows of w whose x is 0 when x is one row."""
    if not pays(x, (w,), config):
        return dense.matvec(x, w)
    v = x[0].astype(jnp.float32)
    y = lax.cond(
        at_most(v, config.matvec_until),
        lambda: sparse_matvec(v, w, config),
        lambda: dense.one_matvec(v, w),
    )
    return y[None]


def take(x, w, ids, count, *, config=Config()):
    """`reference.take`: `matvec` of x with the entries that are not listed set to 0."""
    return matvec(only_listed(x.astype(jnp.float32), ids, count), w, config=config)


def rows(x, w_rows, gate, *, config=Config()):
    """`reference.rows`, skipping the rows whose gate is 0 when x is one row."""
    if not pays(gate, (w_rows,), config):
        return dense.rows(x, w_rows, gate)
    v, a = x[0].astype(jnp.float32), gate[0].astype(jnp.float32)
    m = lax.cond(
        at_most(a, config.rows_until),
        lambda: sparse_rows(v, w_rows, a, config),
        lambda: dense.one_rows(v, w_rows, a),
    )
    return m[None]


def glu(gate, up_rows, down, x, *, config=Config()):
    """`reference.glu`, skipping rows of both matrices when x is one row.

    With more than `rows_until` active rows only `down` skips, above `matvec_until` nothing does.
    """
    if not pays(gate, (up_rows, down), config):
        return dense.glu(gate, up_rows, down, x)
    v, a = x[0].astype(jnp.float32), gate[0].astype(jnp.float32)
    forms = (
        lambda: sparse_glu(a, up_rows, down, v, config),
        lambda: sparse_matvec(dense.one_rows(v, up_rows, a), down, config),
        lambda: dense.one_matvec(dense.one_rows(v, up_rows, a), down),
    )
    limits = (config.rows_until, max(config.rows_until, config.matvec_until))
    return lax.switch(sum(1 - at_most(a, share).astype(jnp.int32) for share in limits), forms)[None]
