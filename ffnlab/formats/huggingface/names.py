"""The table from Hugging Face tensor names to paths in a model, and back: one row per kind.

A row holds a name with `{n}` for the layer number, and `{e}` for the expert where each has a tensor
of its own, and the path, or the paths of the parts that one fused tensor is the concatenation of,
along its output axis. Which rows a family uses, and the one
difference in the layout (a matrix is `[out, in]` there and `[in, out]` here; an embedding is the
same), is all there is to know about the two namings. The rows here are a `Decoder`'s; those of an
`Encoder` are in `encoder_names`.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence

from ffnlab.errors import FormatError
from ffnlab.formats.huggingface.families import family
from ffnlab.formats.untrusted import quoted

_PROJECTIONS = [
    ("self_attn.q_proj", "attn.q"),
    ("self_attn.k_proj", "attn.k"),
    ("self_attn.v_proj", "attn.v"),
    ("self_attn.o_proj", "attn.o"),
    ("mlp.gate_proj", "ffn.gate"),
    ("mlp.up_proj", "ffn.up"),
    ("mlp.down_proj", "ffn.down"),
]
_FUSED = [
    ("self_attn.qkv_proj", "attn.q", "attn.k", "attn.v"),
    ("self_attn.o_proj", "attn.o"),
    ("mlp.gate_up_proj", "ffn.gate", "ffn.up"),
    ("mlp.down_proj", "ffn.down"),
]
_NORMS = [
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn.q_norm", "attn.q_norm"),
    ("self_attn.k_norm", "attn.k_norm"),
]
_SANDWICH = [
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "post_attn_norm"),
    ("pre_feedforward_layernorm", "ffn_norm"),
    ("post_feedforward_layernorm", "post_ffn_norm"),
    ("self_attn.q_norm", "attn.q_norm"),
    ("self_attn.k_norm", "attn.k_norm"),
]
# One tensor for each expert: gate, up and down, and the router.
_MIXTURES = {
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
    "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
}
_PARTS = ("gate", "up", "down")
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_OUTER = [(EMBED, "embed.w"), ("model.norm.weight", "norm.scale"), (HEAD, "head.w")]
# Buffers that old checkpoints carry and that follow from the config.
_DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_TEXT_PREFIXES = (("language_model.model.", "model."), ("model.language_model.", "model."))
_OTHER_MODALITIES = re.compile(
    r"(model\.)?(vision_tower|multi_modal_projector|vision_model|audio_tower)\..*"
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of tensor.

    Attributes:
      name: Hugging Face name, with `{n}` for the layer and `{e}` for the expert.
      paths: where its parts are in the model, with `{n}`.
      kernel: taps of a convolution, which is stored as [out, in, *kernel]; () for none.
      leading: axes of length 1 that are stored before those of ours.
    """

    name: str
    paths: tuple[str, ...]
    kernel: tuple[int, ...] = ()
    leading: int = 0

    @property
    def regex(self) -> re.Pattern[str]:
        """Matches the name; its groups are the numbers of layer and expert."""
        pattern = re.escape(self.name)
        for number in (r"\{n\}", r"\{e\}"):
            pattern = pattern.replace(number, "(0|[1-9][0-9]{0,3})")
        return re.compile(pattern)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a parameter is stored.

    Attributes:
      name: Hugging Face name of the tensor, with `{e}` where each expert has one.
      part: which part of it, 0 unless it is fused.
      paths: paths of all its parts.
      transposed: stored as [out, in].
      kernel: stored as [out, in, *kernel], see `Row`.
      leading: axes of length 1 before, see `Row`.
    """

    name: str
    part: int
    paths: tuple[str, ...]
    transposed: bool
    kernel: tuple[int, ...] = ()
    leading: int = 0

    @property
    def is_matrix(self) -> bool:
        """Whether it is of linear maps, which may be packed."""
        return self.transposed and not self.kernel

    def stored(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the tensor of a parameter, or of all parts of one."""
        if self.kernel:
            rows, out = shape
            return out, rows // math.prod(self.kernel), *self.kernel
        return (1,) * self.leading + (shape[::-1] if self.transposed else shape)

    def of_expert(self, e: int) -> str:
        """Name of one expert's tensor."""
        return self.name.replace("{e}", str(e))

    @property
    def is_stacked(self) -> bool:
        """Whether the parameter is several tensors, on a first axis of experts."""
        return "{e}" in self.name


def rows(model_type: str) -> list[Row]:
    """The table of one family."""
    kind = family(model_type)
    table = [Row(name, (path,)) for name, path in _OUTER]
    for name, *parts in _FUSED if kind.fused else _PROJECTIONS:
        for end, field in (("weight", "w"), ("bias", "b")):
            paths = tuple(f"layers[{{n}}].{part}.{field}" for part in parts)
            table.append(Row(f"model.layers.{{n}}.{name}.{end}", paths))
    if model_type in _MIXTURES:
        inner, *projections = _MIXTURES[model_type]
        head = f"model.layers.{{n}}.{inner}"
        table.append(Row(f"{head}.gate.weight", ("layers[{n}].ffn.router.w",)))
        for name, part in zip(projections, _PARTS, strict=True):
            path = f"layers[{{n}}].ffn.experts.{part}.w"
            table.append(Row(f"{head}.experts.{{e}}.{name}.weight", (path,)))
    for name, part in _SANDWICH if kind.gemma else _NORMS:
        table.append(Row(f"model.layers.{{n}}.{name}.weight", (f"layers[{{n}}].{part}.scale",)))
    return table


class Names:
    """Both directions of one family's table."""

    def __init__(self, model_type: str, table: Sequence[Row] | None = None):
        """Reads a table; that of a `Decoder` of this `model_type` when None."""
        self.family = model_type
        table = rows(model_type) if table is None else table
        self._regexes = [(row.regex, row) for row in table]
        self._by_path = {path: (row, i) for row in table for i, path in enumerate(row.paths)}

    def place(self, path: str) -> Place | None:
        """Where the parameter at `path` is stored; None if this family has no such parameter."""
        layer = re.match(r"layers\[(\d+)\]", path)
        n = layer[1] if layer else ""
        found = self._by_path.get(path.replace(f"layers[{n}]", "layers[{n}]", 1))
        if found is None:
            return None
        row, part = found
        paths = tuple(p.replace("{n}", n) for p in row.paths)
        transposed = path.endswith(".w") and not path.endswith("embed.w")
        return Place(row.name.replace("{n}", n), part, paths, transposed, row.kernel, row.leading)

    def paths(self, name: str) -> tuple[str, ...]:
        """The parameters stored in a tensor; empty if this family has no such tensor."""
        for regex, row in self._regexes:
            found = regex.fullmatch(name)
            if found:
                n = found[1] if found.groups() else ""
                return tuple(path.replace("{n}", n) for path in row.paths)
        return ()


def text_names(names: Iterable[str], *, wrapped: bool) -> dict[str, str]:
    """What a checkpoint calls each tensor, by its name in a text-only one.

    Args:
      names: tensor names found in a checkpoint.
      wrapped: the text model is part of a multimodal one, whose other tensors are left out.
    Raises:
      FormatError: two tensors are the same one of the text model.
    """
    found: dict[str, str] = {}
    for name in names:
        plain = _text_name(name) if wrapped else name
        if plain is None or _DERIVED.fullmatch(plain):
            continue
        if plain in found:
            raise FormatError(f"{quoted(found[plain])} and {quoted(name)} are the same tensor")
        found[plain] = name
    return found


def _text_name(name: str) -> str | None:
    """The text-only name of a tensor of a multimodal checkpoint; None for another modality's."""
    if _OTHER_MODALITIES.fullmatch(name):
        return None
    for prefix, short in _TEXT_PREFIXES:
        if name.startswith(prefix):
            return short + name.removeprefix(prefix)
    return name.removeprefix("language_model.")
