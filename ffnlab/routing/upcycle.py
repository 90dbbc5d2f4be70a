"""Sparse upcycling: a dense model becomes a mixture of experts that computes the same.

Every expert is a copy of the FFN that stood there, with a router beside them (arXiv 2212.05055).
Where the weights of a token's experts sum to 1 the outputs are the dense model's, and learning
takes it from there.
"""

import dataclasses
from typing import Any, cast

import jax

from ffnlab import tree
from ffnlab.errors import ConfigError
from ffnlab.layers import FFN, GatedFFN, Linear, MoE, MoESpec
from ffnlab.layers.feed_forward.ffn import is_plain
from ffnlab.layers.modality import grouped
from ffnlab.models import Decoder
from ffnlab.models.stack import in_list
from ffnlab.transform import Transform

__all__ = ["upcycle"]

# What the files of a family's mixtures are called; other families have none.
MIXTURES = {"llama": "mixtral", "mistral": "mixtral", "qwen3": "qwen3_moe"}


def upcycle(
    *,
    experts: int = 8,
    k: int = 2,
    layers: tuple[int, ...] | None = None,
    normalize: bool = True,
    capacity: float | None = None,
    seed: int = 0,
) -> Transform[Decoder, tuple[()]]:
    """The transform that makes mixtures of a decoder's FFNs: copies of each, and a drawn router.

    Weights keep their format: an INT4 FFN becomes INT4 experts.

    Args:
      experts: of each layer.
      k: experts of a token.
      layers: which; all that have a dense FFN when None.
      normalize: the weights of a token's experts sum to 1, so that outputs stay what they were.
      capacity: see `MoESpec`.
      seed: of the routers.
    Returns:
      a Transform that observes nothing. Its init raises ConfigError for what is no decoder, layers
      that it lacks or that have no dense FFN, and FFNs of different sizes.
    Raises:
      ConfigError: k or capacity out of range.

    >>> upcycle(experts=4).name
    'upcycle'
    """
    spec = MoESpec(experts, k, 1, normalize=normalize, capacity=capacity)  # checked before use

    def init(model: Any) -> tuple[()]:
        if not isinstance(model, Decoder):
            raise ConfigError(f"model is a {type(model).__name__}; a Decoder is accepted")
        jax.eval_shape(lambda: rewritten(model))
        return ()

    def rewritten(model: Decoder) -> Decoder:
        return in_list(model, change)

    def change(model: Decoder) -> Decoder:
        places = found(model, layers)
        chosen = tree.where(lambda path, _: path in places)
        ffns = cast(dict[str, FFN | GatedFFN], tree.select(model, chosen))
        sizes = {(type(f), f.up.weight.shape[1], f.activation) for f in ffns.values()}
        if len(sizes) > 1:
            raise ConfigError(f"the FFNs are of {len(sizes)} kinds and sizes; name layers of one")
        ffn = next(iter(ffns.values()))
        own = dataclasses.replace(
            spec, hidden=ffn.up.weight.shape[1], gated=isinstance(ffn, GatedFFN)
        )
        if model.config.mixture not in (None, own):
            raise ConfigError(
                f"the model has mixtures {model.config.mixture}; a model has one kind of them, "
                f"{own} is another"
            )
        keys = jax.random.split(jax.random.key(seed), model.config.layers)
        new = {path: mixture(ffns[path], own, keys[i]) for path, i in places.items()}
        model = tree.replace(model, new)
        config = model.config
        kinds = tuple(
            "mixture" if i in places.values() else config.ffn(i) for i in range(config.layers)
        )
        family = MIXTURES.get(config.family, config.family)
        model.config = dataclasses.replace(config, ffns=kinds, mixture=own, family=family)
        return model

    return Transform("upcycle", init, None, lambda model, stats: rewritten(model))


def found(model: Decoder, layers: tuple[int, ...] | None) -> dict[str, int]:
    """Paths of the dense FFNs of some layers, with the layer of each.

    Raises:
      ConfigError: a layer that is not there, or has none.
    """
    dense = {
        f"layers[{i}].ffn": i
        for i, block in enumerate(model.blocks())
        if is_plain(getattr(block, "ffn", None))
    }
    wanted = tuple(dense.values()) if layers is None else layers
    lacking = sorted(set(wanted) - set(dense.values()))
    if lacking or not wanted:
        raise ConfigError(
            f"layers={layers}: layers {lacking} have no dense FFN to copy; "
            f"those that have are {list(dense.values())}"
        )
    return {path: i for path, i in dense.items() if i in wanted}


def mixture(ffn: FFN | GatedFFN, spec: MoESpec, key: jax.Array) -> MoE:
    """A mixture of copies of an FFN, and a router."""
    width = ffn.up.weight.shape[0]
    dtype = ffn.up.weight.dtype
    moe = jax.eval_shape(lambda: MoE(width, spec, key=key, activation=ffn.activation))
    moe.router = Linear(width, spec.experts, key=key, axes=moe.router.w.axes, dtype=dtype)
    moe.experts = grouped([ffn] * spec.experts)
    return moe
