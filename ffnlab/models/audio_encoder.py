"""An encoder of sound: two convolutions over frames, positions, blocks, a norm (Whisper's half).

    h = gelu(conv_down(gelu(conv_in(frames)))) + positions;  blocks in which all see all;  norm

(arXiv 2212.04356, section 2.2.) The second convolution keeps every other frame. Positions are
sinusoids, which a checkpoint stores and nothing trains. A sound may be shorter than the 30 s that
Whisper was trained on: it then has the first positions.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from ffnlab.errors import ConfigError
from ffnlab.layers import (
    ACTIVATIONS,
    FFN,
    Attention,
    AttentionSpec,
    Block,
    Context,
    Conv,
    LayerInputs,
    LayerNorm,
    LayerOutputs,
    Statistic,
)
from ffnlab.layers.activations import check_activation
from ffnlab.models import trunk
from ffnlab.models.stack import Stacked, period_of
from ffnlab.weights import Dense

__all__ = ["AudioEncoder", "AudioEncoderConfig", "abstract"]

LONGEST = 10_000.0  # of the wavelengths of the sinusoids, over 2 pi, in positions


@dataclasses.dataclass(frozen=True)
class AudioEncoderConfig:
    """Sizes of an encoder of sound.

    Attributes:
      bands: numbers of a frame.
      width: size of the residual stream (d), even.
      hidden: FFN channels (h).
      layers: number of blocks.
      heads: of attention; they divide the width.
      max_positions: longest sound, outputs; twice as many frames.
      activation: of the FFNs, a name in `layers.ACTIVATIONS`; that of the convolutions is "gelu".
      family: the `model_type` of its Hugging Face config.
    """

    bands: int
    width: int
    hidden: int
    layers: int
    heads: int
    max_positions: int = 1500
    activation: str = "gelu"
    family: str = "whisper"

    def __post_init__(self) -> None:
        for name in ("bands", "width", "hidden", "layers", "heads", "max_positions"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name}={value!r} must be a positive integer")
        if self.width % self.heads or self.width % 2 or self.width < 4:
            raise ConfigError(
                f"width={self.width} must be even, at least 4, and a multiple of heads={self.heads}"
            )
        check_activation(self.activation)

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.width // self.heads


class AudioEncoder(nnx.Module):
    """states = model(frames).

    Attributes:
      conv_in, conv_down: Conv over three frames, [bands, width] and, of stride 2, [width, width].
      positions: Statistic holding a weight [max_positions, width].
      layers: nnx.List of Block, or Stacked.
      norm: final LayerNorm.
      config: AudioEncoderConfig (static).
      remat: what blocks keep for a backward pass, see `ffnlab.models.remat` (static).
    """

    def __init__(self, config: AudioEncoderConfig, *, key: Array, dtype: DTypeLike = jnp.float32):
        """Draws random weights; residual outputs are scaled down by sqrt(2 * layers)."""
        first, second, *blocks = jax.random.split(key, 2 + config.layers)
        width, kernel = config.width, {"size": (3,), "bias": True, "dtype": dtype}
        self.conv_in = Conv(config.bands, width, key=first, padding=1, **kernel)
        self.conv_down = Conv(width, width, key=second, stride=2, padding=1, **kernel)
        table = jnp.asarray(sinusoids(config.max_positions, width), dtype)
        self.positions = Statistic(Dense(table), axes=("position", "embed"))
        self.layers: Sequence[nnx.Module] | Stacked = nnx.List(
            [make_block(config, key=k, dtype=dtype) for k in blocks]
        )
        self.norm = LayerNorm(width, dtype=dtype)
        self.config = config
        self.remat: str | None = None

    def __call__(
        self,
        frames: Float[Array, "b t c"],
        *,
        valid: Bool[Array, "b _"] | None = None,
        inputs: LayerInputs | None = None,
    ) -> Float[Array, "b u d"]:
        """States of every other frame, u = ceil(t / 2), float32; arguments and errors as `run`."""
        return self.run(frames, valid=valid, inputs=inputs)[0].astype(jnp.float32)

    def run(
        self,
        frames: Float[Array, "b t c"],
        *,
        valid: Bool[Array, "b _"] | None = None,
        inputs: LayerInputs | None = None,
        branches: bool = False,
    ) -> tuple[Float[Array, "b u d"], LayerOutputs]:
        """The states after the final norm, and what the layers report.

        Args:
          frames: log-mel features (`ffnlab.data.log_mel`), t >= 1.
          valid: False for frames behind the end of a sound: they count as zeros, and no state sees
            what is made of them alone. All True when None, as Whisper takes sounds filled with
            silence.
          inputs: what each layer is given of its own, leaves [layers, ...].
          branches: also return what each sublayer added to the stream.
        Raises:
          ConfigError: frames of other bands, more than 2 max_positions of them, or a mask of
            another shape.
        """
        self._check(frames, valid)
        seen = None
        if valid is not None:
            frames = jnp.where(valid[..., None], frames, 0)
            kept = valid[:, ::2]
            seen = jnp.broadcast_to(kept[:, None, None], (len(kept), 1, *kept.shape[1:] * 2))
        h = self.embed_frames(frames)
        masks = {spec.window: seen for spec in trunk.specs(self.layers)}
        h, _, outputs = trunk.run(
            self.layers, h, Context({}, masks), inputs=inputs, remat=self.remat, branches=branches
        )
        return self.norm(h), outputs

    def embed_frames(self, frames: Float[Array, "b t c"]) -> Float[Array, "b u d"]:
        """The beginning of the residual stream, in the compute dtype."""
        gelu, dtype = ACTIVATIONS["gelu"], self.compute_dtype
        h = gelu(self.conv_down(gelu(self.conv_in(frames.astype(dtype)))))
        return h + self.positions.get_value().dense()[: h.shape[1]].astype(dtype)

    @property
    def compute_dtype(self) -> jnp.dtype:
        """Dtype of activations, see `trunk.compute_dtype`."""
        return trunk.compute_dtype(self.conv_in.weight.dtype)

    def blocks(self) -> list[Block]:
        """The blocks in order; of a stacked model, those of one period."""
        return period_of(self.layers)

    def _check(self, frames: Array, valid: Array | None) -> None:
        bands, most = self.config.bands, 2 * self.config.max_positions
        if frames.ndim != 3 or frames.shape[2] != bands or not 1 <= frames.shape[1] <= most:
            raise ConfigError(f"frames {frames.shape}; [b, 1..{most}, {bands}] is accepted")
        if valid is not None and valid.shape != frames.shape[:2]:
            raise ConfigError(f"valid {valid.shape}; {frames.shape[:2]}, as frames, is accepted")


def sinusoids(positions: int, width: int) -> Float[np.ndarray, "t d"]:
    """[sin(p w_i), cos(p w_i)] of position p, w_i = 10000^(-i / (d / 2 - 1)), i < d / 2."""
    half = width // 2
    rates = np.exp(-math.log(LONGEST) / (half - 1) * np.arange(half))
    angles = np.arange(positions)[:, None] * rates
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def make_block(config: AudioEncoderConfig, *, key: Array, dtype: DTypeLike = jnp.float32) -> Block:
    """A block of random weights; keys have no bias, which softmax would cancel."""
    attn_key, ffn_key = jax.random.split(key)
    heads, head_dim, scale = config.heads, config.head_dim, (2 * config.layers) ** -0.5
    spec = AttentionSpec(heads, heads, head_dim, rope=None, causal=False)
    common = {"out_scale": scale, "dtype": dtype}
    attn = Attention(spec, config.width, key=attn_key, qkv_bias=True, o_bias=True, **common)
    attn.k.b = nnx.data(None)
    ffn = FFN(config.width, config.hidden, key=ffn_key, activation=config.activation, **common)
    norm = lambda: LayerNorm(config.width, dtype=dtype)  # noqa: E731
    return Block(norm(), attn, norm(), ffn)


def abstract(config: AudioEncoderConfig) -> AudioEncoder:
    """An encoder without arrays, float32: one block is traced, however many it has."""
    outer = dataclasses.replace(config, layers=1)
    model = jax.eval_shape(lambda key: AudioEncoder(outer, key=key), jax.random.key(0))
    block = model.layers[0]
    model.layers = nnx.List([jax.tree.map(lambda leaf: leaf, block) for _ in range(config.layers)])
    model.config = config
    return model
