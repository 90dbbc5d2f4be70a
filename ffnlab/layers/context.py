"""What a layer is given beside its input, and what it gives beside its output.

`Context` is the same for all layers of one forward pass. `LayerInputs` and `LayerOutputs` differ
from layer to layer: for a whole model their leaves have a leading axis of layers, so that a list of
blocks and a scanned stack take and give the same arrays.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from ffnlab.layers.attention.rope import Rope

__all__ = ["Angles", "Context", "LayerInputs", "LayerOutputs", "Memory", "TokenFacts"]

Angles = tuple[Array, Array]


class TokenFacts(NamedTuple):
    """What is known of each token, for layers that treat tokens differently.

    Attributes:
      modality: [b, t] int, the kind of each token (0: text), or None.
      valid: [b, t] bool, False for padding; None where all are tokens.
      key: [] random key of this forward pass, or None where nothing is drawn.
      order: how tokens get to the copy of a module for their modality
        (`ffnlab.layers.modality`): the `Groups` of them, computed once, or a way that is told;
        None where each module sorts for itself.
      segments: [b, t] int, number of the text that a token of a packed row belongs to, 0 for
        padding, or None. `Context.masks` says the same to attention, which takes this where rows
        lie on several devices.
    """

    modality: Int[Array, "b t"] | None = None
    valid: Bool[Array, "b t"] | None = None
    key: Key[Array, ""] | None = None
    order: PyTree[Any] | None = None
    segments: Int[Array, "b t"] | None = None


class Memory(NamedTuple):
    """What attention with `AttentionSpec.memory` reads instead of its own input.

    Attributes:
      states: [b, s, m] activations that keys and values are made of.
      mask: [b, 1, t, s] or [b, 1, 1, s] bool, which of them each query may see; None for all.
    """

    states: Float[Array, "b s m"]
    mask: Bool[Array, "b 1 t s"] | None = None


class Context(NamedTuple):
    """What all layers of one forward pass share, computed once.

    Attributes:
      angles: (cos, sin) of each kind of rotary embedding in the model.
      masks: which keys each query may see, [b, 1, t, S] bool, by window size; a mask of None means
        all t tokens, of causal attention those up to the query (both within the window).
      index: cache slot of the first query token, or None without a cache.
      tokens: facts of each token, or None.
      bias: [b, h, t, S] or [1, h, t, S] added to the scores of every head, or None.
      memory: what layers that read from elsewhere read, or None.
    """

    angles: Mapping[Rope, Angles]
    masks: Mapping[int | None, Array | None]
    index: Array | None = None
    tokens: TokenFacts | None = None
    bias: Float[Array, "b h t s"] | None = None
    memory: Memory | None = None


class LayerInputs(NamedTuple):
    """What each layer is given of its own; shapes of one layer, a model's have [n, ...] before.

    Attributes:
      gates: [s] float, multiplier of each sublayer's branch in the order of the block's slots; 1
        when None.
      choice: [b, t] int, which branch of a layer with several each token takes, or None.
      key: [] random key, or None.
    """

    gates: Float[Array, "*n s"] | None = None
    choice: Int[Array, "*n b t"] | None = None
    key: Key[Array, "*n"] | None = None


class LayerOutputs(NamedTuple):
    """What each layer gives beside the residual stream; a model's has [n, ...] before each shape.

    Attributes:
      reports: what sublayers say of themselves (a mixture its routing), by slot; of a model the
        layers that say something are on the leading axis, in order.
      branches: [s, b, t, d] what each sublayer added to the stream, 0 where it is removed; None
        where it was not asked for.
    """

    reports: Mapping[str, PyTree[Any]]
    branches: Float[Array, "*n s b t d"] | None = None
