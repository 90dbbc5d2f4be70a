"""One decoder block: attention and FFN sublayers on a residual stream, each removable."""

from flax import nnx
from jaxtyping import Array, Float

from ffnlab.layers.attention.attention import Attention, Context
from ffnlab.layers.linear import RMSNorm
from ffnlab.layers.logical import constrain
from ffnlab.weights import kv


class Block(nnx.Module):
    """h + attn(norm(h)), then h + ffn(norm(h)); a sublayer of None is removed and adds nothing.

    Attributes:
      attn_norm, ffn_norm: RMSNorm before each sublayer (None with the sublayer).
      attn: Attention or None.
      ffn: any module [b, t, d] -> [b, t, d], or None.
      post_attn_norm, post_ffn_norm: RMSNorm on a sublayer's output (Gemma 2 and 3), or None.
    """

    def __init__(
        self,
        attn_norm: RMSNorm | None,
        attn: Attention | None,
        ffn_norm: RMSNorm | None,
        ffn: nnx.Module | None,
        *,
        post_attn_norm: RMSNorm | None = None,
        post_ffn_norm: RMSNorm | None = None,
    ):
        self.attn_norm, self.attn = nnx.data(attn_norm), nnx.data(attn)
        self.ffn_norm, self.ffn = nnx.data(ffn_norm), nnx.data(ffn)
        self.post_attn_norm = nnx.data(post_attn_norm)
        self.post_ffn_norm = nnx.data(post_ffn_norm)

    def __call__(
        self,
        h: Float[Array, "b t d"],
        context: Context,
        *,
        gates: Float[Array, "2"] | None = None,
        cache: kv.KV | None = None,
    ) -> tuple[Float[Array, "b t d"], kv.KV | None]:
        """Returns (h, cache).

        Args:
          gates: multipliers of the attention and the FFN branch; 1 when None.
          cache: this block's keys and values; None without caching.
        """
        if self.attn is not None:
            y, cache = self.attn(self.attn_norm(h), context, cache)
            y = y if self.post_attn_norm is None else self.post_attn_norm(y)
            h = h + (y if gates is None else y * gates[0].astype(y.dtype))
        if self.ffn is not None:
            y = self.ffn(self.ffn_norm(h))
            y = y if self.post_ffn_norm is None else self.post_ffn_norm(y)
            h = h + (y if gates is None else y * gates[1].astype(y.dtype))
        return constrain(h, ("batch", "length", "embed")), cache

    def without(self, sublayer: str) -> "Block":
        """A new block without its "attn" or "ffn" sublayer.

        Raises:
          ValueError: another name, or a sublayer that is already removed.
        """
        if sublayer not in ("attn", "ffn") or getattr(self, sublayer) is None:
            raise ValueError(f"sublayer={sublayer!r}: this block has no such sublayer to remove")
        keep_attn, keep_ffn = sublayer != "attn", sublayer != "ffn"
        return Block(
            self.attn_norm if keep_attn else None,
            self.attn if keep_attn else None,
            self.ffn_norm if keep_ffn else None,
            self.ffn if keep_ffn else None,
            post_attn_norm=self.post_attn_norm if keep_attn else None,
            post_ffn_norm=self.post_ffn_norm if keep_ffn else None,
        )
