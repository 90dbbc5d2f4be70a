"""Adapters of three texts, routers between them, and their scores: what `lora_mixer` claims of."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from ffnlab import transform, tree
from ffnlab.data import TextBatches, find_folder, squad, stdlib_text
from ffnlab.formats.peft import load_adapter, save_adapter
from ffnlab.layers import RoutedLinear
from ffnlab.learning import backprop, members
from ffnlab.losses import next_token
from ffnlab.models import Decoder, adapters
from ffnlab.routing import MIXERS, sharpened, specialized
from ffnlab.rule import Rule
from ffnlab.studies.side_by_side import learned_members
from ffnlab.weights import Dense

__all__ = [
    "FULL",
    "LOSSES",
    "QUICK",
    "Score",
    "Sizes",
    "adapted",
    "averaged",
    "each",
    "routed",
    "three_texts",
    "through_directories",
]

RANK, LENGTH = 8, 128
ADAPTER_RATE, ROUTER_RATE = 3e-3, 1e-2
BALANCE, CERTAINTY = 1e-2, 1e-3
MIXED_ROWS = 200  # of text that routers learn from, as in the card
# Weights of the two parts of the routers' loss: as the paper says, as it is printed, without the
# entropy, and with neither.
LOSSES: Mapping[str, tuple[float, float]] = {
    "specialized": (BALANCE, CERTAINTY),
    "as printed": (BALANCE, -CERTAINTY),
    "balance alone": (BALANCE, 0.0),
    "none": (0.0, 0.0),
}


class Sizes(NamedTuple):
    """How much is run.

    Attributes:
      seeds: of the routers.
      steps, rows: of each adapter.
      router_steps, router_rows: of the routers.
      held_out: windows of each text.
    """

    seeds: int
    steps: int
    rows: int
    router_steps: int
    router_rows: int
    held_out: int


FULL = Sizes(3, 400, 8, 150, 6, 48)
QUICK = Sizes(1, 40, 4, 20, 6, 8)


class Score(NamedTuple):
    """Of a model on a held-out text.

    Attributes:
      bits: per byte.
      accuracy: of next bytes.
    """

    bits: float
    accuracy: float


def three_texts() -> tuple[dict[str, bytes], str]:
    """Three texts by name, and what they are."""
    names = ("tinyshakespeare", "wikitext2", "xquad")
    folders = [folder for name in names if (folder := find_folder(name)) is not None]
    if len(folders) == len(names):
        plays, wiki, questions = folders
        contexts = dict.fromkeys(q.context for q in squad(questions / "xquad.de.first36.json"))
        real = {
            "Shakespeare": (plays / "input.txt").read_bytes(),
            "Wikipedia": (wiki / "valid.txt").read_bytes(),
            "German": "\n".join(contexts).encode(),
        }
        return {name: text[:400_000] for name, text in real.items()}, "real"
    source = stdlib_text().train[:1_200_000]
    third = len(source) // 3
    return {
        "capitals": source[:third].upper(),
        "rotated": source[third : 2 * third].translate(rotated(13)),
        "mirrored": source[2 * third :].translate(rotated(-1)),
    }, "ciphers of the standard library, for want of FFNLAB_DATA"


def rotated(by: int) -> bytes:
    """A table that moves lower-case letters along the alphabet."""
    table = np.arange(256)
    table[97:123] = 97 + (np.arange(26) + by) % 26
    return bytes(table.astype(np.uint8))


def adapted(base: Decoder, texts: Sequence[bytes], sizes: Sizes, seed: int) -> list[Decoder]:
    """An adapter of each text on the same base, all learning side by side."""
    where = tree.at("layers**.attn.*")
    small, _ = transform.apply(adapters.lora(rank=RANK, where=where, seed=seed), base)
    joined = jax.tree.map(lambda leaf: jnp.stack([leaf] * len(texts)), small)
    streams = [TextBatches(text, sizes.rows, LENGTH, seed) for text in texts]

    def one() -> Rule:
        optimizer = optax.adam(optax.cosine_decay_schedule(ADAPTER_RATE, sizes.steps))
        return backprop(next_token, optimizer, trainable=adapters.TRAINS["lora"])

    rule = members(one, len(texts), shared_batch=False)
    batches = lambda position: np.stack([stream(position) for stream in streams])  # noqa: E731
    return learned_members(rule, joined, batches, sizes.steps, seed, len(texts))


def through_directories(
    base: Decoder, own: Sequence[Decoder], held: Mapping[str, Array]
) -> tuple[list[Decoder], float]:
    """(the adapters as read back from PEFT directories, largest change of a logit)."""
    tokens = next(iter(held.values()))[:2, :-1]
    with tempfile.TemporaryDirectory() as folder:
        read = []
        for i, model in enumerate(own):
            save_adapter(model, Path(folder) / str(i))
            read.append(load_adapter(base, Path(folder) / str(i)))
    changes = [np.abs(a(tokens) - b(tokens)).max() for a, b in zip(own, read, strict=True)]
    return read, float(max(changes))


def averaged(model: Decoder) -> Decoder:
    """The mixture with all routers at zero: every expert has the same share."""
    zero = lambda m: m.replace(Dense(jnp.zeros_like(m.weight.dense())))  # noqa: E731
    chosen = tree.where(lambda path, node: path.endswith(".router") and hasattr(node, "w"))
    return tree.map_at(model, chosen, zero)


def routed(
    model: Decoder,
    learn: Mapping[str, bytes],
    held: Mapping[str, Array],
    sizes: Sizes,
    seed: int,
) -> tuple[dict[str, dict[str, list[Score]]], dict[str, list[float]], dict[str, list[float]]]:
    """(scores, entropy of a token's mixture, largest share of an expert) by loss and seed.

    All losses and seeds learn side by side from the same rows; a seed draws the routers.
    """
    settings = [(name, s) for name in LOSSES for s in range(seed, seed + sizes.seeds)]
    starts = [redrawn(model, s) for _, s in settings]
    joined = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)

    def one(balance: float | Array, certainty: float | Array) -> Rule:
        loss = specialized(balance=balance, certainty=certainty)
        return backprop(loss, optax.adam(ROUTER_RATE), trainable=MIXERS)

    vary = {
        name: [LOSSES[loss][i] for loss, _ in settings]
        for i, name in enumerate(("balance", "certainty"))
    }
    rule = members(one, len(settings), vary=vary, chunk=sizes.seeds)
    batches = mixed_rows(list(learn.values()), sizes.router_rows, seed)
    found = learned_members(rule, joined, batches, sizes.router_steps, seed, len(settings))
    scores: dict[str, dict[str, list[Score]]] = {}
    entropies: dict[str, list[float]] = {name: [] for name in LOSSES}
    shares: dict[str, list[float]] = {name: [] for name in LOSSES}
    every = jnp.concatenate([tokens[:8] for tokens in held.values()])
    look = jax.jit(lambda model: specialized()(model, every)[1])
    for (name, _), made in zip(settings, found, strict=True):
        for way, k in ((name, None), (f"{name}, top 1", 1)):
            for text, (score,) in each(sharpened(made, k=k), held).items():
                scores.setdefault(way, {}).setdefault(text, []).append(score)
        seen = look(made)
        entropies[name].append(float(seen["entropy"]))
        shares[name].append(float(seen["share"]))
    return scores, entropies, shares


def redrawn(model: Decoder, seed: int) -> Decoder:
    """The mixture with other routers: each from N(0, 1 / in) by a seed."""

    def draw(path: str, layer: Any) -> RoutedLinear:
        w = layer.router.weight.dense()
        key = jax.random.fold_in(jax.random.key(seed), sum(path.encode()))
        new = jax.tree.map(lambda leaf: leaf, layer)
        noise = jax.random.normal(key, w.shape) * w.shape[-2] ** -0.5
        new.router = layer.router.replace(Dense(noise))
        return new

    return tree.map_at_path(model, tree.of_type(RoutedLinear), draw)


def mixed_rows(
    texts: Sequence[bytes], rows: int, seed: int
) -> Callable[[int], Int[np.ndarray, "b t"]]:
    """Batches of `MIXED_ROWS` rows in all, as many of each text in every batch."""
    share = rows // len(texts)
    few = MIXED_ROWS // len(texts)
    streams = [TextBatches(text[: (few + 2) * LENGTH], share, LENGTH, seed) for text in texts]
    return lambda position: np.concatenate([stream(position) for stream in streams])


def each(model: Decoder, held: Mapping[str, Array]) -> dict[str, list[Score]]:
    """The score of a model on each text."""
    return {name: [score(model, tokens)] for name, tokens in held.items()}


def score(model: Decoder, tokens: Int[Array, "b t"]) -> Score:
    """Bits per byte and accuracy of next bytes, eight windows at a time."""
    parts = [_measure(model, tokens[i : i + 8]) for i in range(0, len(tokens), 8)]
    nats, right = (float(np.mean([part[i] for part in parts])) for i in (0, 1))
    return Score(nats / float(np.log(2)), right)


@jax.jit
def _measure(
    model: Decoder, tokens: Int[Array, "b t"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    logits = model(tokens[:, :-1])
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
    return nats, jnp.mean(logits.argmax(-1) == tokens[:, 1:])
