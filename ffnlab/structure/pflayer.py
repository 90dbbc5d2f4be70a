"""Parameter-free mixing: a maximum over neighbours in place of attention (PfLayer).

    x + attn(norm(x))   becomes   x + down(gelu(pool(gelu(up(norm(x))))))

"Learning Features with Parameter-Free Layers" (arXiv 2202.02777): what mixes places need not be
learned. In a vision transformer every other block's attention gives way to `layers.EffLayer`; in
a residual network the spatial step of a bottleneck is chosen by name (`models.ResNetConfig.op`,
"max" and "hybrid").

Differences from the authors' code: tokens before the patches (a class token) are let through the
layer without pooling, so that any ViT is taken; grids need not be square where the model's is not;
and a number of tokens that is no grid is refused, of which the authors take the root, rounded down.
"""

from typing import Any, cast

from flax import nnx

from ffnlab import tree
from ffnlab.errors import at_least
from ffnlab.layers import Attention, EffLayer
from ffnlab.layers.eff_layer import check_window
from ffnlab.models import ViT
from ffnlab.models.rewriting import key_of, rewriting
from ffnlab.models.vit import grids
from ffnlab.transform import Transform

__all__ = ["pflayer"]


def pflayer(
    *, every: int = 2, first: int = 1, ratio: int = 3, size: int = 3, seed: int = 0
) -> Transform[Any, tuple[()]]:
    """The transform that puts parameter-free mixing in place of a vision transformer's attention.

    The new maps are drawn: the model is to be trained. What counts is the place of a block in its
    stage, so that the order begins anew in each.

    Args:
      every, first: blocks `first`, `first + every`, … of each stage; every other block, the second
        first, as the authors have it.
      ratio: channels inside the new layer for each of the stream (3 of the authors).
      size: side of the window, odd (3).
      seed: of the new maps.
    Returns:
      a Transform that observes nothing. Its init raises ConfigError for what is no ViT, and where
      no such block has attention.
    Raises:
      ConfigError: an even size, or a number that is too small.
    Source:
      arXiv 2202.02777; `vit_pf.py` and `pit_pf.py` of naver-ai/PfLayer.

    >>> pflayer(every=1, first=0).name
    'pflayer'
    """
    at_least(1, every=every)
    at_least(0, first=first)
    check_window(size, ratio)

    def places(model: ViT) -> dict[str, int]:
        """Path of each attention that goes, with its stage."""
        found, start = {}, 0
        for stage, depth in enumerate(model.config.depths):
            for i in range(first, depth, every):
                if isinstance(model.blocks()[start + i].attn, Attention):
                    found[f"layers[{start + i}].attn"] = stage
            start += depth
        return found

    def problems(model: Any) -> list[str]:
        if not isinstance(model, ViT):
            return [f"model is a {type(model).__name__}; a ViT is accepted"]
        if not places(model):
            return [
                f"first={first}, every={every}: no such block has attention; the stages have "
                f"{list(model.config.depths)} blocks"
            ]
        return []

    def change(model: ViT) -> ViT:
        sides = grids(model.config)

        def made(path: str, stage: int) -> nnx.Module:
            rows, columns = sides[stage]
            old = cast(Attention, tree.select(model, tree.at(path))[path])
            weight = old.o.weight
            return EffLayer(
                weight.shape[1],
                key=key_of(seed, path),
                ratio=ratio,
                size=size,
                leading=model.config.tokens,
                grid=None if rows == columns else (rows, columns),
                out_scale=(2 * model.config.layers) ** -0.5,
                dtype=weight.dtype,
            )

        return tree.replace(model, {path: made(path, s) for path, s in places(model).items()})

    return rewriting("pflayer", problems, change)
