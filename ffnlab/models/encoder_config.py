"""The configuration of an encoder: one frozen dataclass that covers BERT and its kin."""

import dataclasses

from ffnlab.errors import ConfigError
from ffnlab.layers.activations import check_activation
from ffnlab.layers.attention.rope import Rope, check_rope

__all__ = ["EncoderConfig"]

HEADS = (None, "masked", "span", "classes", "tokens")
POSITIONS = (None, "absolute", "rotary")
NORMS = ("after", "before")


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Sizes and switches of an encoder.

    Attributes:
      vocab: number of token ids.
      width: size of the residual stream (d).
      hidden: FFN channels (h).
      layers: number of blocks.
      heads, head_dim: attention sizes.
      eps: of the layer norms.
      activation: of the FFN and of the masked head, a name in `layers.ACTIVATIONS`.
      positions: "absolute" (a learned vector for each), "rotary" or None.
      rope: the rotary embedding, of "rotary".
      max_positions: longest text, tokens; rows of the table of "absolute".
      types: number of token types (first text, second text), 0 for none.
      norm: "after" each sum, and on the embeddings (BERT), or "before" each sublayer, and at the
        end.
      gated: the FFN has a gate.
      qkv_bias, o_bias, mlp_bias: which linear maps of a block have biases.
      pooler: activation of a map of the first token, which "classes" reads; None for no such map.
      head: what the model gives: None (hidden states), "masked" (logits of each token), "span"
        (logits of being first and last), "classes" (of the text) or "tokens" (classes of each).
      classes: their number, of "classes" and "tokens", else None.
      labels: their names, or None.
      tie_embeddings: the masked head reads the embedding.
      family: the `model_type` of its Hugging Face config.
      pad: id of padding, or None.
    """

    vocab: int
    width: int
    hidden: int
    layers: int
    heads: int
    head_dim: int
    eps: float = 1e-12
    activation: str = "gelu"
    positions: str | None = "absolute"
    rope: Rope = Rope()
    max_positions: int = 512
    types: int = 0
    norm: str = "after"
    gated: bool = False
    qkv_bias: bool = True
    o_bias: bool = True
    mlp_bias: bool = True
    pooler: str | None = None
    head: str | None = None
    classes: int | None = None
    labels: tuple[str, ...] | None = None
    tie_embeddings: bool = True
    family: str = "bert"
    pad: int | None = None

    def __post_init__(self) -> None:
        sizes = ["vocab", "width", "hidden", "layers", "heads", "head_dim", "max_positions"]
        has_classes = self.head in ("classes", "tokens")
        for name in sizes + ["classes"] * has_classes:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name}={value!r} must be a positive integer")
        if not isinstance(self.types, int) or isinstance(self.types, bool) or self.types < 0:
            raise ConfigError(f"types={self.types!r} must be an integer >= 0")
        accepted = {"head": HEADS, "positions": POSITIONS, "norm": NORMS}
        for name, values in accepted.items():
            if getattr(self, name) not in values:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not one of {values}")
        if not has_classes and (self.classes is not None or self.labels is not None):
            raise ConfigError(f"head={self.head!r} has no classes; 'classes' and 'tokens' have")
        if self.labels is not None and len(self.labels) != self.classes:
            raise ConfigError(f"labels has {len(self.labels)} names for classes={self.classes}")
        if self.positions == "rotary":
            if self.head_dim % 2:
                raise ConfigError(
                    f"head_dim={self.head_dim} must be even: RoPE rotates pairs of channels"
                )
            check_rope(self.rope, self.head_dim)
        check_activation(self.activation)
        if self.pooler is not None:
            check_activation(self.pooler)
