"""What a `config.json` says of mixtures of experts, as options of `DecoderConfig` and back."""

from collections.abc import Callable, Mapping

from ffnlab.formats.huggingface.fields import Fields
from ffnlab.layers import MoESpec
from ffnlab.models.config import DecoderConfig

__all__ = ["MIXTRAL_DEFAULTS", "MIXTURES", "QWEN3_DEFAULTS", "written_mixture"]

MIXTRAL_DEFAULTS: Mapping[str, object] = {"num_local_experts": 8, "num_experts_per_tok": 2}
QWEN3_DEFAULTS: Mapping[str, object] = {
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "decoder_sparse_step": 1,
}


def read_mixtral(fields: Fields) -> dict[str, object]:
    """Every layer is a mixture; weights of a token's experts sum to 1."""
    experts = fields.size("num_local_experts")
    return {"mixture": _spec(fields, experts, fields.size("intermediate_size"), True)}


def read_qwen3(fields: Fields) -> dict[str, object]:
    """Every `decoder_sparse_step`-th layer is a mixture, but for those of `mlp_only_layers`."""
    layers, step = fields.size("num_hidden_layers"), fields.size("decoder_sparse_step")
    dense = fields.get("mlp_only_layers") or []
    is_list = isinstance(dense, list) and all(type(i) is int and 0 <= i < layers for i in dense)
    if not is_list:
        fields.wrong("mlp_only_layers", f"a list of layers below {layers}")
        dense = []
    hidden, normalize = fields.size("moe_intermediate_size"), fields.flag("norm_topk_prob")
    # transformers 5 writes one name, 4 the other; where both are there they must agree.
    names = [n for n in ("num_experts", "num_local_experts") if n in fields.values]
    experts = [fields.size(name) for name in names or ("num_experts",)]
    if len(set(experts)) > 1:
        fields.note(f"num_experts={experts[0]} and num_local_experts={experts[1]} differ")
    spec = _spec(fields, experts[0], hidden, normalize)
    routed = [i not in dense and (i + 1) % step == 0 for i in range(layers)]
    return {"mixture": spec, "ffns": tuple("mixture" if r else "gated" for r in routed)}


def _spec(fields: Fields, experts: int, hidden: int, normalize: bool) -> MoESpec:
    k = fields.size("num_experts_per_tok")
    if k > experts:
        fields.note(f"num_experts_per_tok={k} is more than the {experts} experts")
    return MoESpec(experts, min(k, experts), hidden, normalize=normalize)


MIXTURES: Mapping[str, Callable[[Fields], dict[str, object]]] = {
    "mixtral": read_mixtral,
    "qwen3_moe": read_qwen3,
}


def written_mixture(config: DecoderConfig) -> dict[str, object]:
    """The entries that say a config's mixture, in the words of its family."""
    spec = config.mixture
    if spec is None or config.family not in MIXTURES:
        return {}
    written: dict[str, object] = {"num_experts_per_tok": spec.k, "output_router_logits": False}
    if config.family == "mixtral":
        return written | {"num_local_experts": spec.experts}
    dense = [i for i in range(config.layers) if config.ffn(i) != "mixture"]
    return written | {
        "num_experts": spec.experts,
        "num_local_experts": spec.experts,
        "moe_intermediate_size": spec.hidden,
        "norm_topk_prob": spec.normalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
    }
