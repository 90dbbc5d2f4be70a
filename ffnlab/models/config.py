"""The configuration of a decoder: one frozen dataclass that covers the Llama-shaped families."""

import dataclasses

from ffnlab.errors import ConfigError
from ffnlab.layers import MoESpec
from ffnlab.layers.activations import check_activation
from ffnlab.layers.attention.rope import Rope, check_rope
from ffnlab.models.audio_input import AudioInput
from ffnlab.storage.structure import later

# Kinds of FFN that a layer may have.
FFNS = ("gated", "plain", "mixture")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches of a decoder-only language model.

    Attributes:
      vocab: number of token ids.
      width: size of the residual stream (d).
      hidden: FFN channels (h).
      layers: number of blocks.
      heads, kv_heads, head_dim: attention sizes; heads is a multiple of kv_heads, head_dim even.
      eps: of the RMS norms.
      activation: of the FFN's gate, a name in `layers.ACTIVATIONS`.
      rope: rotary embedding of the layers.
      local_rope: that of layers with a window, where it differs (Gemma 3).
      windows: sliding window of each layer in tokens (None: sees everything); None for no windows.
      qkv_bias, o_bias, mlp_bias: which linear maps have biases.
      qk_norm: RMS norm on queries and keys, per head.
      norm_offset: 1.0 where checkpoints store scale - 1 (Gemma), else 0.0.
      sandwich_norms: norms after each sublayer too (Gemma 2 and 3).
      embed_scale: multiplies the embeddings.
      query_scale: multiplies attention scores; head_dim ** -0.5 when None.
      attn_softcap, logit_softcap: x becomes cap * tanh(x / cap); None for none.
      tie_embeddings: the output head reads the embedding.
      max_positions: longest context the model was made for.
      family: the `model_type` of its Hugging Face config.
      bos, eos, pad: special token ids; eos may be several.
      ffns: kind of each layer's FFN: "gated", "plain" or "mixture"; None for all alike: mixtures
        where there is one, else gated.
      mixture: sizes and rule of layers that are mixtures of experts.
      hiddens: FFN channels of each layer, gated or plain, where these differ; `hidden` is the
        largest. None where all have `hidden`.
      audio: what it hears beside its text (`ffnlab.routing.pal`), or None.
    """

    vocab: int
    width: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float = 1e-5
    activation: str = "silu"
    rope: Rope = Rope()
    local_rope: Rope | None = None
    windows: tuple[int | None, ...] | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_offset: float = 0.0
    sandwich_norms: bool = False
    embed_scale: float = 1.0
    query_scale: float | None = None
    attn_softcap: float | None = None
    logit_softcap: float | None = None
    tie_embeddings: bool = True
    max_positions: int = 2048
    family: str = "llama"
    bos: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None
    ffns: tuple[str, ...] | None = later(None)
    mixture: MoESpec | None = later(None)
    audio: AudioInput | None = later(None)
    hiddens: tuple[int, ...] | None = later(None)

    def __post_init__(self) -> None:
        sizes = (
            "vocab",
            "width",
            "hidden",
            "layers",
            "heads",
            "kv_heads",
            "head_dim",
            "max_positions",
        )
        for name in sizes:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name}={value!r} must be a positive integer")
        if self.heads % self.kv_heads:
            raise ConfigError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")
        if self.head_dim % 2:
            raise ConfigError(
                f"head_dim={self.head_dim} must be even: RoPE rotates pairs of channels"
            )
        for rope in (self.rope, self.local_rope):
            if rope is not None:
                check_rope(rope, self.head_dim)
        check_activation(self.activation)
        if self.audio is not None and self.audio.start > self.layers:
            raise ConfigError(f"audio: start={self.audio.start} is beyond layers={self.layers}")
        if self.windows is not None and len(self.windows) != self.layers:
            raise ConfigError(
                f"windows has {len(self.windows)} entries for layers={self.layers} layers"
            )
        self._check_ffns()
        self._check_hiddens()
        if any(w is not None and w < 1 for w in self.windows or ()):
            raise ConfigError(f"windows={self.windows} must hold None or positive integers")

    def _check_ffns(self) -> None:
        if self.ffns is None:
            return
        if len(self.ffns) != self.layers or not set(self.ffns) <= set(FFNS):
            raise ConfigError(
                f"ffns={self.ffns} must have an entry of {list(FFNS)} for each of the "
                f"layers={self.layers}"
            )
        if "mixture" in self.ffns and self.mixture is None:
            raise ConfigError(f"ffns={self.ffns} names mixtures, but mixture=None says none")
        usual = "gated" if self.mixture is None else "mixture"
        if set(self.ffns) == {usual}:
            object.__setattr__(self, "ffns", None)  # the same said shorter

    def _check_hiddens(self) -> None:
        sizes = self.hiddens
        if sizes is None:
            return
        if len(sizes) != self.layers or min(sizes) < 1 or max(sizes) != self.hidden:
            raise ConfigError(
                f"hiddens={sizes} must have a positive integer for each of the layers="
                f"{self.layers}, of which hidden={self.hidden} is the largest"
            )
        if len(set(sizes)) == 1:
            object.__setattr__(self, "hiddens", None)  # the same said shorter

    @property
    def reach(self) -> int:
        """Longest context that the rotary embedding allows, tokens; at least `max_positions`."""
        return max(self.max_positions, self.rope.reach)

    def window(self, layer: int) -> int | None:
        """Sliding window of one layer, tokens, or None."""
        return None if self.windows is None else self.windows[layer]

    def ffn(self, layer: int) -> str:
        """Kind of one layer's FFN, one of `FFNS`."""
        if self.ffns is None:
            return "gated" if self.mixture is None else "mixture"
        return self.ffns[layer]

    def layer_hidden(self, layer: int) -> int:
        """FFN channels of one layer that is no mixture."""
        return self.hidden if self.hiddens is None else self.hiddens[layer]

    def layer_rope(self, layer: int) -> Rope:
        """Rotary embedding of one layer."""
        local = self.local_rope is not None and self.window(layer) is not None
        return self.local_rope if local else self.rope
