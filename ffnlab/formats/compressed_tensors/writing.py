"""Quantized weights into Hugging Face directories, in the formats of compressed-tensors.

`Int4` and `Int8` are written as `pack-quantized`, `Float8` as `float-quantized`, `act="e4m3"` as
dynamic FP8 inputs per token. INT4 weights with FP8 inputs are W4AFP8; the package would infer
another format for it, which vLLM does not take. What the formats cannot say is written dense, and
`Encoder.notes` says so:

- They have no divisor: it goes into the scales. FireQ's is a power of two, so nothing is rounded.
  Scales that the model's dtype does not hold are written in float32.
- Groups have to divide the rows. Where the last group is shorter, all are written as smaller
  groups, of which they consist, if those have at least `SMALLEST_GROUP` rows.

`ScalesExtra`, in `ffnlab.json`, says in which form the scales were, so that `load` gives back the
very weights that were saved.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from ffnlab.errors import ConfigError
from ffnlab.formats.compressed_tensors.packing import (
    folded_scales,
    holds,
    int4_words,
    int8_words,
    turn,
)
from ffnlab.formats.compressed_tensors.schemes import PACKED, Scheme, write_schemes
from ffnlab.formats.huggingface.sidecar_schema import ScalesExtra
from ffnlab.formats.safetensors import Entry, entry
from ffnlab.weights import Float8, Int4, Int8, Weight

__all__ = ["Encoded", "Encoder", "extra_of_experts", "scheme_of"]

SMALLEST_GROUP = 32  # the smallest that vLLM's INT4 kernels take
VLLM_GROUPS = (32, 64, 128)
VLLM_FP8_GROUP = 128
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))  # by vLLM
E4M3 = np.dtype(jnp.float8_e4m3fn)


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One linear map, ready to be written.

    Attributes:
      name: as the checkpoint calls it, without ".weight".
      scheme: of all its weights.
      weights: several where the family fuses maps, in order along `out`.
    """

    name: str
    scheme: Scheme
    weights: tuple[Weight, ...]

    def tensors(self, dtype: np.dtype) -> dict[str, Entry]:
        """The tensors by name, made when they are written.

        Args:
          dtype: of the scales, if it holds them; float32 otherwise.
        """
        rows, columns = self.weights[0].shape[0], sum(weight.shape[1] for weight in self.weights)
        groups = 1 if self.scheme.group is None else rows // self.scheme.group
        found = self.scale_dtype(dtype)
        scales = Entry(found, (columns, groups), lambda: self._scales().astype(found))
        if self.scheme.format != PACKED:
            codes = Entry(E4M3, (columns, rows), lambda: self._joined(_float8_rows))
            return {f"{self.name}.weight": codes, f"{self.name}.weight_scale": scales}
        shape = (columns, -(-rows * self.scheme.bits // 32))
        return {
            f"{self.name}.weight_packed": Entry(
                np.dtype(np.int32), shape, lambda: self._joined(_words)
            ),
            f"{self.name}.weight_scale": scales,
            f"{self.name}.weight_shape": entry(np.array([columns, rows], np.int64)),
        }

    def scale_dtype(self, dtype: np.dtype) -> np.dtype:
        """`dtype` if it holds all scales exactly, else float32."""
        return dtype if holds(dtype, self._scales()) else np.dtype(np.float32)

    def _scales(self) -> np.ndarray:
        return self._joined(lambda weight: _scales(weight, self.scheme))

    def _joined(self, make: Callable[[Weight], np.ndarray]) -> np.ndarray:
        parts = [make(weight) for weight in self.weights]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def extras(self, dtype: np.dtype) -> tuple[ScalesExtra | None, ...]:
        """What to say of the scales of each weight beside the tensors; None for nothing."""
        written = self.scale_dtype(dtype)
        return tuple(_extra([weight], self.scheme, written) for weight in self.weights)


def _words(weight: Weight) -> np.ndarray:
    codes = np.asarray(weight.codes)
    return int4_words(codes, weight.rows) if isinstance(weight, Int4) else int8_words(codes)


def _float8_rows(weight: Weight) -> np.ndarray:
    return turn(np.asarray(weight.codes).view(np.uint8)).view(E4M3)


def _scales(weight: Weight, scheme: Scheme) -> np.ndarray:
    """[out, groups] float32, for the groups of a scheme."""
    if isinstance(weight, Float8):
        return np.ascontiguousarray(np.asarray(weight.scales).T)
    times = 1 if scheme.group is None else weight.group // scheme.group
    groups = 1 if scheme.group is None else weight.shape[0] // scheme.group
    return np.ascontiguousarray(np.repeat(folded_scales(weight), times, axis=0)[:groups].T)


def extra_of_experts(experts: Sequence[Encoded], dtype: np.dtype) -> ScalesExtra | None:
    """What to say of the scales of a mixture's experts, which are one weight in the model.

    Args:
      experts: one map each, of one scheme.
      dtype: that the scales of all are written in.
    """
    weights = [weight for expert in experts for weight in expert.weights]
    return _extra(weights, experts[0].scheme, dtype)


def _extra(weights: Sequence[Weight], scheme: Scheme, written: np.dtype) -> ScalesExtra | None:
    """What to say of scales written in this dtype; of several weights, those of the experts."""
    first = weights[0]
    if isinstance(first, Float8):
        return None
    read = "float32" if written == np.float16 else written.name  # no weight has float16 scales
    form, divisors = first.scales.dtype, tuple(_divisor(weight) for weight in weights)
    for weight, divisor in zip(weights, divisors, strict=True):
        folded = folded_scales(weight).astype(written).astype(np.float32)
        with np.errstate(over="ignore"):
            back = (folded * np.float32(divisor)).astype(weight.scales.dtype)
        if not np.array_equal(back, np.asarray(weight.scales)):
            # The file's scales are as close as can be said.
            form, divisors = np.dtype(read), (1.0,) * len(weights)
            break
    divisor = divisors[0] if len(set(divisors)) == 1 else divisors
    extra = ScalesExtra(first.group, form.name, divisor)
    usual = ScalesExtra(scheme.rows_per_scale(first.shape[0]), read)
    return None if extra == usual else extra


def _divisor(weight: Weight) -> float:
    """That of an INT4 weight's scales, where it is one; else 1."""
    is_divided = isinstance(weight, Int4) and weight.divisor > 0
    return float(weight.divisor) if is_divided else 1.0


def scheme_of(weight: Weight) -> Scheme | str | None:
    """How a weight is written: a scheme, why it cannot be packed, or None for other formats."""
    if isinstance(weight, Float8):
        return Scheme("float-quantized", "float", 8, "channel", act=weight.act)
    if not isinstance(weight, Int4 | Int8):
        return None
    rows, bits = weight.shape[0], 4 if isinstance(weight, Int4) else 8
    if weight.scales.shape[0] == 1 and not weight.group == rows == VLLM_FP8_GROUP:
        return Scheme(PACKED, "int", bits, "channel", act=weight.act)
    group = math.gcd(rows, weight.group)
    if group == weight.group or group >= SMALLEST_GROUP:
        return Scheme(PACKED, "int", bits, "group", group, weight.act)
    fitting = [size for size in range(2, weight.group, 2) if rows % size == 0]
    remedy = f"groups of {fitting[-1]}, or with whole columns" if fitting else "whole columns"
    return f"groups of {weight.group} do not divide {rows} rows; quantize with {remedy}"


class Encoder:
    """Packs the linear maps of one model: called once for each, then asked for config and notes.

    It is what `ffnlab.models.save` uses for format "compressed-tensors".
    """

    def __init__(self) -> None:
        self._schemes: dict[str, Scheme | None] = {"lm_head": None}
        self._encoded: list[Encoded] = []
        self._dense: Counter[str] = Counter()

    def __call__(self, name: str, weights: tuple[Weight, ...]) -> Encoded | None:
        """Takes the next linear map.

        Args:
          name: its Hugging Face name, without ".weight".
          weights: what it holds; several where the family fuses maps, none if it was removed.
        Returns:
          how to write it, or None to write it dense.
        """
        found = {scheme_of(weight) for weight in weights}
        only = next(iter(found)) if len(found) == 1 else None
        if len(found) > 1:
            self._dense["the maps that are one in this family differ in format"] += 1
        elif isinstance(only, str):
            self._dense[only] += 1
        scheme = only if isinstance(only, Scheme) else None
        self._schemes[name] = scheme
        if scheme is None:
            return None
        self._encoded.append(Encoded(name, scheme, weights))
        return self._encoded[-1]

    @property
    def quantization_config(self) -> dict[str, object]:
        """What config.json says.

        Raises:
          ConfigError: nothing was packed.
        """
        if not self._encoded:
            why = "; ".join(f"{_maps(count)}: {why}" for why, count in self._dense.items())
            raise ConfigError(
                "format='compressed-tensors': no linear map is an Int4, Int8 or Float8 that it has "
                f"a form for{f' ({why})' if why else ''}; quantize the model, or use format='dense'"
            )
        return write_schemes(self._schemes)

    def dense(self) -> list[str]:
        """Why quantized linear maps are written dense, one sentence each."""
        return [f"{_maps(count)} written dense: {why}" for why, count in self._dense.items()]

    def notes(self, dtype: np.dtype) -> list[str]:
        """What readers of the directory should know, one sentence each.

        Args:
          dtype: of the model's dense tensors.
        """
        found = self.dense()
        wide = sum(item.scale_dtype(dtype) != dtype for item in self._encoded)
        if wide:
            found.append(f"float32 scales, which {dtype} does not hold: in {_maps(wide)}")
        schemes = [item.scheme for item in self._encoded]
        fp8 = sum(s.act is not None and s.type == "int" and not _is_w4afp8(s) for s in schemes)
        if fp8:
            found.append(
                f"vLLM takes FP8 inputs with INT4 weights in groups of {VLLM_FP8_GROUP} only: "
                f"others in {_maps(fp8)}"
            )
        odd = sum(s.act is None and s.group not in (None, *VLLM_GROUPS) for s in schemes)
        if odd:
            sizes = ", ".join(map(str, VLLM_GROUPS))
            found.append(f"vLLM takes groups of {sizes} or whole columns: others in {_maps(odd)}")
        if self._schemes["lm_head"] is not None:
            found.append("lm_head is quantized, which not every reader takes")
        return found + self._mixed()

    def _mixed(self) -> list[str]:
        """The note on maps that vLLM fuses and that do not share a scheme."""
        places = []
        for name in self._schemes:
            for first, *rest in FUSED:
                stem = name.removesuffix(first)
                schemes = {self._schemes.get(stem + part) for part in (first, *rest)}
                if name.endswith(f".{first}") and len(schemes) > 1:
                    places.append(stem + "/".join((first, *rest)))
        if not places:
            return []
        more = f" and {len(places) - 1} more" if len(places) > 1 else ""
        return [f"vLLM fuses maps that differ in format here: {places[0]}{more}"]


def _maps(count: int) -> str:
    return f"{count} linear map{'' if count == 1 else 's'}"


def _is_w4afp8(scheme: Scheme) -> bool:
    return scheme.bits == 4 and scheme.group == VLLM_FP8_GROUP
