"""How the GPU kernels cut a sparse product into blocks of threads, and which calls they take.

A weight row is `length` words of `planes` columns: the row itself, or an eighth of it for
`Int4Rows`. Pallas is not imported here, so that a call can be refused cheaply.
"""

import dataclasses

import jax.numpy as jnp

from pallas_kernels import _triton, backend
from pallas_kernels.sparse.packed import PLANES, Int4Rows, nbytes
from pallas_kernels.tuning import cache

THREADS = 128  # of a block: one warp group
MAX_ROWS = 4  # of x: with more the active channels of all rows are nearly all channels
# Numbers that a block may keep in registers: x of `rows`; x and the sums of the one-pass `glu`.
HELD = 128 * THREADS
HELD_GLU = 64 * THREADS
# The same for a TPU, by planes: tiles of 128 words of `matvec`, and words of a whole row of `rows`.
# Two blocks of rows and the sums then fit the 16 MB that a kernel may ask for.
TPU_TILES, HELD_TPU = {1: 44, PLANES: 16}, {1: 8192, PLANES: 2048}
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
# Blocks that a multiprocessor holds at once by their registers (`make aot` refuses more), for one
# row of x and for several. Two of INT4 always: each writes float32 sums, and those of three blocks
# are a fifth of the weight's bytes.
RESIDENT = {"matvec": (6, 3), "take": (4, 2), "rows": (3, 2), "glu": (2, 2)}
RESIDENT_INT4 = 2
# What a tuned configuration names; min_bytes is the caller's.
TUNED = ("blocks", "unroll", "unroll_pairs")


@dataclasses.dataclass(frozen=True)
class GpuConfig:
    """How the work is cut on a GPU, and from which size on.

    Attributes:
      blocks: thread blocks wanted, >= 1; when None as many as run at once (`resident`).
      unroll: weight rows of `matvec` and `take` whose loads are in flight together, 1 to 16.
      unroll_pairs: the same for `rows` and `glu`, which hold whole rows, 1 to 4; twice as many of
        `Int4Rows`, which are shorter.
      min_bytes: with a weight smaller than this the dense product runs unless this backend is asked
        for by name: a launch costs more than the traffic it saves.
    """

    blocks: int | None = None
    unroll: int = 8
    unroll_pairs: int = 2
    min_bytes: int = 8 << 20

    def __post_init__(self):
        few = self.blocks is not None and self.blocks < 1
        if few or not 1 <= self.unroll <= 16 or not 1 <= self.unroll_pairs <= 4:
            raise ValueError(
                f"{self} is out of range: blocks >= 1, unroll 1 to 16, unroll_pairs 1 to 4"
            )


def pick(name, m, *weights):
    """The configuration measured best for a call on this device, else the default.

    Args:
      name: "matvec", "rows" or "glu".
      m: rows of x.
      *weights: the call's, in order.
    """
    found = cache.find(f"sparse.{name}", m, facts(m, *weights), build)
    return GpuConfig() if found is None else found


def settle(config, name, m, *weights):
    """A configuration whose number of blocks is known; see `pick` for the arguments."""
    if config.blocks is not None:
        return config
    count = backend.cores() * min(resident(name, m, w) for w in weights)
    return dataclasses.replace(config, blocks=count)


def resident(name, m, w):
    """Blocks of a product of m rows by w that a multiprocessor works on at once.

    >>> resident("matvec", 1, jnp.ones((2, 128))), resident("matvec", 4, jnp.ones((2, 128)))
    (6, 3)
    """
    return RESIDENT_INT4 if isinstance(w, Int4Rows) else RESIDENT[name][m > 1]


def facts(m, *weights):
    """What a configuration depends on, by name; rows of x count exactly."""
    kind = "int4" if isinstance(weights[0], Int4Rows) else weights[0].dtype.name
    return {"x": m, "rows": weights[0].shape[0], "weights": kind} | {
        f"columns_{i}": w.shape[1] for i, w in enumerate(weights)
    }


def build(named):
    """The `GpuConfig` of numbers by name; ValueError for other names or a number out of range."""
    if set(named) != set(TUNED):
        raise ValueError(f"config must hold {', '.join(TUNED)}, got {', '.join(sorted(named))}")
    return GpuConfig(**named)


@dataclasses.dataclass(frozen=True)
class Cut:
    """A weight [k, n] as a kernel sees it.

    Attributes:
      rows: k.
      length: words per row; planes: columns per word; n is their product.
      width: neighbouring words of one thread, at most 128 bits.
    """

    rows: int
    length: int
    planes: int
    width: int

    @property
    def step(self):
        """Words of a row that one block holds."""
        return THREADS * self.width

    @property
    def columns(self):
        """Blocks side by side that hold a row; the last one overlaps its neighbour if need be."""
        return -(-self.length // self.step)


def widths(w, m, *, whole=False):
    """Words that each thread of a block may read side by side, best first; none fit a short row.

    Args:
      w: array [k, n], or `Int4Rows`.
      m: rows of x.
      whole: one block holds a whole row (`rows`, `glu`).
    """
    widest = (4 if m <= 2 else 2) if isinstance(w, Int4Rows) else 16 // w.dtype.itemsize
    length, unit = w.shape[1] // planes(w), THREADS if whole else 1
    candidates = [v for v in (8, 4, 2, 1) if v <= widest and THREADS * v <= length]
    return [v for v in candidates if length % (unit * v) == 0]


def cut(w, m, *, whole=False):
    """The `Cut` of a weight of which `widths` finds some, by the same arguments."""
    return Cut(w.shape[0], w.shape[1] // planes(w), planes(w), widths(w, m, whole=whole)[0])


def deal(entries, columns, unroll, blocks):
    """Blocks that share `entries` rows, each with work: no more than their longest turn needs.

    Args:
      entries: rows; columns: blocks side by side; unroll: rows of a turn.
      blocks: wanted in all.

    >>> deal(14336, 4, 8, 792), deal(14336, 4, 8, 256), deal(3, 1, 8, 256)  # 10, 28 and 1 turns
    (180, 64, 1)
    """
    units = -(-entries // unroll)
    turns = -(-units // max(1, min(blocks // columns, units)))
    return -(-units // turns)


def in_one_pass(m, up_rows, down):
    """Whether `glu` runs as one kernel: one row of x, and x and the sums fit the registers."""
    whole = all(w.shape[1] % (THREADS * planes(w)) == 0 for w in (up_rows, down))
    return m == 1 and whole and up_rows.shape[1] + down.shape[1] <= HELD_GLU


def unroll_whole(w, config):
    """Weight rows of `rows` and `glu` whose loads are in flight together."""
    return config.unroll_pairs * (2 if isinstance(w, Int4Rows) else 1)


def planes(w):
    """Columns per word of a weight."""
    return PLANES if isinstance(w, Int4Rows) else 1


def refuse(name, *, weights, m, config, named):
    """Why the kernels cannot take a call, or None.

    Args:
      name: "matvec", "take", "rows" or "glu".
      weights: the call's, in order.
      m: rows of x.
      config: `GpuConfig`.
      named: whether the backend was asked for by name.
    """
    if not 1 <= m <= MAX_ROWS:
        return f"takes 1 to {MAX_ROWS} rows of x, got {m}"
    reason = refuse_weights(weights, config, named)
    if reason is not None:
        return reason
    for w in weights:
        if not widths(w, m):
            return f"needs rows of {THREADS * planes(w)} columns or more, got {tuple(w.shape)}"
    if name in ("rows", "glu"):
        up = weights[0]
        if up.shape[1] % (THREADS * planes(up)):
            return f"needs rows of a multiple of {THREADS * planes(up)} columns, got {up.shape[1]}"
        if m * up.shape[1] > HELD:
            return f"holds {HELD} numbers of x, got {m} rows of {up.shape[1]}"
    return None


def unit(w):
    """Neighbouring rows of a weight that a TPU copies together: those of one 32-bit sublane."""
    return 1 if isinstance(w, Int4Rows) else 4 // w.dtype.itemsize


def tpu_columns(w):
    """Words of a row in one block of a TPU's `matvec`: the most that divide it; 128 at least."""
    tiles = w.shape[1] // planes(w) // 128
    return 128 * max(t for t in range(1, TPU_TILES[planes(w)] + 1) if tiles % t == 0)


def refuse_tpu(name, *, weights, m, config, named):
    """Why the TPU kernels cannot take a call, or None; arguments as of `refuse`."""
    if not 1 <= m <= MAX_ROWS:
        return f"takes 1 to {MAX_ROWS} rows of x, got {m}"
    for w in weights:
        if not isinstance(w, Int4Rows) and w.dtype == jnp.float16:
            return "a TPU has no float16; accepted: float32, bfloat16, Int4Rows"
    reason = refuse_weights(weights, config, named)
    if reason is not None:
        return reason
    for w in weights:
        if w.shape[0] % unit(w) or w.shape[1] % (128 * planes(w)):
            return (
                f"needs a multiple of {unit(w)} rows and of {128 * planes(w)} columns, "
                f"got {tuple(w.shape)}"
            )
    up = weights[0]
    most = HELD_TPU[planes(up)] * planes(up)
    if name in ("rows", "glu") and up.shape[1] > most:
        return f"holds rows of {most} columns, got {up.shape[1]}"
    return None


def refuse_triton(*, weights, m, config, named):
    """Why the Triton kernels cannot take a call, or None; arguments as of `refuse`."""
    if m != 1:
        return f"takes one row of x, got {m}"
    return _triton.missing() or refuse_weights(weights, config, named)


def refuse_weights(weights, config, named):
    """What any kernel cannot take of the weights, or None."""
    for w in weights:
        if not isinstance(w, Int4Rows) and w.dtype not in DTYPES:
            return f"takes weights in float32, bfloat16, float16 or Int4Rows, got {w.dtype}"
        if not w.shape[0] or not w.shape[1]:
            return f"a weight of shape {tuple(w.shape)} is empty"
        if not named and nbytes(w) < config.min_bytes:
            return f"a weight of {nbytes(w)} bytes is below min_bytes={config.min_bytes}"
    return None
