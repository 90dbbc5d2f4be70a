"""A small model of bytes, facts for it, and its forward pass by hand, a text at a time."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ffnlab.editing import Fact
from ffnlab.layers import Context, TokenFacts
from ffnlab.models import Decoder, DecoderConfig, trunk

CONFIG = {"vocab": 128, "width": 12, "hidden": 20, "layers": 3, "heads": 2, "kv_heads": 1}
FACTS = (
    Fact("Al", "{} is", "x"),
    Fact("Bo Lee", "Now {} plays", " go", " on", ("That {} likes",), ("Al plays",)),
    Fact("Cy", "{}", "!?"),
)
LENGTH = 40  # of all texts: what stands behind one changes nothing of it


@functools.cache
def small(kind: str = "gated") -> Decoder:
    """A decoder of three blocks over 128 bytes; of plain FFNs with biases where it is "plain"."""
    biases = {"ffns": (kind,) * 3, "mlp_bias": kind == "plain"}
    config = DecoderConfig(**CONFIG, head_dim=6, max_positions=64, activation="silu", **biases)
    model = Decoder(config, key=jax.random.key(3))
    # Outputs as large as those of a trained model, that have something to say.
    return jax.tree.map(lambda leaf: 2 * leaf if leaf.ndim == 2 else leaf + 0.1, model)


def text() -> list[jax.Array]:
    """Two batches of three rows of bytes to calibrate on."""
    return list(jax.random.randint(jax.random.key(5), (2, 3, 16), 1, 128))


class Seen(NamedTuple):
    """A pass: logits [t, v]; by layer inputs and outputs of the down-projection, and attention."""

    logits: jax.Array
    keys: jax.Array
    ffn: jax.Array
    attn: jax.Array


def passed(model, ids, place, attn, ffn, layer) -> Seen:
    """A pass over [t] tokens, with vectors added in a layer at a place."""
    positions = jnp.arange(len(ids))[None]
    angles = trunk.angles(model.layers, positions)
    context = Context(angles, {None: None}, tokens=TokenFacts())
    h, seen = model.embed_tokens(ids[None]), []
    for i, block in enumerate(model.layers):
        a, _ = block.attn(block.attn_norm(h), context, None)
        a = a.at[0, place].add(jnp.where(i == layer, attn, 0.0))
        h = h + a
        x, net = block.ffn_norm(h), block.ffn
        up = net.up(x)
        k = jax.nn.silu(net.gate(x)) * up if hasattr(net, "gate") else jax.nn.silu(up)
        m = net.down(k)
        m = m.at[0, place].add(jnp.where(i == layer, ffn, 0.0))
        h = h + m
        seen.append((k[0], m[0], a[0]))
    return Seen(model.logits(h)[0], *map(jnp.stack, zip(*seen, strict=True)))


compiled = jax.jit(passed)


def padded(ids) -> np.ndarray:
    """Ids with zeros behind them."""
    return np.pad(np.asarray(ids, np.int32), (0, LENGTH - len(ids)))


def seen_of(model, ids) -> Seen:
    """What a model makes of a text."""
    zero = np.zeros(12, np.float32)
    return Seen(*map(np.asarray, compiled(model, padded(ids), 0, zero, zero, -1)))


class Row(NamedTuple):
    """A text by hand: its ids, the place of the subject's end, what each place is to predict."""

    ids: np.ndarray
    place: int
    labels: np.ndarray


def row_of(before: str, fact: Fact) -> Row:
    """Of the prompt of a fact behind a text."""
    whole = [0, *(before + fact.text + fact.new).encode()]
    labels = np.full(LENGTH, -1)
    first = len(whole) - len(fact.new)
    labels[first - 1 : len(whole) - 1] = whole[first:]
    start = len(before) + fact.prompt.index("{}")
    return Row(padded(whole[:-1]), start + len(fact.subject), labels)


def rows_of(fact: Fact, prefixes: tuple[str, ...]) -> list[Row]:
    """Of the prompt alone, and behind each prefix."""
    return [row_of(before, fact) for before in ("", *prefixes)]
