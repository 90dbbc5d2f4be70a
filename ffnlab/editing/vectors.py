"""Step 1 of PMET: the vectors that make a model say what is wanted, for all facts at once.

Two vectors of each fact are added at the last token of the subject in layer L, delta_a to what the
attention's last map gives and delta_m to what the FFN's gives, and found by Adam:

    loss = c mean(-log p(new)) + kl KL(p_now || p_before) + decay (|delta_m| / |m|^2
                                                                 + |delta_a| / |a|^2)

over the prompts of the fact, the divergence at the subject of "SUBJECT is a". After each step both
are clipped to `clamp` times the norm of what was there, a and m. A fact is done once its loss is
below 0.05, or once every token of every answer is the most likely one and the divergence's part of
the loss at most 0.01; in the step after one where the former was so, c is 0.1 instead of 1. What is
written is z = m + delta_m; delta_a takes up what does not belong into the FFN, and is dropped.

Facts are rows of one batch and share nothing, so that one compiled loop serves all: a fact that is
done stays as it is, and the loop ends with the last. Layers below L are run once, unless the head
reads an ensemble of paths.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection
from typing import Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ffnlab import tree
from ffnlab.editing.requests import Requests
from ffnlab.errors import ConfigError, at_least
from ffnlab.models.decoder import Decoder
from ffnlab.models.stack import period_of, unstack
from ffnlab.tree import Captured

__all__ = ["Found", "Inputs", "Shifted", "Steps", "Vectors", "find", "listed"]

Host = Array | np.ndarray

SMALL_LOSS, SMALL_KL, SAID_WEIGHT = 0.05, 0.01, 0.1
TINY = 1e-30  # under a root, whose slope at zero is none


@dataclasses.dataclass(frozen=True)
class Steps:
    """How vectors are found; defaults are the authors' for GPT-J.

    Attributes:
      vectors: "both", or "ffn" for delta_m alone, as in MEMIT.
      rate: of Adam.
      steps: evaluations of the loss at most, between which the vectors move.
      clamp: largest norm of a vector, over that of what it is added to.
      kl: weight of the divergence.
      decay: weight of the norms.
    """

    vectors: Literal["both", "ffn"] = "both"
    rate: float = 0.2
    steps: int = 30
    clamp: float = 0.75
    kl: float = 1.0
    decay: float = 0.5

    def __post_init__(self) -> None:
        if self.vectors not in ("both", "ffn"):
            raise ConfigError(f"vectors={self.vectors!r} is not 'both' or 'ffn'")
        at_least(1, steps=self.steps)
        if not (0 < self.rate < math.inf and 0 < self.clamp < math.inf):
            raise ConfigError(
                f"rate={self.rate} and clamp={self.clamp} must be finite numbers above 0"
            )
        if not (0 <= self.kl < math.inf and 0 <= self.decay < math.inf):
            raise ConfigError(
                f"kl={self.kl} and decay={self.decay} must be finite numbers of 0 or more"
            )


class Numbers(NamedTuple):
    """Those of `Steps`; one program serves all values."""

    rate: Float[Array, ""]
    steps: Int[Array, ""]
    clamp: Float[Array, ""]
    kl: Float[Array, ""]
    decay: Float[Array, ""]

    @classmethod
    def of(cls, options: Steps) -> "Numbers":
        """The numbers of some options."""
        rest = (jnp.float32(x) for x in (options.clamp, options.kl, options.decay))
        return cls(jnp.float32(options.rate), jnp.int32(options.steps), *rest)


class Vectors(NamedTuple):
    """What is added, or what it is added to.

    Attributes:
      attn, ffn: a vector of each fact, float32.
    """

    attn: Float[Host, "f d"]
    ffn: Float[Host, "f d"]


class Terms(NamedTuple):
    """The loss of each fact, by its parts.

    Attributes:
      nll: mean of -log p over prompts and tokens of the answer.
      kl: divergence of the text that stays.
      said: whether each token of the answer is the most likely one behind every prompt.
      nats: -log p of the whole answer behind the plain prompt.
    """

    nll: Float[Array, "f"]
    kl: Float[Array, "f"]
    said: Bool[Array, "f"]
    nats: Float[Array, "f"]


class Found(NamedTuple):
    """What step 1 found.

    Attributes:
      before: a and m, what stood at the subject of the plain prompt.
      vectors: delta_a and delta_m.
      terms: of the loss, with them.
      steps: [f], how often the vectors of a fact were moved.
    """

    before: Vectors
    vectors: Vectors
    terms: Terms
    steps: Int[Array, "f"]

    @property
    def targets(self) -> Float[Host, "f d"]:
        """z, what the FFN is to give at the subject."""
        return self.before.ffn + self.vectors.ffn


class Shifted(nnx.Module):
    """y = inner(x), and in each row a vector more at one place.

    Attributes:
      inner: what stood here, [b, t, n] -> [b, t, d].
      vectors: [b, d].
      place: [b], where.
    """

    def __init__(self, inner: nnx.Module, vectors: Float[Array, "b d"], place: Int[Array, "b"]):
        self.inner = inner
        self.vectors, self.place = nnx.data(vectors), nnx.data(place)

    def __call__(self, x: Float[Array, "b t n"]) -> Float[Array, "b t d"]:
        y = self.inner(x)
        here = jnp.arange(y.shape[1]) == self.place[:, None]
        more = self.vectors.astype(y.dtype)[:, None]
        return y + jnp.where(here[..., None], more, jnp.zeros((), y.dtype))


class Inputs(NamedTuple):
    """What a model is called with for b rows, padded on the left.

    Attributes:
      tokens: [b, t].
      positions: of each token in its text, [b, t].
      segments: 0 for padding, else 1, [b, t].
    """

    tokens: Int[Array, "b t"]
    positions: Int[Array, "b t"]
    segments: Int[Array, "b t"]

    @classmethod
    def of(cls, tokens: Int[Host, "b t"], valid: Bool[Host, "b t"]) -> "Inputs":
        """Those of tokens of which some are padding."""
        valid = jnp.asarray(valid)
        positions = jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0).astype(jnp.int32)
        return cls(jnp.asarray(tokens), positions, valid.astype(jnp.int32))

    @classmethod
    def rows(cls, rows: Requests) -> tuple["Inputs", Int[Array, "b"]]:
        """Those of all rows of all facts, and the place of the subject in each."""
        tokens, valid = (x.reshape(-1, x.shape[-1]) for x in (rows.tokens, rows.valid))
        return cls.of(tokens, valid), jnp.asarray(rows.place).reshape(-1)

    def captured(self, model: Decoder, paths: Collection[str]) -> dict[str, Captured]:
        """What the modules at some paths of a model in its list form saw and gave."""
        wanted = tree.where(lambda path, _: path in paths)
        given = {"positions": self.positions, "segments": self.segments}
        _, seen = tree.capture(model, wanted, self.tokens, calls="one", **given)
        return cast("dict[str, Captured]", seen)

    def hidden(
        self, model: Decoder, stream: Float[Array, "b t d"] | None = None
    ) -> Float[Array, "b t d"]:
        """Hidden states of a model, or of one that begins with what stands for the tokens."""
        tokens = self.tokens if stream is None else None
        given = {"positions": self.positions, "segments": self.segments}
        return model.hidden(tokens, embeddings=stream, inputs=None, **given)


def listed(model: Decoder) -> Decoder:
    """A model with its layers in a list, none of which is computed again in a backward pass."""
    model = unstack(model)
    model.remat = None
    return model


def find(model: Decoder, rows: Requests, *, layer: int, options: Steps) -> Found:
    """The vectors of all facts; compiles once for their number and lengths.

    Args:
      model: with attention, unless `options.vectors` is "ffn", and an FFN in the layer.
      rows: of the facts.
      layer: L, the last that is edited.
      options: see `Steps`; another rate, or another number of steps, compiles nothing.
    """
    return found_by(
        model, rows, Numbers.of(options), layer=layer, is_both=options.vectors == "both"
    )


@functools.partial(jax.jit, static_argnames=("layer", "is_both"))
def found_by(
    model: Decoder, rows: Requests, numbers: Numbers, *, layer: int, is_both: bool
) -> Found:
    """`find`, with two vectors or with that of the FFN alone."""
    model, facts = listed(model), rows.tokens.shape[0]
    inputs, place = Inputs.rows(rows)
    upper, stream, own = tree.copy(model), None, f"layers[{layer}]"
    if model.ensemble is None:  # a head that reads an ensemble of paths reads the lower layers too
        stream = inputs.captured(model, [own])[own].input[0]
        upper.layers, own = nnx.List(period_of(model.layers)[layer:]), "layers[0]"
    before = standing(model, inputs, place, facts, layer, is_both)

    def hidden(vectors: Vectors) -> Float[Array, "b t d"]:
        each = jax.tree.map(lambda v: jnp.repeat(v, len(place) // facts, axis=0), vectors)
        spots = {f"{own}.ffn.down": each.ffn}
        if is_both:
            spots[f"{own}.attn.o"] = each.attn
        moved = tree.map_at_path(
            upper,
            tree.where(lambda path, _: path in spots),
            lambda path, inner: Shifted(cast("nnx.Module", inner), spots[path], place),
            expect=len(spots),
        )
        return inputs.hidden(moved, stream)

    zeros = jax.tree.map(jnp.zeros_like, before)
    settled = stays(model, rows, hidden(zeros))
    terms = lambda vectors: terms_of(model, rows, hidden(vectors), settled)  # noqa: E731
    return descended(terms, before, numbers, is_both)


def standing(
    model: Decoder,
    inputs: Inputs,
    place: Int[Array, "b"],
    facts: int,
    layer: int,
    is_both: bool,
) -> Vectors:
    """a and m of the plain prompts; a is m where nothing is added to the attention."""
    names = {"ffn": f"layers[{layer}].ffn.down"}
    if is_both:
        names["attn"] = f"layers[{layer}].attn.o"
    seen = inputs.captured(model, names.values())
    first = jnp.arange(facts) * (len(place) // facts)
    output = {name: cast("Array", seen[path].output) for name, path in names.items()}
    found = {name: y[first, place[first]].astype(jnp.float32) for name, y in output.items()}
    return Vectors(found.get("attn", found["ffn"]), found["ffn"])


def descended(
    terms: Callable[[Vectors], Terms], before: Vectors, numbers: Numbers, is_both: bool
) -> Found:
    """The loop of `find`: Adam on all facts, each clipped, and left alone once it is done."""
    optimizer = optax.adam(numbers.rate)
    limits = jax.tree.map(lambda v: numbers.clamp * jnp.linalg.norm(v, axis=-1), before)

    def loss_of(vectors: Vectors, weight: Float[Array, "f"]) -> tuple[Array, tuple[Array, Terms]]:
        found = terms(vectors)
        sizes = jax.tree.map(lambda v, b: size(v) / jnp.sum(b**2, axis=-1), vectors, before)
        loss = weight * found.nll + numbers.kl * found.kl + numbers.decay * sum(sizes)
        return loss.sum(), (loss, found)

    def step(state: tuple) -> tuple:
        at, vectors, moments, weight, done, steps, _ = state
        (_, (loss, found)), slope = jax.value_and_grad(loss_of, has_aux=True)(vectors, weight)
        if not is_both:
            slope = slope._replace(attn=jnp.zeros_like(slope.attn))
        done |= (loss < SMALL_LOSS) | (found.said & (numbers.kl * found.kl <= SMALL_KL))
        moves, moments = optimizer.update(slope, moments)
        moved = jax.tree.map(clipped, optax.apply_updates(vectors, moves), limits)
        kept = done | (at == numbers.steps - 1)
        vectors = jax.tree.map(lambda a, b: jnp.where(kept[:, None], a, b), vectors, moved)
        weight = jnp.where(found.said, SAID_WEIGHT, 1.0)
        return at + 1, vectors, moments, weight, done, steps + ~kept, found

    start, facts = jax.tree.map(jnp.zeros_like, before), len(before.ffn)
    empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(terms, start))
    counts, weight, done = jnp.zeros(facts, jnp.int32), jnp.ones(facts), jnp.zeros(facts, bool)
    state = (jnp.int32(0), start, optimizer.init(start), weight, done, counts, empty)
    is_open = lambda state: (state[0] < numbers.steps) & ~state[4].all()  # noqa: E731
    _, vectors, _, _, _, steps, found = jax.lax.while_loop(is_open, step, state)
    return Found(before, vectors, found, steps)


def size(vectors: Float[Array, "f d"]) -> Float[Array, "f"]:
    """Norms, with a slope of zero at zero."""
    return jnp.sqrt(jnp.maximum(jnp.sum(vectors**2, axis=-1), TINY))


def clipped(vectors: Float[Array, "f d"], limits: Float[Array, "f"]) -> Float[Array, "f d"]:
    """Vectors shortened to their limits."""
    return vectors * jnp.minimum(1.0, limits / size(vectors))[:, None]


def stays(model: Decoder, rows: Requests, h: Float[Array, "b t d"]) -> Float[Array, "f v"]:
    """Log-probabilities behind the subject of the text whose meaning is to stay."""
    f, r, t = rows.tokens.shape
    last = h.reshape(f, r, t, -1)[jnp.arange(f), -1, rows.place[:, -1]]
    return jax.nn.log_softmax(model.logits(last[:, None])[:, 0])


def terms_of(
    model: Decoder, rows: Requests, h: Float[Array, "b t d"], settled: Float[Array, "f v"]
) -> Terms:
    """The parts of the loss.

    Args:
      model: for its head.
      rows: of the facts.
      h: hidden states of all rows.
      settled: `stays` of the model as it was.
    """
    f, r, t = rows.tokens.shape
    labels = rows.labels[:, :-1]
    m = labels.shape[-1]
    ends = h.reshape(f, r, t, -1)[:, :-1, t - m :]
    logits = model.logits(ends.reshape(f * (r - 1), m, -1)).reshape(f, r - 1, m, -1)
    is_new = labels >= 0
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(labels, 0)[..., None], -1)
    nats = -jnp.where(is_new, chosen[..., 0], 0.0)
    said = jnp.all((logits.argmax(-1) == labels) | ~is_new, axis=(1, 2))
    now = stays(model, rows, h)
    kl = jnp.sum(jnp.exp(now) * (now - settled), axis=-1)
    nll = jnp.mean(nats.sum(-1) / is_new.sum(-1), axis=1)
    return Terms(nll, kl, said, nats[:, 0].sum(-1))
