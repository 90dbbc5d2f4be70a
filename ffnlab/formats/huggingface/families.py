"""Hugging Face configs of the Llama-shaped families, as `DecoderConfig` and back.

One `Family` per `model_type`: its defaults (what the key means when it is absent), which switches
it has, and which layers have windows. What a family cannot say is found by reading back what was
written: `write_config` compares the two and refuses to lose anything.
"""

import dataclasses
from collections.abc import Callable, Mapping

from ffnlab.errors import ConfigError
from ffnlab.formats.huggingface import mixtures
from ffnlab.formats.huggingface.fields import Fields
from ffnlab.formats.huggingface.ropes import (
    FIXED_FORMS,
    FORMS,
    ORIGINAL,
    PHI_FORMS,
    read_rope,
    read_ropes_by_layer,
    write_rope,
)
from ffnlab.formats.huggingface.windows import (
    Windows,
    by_type,
    every,
    everywhere,
    if_used,
    late_layers,
    nowhere,
)
from ffnlab.formats.untrusted import quoted
from ffnlab.models.config import DecoderConfig

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "leaky_relu": "leaky_relu",
    "linear": "identity",
    "relu": "relu",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
}
ACTIVATION_NAMES = {  # of the others "silu" is written, which reading back finds to be another
    **{name: name for name in ("silu", "gelu", "leaky_relu", "relu", "sigmoid", "tanh")},
    "gelu_tanh": "gelu_pytorch_tanh",
    "identity": "linear",
}
_COMMON: dict[str, object] = {
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
_GEMMA: dict[str, object] = _COMMON | {
    "head_dim": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
SMALLEST = 1e-20  # of numbers that are divided by: float32 squares and inverts it


@dataclasses.dataclass(frozen=True)
class Family:
    """What is peculiar to one `model_type`.

    Attributes:
      architecture: class name in `architectures`.
      defaults: value of a key that is absent.
      windowed: which layers have the sliding window, given the fields and the number of layers.
      biases: reads (qkv, o, mlp) bias switches.
      qk_norm: queries and keys are normalized.
      gemma: norm offset, sandwich norms, scaled embeddings, query scale and soft caps.
      local_rope: windowed layers have a rotary embedding of their own (Gemma 3).
      fused: q, k, v are one tensor and so are gate and up (Phi-3).
      ropes: what each `rope_type` that it may have stands for.
      partial: a share of a head's channels may rotate alone (Phi-3); the others rotate all.
    """

    architecture: str
    defaults: Mapping[str, object]
    windowed: Windows
    biases: Callable[[Fields], tuple[bool, bool, bool]]
    qk_norm: bool = False
    gemma: bool = False
    local_rope: bool = False
    fused: bool = False
    ropes: Mapping[str, str] = dataclasses.field(default_factory=lambda: FORMS)
    partial: bool = False


def _no_bias(fields: Fields) -> tuple[bool, bool, bool]:
    return False, False, False


def _attention_bias(fields: Fields) -> tuple[bool, bool, bool]:
    bias = fields.flag("attention_bias")
    return bias, bias, False


FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        _COMMON | {"bos_token_id": 1, "eos_token_id": 2},
        nowhere,
        lambda fields: (*_attention_bias(fields)[:2], fields.flag("mlp_bias")),
    ),
    "mistral": Family(
        "MistralForCausalLM",
        _COMMON
        | {"num_key_value_heads": 8, "sliding_window": 4096, "bos_token_id": 1, "eos_token_id": 2},
        everywhere,
        _no_bias,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        _COMMON | {"max_window_layers": 28, "sliding_window": 4096},
        if_used(by_type(late_layers)),
        lambda fields: (True, False, False),
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        _COMMON | {"head_dim": 128, "max_window_layers": 28, "sliding_window": 4096},
        if_used(by_type(late_layers)),
        _attention_bias,
        qk_norm=True,
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        _COMMON
        | {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2}
        | mixtures.MIXTRAL_DEFAULTS,
        everywhere,
        _no_bias,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        _COMMON | {"num_key_value_heads": 4, "sliding_window": 4096} | mixtures.QWEN3_DEFAULTS,
        if_used(everywhere),
        _attention_bias,
        qk_norm=True,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        _GEMMA
        | {
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "max_position_embeddings": 8192,
        },
        by_type(every("sliding_window_pattern", 2)),
        _attention_bias,
        gemma=True,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _GEMMA | {"vocab_size": 262208, "max_position_embeddings": 131072},
        by_type(every("sliding_window_pattern", 6)),
        _attention_bias,
        qk_norm=True,
        gemma=True,
        local_rope=True,
        ropes=FIXED_FORMS,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        _COMMON | {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, ORIGINAL: 4096},
        everywhere,
        _no_bias,
        fused=True,
        ropes=PHI_FORMS,
        partial=True,
    ),
}


def family(name: str) -> Family:
    """The family of a `model_type`.

    Raises:
      ConfigError: it is not one of `FAMILIES`.
    """
    if name not in FAMILIES:
        raise ConfigError(
            f"unknown architecture: model_type={quoted(name)}; known: {', '.join(FAMILIES)}"
        )
    return FAMILIES[name]


def read_config(config: object, *, where: str = "config.json") -> DecoderConfig:
    """The parsed content of a `config.json` as a `DecoderConfig`.

    Args:
      config: a JSON object with `model_type` among `FAMILIES`, or "gemma3" with a `text_config`.
      where: file name for the message.
    Returns:
      a checked config; nothing of its size has been allocated.
    Raises:
      ConfigError: not an object, an unknown architecture, or entries that are absurd, contradict
        each other or ask for what `Decoder` cannot do; all of them are named.
    """
    if not isinstance(config, dict):
        raise ConfigError(f"{where}: must hold a JSON object")
    config = text_config(config, where)
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ConfigError(
            f"{where}: unknown architecture: model_type={quoted(name)}; "
            f"known: {', '.join(FAMILIES)} (and gemma3 for its text model)"
        )
    kind = FAMILIES[name]
    fields = Fields(config, kind.defaults, where=where)
    options = _sizes(fields) | _switches(fields, kind)
    options |= mixtures.MIXTURES[name](fields) if name in mixtures.MIXTURES else {}
    options["family"] = name
    _refuse(fields)
    fields.finish()
    try:
        return DecoderConfig(**options)  # type: ignore[arg-type]
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def text_config(config: dict[str, object], where: str) -> dict[str, object]:
    """The part of a multimodal Gemma 3 config that describes its text model; others unchanged."""
    if config.get("model_type") != "gemma3":
        return config
    text = config.get("text_config")
    if not isinstance(text, dict):
        raise ConfigError(f"{where}: model_type='gemma3' needs a text_config object")
    return {"model_type": "gemma3_text"} | text


def _sizes(fields: Fields) -> dict[str, object]:
    width, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    head_dim = fields.optional_size("head_dim")
    kv_heads = fields.optional_size("num_key_value_heads")
    vocab = fields.size("vocab_size")
    if head_dim is None and width % heads:
        fields.note(
            f"hidden_size={width} is not a multiple of num_attention_heads={heads}, and there is "
            "no head_dim"
        )
    return {
        "vocab": vocab,
        "width": width,
        "hidden": fields.size("intermediate_size"),
        "layers": fields.size("num_hidden_layers"),
        "heads": heads,
        "kv_heads": kv_heads or heads,
        "head_dim": head_dim or max(width // heads, 1),
        "max_positions": fields.size("max_position_embeddings"),
        "bos": next(iter(fields.ids("bos_token_id", vocab)), None),
        "eos": fields.ids("eos_token_id", vocab),
        "pad": next(iter(fields.ids("pad_token_id", vocab)), None),
    }


def _switches(fields: Fields, kind: Family) -> dict[str, object]:
    qkv, o, mlp = kind.biases(fields)
    act = "hidden_activation" if kind.gemma else "hidden_act"
    options: dict[str, object] = {
        "eps": fields.number("rms_norm_eps", low=SMALLEST, high=1.0),
        "activation": fields.choice(act, ACTIVATIONS),
        "windows": _windows(fields, kind),
        "qkv_bias": qkv,
        "o_bias": o,
        "mlp_bias": mlp,
        "qk_norm": kind.qk_norm,
        "tie_embeddings": fields.flag("tie_word_embeddings"),
    }
    if kind.local_rope:
        options["rope"], options["local_rope"] = read_ropes_by_layer(fields, kind.ropes)
    else:
        options["rope"] = read_rope(fields, kind.ropes, partial=kind.partial)
    if kind.gemma:
        scalar = fields.number("query_pre_attn_scalar", low=SMALLEST, high=1e6)
        options |= {
            "norm_offset": 1.0,
            "sandwich_norms": True,
            "embed_scale": fields.size("hidden_size") ** 0.5,
            "query_scale": scalar**-0.5,
            "attn_softcap": fields.optional_number("attn_logit_softcapping", low=SMALLEST),
            "logit_softcap": fields.optional_number("final_logit_softcapping", low=SMALLEST),
        }
    return options


def _windows(fields: Fields, kind: Family) -> tuple[int | None, ...] | None:
    layers = fields.size("num_hidden_layers")
    windowed = kind.windowed(fields, layers)
    if not any(windowed):
        return None
    window = fields.optional_size("sliding_window")
    return None if window is None else tuple(window if w else None for w in windowed)


def _refuse(fields: Fields) -> None:
    """Notes switches that would change the result and that `Decoder` does not have."""
    if fields.flag("use_bidirectional_attention"):
        fields.note("use_bidirectional_attention=true: only causal models are supported")


def write_config(config: DecoderConfig) -> dict[str, object]:
    """The `config.json` content that says what a `DecoderConfig` says.

    Args:
      config: its `family` decides the form.
    Returns:
      a JSON object that transformers 4 and 5 both read; without dtype.
    Raises:
      ConfigError: the family cannot say it; the fields that would be lost are named.
    """
    kind = family(config.family)
    written = _written(config, kind)
    canonical = dataclasses.replace(
        config,
        windows=config.windows if any(config.windows or ()) else None,
        max_positions=_positions(config),
    )
    back = read_config(written, where=f"config of family {config.family!r}")
    lost = [
        f"{field.name}={getattr(canonical, field.name)!r} (it would be "
        f"{getattr(back, field.name)!r})"
        for field in dataclasses.fields(canonical)
        if getattr(canonical, field.name) != getattr(back, field.name)
    ]
    if lost:
        raise ConfigError(f"model_type {config.family!r} cannot say " + ", ".join(lost))
    return written


def _written(config: DecoderConfig, kind: Family) -> dict[str, object]:
    act = "hidden_activation" if kind.gemma else "hidden_act"
    written: dict[str, object] = {
        "architectures": [kind.architecture],
        "model_type": config.family,
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": _positions(config),
        "rms_norm_eps": config.eps,
        act: ACTIVATION_NAMES.get(config.activation, "silu"),
        "attention_bias": config.qkv_bias and config.o_bias,
        "mlp_bias": config.mlp_bias,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos,
        "eos_token_id": list(config.eos) if len(config.eos) > 1 else next(iter(config.eos), None),
        "pad_token_id": config.pad,
        **write_rope(config, by_layer=kind.local_rope),
        **_written_windows(config, kind),
        **mixtures.written_mixture(config),
    }
    if config.family == "phi3":
        written[ORIGINAL] = config.rope.original or config.max_positions
    if kind.gemma:
        scalar = (config.query_scale or config.head_dim**-0.5) ** -2
        written |= {
            "query_pre_attn_scalar": round(scalar)
            if abs(scalar - round(scalar)) < 1e-6
            else scalar,
            "attn_logit_softcapping": config.attn_softcap,
            "final_logit_softcapping": config.logit_softcap,
        }
    return written


def _positions(config: DecoderConfig) -> int:
    """`max_position_embeddings`: what a dynamic rope stretches, not what it was stretched to."""
    return config.rope.original if config.rope.scaling == "dynamic" else config.max_positions


def _written_windows(config: DecoderConfig, kind: Family) -> dict[str, object]:
    windows = config.windows or (None,) * config.layers
    size = next((w for w in windows if w is not None), None)
    if kind.windowed in (nowhere, everywhere):
        return {"sliding_window": size} if kind.windowed is everywhere else {}
    types = ["full_attention" if w is None else "sliding_attention" for w in windows]
    written: dict[str, object] = {"sliding_window": size, "layer_types": types}
    if not kind.gemma:
        written["use_sliding_window"] = size is not None
        written["max_window_layers"] = next(
            (i for i, w in enumerate(windows) if w is not None), config.layers
        )
    return written
