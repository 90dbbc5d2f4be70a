"""Meta pruning as a transform: one pass of a metanetwork, then pruning by group norms."""

from pathlib import Path
from typing import Any

from flax import nnx

from ffnlab.formats import load
from ffnlab.models import narrow
from ffnlab.models.meta_network import MetaNetwork
from ffnlab.pruning.group_norm import STEPS, Kept, check_options, kept_of
from ffnlab.pruning.meta.correcting import corrected
from ffnlab.transform import Transform

__all__ = ["meta_prune"]


def meta_prune(
    *,
    metanetwork: str | MetaNetwork,
    rate: float | None = None,
    speed_up: float | None = None,
    select: str = "**",
    steps: int = STEPS,
) -> Transform[nnx.Module, Kept]:
    """Takes out the units that a metanetwork has made small.

    The network is corrected in one pass; it may be one that the metanetwork never saw, of the same
    layout. What is left of it is the corrected network, to be trained on: the authors train it
    before pruning and after. `ffnlab.pruning.meta.corrected` is the first step alone, and
    `ffnlab.pruning.group_norm` the second.

    Args:
      metanetwork: a trained one (`meta_loss`), or the directory of one.
      rate, speed_up, select, steps: see `ffnlab.pruning.group_norm`.
    Returns:
      a transform that observes nothing; its stats say which units stay.
    Raises:
      ConfigError: an option out of range, or the directory holds another kind of model; at `init`,
        as `group_norm`, and a model of another layout, or of none.
      FormatError: no such directory, or damaged.

    Source: Meta Pruning via Graph Metanetworks (2025), without its training in between.

    >>> from ffnlab.models import MetaNetworkConfig
    >>> import jax
    >>> net = MetaNetworkConfig(nodes=1, edges=1).make(key=jax.random.key(0))
    >>> meta_prune(metanetwork=net, speed_up=2.0).name
    'meta_prune'
    """
    check_options(rate, speed_up, steps)
    network = metanetwork
    if not isinstance(network, MetaNetwork):
        network = load(Path(network), kinds=("meta",), progress=False)

    def init(model: nnx.Module) -> Kept:
        options = {"rate": rate, "speed_up": speed_up, "select": select, "steps": steps}
        return kept_of(corrected(network, model), **options)

    def rewrite(model: nnx.Module, kept: Kept) -> Any:
        return narrow(corrected(network, model), kept)

    return Transform(name="meta_prune", init=init, observe=None, rewrite=rewrite)
