"""Quantized matrix products beside qwix: the same codes and scales, the same activations, on a CPU.

    y = x @ w,  w[i, j] = q[i, j] * s[i // group, j]

qwix rounds a random matrix, and both sides multiply by what it found: INT8 or INT4 weights with
float32 activations, and INT4 weights with activations that each side rounds to e4m3 per row. Both
are compiled whole and take turns, so that what else the machine does falls on both; a ratio is the
median of the turns' ratios. The products are compared, else the figures would not be of the same
work.

`ffnlab` has two forms. Packed is the weight as it is stored. Prepared is what generation uses on a
CPU (`weights.prepare`): the same values, written out once in float32, in eight times the memory of
INT4. It stands in a column of its own, since who calls `qwix.dequantize` beforehand has as much.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from rich import box
from rich.table import Table

from ffnlab import weights
from ffnlab.clock import in_turns
from ffnlab.errors import FFNLabError, at_least, require
from ffnlab.formats.opening import config_of
from ffnlab.progress import track

__all__ = ["Comparison", "Product", "Settings", "compare", "ratios", "settings_for"]

# Float32 sums in another order; an activation between two e4m3 values may also go either way.
TOLERANCE = {None: 1e-5, "e4m3": 1e-2}  # relative to the largest output
FORMATS = {"int8": ("int8", None), "int4": ("int4", None), "int4, x e4m3": ("int4", "e4m3")}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
      d_in, d_out: of the matrix.
      rows: numbers of activation rows; one is a step of decoding.
      group: rows of the matrix that share a scale; divides d_in.
      turns: times that each form runs, after one to warm up.
    """

    d_in: int = 2048
    d_out: int = 5632
    rows: tuple[int, ...] = (1, 64)
    group: int = 128
    turns: int = 9

    def __post_init__(self) -> None:
        at_least(1, d_in=self.d_in, d_out=self.d_out, group=self.group, turns=self.turns)


@dataclasses.dataclass(frozen=True)
class Product:
    """One format and number of rows.

    Attributes:
      format: of the weights and, where rounded, of the activations.
      rows: of the activations.
      packed, prepared, theirs: median seconds.
      ratio: how many times faster packed is than qwix; median over turns.
      dtypes: of operands and result, ours and theirs.
      difference: of the products, relative to the largest output.
    """

    format: str
    rows: int
    packed: float
    prepared: float
    theirs: float
    ratio: float
    dtypes: tuple[str, str]
    difference: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All products, and what they ran on.

    Attributes:
      products: in the order of formats, then rows.
      about: shape, versions and platform; one line.
    """

    products: tuple[Product, ...]
    about: str

    def __rich__(self) -> Table:
        table = Table(
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            title="quantized products beside qwix",
            caption=self.about,
        )
        texts = ("weights", "ffnlab's dtypes", "qwix's dtypes")
        numbers = ("rows", "packed ms", "qwix ms", "ratio", "prepared ms", "difference")
        for name in (texts[0], *numbers, *texts[1:]):
            table.add_column(name, justify="left" if name in texts else "right")
        for p in self.products:
            packed, theirs, prepared = (f"{1e3 * s:.2f}" for s in (p.packed, p.theirs, p.prepared))
            figures = (str(p.rows), packed, theirs, f"{p.ratio:.2f}", prepared)
            table.add_row(p.format, *figures, f"{p.difference:.0e}", *p.dtypes)
        return table


def settings_for(directory: Path | None, turns: int) -> Settings:
    """Settings with the up projection of a model directory; of 2048 x 5632 without one."""
    if directory is None:
        return Settings(turns=turns)
    config = config_of(directory)
    group = 128 if config.width % 128 == 0 else config.width
    return Settings(config.width, config.hidden, group=group, turns=turns)


def compare(settings: Settings = Settings(), *, progress: bool = False) -> Comparison:
    """Measures both sides.

    Args:
      settings: sizes and turns.
      progress: show a bar.
    Returns:
      the figures.
    Raises:
      MissingExtraError: qwix is not installed.
      FFNLabError: the two sides do not compute the same.
    """
    qwix = require("qwix", extra="parity")
    w = jax.random.normal(jax.random.key(0), (settings.d_in, settings.d_out))
    w *= settings.d_in**-0.5
    cases = [(name, rows) for name in FORMATS for rows in settings.rows]
    found = [measure(qwix, w, *case, settings) for case in track(cases, "bench", enabled=progress)]
    about = (
        f"[{settings.d_in} x {settings.d_out}], groups of {settings.group}; "
        f"jax {jax.__version__}, qwix {qwix.__version__}, {jax.devices()[0].platform}"
    )
    return Comparison(tuple(found), about)


def ratios() -> dict[str, float]:
    """How many times faster packed weights are than qwix: by format and rows, as "int4, 64"."""
    return {f"{p.format}, {p.rows}": p.ratio for p in compare().products}


def measure(
    qwix: ModuleType, w: Float[Array, "in out"], name: str, rows: int, settings: Settings
) -> Product:
    """All forms of one product take turns."""
    kind, act = FORMATS[name]
    x = jax.random.normal(jax.random.key(1), (rows, w.shape[0]))
    theirs = qwix.quantize(w, kind, channelwise_axes=[1], tiled_axes={0: settings.group})
    ours = same_weight(theirs, settings.group, act)
    product, their_product = jax.jit(lambda x, w: w.matmul(x)), qwix_product(qwix, act)
    prepared = weights.prepare(ours)
    forms: dict[str, Callable[[], Array]] = {
        "packed": lambda: product(x, ours),
        "prepared": lambda: product(x, prepared),
        "theirs": lambda: their_product(x, theirs),
    }
    results = {form: run() for form, run in forms.items()}  # compiles
    difference = differ(results["packed"], results["theirs"])
    if max(difference, differ(results["prepared"], results["theirs"])) > TOLERANCE[act]:
        raise FFNLabError(f"{name}: the two sides do not compute the same: {difference:.1e}")
    times = in_turns(forms, settings.turns)
    medians = {form: times.of(form).median for form in forms}
    ratio = times.over("theirs", "packed").median
    left = str(x.dtype) if act is None else f"{x.dtype} as {act}"
    mine = f"{left} @ {kind} -> {results['packed'].dtype}"
    other = f"{left} @ {theirs.qvalue.dtype} -> {results['theirs'].dtype}"
    return Product(name, rows, **medians, ratio=ratio, dtypes=(mine, other), difference=difference)


def same_weight(theirs: Any, group: int, act: str | None) -> weights.Weight:
    """Our weight with the codes and scales of a qwix array [in, out]."""
    codes = theirs.qvalue.astype(jnp.int8)
    if theirs.qvalue.dtype == jnp.int8:
        return weights.Int8(codes, theirs.scale, group=group, act=act)
    return weights.Int4.from_codes(codes, theirs.scale, group=group, act=act)


def qwix_product(qwix: ModuleType, act: str | None) -> Callable[..., Array]:
    """qwix's x @ w, compiled; x is rounded per row where `act` says so."""
    if act is None:
        return jax.jit(qwix.dot)
    rounded = lambda x: qwix.quantize(x, jnp.float8_e4m3fn, channelwise_axes=[0])  # noqa: E731
    return jax.jit(lambda x, w: qwix.dot(rounded(x), w))


def differ(a: Float[Array, "rows out"], b: Float[Array, "rows out"]) -> float:
    """Largest difference, relative to the largest entry."""
    return float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))
