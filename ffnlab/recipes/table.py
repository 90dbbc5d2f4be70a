"""The transforms that a recipe may name. A new method joins by one line."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from ffnlab.options import Option
from ffnlab.outside import Methods
from ffnlab.transform import Transform

__all__ = ["METHODS", "TRANSFORMS", "factory", "options_of"]

# Name in a recipe -> "module:factory"; a module is imported when a recipe names it.
TRANSFORMS: Mapping[str, str] = MappingProxyType(
    {
        "adapter": "ffnlab.models.adapters:adapter",
        "biases": "ffnlab.models.adapters:biases",
        "bundle": "ffnlab.structure.snnk:bundle",
        "bundled": "ffnlab.structure.snnk:bundled",
        "cats": "ffnlab.sparsity.chess:cats",
        "chess": "ffnlab.sparsity.chess:chess",
        "classifier": "ffnlab.models.adapters:classifier",
        "duo": "ffnlab.routing.duo:duo",
        "ensemble_scale": "ffnlab.pruning.paths.scaled:ensemble_scale",
        "finercut": "ffnlab.pruning.finercut:finercut",
        "expand": "ffnlab.structure.learngene_sws:expand",
        "fireq": "ffnlab.quantization.fireq:fireq",
        "group_norm": "ffnlab.pruning.group_norm:group_norm",
        "guided": "ffnlab.structure.structured_ffn:guided",
        "head": "ffnlab.models.adapters:head",
        "lora": "ffnlab.models.adapters:lora",
        "lora_experts": "ffnlab.routing.lora_mixer:lora_experts",
        "macaron": "ffnlab.structure.macaron:macaron",
        "meta_prune": "ffnlab.pruning.meta.pruning:meta_prune",
        "nearest": "ffnlab.quantization.nearest:nearest",
        "path_ensemble": "ffnlab.pruning.paths.path_ensemble:path_ensemble",
        "pflayer": "ffnlab.structure.pflayer:pflayer",
        "pmet": "ffnlab.editing.pmet:pmet",
        "premerged": "ffnlab.structure.structured_ffn:premerged",
        "prompts": "ffnlab.models.adapters:prompts",
        "untie": "ffnlab.routing.mixture_of_transformers:untie",
        "switch_head": "ffnlab.routing.robust_qa:switch_head",
        "top2_head": "ffnlab.routing.robust_qa:top2_head",
        "repa": "ffnlab.structure.repavit:repa",
        "repa-fold": "ffnlab.structure.repavit:repa_fold",
        "scalelong": "ffnlab.structure.scalelong:scalelong",
        "share": "ffnlab.structure.learngene_sws:share",
        "snnk": "ffnlab.structure.snnk:snnk",
        "snnk-adapter": "ffnlab.structure.snnk:snnk_adapter",
        "structured": "ffnlab.structure.structured_ffn:structured",
        "unguided": "ffnlab.structure.structured_ffn:unguided",
        "upcycle": "ffnlab.routing.upcycle:upcycle",
        "virgo": "ffnlab.graphs.virgo:virgo",
        "with_routers": "ffnlab.routing.duo:with_routers",
    }
)
METHODS = Methods("transform", "ffnlab.transforms", Transform, TRANSFORMS)


def factory(name: str) -> Callable[..., Transform]:
    """The factory of a transform.

    Args:
      name: a key of `TRANSFORMS`, a name that a package registers, or "module:factory".
    Returns:
      a function whose parameters are the options.
    Raises:
      ConfigError: no such transform, the message lists them, the nearest name first; or importing
        it fails (`ffnlab.outside`).

    >>> factory("finercut").__name__
    'finercut'
    """
    return METHODS.factory(name)


def options_of(name: str) -> dict[str, Option]:
    """The options of a transform by name, with their types and defaults.

    Args:
      name: as `factory`.
    Raises:
      ConfigError: no such transform.

    >>> str(options_of("finercut")["rate"])
    "rate: number or 'none' (default 'none')"
    """
    return METHODS.options(name)
