"""The content of `ffnlab.json`, version 1, and the checks a file from elsewhere has to pass."""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ffnlab.errors import FormatError
from ffnlab.formats.huggingface.dialects import Config
from ffnlab.formats.untrusted import quoted
from ffnlab.models.config import DecoderConfig
from ffnlab.models.encoder_config import EncoderConfig

VERSION = 1
SCALE_DTYPES = ("float32", "bfloat16", "float8_e4m3fn")
BLOCKS_LIMIT = 1024
EXPERTS_LIMIT = 2**14
FLOAT32_MAX = float(np.finfo(np.float32).max)
OUTER = ("head", "pooler", "transform.dense")  # linear maps outside the blocks
_LINEAR = re.compile(
    r"head|pooler|transform\.dense|layers\[(?P<layer>0|[1-9][0-9]{0,3})\]\."
    r"(attn\.[qkvo]|ffn\.(gate|up|down)|ffn\.(?P<routed>router|experts\.(gate|up|down)))"
)


@dataclasses.dataclass(frozen=True)
class BlockExtra:
    """Runtime parts of one block.

    Attributes:
      kv_format: None, "float8" or "int4".
      query_format: None or "e4m3".
      post_scale: [kv_heads][head_dim] positive numbers, or None.
      threshold: [hidden] numbers of a SparseGatedFFN, infinity included, or None.
      strict: its rule, keep where |a| > threshold (True) or >= (False).
    """

    kv_format: str | None = None
    query_format: str | None = None
    post_scale: tuple[tuple[float, ...], ...] | None = None
    threshold: tuple[float, ...] | None = None
    strict: bool = True


@dataclasses.dataclass(frozen=True)
class ScalesExtra:
    """The form of the scales of an INT4 or INT8 weight, where the tensors hold them in another.

    Attributes:
      group: rows that share a scale.
      dtype: of the scales, one of `SCALE_DTYPES`.
      divisor: that of an INT4 weight, of a mixture's where they differ one of each expert; the
        stored scales are already divided by it.
    """

    group: int
    dtype: str
    divisor: float | tuple[float, ...] = 1.0


@dataclasses.dataclass(frozen=True)
class LinearExtra:
    """Runtime parts of one linear map.

    Attributes:
      act: None or "e4m3".
      input_threshold: inputs of at most this magnitude count as 0; None for no threshold.
      stored: class name of the weight's format where it is not the usual dense one; informative.
      scales: their form, of a map that is quantized in the tensors; None for that of the tensors.
    """

    act: str | None = None
    input_threshold: float | None = None
    stored: str | None = None
    scales: ScalesExtra | None = None


@dataclasses.dataclass(frozen=True)
class Sidecar:
    """What `ffnlab.json` says.

    Attributes:
      blocks: number of blocks of the model, those that lost both sublayers included.
      windows: sliding window of each block, as in `DecoderConfig`.
      removed: units of removed sublayers (`ffnlab.models.remove`), ascending.
      by_block: runtime parts by block number.
      linears: runtime parts by path.
      whole: a block that lost all its sublayers still does something (its norms stand after the
        sums): follows from the config, and is not in the file.
    """

    blocks: int
    windows: tuple[int | None, ...] | None
    removed: tuple[int, ...]
    by_block: Mapping[int, BlockExtra]
    linears: Mapping[str, LinearExtra]
    whole: bool = False

    @property
    def kept(self) -> tuple[int, ...]:
        """Blocks that have a place in the Hugging Face files: all but those that do nothing.

        One block is always there: without any, the first is written and does nothing.
        """
        if self.whole:
            return tuple(range(self.blocks))
        gone = set(self.removed)
        left = (i for i in range(self.blocks) if not {2 * i, 2 * i + 1} <= gone)
        return tuple(left) or (0,)

    @property
    def is_needed(self) -> bool:
        """Whether there is anything that the other files do not say."""
        return bool(self.removed or self.by_block or self.linears)


def keeps_empty_blocks(config: Config) -> bool:
    """Whether a block that lost all its sublayers still does something: `Sidecar.whole`."""
    return isinstance(config, EncoderConfig) and config.norm == "after"


def parse(raw: object, config: Config, file: Path) -> Sidecar:
    """Checks the parsed JSON of a sidecar.

    Args:
      raw: parsed JSON.
      config: what config.json says; its blocks are the kept ones.
      file: for messages.
    Raises:
      FormatError: an unknown key, a value of the wrong kind, or a contradiction with the config.
    """
    keys = {"format", "version", "blocks", "windows", "removed", "by_block", "linears"}
    top = _object(raw, keys, str(file))
    if top.get("format") != "ffnlab" or top.get("version") != VERSION:
        raise FormatError(
            f"{file}: format {quoted(top.get('format'))}, version {quoted(top.get('version'))}; "
            f"'ffnlab' and {VERSION} are accepted"
        )
    blocks = _count(top.get("blocks"), BLOCKS_LIMIT + 1, f"{file}: blocks")
    removed = _list(top.get("removed"), f"{file}: removed")
    units = tuple(_count(unit, 2 * blocks, f"{file}: removed") for unit in removed)
    if list(units) != sorted(set(units)):
        raise FormatError(f"{file}: removed is not ascending")
    by_block = {
        _block_number(key, blocks, file): _block(value, config, f"{file}: by_block {quoted(key)}")
        for key, value in _mapping(top.get("by_block"), f"{file}: by_block").items()
    }
    routed = getattr(config, "mixture", None) is not None
    linears = {
        _path(key, blocks, routed, file): _linear(value, f"{file}: {quoted(key)}")
        for key, value in _mapping(top.get("linears"), f"{file}: linears").items()
    }
    windows = _windows(top.get("windows"), blocks, f"{file}: windows")
    extra = Sidecar(blocks, windows, units, by_block, linears, keeps_empty_blocks(config))
    _check_config(extra, config, file)
    return extra


def _check_config(extra: Sidecar, config: Config, file: Path) -> None:
    if len(extra.kept) != config.layers:
        raise FormatError(
            f"{file}: {len(extra.kept)} blocks are left, config.json has {config.layers}"
        )
    ours = [None if extra.windows is None else extra.windows[i] for i in extra.kept]
    windows = config.windows if isinstance(config, DecoderConfig) else None
    if ours != list(windows or (None,) * config.layers):
        raise FormatError(f"{file}: windows contradict config.json")


def _object(raw: object, keys: set[str], where: str) -> Mapping[str, object]:
    found = _mapping(raw, where)
    unknown = sorted(set(found) - keys)
    if unknown:
        raise FormatError(f"{where}: unknown key {quoted(unknown[0])}; {sorted(keys)} are accepted")
    return found


def _mapping(raw: object, where: str) -> Mapping[str, object]:
    if not isinstance(raw, dict):
        raise FormatError(f"{where}: must be an object, got {quoted(raw)}")
    return raw


def _list(raw: object, where: str) -> list:
    if not isinstance(raw, list):
        raise FormatError(f"{where}: must be a list, got {quoted(raw)}")
    return raw


def _count(raw: object, limit: int, where: str) -> int:
    if not isinstance(raw, int) or isinstance(raw, bool) or not 0 <= raw < limit:
        raise FormatError(f"{where}: {quoted(raw)} is not an integer in 0..{limit - 1}")
    return raw


def _number(raw: object, where: str) -> float:
    value = {"inf": math.inf, "-inf": -math.inf}.get(raw, raw) if isinstance(raw, str) else raw
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise FormatError(f"{where}: {quoted(raw)} is not a number")
    if FLOAT32_MAX < abs(value) < math.inf:
        raise FormatError(f"{where}: {quoted(raw)} does not fit float32")
    return float(value)


def _word(raw: object, accepted: tuple[str | None, ...], where: str) -> str | None:
    if raw is not None and (not isinstance(raw, str) or raw not in accepted):
        raise FormatError(f"{where}: {quoted(raw)} is not one of {accepted}")
    return raw


def _block_number(key: str, blocks: int, file: Path) -> int:
    if not re.fullmatch(r"0|[1-9][0-9]{0,3}", key) or int(key) >= blocks:
        raise FormatError(f"{file}: by_block {quoted(key)} is not a block in 0..{blocks - 1}")
    return int(key)


def _path(key: str, blocks: int, routed: bool, file: Path) -> str:
    found = _LINEAR.fullmatch(key)
    is_there = found is not None and int(found["layer"] or 0) <= blocks - bool(found["layer"])
    if not is_there or (found["routed"] and not routed):
        raise FormatError(f"{file}: {quoted(key)} is not the path of a linear map")
    return key


def _windows(raw: object, blocks: int, where: str) -> tuple[int | None, ...] | None:
    if raw is None:
        return None
    found = _list(raw, where)
    if len(found) != blocks:
        raise FormatError(f"{where}: {len(found)} entries for {blocks} blocks")
    return tuple(None if w is None else _count(w, 2**31, where) for w in found)


def _block(raw: object, config: Config, where: str) -> BlockExtra:
    found = _object(raw, {field.name for field in dataclasses.fields(BlockExtra)}, where)
    strict, scale, threshold = found.get("strict", True), None, None
    if not isinstance(strict, bool):
        raise FormatError(f"{where}: strict must be true or false, got {quoted(strict)}")
    if found.get("post_scale") is not None:
        heads = config.kv_heads if isinstance(config, DecoderConfig) else config.heads
        rows = _sized(found["post_scale"], heads, f"{where}: post_scale")
        scale = tuple(_numbers(row, config.head_dim, f"{where}: post_scale") for row in rows)
        if not all(0 < np.float32(value) < np.inf for row in scale for value in row):
            raise FormatError(f"{where}: post_scale holds a number that is not positive")
    if found.get("threshold") is not None:
        threshold = _numbers(found["threshold"], config.hidden, f"{where}: threshold")
    return BlockExtra(
        _word(found.get("kv_format"), ("float8", "int4"), f"{where}: kv_format"),
        _word(found.get("query_format"), ("e4m3",), f"{where}: query_format"),
        scale,
        threshold,
        strict,
    )


def _sized(raw: object, length: int, where: str) -> list:
    found = _list(raw, where)
    if len(found) != length:
        raise FormatError(f"{where}: {len(found)} entries, {length} are expected")
    return found


def _numbers(raw: object, length: int, where: str) -> tuple[float, ...]:
    return tuple(_number(value, where) for value in _sized(raw, length, where))


def _linear(raw: object, where: str) -> LinearExtra:
    found = _object(raw, {field.name for field in dataclasses.fields(LinearExtra)}, where)
    threshold, stored = found.get("input_threshold"), found.get("stored")
    if stored is not None and (not isinstance(stored, str) or len(stored) > 100):
        raise FormatError(f"{where}: stored must be a short name, got {quoted(stored)}")
    return LinearExtra(
        _word(found.get("act"), ("e4m3",), f"{where}: act"),
        None if threshold is None else _number(threshold, f"{where}: input_threshold"),
        stored,
        None if found.get("scales") is None else _scales(found["scales"], f"{where}: scales"),
    )


def _scales(raw: object, where: str) -> ScalesExtra:
    found = _object(raw, {field.name for field in dataclasses.fields(ScalesExtra)}, where)
    dtype = found.get("dtype")
    if not isinstance(dtype, str) or dtype not in SCALE_DTYPES:
        raise FormatError(f"{where}: dtype {quoted(dtype)} is not one of {SCALE_DTYPES}")
    group = _count(found.get("group"), 2**31, f"{where}: group")
    raw_divisor = found.get("divisor", 1.0)
    given = raw_divisor if isinstance(raw_divisor, list) else [raw_divisor]
    divisors = tuple(_number(value, f"{where}: divisor") for value in given[:EXPERTS_LIMIT])
    if not group or not all(0 < np.float32(value) < np.inf for value in divisors):
        raise FormatError(
            f"{where}: group {group}, divisor {quoted(raw_divisor)}: positive ones are accepted"
        )
    return ScalesExtra(group, dtype, divisors if isinstance(raw_divisor, list) else divisors[0])
