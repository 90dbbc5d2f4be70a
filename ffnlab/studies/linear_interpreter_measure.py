"""What the study of linear interpreters measures: exactness, votes of pixels and bytes, bases."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from ffnlab.analysis import after_embedding, interpret, singular, votes
from ffnlab.data import TextBatches, digits, find_folder, on_photographs, stdlib_text
from ffnlab.formats import embedded, load_resnet
from ffnlab.layers import MLP, GatedFFN, InstanceNorm, max_pool
from ffnlab.learning import backprop, labelled, members
from ffnlab.losses import Moment
from ffnlab.models import ConvAutoencoder, ConvNet
from ffnlab.studies.classify import learned
from ffnlab.testing import tiny

__all__ = [
    "NETS",
    "PIECEWISE",
    "Bytes",
    "Exact",
    "Patches",
    "Voted",
    "bases",
    "bytes_of",
    "classifiers",
    "denoisers",
    "exactness",
    "member",
    "photographs",
    "resnet",
    "voted",
]

WIDTHS, BATCH, NOISE = (64, 128, 64, 10), 64, 0.5
REMOVED = 8  # pixels
LENGTH, SPACE = 64, 32  # of a context; the byte that stands in the place of another


class Exact(NamedTuple):
    """What is known of an interpreter of a drawn network, in float64.

    Attributes:
      here: error of F x0 + r.
      affine: error of a mixture of far inputs, over their size.
      transposed: error of <u, F z> = <F' u, z>, over its size.
      jacobian: |F - J| / |J|.
    """

    here: float
    affine: float
    transposed: float
    jacobian: float


def wide(model: PyTree) -> PyTree:
    """A model in float64."""
    is_float = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)  # noqa: E731
    return jax.tree.map(lambda a: a.astype(jnp.float64) if is_float(a) else a, model)


def drawn(name: str, key: Array) -> tuple[Callable[[Array], Array], tuple[int, ...]]:
    """A network of a kind in float64, and the shape of its input."""
    if name == "decoder":
        model = wide(tiny())
        return after_embedding(model), (4, model.config.width)
    if name == "convolutions, ELU, max pooling":
        net = wide(ConvNet((1, 4, 4, 4), 10, key=key))
        return lambda x: net(x[None])[0], (8, 8, 1)
    if name == "instance norm":
        norm, net = wide(InstanceNorm(2)), wide(MLP((32, 5), key=key))
        return lambda x: net(jax.nn.relu(norm(x[None])).reshape(-1)), (4, 4, 2)
    if name == "max pooling":
        net = wide(MLP((8, 16, 5), key=key))
        return lambda x: net(max_pool(x[None], (2, 2)).reshape(-1)), (4, 4, 2)
    if name == "gated":
        return wide(GatedFFN(12, 16, key=key)), (12,)
    return wide(MLP((12, 16, 16, 5), key=key, activation=name)), (12,)


PIECEWISE = ("relu", "max pooling")  # linear by parts, so that F is the Jacobian
NETS = (
    *PIECEWISE,
    "gelu",
    "sigmoid",
    "convolutions, ELU, max pooling",
    "instance norm",
    "gated",
    "decoder",
)


def exactness(names: Sequence[str], seed: int) -> dict[str, Exact]:
    """Of some of `NETS`."""
    found = {}
    with jax.enable_x64(True):
        for i, name in enumerate(names):
            key = jax.random.fold_in(jax.random.key(seed), i)
            fn, shape = drawn(name, key)
            found[name] = Exact(*map(float, checked(fn, shape, key)))
    return found


def checked(fn: Callable[[Array], Array], shape: tuple[int, ...], key: Array) -> tuple:
    """The errors of one."""

    @jax.jit
    def errors(x0: Array, one: Array, other: Array) -> tuple:
        at, out = interpret(fn, x0), fn(x0)
        u = jax.random.normal(key, out.shape, out.dtype)
        parts = at(one), at(other)
        mixed = at(0.3 * one + 0.7 * other) - 0.3 * parts[0] - 0.7 * parts[1]
        product = jnp.vdot(u, at.matvec(one))
        jacobian = jax.jacrev(fn)(x0)
        basis = jnp.eye(x0.size, dtype=x0.dtype).reshape(-1, *shape)
        columns = jax.vmap(at.matvec, 0, -1)(basis).reshape(jacobian.shape)
        return (
            jnp.abs(at.matvec(x0) + at.residual - out).max(),
            jnp.abs(mixed).max() / jnp.abs(parts[1]).max(),
            jnp.abs(product - jnp.vdot(at.rmatvec(u), one)) / jnp.abs(product),
            jnp.linalg.norm(columns - jacobian) / jnp.linalg.norm(jacobian),
        )

    keys = jax.random.split(jax.random.fold_in(key, 1), 3)
    x0, one, other = (jax.random.normal(k, shape, jnp.float64) for k in keys)
    return errors(x0, one, 100 * other)


# Networks that were trained.


def classifiers(seeds: Sequence[int], epochs: int) -> tuple[MLP, tuple[Array, Array]]:
    """Members [seeds, …] that know digits, and the test images with classes."""
    train, test = digits(seeds[0])
    rule = members(lambda: backprop(labelled, optax.adam(1e-3)), len(seeds))
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    nets = jax.vmap(lambda key: MLP(WIDTHS, key=key))(keys)
    steps = epochs * len(train.x) // BATCH
    state = learned(rule, nets, train, batch=BATCH, steps=steps, seed=seeds[0])
    return rule.model(state), (jnp.asarray(test.x), jnp.asarray(test.y))


def denoisers(seeds: Sequence[int], epochs: int) -> tuple[ConvAutoencoder, Array]:
    """Members [seeds, …] that take noise off digits, and noisy test images [n, 8, 8, 1]."""
    train, test = (part.x.reshape(-1, 8, 8, 1) for part in digits(seeds[0]))

    def loss(net: ConvAutoencoder, x: Array, moment: Moment) -> tuple[Array, dict[str, Array]]:
        noisy = x + NOISE * jax.random.normal(moment.key, x.shape)
        return jnp.mean((net(noisy) - x) ** 2), {}

    rule = members(lambda: backprop(loss, optax.adam(3e-3), informed=True), len(seeds))
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    nets = jax.vmap(lambda key: ConvAutoencoder((1, 32), key=key))(keys)
    steps = epochs * len(train) // BATCH
    state = learned(rule, nets, train, batch=BATCH, steps=steps, seed=seeds[0])
    return rule.model(state), test + NOISE * jax.random.normal(jax.random.key(1), test.shape)


class Voted(NamedTuple):
    """What votes say of a classifier, over test images.

    Attributes:
      accuracy: of the network.
      rebuilt: largest error of F x0 + r against any logit.
      share: mean share of the constant in the logit of the class that is named.
      without: accuracy of F x0 alone, the constant left out.
      changed: share of images whose class changes without it.
      removed: share of images whose class changes when pixels are made black: those with the most
        votes for the class, the brightest, or any that are lit.
    """

    accuracy: float
    rebuilt: float
    share: float
    without: float
    changed: float
    removed: Mapping[str, float]


@jax.jit
def voted(net: MLP, images: Float[Array, "n d"], classes: Int[Array, "n"], key: Array) -> Voted:
    """What votes say of one network; leaves are arrays."""

    def of_one(x: Array, key: Array) -> tuple:
        logits, at = net(x), interpret(net, x)
        linear, constant, named = at.matvec(x), at.residual, logits.argmax()
        found = votes(at, named)
        ranks = {
            "most votes": found.of,
            "brightest": x,
            "any lit": jnp.where(x > 0, jax.random.uniform(key, x.shape), -1.0),
        }
        cut = {
            name: net(x.at[jax.lax.top_k(rank, REMOVED)[1]].set(0)).argmax() != named
            for name, rank in ranks.items()
        }
        error = jnp.abs(linear + constant - logits).max()
        return named, error, found.share, linear.argmax(), cut

    keys = jax.random.split(key, len(images))
    named, error, share, alone, cut = jax.vmap(of_one)(images, keys)
    return Voted(
        jnp.mean(named == classes),
        error.max(),
        share.mean(),
        jnp.mean(alone == classes),
        jnp.mean(alone != named),
        {name: jnp.mean(flags) for name, flags in cut.items()},
    )


@jax.jit
def bases(net: Callable, image: Float[Array, "8 8 1"], key: Array) -> tuple:
    """(share of the squares of each row that lies on the 3 x 3 pixels around, leading right
    singular vectors [8, 8, 8])."""
    at = interpret(lambda x: net(x[None])[0], image)
    units = jnp.eye(64).reshape(64, 8, 8, 1)
    rows = jax.vmap(at.rmatvec)(units)[..., 0]
    place = jnp.arange(64)
    tall = jnp.abs(jnp.arange(8)[None, :] - (place // 8)[:, None]) <= 1
    across = jnp.abs(jnp.arange(8)[None, :] - (place % 8)[:, None]) <= 1
    near = tall[:, :, None] & across[:, None, :]
    square = rows**2
    around = (square * near).sum((1, 2)) / square.sum((1, 2))
    return around.mean(), singular(at, 8, key=key).v[..., 0]


# The residual network whose weights were published, on photographs.


def photographs(count: int, seed: int) -> Float[np.ndarray, "n 32 32 3"]:
    """Patches of scikit-learn's two: of four times as many that are drawn, those most uneven."""
    drawn = on_photographs(np.zeros((4 * count, 32, 32, 3), np.float32), seed)
    return drawn[np.argsort(-drawn.std((1, 2)).mean(-1))[:count]]


class Patches(NamedTuple):
    """What interpreters say of the residual network.

    Attributes:
      rebuilt: largest error of F x0 + r, over the largest logit of the patch.
      share: of the constant in the logit that is named, by patch.
      votes: of pixels for the class that is named, [n, 32, 32, 3].
      bases: leading right singular vectors at the first patch, [8, 32, 32, 3].
    """

    rebuilt: float
    share: Float[np.ndarray, "n"]
    votes: Float[np.ndarray, "n h w 3"]
    bases: Float[np.ndarray, "k h w 3"]


def resnet(images: Float[np.ndarray, "n 32 32 3"], seed: int) -> Patches | None:
    """Of ResNet-20 of CIFAR; None where its weights are not there."""
    where = find_folder("resnet_cifar10")
    if where is None:
        return None
    model = load_resnet(next(where.glob("resnet20-*.npz")))
    fn = lambda x: model(x[None])[0]  # noqa: E731

    @jax.jit
    def of_one(x: Array) -> tuple:
        at, logits = interpret(fn, x), fn(x)
        found = votes(at, logits.argmax())
        error = jnp.abs(at.matvec(x) + at.residual - logits).max() / jnp.abs(logits).max()
        return error, found.share, found.of

    rows = [jax.device_get(of_one(jnp.asarray(x))) for x in images]
    error, share, parts = (np.stack(each) for each in zip(*rows, strict=True))
    at = interpret(fn, jnp.asarray(images[0]))
    leading = singular(at, 8, key=jax.random.key(seed), turns=50)
    return Patches(float(error.max()), share, parts, np.asarray(leading.v))


# The language model that comes with the package.


@dataclasses.dataclass(frozen=True)
class Bytes:
    """Votes of the bytes of held-out contexts for the byte that is predicted.

    Attributes:
      contexts: [n, t].
      named: [n], the predicted bytes.
      votes: [n, t], each byte's part of its logit.
      share: [n], of the constant.
      rebuilt: largest error of F x0 + r against a logit.
      drops: by how much the logit falls, [n], where a space stands in the place of a byte: the one
        with the most votes, the last, or any.
    """

    contexts: Int[np.ndarray, "n t"]
    named: Int[np.ndarray, "n"]
    votes: Float[np.ndarray, "n t"]
    share: Float[np.ndarray, "n"]
    rebuilt: float
    drops: Mapping[str, Float[np.ndarray, "n"]]


def bytes_of(count: int, seed: int) -> Bytes:
    """Of the small embedded model on held-out modules of the standard library."""
    model, _ = embedded("embedded_small")
    text = jnp.asarray(TextBatches(stdlib_text().held_out, count, LENGTH - 1, seed)(0))

    @jax.jit
    def of_one(tokens: Array, key: Array) -> tuple:
        h = model.embed_tokens(tokens[None])[0]
        fn = after_embedding(model)
        at, logits = interpret(fn, h), fn(h)
        named = logits.argmax()
        found = votes(at, named)
        parts = found.of.sum(-1)
        error = jnp.abs(at.matvec(h) + at.residual - logits).max()
        places = {
            "most votes": parts.argmax(),
            "last": jnp.int32(LENGTH - 1),
            "any": jax.random.randint(key, (), 0, LENGTH),
        }
        drops = {
            name: logits[named] - model(tokens.at[place].set(SPACE)[None])[0, -1, named]
            for name, place in places.items()
        }
        return tokens, named, parts, found.share, error, drops

    keys = jax.random.split(jax.random.key(seed), count)
    found = jax.device_get(jax.lax.map(lambda args: of_one(*args), (text, keys)))
    contexts, named, parts, share, error, drops = found
    return Bytes(contexts, named, parts, share, float(error.max()), drops)


def member(nets: PyTree, i: int) -> PyTree:
    """One of several networks that are one."""
    return jax.tree.map(lambda leaf: leaf[i], nets)
