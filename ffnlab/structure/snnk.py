"""Scalable Neural Network Kernels (ICLR 2024, arXiv 2310.13225).

A layer act(w . x + b) is replaced by a product of two towers, Phi(x) and Psi(w, b), which random
features make of inputs and of weights (`ffnlab.layers.random_features`). Phi has no parameters, so
n units of d inputs need n m parameters for m features. What follows, a linear map, can be taken
into the same matrix (bundled), and the best such matrix for squared errors has a closed form.

    y = W2 Psi Phi(x) + b2;      bundled  y = W Phi(x) + b,  W = argmin |W Phi + b - Y|^2 + r |W|^2

What differs from the authors' code: rotations of orthogonal projections are drawn evenly (theirs
keep the signs that a QR decomposition gives, which is biased); the exponent has the factor 1/2 of
the formula for rows of tokens too; adapters draw Gaussian projections. The closed form is solved
from an orthogonal triangle of features and targets, not from their products, whose condition is
the square.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ffnlab import tree
from ffnlab.errors import ConfigError, NumericalError
from ffnlab.layers import FFN, Block, FourierFeatures, GatedFFN, KernelAdapter, KernelFFN, Linear
from ffnlab.layers.random_features import SPECTRA, Features, ReluFeatures, projections
from ffnlab.models.adapters import INSERTED, blocks, check_count, width_of, with_adapters
from ffnlab.models.calibration import given
from ffnlab.models.rewriting import key_of, rewriting
from ffnlab.models.stack import check_layered, in_list
from ffnlab.transform import Transform
from ffnlab.tree import Predicate
from ffnlab.weights import Dense

__all__ = ["bundle", "bundled", "snnk", "snnk_adapter"]

FFNS = tree.of_type(FFN) | tree.of_type(GatedFFN)
Triangles = Mapping[str, Float[Array, "k k"]]
AXES = ("features", "embed")
PAIRS = tree.where(
    lambda _, node: isinstance(node, KernelFFN) and node.psi is not None and node.up is None
)


def snnk(
    *,
    features: int = 16,
    kind: str = "relu",
    floor: float = -5.0,
    length: float | None = None,
    orthogonal: bool = True,
    where: Predicate = FFNS,
    seed: int = 0,
) -> Transform[Any, tuple[()]]:
    """The transform that replaces the first map of FFNs and its nonlinearity by random features.

    The matrix of the features is Psi of the first map's weights and trains from there; the
    function changes. Of a gated FFN it stands for the gate. "relu" is another layer than
    relu(w . x): the kernel of two rectified towers; the others approximate cos, sin or
    exp(-z^2 / 2) of w . x + b.

    Args:
      features: projections (m), >= 1; "cos" and its like make two features of each.
      kind: of features, "relu", "cos", "sin" or "gaussian".
      floor: of "relu", below which no product goes; the authors take -5 here and 0 in adapters.
      length: to which inputs are scaled before; needed for all but "relu", whose size does not
        grow with exp(|x|^2).
      orthogonal: whether projections are, in blocks of the width.
      where: which `FFN` and `GatedFFN` layers, by their paths in the list form.
      seed: of the draws, each by its path.
    Returns:
      a transform that observes nothing.
    Raises:
      ConfigError: an option out of range; of a model, weights that are not plain matrices.
      SelectionError: of a model, no FFN is selected.

    >>> snnk(features=8).name
    'snnk'
    """
    draw = Draw(features, kind, floor, length, orthogonal, seed)

    def problems(model: Any) -> list[str]:
        return not_dense(tree.select(model, ffns(where)))

    def change(model: Any) -> Any:
        return tree.map_at_path(
            model, ffns(where), lambda path, ffn: kernel_ffn(ffn, draw(path, ffn))
        )

    return rewriting("snnk", problems, change)


def snnk_adapter(
    *,
    features: int = 8,
    kind: str = "relu",
    length: float | None = None,
    orthogonal: bool = True,
    seed: int = 0,
) -> Transform[Any, tuple[()]]:
    """The transform that puts a small trainable layer of random features after every sublayer.

        h <- h + v * (Psi Phi(h)),  v zero: the model computes the same

    Psi is drawn from N(0, 0.02^2). `models.adapters.TRAINS["adapter"]` selects what learns: v and
    Psi, (m + 1) d numbers for m features and a width of d.

    Args:
      features: projections (m), >= 1; "cos" and its like make two features of each.
      kind: of features, as `snnk` has them; the floor of "relu" is 0.
      length: to which inputs are scaled before; needed for all but "relu".
      orthogonal: whether projections are, in blocks of the width.
      seed: of the draws, each by its path.
    Returns:
      a transform that observes nothing; the layers are slots "attn_adapter" and "ffn_adapter".
    Raises:
      ConfigError: an option out of range, or a model that has adapters.
    """
    draw = Draw(features, kind, 0.0, length, orthogonal, seed)

    def problems(model: Any) -> list[str]:
        there = [path for path, block in blocks(model).items() if with_adapters(block)]
        return [f"{there[:3]} have adapters already"] if there else []

    def inserted(path: str, block: Block) -> Block:
        width = width_of(block)
        for slot in block.slots:
            name = f"{slot}_{INSERTED}"
            phi = draw.of_width(f"{path}.{name}", width)
            start = jax.nn.initializers.normal(0.02)
            key = key_of(seed, f"{path}.{name}.psi")
            psi = Linear(phi.count, width, key=key, axes=AXES, init=start)
            block = block.with_slot(name, KernelAdapter(phi, psi, jnp.zeros(width)), after=slot)
        return block

    def change(model: Any) -> Any:
        return tree.replace(model, {p: inserted(p, b) for p, b in blocks(model).items()})

    return rewriting("snnk-adapter", problems, change)


def bundle() -> Transform[Any, tuple[()]]:
    """The transform that makes the two maps after random features one: W2 Psi.

    The function stays; it has fewer parameters where features are fewer than hidden channels.

    Raises:
      ConfigError: of a model, quantized weights, or gated FFNs alone, whose product with `up` no
        matrix says.
      SelectionError: of a model, there is no `KernelFFN` of two maps.
    """

    def problems(model: Any) -> list[str]:
        return not_dense(tree.select(model, PAIRS))

    def change(model: Any) -> Any:
        return tree.map_at(model, PAIRS, merged)

    return rewriting("bundle", problems, change)


def bundled(
    *,
    features: int = 256,
    kind: str = "relu",
    floor: float = 0.0,
    length: float | None = None,
    orthogonal: bool = True,
    ridge: float = 1e-6,
    where: Predicate = FFNS,
    seed: int = 0,
) -> Transform[Any, Triangles]:
    """The transform that fits FFNs by one matrix on random features, in closed form.

    Calibration sees every FFN's inputs and outputs; the matrix and a bias minimize their squared
    error, with no backpropagation. A batch is what the model takes, without padding.

    Args:
      features, kind, floor, length, orthogonal, where, seed: as `snnk`; gated FFNs are fitted too.
      ridge: r >= 0, times the mean squared entry of the features; the bias is not penalized.
    Returns:
      a transform of models with blocks. Its stats are, of each FFN, the triangle R of the QR
      decomposition of [Phi, 1, Y], whose size does not depend on the number of tokens.
    Raises:
      ConfigError: an option out of range; of a model, weights that are not plain matrices.
      SelectionError: of a model, no FFN is selected.
      NumericalError: at the end, activations that were not finite.
    """
    if not ridge >= 0:
        raise ConfigError(f"ridge={ridge} must be at least 0")
    draw = Draw(features, kind, floor, length, orthogonal, seed)

    def init(model: Any) -> Triangles:
        check_layered(model)
        found: dict[str, Array] = {}

        def measured(flat: Any) -> Any:
            chosen: dict[str, Any] = tree.select(flat, ffns(where))
            for path, ffn in chosen.items():
                size = draw.count + 1 + ffn.down.weight.shape[1]
                found[path] = jnp.zeros((size, size))
            return flat

        in_list(model, measured)
        return found

    @jax.jit
    def observed(stats: Triangles, model: Any, args: Any, options: Any) -> Triangles:
        new: dict[str, Array] = {}

        def seen(flat: Any) -> Any:
            there = tree.where(lambda path, _: path in stats)
            calls: Any = tree.capture(flat, there, *args, **options)[1]
            for path, ffn in tree.select(flat, there).items():
                call = calls[path]
                new[path] = grown(stats[path], draw(path, ffn), call.input[0], call.output)
            return flat

        in_list(model, seen)
        return new

    def observe(stats: Triangles, model: Any, batch: object) -> Triangles:
        taken = given(batch, model)
        return observed(stats, model, taken.args, taken.options)

    def rewrite(model: Any, stats: Triangles) -> Any:
        odd = [path for path, r in stats.items() if not np.isfinite(r).all()]
        if odd:
            raise NumericalError(f"bundled: activations of {odd[:3]} were not finite")

        def change(flat: Any) -> Any:
            return tree.map_at_path(
                flat,
                tree.where(lambda path, _: path in stats),
                lambda path, ffn: solved(ffn, draw(path, ffn), stats[path], ridge),
            )

        return in_list(model, change)

    return Transform("bundled", init, observe, rewrite)


def grown(
    triangle: Float[Array, "k k"], phi: Features, x: Float[Array, "..."], y: Float[Array, "..."]
) -> Float[Array, "k k"]:
    """The triangle of all rows so far, and of these."""
    x, y = (part.reshape(-1, part.shape[-1]).astype(jnp.float32) for part in (x, y))
    rows = jnp.concatenate([phi(x), jnp.ones((len(x), 1)), y], 1)
    return jnp.linalg.qr(jnp.concatenate([triangle, rows]), mode="r")


def least_squares(
    triangle: Float[Array | np.ndarray, "k k"], features: int, ridge: float
) -> tuple[Float[np.ndarray, "m n"], Float[np.ndarray, "n"]]:
    """W, b of the least |Phi W + b - Y|^2 + r |W|^2, of the triangle of [Phi, 1, Y].

    Args:
      triangle: R of a QR decomposition; |R v| is the length of the rows times v.
      features: columns of Phi (m).
      ridge: times the mean squared entry of a row, summed over rows: r.
    """
    r = np.asarray(triangle, np.float64)
    left, right = r[:, : features + 1], r[:, features + 1 :]
    size = ridge * np.square(left[:, :features]).sum() / max(features, 1)
    penalty = np.sqrt(size) * np.eye(features, features + 1)
    zero = np.zeros((features, right.shape[1]))
    found, *_ = np.linalg.lstsq(np.vstack([left, penalty]), np.vstack([right, zero]), rcond=None)
    return found[:features], found[features]


def solved(ffn: Any, phi: Features, triangle: Float[Array, "k k"], ridge: float) -> KernelFFN:
    """The FFN that the closed form makes of what was seen of another."""
    w, b = least_squares(triangle, phi.count, ridge)
    dtype = ffn.down.weight.dtype
    axes = ("features", ffn.down.w.axes[1])
    return KernelFFN(phi, Linear.of(Dense(jnp.asarray(w, dtype)), jnp.asarray(b, dtype), axes=axes))


@dataclasses.dataclass(frozen=True)
class Draw:
    """How features are drawn for a place; the options are checked."""

    features: int
    kind: str
    floor: float
    length: float | None
    orthogonal: bool
    seed: int

    def __post_init__(self) -> None:
        check_count("features", self.features)
        if self.kind not in ("relu", *SPECTRA):
            raise ConfigError(f"kind={self.kind!r} is not one of {['relu', *SPECTRA]}")
        if self.length is not None and not self.length > 0:
            raise ConfigError(f"length={self.length} must be above 0")
        if self.kind != "relu" and self.length is None:
            raise ConfigError(
                f"kind={self.kind!r} needs a length: features grow with exp(|x|^2 / 2)"
            )

    @property
    def count(self) -> int:
        """Features of an input."""
        return self.features if self.kind == "relu" else 2 * self.features

    def __call__(self, path: str, ffn: Any) -> Features:
        return self.of_width(path, ffn.up.weight.shape[0])

    def of_width(self, path: str, width: int) -> Features:
        """Features of inputs of a width, by the place's own key."""
        turns, frequency = jax.random.split(key_of(self.seed, path))
        g = projections(turns, self.features, width, orthogonal=self.orthogonal)
        if self.kind == "relu":
            return ReluFeatures(g, floor=self.floor, length=self.length)
        frequencies = SPECTRA[self.kind].draw(frequency, self.features)
        return FourierFeatures(g, frequencies, function=self.kind, length=self.length)


def ffns(where: Predicate) -> tree.Selector:
    """The dense FFNs among what a selection names."""
    name = getattr(where, "name", "where")
    return tree.Selector(
        f"FFNs of {name}", lambda path, node: FFNS(path, node) and where(path, node)
    )


def not_dense(found: Mapping[str, Any]) -> list[str]:
    """A sentence where an FFN has other weights than matrices."""
    odd = [
        path
        for path, ffn in found.items()
        if not all(isinstance(m.weight, Dense) for _, m in tree.walk(ffn) if isinstance(m, Linear))
    ]
    return [f"{odd[:3]} have weights that are not plain matrices"] if odd else []


def kernel_ffn(ffn: Any, phi: Features) -> KernelFFN:
    """The FFN whose first map and nonlinearity are features, initialised from that map."""
    is_gated = isinstance(ffn, GatedFFN)
    first = ffn.gate if is_gated else ffn.up
    psi = phi.weights(first.weight.dense(), first.bias).astype(first.weight.dtype)
    linear = Linear.of(Dense(psi), axes=("features", first.w.axes[1]))
    return KernelFFN(phi, ffn.down, psi=linear, up=ffn.up if is_gated else None)


def merged(ffn: Any) -> KernelFFN:
    """The same function with one matrix in place of two."""
    product = ffn.psi.weight.dense().astype(jnp.float32) @ ffn.down.weight.dense()
    weight = Dense(product.astype(ffn.down.weight.dtype))
    bias = ffn.down.bias
    if ffn.psi.bias is not None:
        more = ffn.psi.bias @ ffn.down.weight.dense()
        bias = more if bias is None else bias + more
    return KernelFFN(ffn.phi, Linear.of(weight, bias, axes=("features", ffn.down.w.axes[1])))
