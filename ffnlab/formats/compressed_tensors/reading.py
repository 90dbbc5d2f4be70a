"""Quantized linear maps of Hugging Face directories in the formats of compressed-tensors.

`pack-quantized` and `int-quantized` maps become `Int4` or `Int8`, `float-quantized` ones `Float8`,
with `act="e4m3"` where inputs are rounded to FP8 per token; codes and scales are those of the file.
The way back is `writing`, beside this module. Asymmetric weights, static scales of inputs and
blocks have no weight of ours and are refused (`schemes`).
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from ffnlab.errors import FormatError
from ffnlab.formats.compressed_tensors.packing import int4_codes, int8_codes, turn
from ffnlab.formats.compressed_tensors.schemes import PACKED, Scheme, Schemes, read_schemes
from ffnlab.formats.huggingface.plan import Packed
from ffnlab.formats.safetensors import Checkpoint, TensorInfo
from ffnlab.formats.stream import is_finite
from ffnlab.formats.untrusted import quoted
from ffnlab.weights import Float8, Int4, Int8, Weight

__all__ = ["Reading", "decoder"]

E4M3 = np.dtype(jnp.float8_e4m3fn)
SCALES = tuple(np.dtype(d) for d in (np.float32, jnp.bfloat16, np.float16))


def decoder(quantization: object, where: str = "config.json") -> "Reading":
    """The reader of a checkpoint's quantized linear maps, for `ffnlab.formats.huggingface.plan`.

    Args:
      quantization: the parsed `quantization_config`.
      where: file name for messages.
    Raises:
      ConfigError: it asks for what no weight of ours is, or is malformed.
    """
    return Reading(read_schemes(quantization, where))


@dataclasses.dataclass(frozen=True)
class Reading:
    """Recognizes the quantized linear maps of one checkpoint.

    Attributes:
      schemes: what its config says.
    """

    schemes: Schemes

    def __call__(
        self, checkpoint: Checkpoint, name: str, rows: int, columns: tuple[int, ...]
    ) -> Packed | None:
        """See `ffnlab.formats.huggingface.plan.Decode`."""
        scheme = self.schemes.of(name)
        if scheme is None:
            return None
        item = _Map(checkpoint, name, scheme, rows, columns)
        problems = tuple(item.problems())
        names = frozenset(f"{name}.{end}" for end in item.layout) & set(checkpoint.tensors)
        return Packed(names, problems, scheme, item.build)


class _Map:
    """One quantized linear map of a checkpoint."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        name: str,
        scheme: Scheme,
        rows: int,
        columns: tuple[int, ...],
    ):
        self.checkpoint, self.name, self.scheme = checkpoint, name, scheme
        self.rows, self.columns = rows, columns
        self.layout = _layout(scheme, rows, sum(columns))

    def _info(self, end: str) -> TensorInfo | None:
        return self.checkpoint.tensors.get(f"{self.name}.{end}")

    def problems(self) -> list[str]:
        """What is wrong with its tensors."""
        found, group = [], self.scheme.group
        for end, (dtypes, shapes) in self.layout.items():
            info = self._info(end)
            if info is None:
                found.append(f"{end} is missing, {self._said()}")
            elif info.dtype not in dtypes:
                known = " or ".join(str(dtype) for dtype in dtypes)
                found.append(f"{end} is {info.dtype}; {known} is accepted {self._said()}")
            elif info.shape not in shapes:
                found.append(f"{end} has shape {list(info.shape)}, {self._said()} {shapes[0]}")
            elif end == "weight_shape":
                found += self._shape_problems()
        if group is not None and self.rows % group:
            found.append(f"group_size={group} does not divide its {self.rows} inputs")
        if group is not None and self.scheme.bits == 4 and group % 2:
            found.append(f"group_size={group}: even groups of INT4 codes are accepted")
        return found

    def _said(self) -> str:
        """The scheme in words."""
        scheme = self.scheme
        shared = f"groups of {scheme.group}" if scheme.group else f"one scale per {scheme.strategy}"
        return f"for {scheme.format} {scheme.type}{scheme.bits} with {shared}:"

    def _shape_problems(self) -> list[str]:
        told = self.checkpoint.read(f"{self.name}.weight_shape").tolist()
        wanted = [sum(self.columns), self.rows]
        return [] if told == wanted else [f"weight_shape says {told}, config.json {wanted}"]

    def build(self, check_finite: bool = True) -> list[Weight]:
        """Reads the tensors and makes a weight for each part.

        Raises:
          FormatError: a NaN or infinity, or a code out of range.
        """
        codes = self._codes(check_finite)
        scales = self.checkpoint.read(f"{self.name}.weight_scale")
        if check_finite and not is_finite(scales):
            self._refuse("weight_scale", "holds NaN or infinity")
        if scales.dtype == np.float16 or self.scheme.type == "float":
            scales = scales.astype(np.float32)
        if self.scheme.strategy == "tensor":
            scales = np.broadcast_to(scales.reshape(1, 1), (sum(self.columns), 1))
        scales = scales.reshape(sum(self.columns), -1)
        ends = np.cumsum(self.columns)
        spans = zip(ends - self.columns, ends, strict=True)
        return [self._weight(codes[a:b], turn(scales[a:b])) for a, b in spans]

    def _codes(self, check_finite: bool) -> np.ndarray:
        end = next(iter(self.layout))
        codes = self.checkpoint.read(f"{self.name}.{end}")
        if codes.dtype == E4M3 and check_finite and ((codes.view(np.uint8) & 0x7F) == 0x7F).any():
            self._refuse(end, "holds NaN")
        if codes.dtype == np.int8 and self.scheme.bits == 4 and (codes + 8 & ~15).any():
            self._refuse(end, "holds codes outside -8..7")
        return codes

    def _refuse(self, end: str, what: str) -> None:
        info = self.checkpoint.tensors[f"{self.name}.{end}"]
        raise FormatError(f"{info.file}: tensor {quoted(info.name)} {what}")

    def _weight(self, codes: np.ndarray, scales: np.ndarray) -> Weight:
        """The weight of rows [out, …] of codes and scales [groups, out]; its leaves are NumPy's."""
        scheme, group = self.scheme, self.scheme.rows_per_scale(self.rows)
        if scheme.type == "float":
            turned = turn(codes.view(np.uint8)).view(E4M3)
            return _checked(lambda c, s: Float8(c, s, scheme.act), turned, scales)
        if scheme.bits == 8:
            packed = scheme.format == PACKED
            turned = int8_codes(codes, self.rows) if packed else turn(codes)
            return _checked(lambda c, s: Int8(c, s, group, scheme.act), turned, scales)
        if scheme.format != PACKED:
            pairs = np.pad(codes, ((0, 0), (0, self.rows % 2))).view(np.uint8) & 0x0F
            nibbles = turn(pairs[:, ::2] | pairs[:, 1::2] << 4)
        else:
            nibbles = int4_codes(codes, self.rows, group * len(scales))
        divisor = np.ones((), np.float32)
        return _checked(
            lambda c, s, d: Int4(c, s, d, group=group, rows=self.rows, act=scheme.act),
            nibbles,
            scales,
            divisor,
        )


def _checked(make: Callable[..., Weight], *leaves: np.ndarray) -> Weight:
    """`make(*leaves)` with its checks run on the shapes alone, so that nothing is placed yet."""
    abstract = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    tree = jax.tree.structure(jax.eval_shape(make, *abstract))
    return jax.tree.unflatten(tree, leaves)


def _layout(
    scheme: Scheme, rows: int, columns: int
) -> Mapping[str, tuple[tuple[np.dtype, ...], list[tuple[int, ...]]]]:
    """Accepted dtypes and shapes of the tensors of a map, by the end of their names; codes first.

    Args:
      scheme: of the map.
      rows: `in`.
      columns: `out`.
    """
    groups = 1 if scheme.group is None else -(-rows // scheme.group)
    shapes = {"tensor": [(1,), (), (1, 1)], "channel": [(columns, 1), (columns,)]}
    scales = (SCALES, shapes.get(scheme.strategy, [(columns, groups)]))
    if scheme.format != PACKED:
        dtype = E4M3 if scheme.type == "float" else np.dtype(np.int8)
        return {"weight": ((dtype,), [(columns, rows)]), "weight_scale": scales}
    words = -(-rows * scheme.bits // 32)
    integers = (np.dtype(np.int64), np.dtype(np.int32))
    return {
        "weight_packed": ((np.dtype(np.int32),), [(columns, words)]),
        "weight_scale": scales,
        "weight_shape": (integers, [(2,)]),
    }
