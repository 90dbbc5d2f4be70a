"""The `quantization_config` of compressed-tensors: which linear map is quantized how.

A config lists groups; each says how its `targets` (names, `re:` patterns, or the class "Linear")
are quantized, and `ignore` lists those that are not, whatever the targets say. What is accepted is
what `Int4`, `Int8` and `Float8` can be: symmetric static weights, inputs as they are or rounded to
e4m3 per token; all that is not is told at once.

What differs from the package: a pattern that could take a backtracking matcher long is refused.
"""

import dataclasses
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence

from ffnlab.errors import ConfigError
from ffnlab.formats.untrusted import quoted

METHOD = "compressed-tensors"
PACKED = "pack-quantized"
FORMATS = {  # format -> types of weights that it stores
    PACKED: ("int",),
    "int-quantized": ("int",),
    "float-quantized": ("float",),
    "naive-quantized": ("int", "float"),
}
CLASSES = ("Linear", "Module")
GROUP_LIMIT = 2**20
NAMES_LIMIT = 100_000
GROUPS_LIMIT = 256  # every linear map is looked up in each
# Ways to match a name, summed over all patterns: a name takes 1 ms at most (measured).
PATTERN_COST = 2**16
NAME = 64  # characters; the names of our families have fewer
ARGS = frozenset(
    "num_bits type symmetric group_size strategy block_structure dynamic actorder scale_dtype "
    "zp_dtype observer observer_kwargs".split()
)
ABSENT = ("kv_cache_scheme", "moe_sparsity_config", "sparsity_config", "transform_config")
GROUP_KEYS = frozenset("targets weights input_activations output_activations format".split())


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How a linear map is quantized.

    Attributes:
      format: a key of `FORMATS`.
      type: "int" or "float" (e4m3).
      bits: of a code, 4 or 8.
      strategy: what shares a scale: "group" (of inputs of one output), "channel" (an output) or
        "tensor" (all).
      group: inputs that share a scale; None unless the strategy is "group".
      act: None, or "e4m3": inputs are rounded to e4m3, one scale per token.
    """

    format: str
    type: str
    bits: int
    strategy: str
    group: int | None = None
    act: str | None = None

    def rows_per_scale(self, rows: int) -> int:
        """Rows of a weight of this many rows that share a scale; groups of INT4 are even."""
        if self.group is not None:
            return self.group
        return rows + rows % 2 if self.bits == 4 else rows

    def as_json(self, targets: Sequence[str]) -> dict[str, object]:
        """The config group of these targets."""
        weights = {
            "num_bits": self.bits,
            "type": self.type,
            "symmetric": True,
            "strategy": self.strategy,
            "group_size": self.group,
            "dynamic": False,
        }
        inputs = {
            "num_bits": 8,
            "type": "float",
            "symmetric": True,
            "strategy": "token",
            "group_size": None,
            "dynamic": True,
        }
        return {
            "targets": list(targets),
            "format": self.format,
            "weights": weights,
            "input_activations": None if self.act is None else inputs,
            "output_activations": None,
        }


def write_schemes(maps: Mapping[str, Scheme | None]) -> dict[str, object]:
    """The `quantization_config` of a checkpoint.

    Args:
      maps: the scheme of every linear map by name; None for the dense ones.
    """
    groups: dict[Scheme, list[str]] = {}
    for name, scheme in maps.items():
        if scheme is not None:
            groups.setdefault(scheme, []).append(name)
    named = groups if len(groups) > 1 else {scheme: ["Linear"] for scheme in groups}
    formats = {scheme.format for scheme in groups}
    return {
        "quant_method": METHOD,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": scheme.as_json(targets)
            for i, (scheme, targets) in enumerate(named.items())
        },
        "ignore": [name for name, scheme in maps.items() if scheme is None],
    }


@dataclasses.dataclass(frozen=True)
class Names:
    """A list of targets, ready to be looked up.

    Attributes:
      exact: names and classes.
      patterns: compiled, each matched from the beginning of a name.
    """

    exact: frozenset[str]
    patterns: tuple[re.Pattern[str], ...]

    def rank(self, name: str) -> int | None:
        """How a linear map is named: 0 itself, 1 by a pattern, 2 by its class, None not at all."""
        if name in self.exact:
            return 0
        if any(pattern.match(name) for pattern in self.patterns):
            return 1
        return None if self.exact.isdisjoint(CLASSES) else 2


@dataclasses.dataclass(frozen=True)
class Schemes:
    """A `quantization_config` that has been checked.

    Attributes:
      groups: targets and how they are quantized, in the order of the config.
      ignore: what is dense.
    """

    groups: tuple[tuple[Names, Scheme], ...]
    ignore: Names

    def of(self, name: str) -> Scheme | None:
        """The scheme of a linear map, None if it is dense.

        The first group that has its name wins, else the first with a pattern for it, else the
        first for its class.
        """
        if self.ignore.rank(name) is not None:
            return None
        ranked = [(names.rank(name), scheme) for names, scheme in self.groups]
        found = [(rank, scheme) for rank, scheme in ranked if rank is not None]
        return min(found, key=lambda item: item[0])[1] if found else None


def read_schemes(raw: object, where: str) -> Schemes:
    """Checks the parsed `quantization_config` of a config.json.

    Args:
      raw: parsed JSON.
      where: file name for the message.
    Raises:
      ConfigError: what it asks for is malformed or unsupported; everything is named.
    """
    reader = _Reader()
    schemes = reader.schemes(raw if isinstance(raw, dict) else {})
    if reader.problems:
        shown = reader.problems[:10] + ["…"] * (len(reader.problems) > 10)
        raise ConfigError(f"{where}: quantization_config: " + "; ".join(shown))
    return schemes


class _Reader:
    """Reads a config, noting what is wrong."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.names, self.cost = 0, 0

    def note(self, where: str, value: object, accepted: str) -> None:
        """Notes that a value is not acceptable."""
        self.problems.append(f"{where}={quoted(value)}: {accepted} is accepted")

    def schemes(self, raw: Mapping[str, object]) -> Schemes:
        status = raw.get("quantization_status")
        if status not in (None, "compressed"):
            self.note("quantization_status", status, "'compressed'")
        for key in ABSENT:
            value = raw.get(key)
            is_dense = key.startswith("sparsity") and _get(value, "format") == "dense"
            if value and not is_dense:
                self.note(key, value, "none")
        groups = raw.get("config_groups")
        if not isinstance(groups, dict) or not 1 <= len(groups) <= GROUPS_LIMIT:
            self.note("config_groups", groups, f"an object with 1 to {GROUPS_LIMIT} groups")
            groups = {}
        found = [self.group(key, value, raw.get("format")) for key, value in groups.items()]
        ignore = raw.get("ignore")
        names = self.targets("ignore", [] if ignore is None else ignore)
        return Schemes(tuple(group for group in found if group is not None), names)

    def group(self, key: str, raw: object, usual: object) -> tuple[Names, Scheme] | None:
        where = f"config_groups[{quoted(key)}]"
        if not isinstance(raw, dict):
            self.note(where, raw, "an object")
            return None
        self.unknown(where, raw, GROUP_KEYS)
        if raw.get("output_activations") is not None:
            self.note(f"{where}.output_activations", raw["output_activations"], "none")
        names = self.targets(f"{where}.targets", raw.get("targets"))
        form = usual if raw.get("format") is None else raw["format"]
        act = self.act(f"{where}.input_activations", raw.get("input_activations"))
        scheme = self.weights(f"{where}.weights", raw.get("weights"), form, act)
        return None if scheme is None else (names, scheme)

    def weights(self, where: str, raw: object, form: object, act: str | None) -> Scheme | None:
        before = len(self.problems)
        args = self.args(where, raw)
        kind, bits = args["type"], args["num_bits"]
        if type(bits) is not int or (kind, bits) not in (("int", 4), ("int", 8), ("float", 8)):
            self.note(f"{where}: type and num_bits", (kind, bits), "int with 4 or 8, float with 8")
        if not isinstance(form, str) or kind not in FORMATS.get(form, ()):
            known = [name for name, kinds in FORMATS.items() if kind in kinds] or list(FORMATS)
            self.note(f"{where}: format", form, " or ".join(known))
        if args["dynamic"] is not False:
            self.note(f"{where}.dynamic", args["dynamic"], "false")
        if args["actorder"] not in (None, False, "weight", "static"):
            self.note(f"{where}.actorder", args["actorder"], "'weight' or none")
        accepted = ("group", "channel", "tensor") if kind == "int" else ("channel", "tensor")
        if args["strategy"] not in accepted:
            self.note(f"{where}.strategy", args["strategy"], " or ".join(accepted))
        group = args["group_size"] if args["strategy"] == "group" else None
        if args["strategy"] == "group" and not _is_count(group, GROUP_LIMIT):
            self.note(f"{where}.group_size", group, f"1 to {GROUP_LIMIT}")
        if len(self.problems) > before:
            return None
        return Scheme(form, kind, bits, args["strategy"], group, act)  # type: ignore[arg-type]

    def act(self, where: str, raw: object) -> str | None:
        if raw is None:
            return None
        args = self.args(where, raw)
        found = (args["type"], args["num_bits"], args["strategy"], args["dynamic"])
        if found != ("float", 8, "token", True):
            said = ", ".join(str(value) for value in found)
            self.note(where, said, "float with 8 bits, strategy token, dynamic (or none)")
        return "e4m3"

    def args(self, where: str, raw: object) -> dict[str, object]:
        """The arguments of one quantizer with the package's defaults."""
        if not isinstance(raw, dict):
            self.note(where, raw, "an object")
            raw = {}
        self.unknown(where, raw, ARGS)
        args = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False} | raw
        for key in ("type", "strategy", "actorder"):
            value = args.get(key)
            args[key] = value.lower() if isinstance(value, str) else value
        size = args.setdefault("group_size", None)
        if args["strategy"] is None:
            by_size: dict[object, str] = {None: "tensor", -1: "channel"}
            args["strategy"] = by_size.get(size, "group") if _is_plain(size) else size
        if args["symmetric"] is not True:
            self.note(f"{where}.symmetric", args["symmetric"], "true (no zero points)")
        return args

    def unknown(self, where: str, raw: Mapping[str, object], known: frozenset[str]) -> None:
        self.problems += [f"{where}: unknown key {quoted(key)}" for key in raw if key not in known]

    def targets(self, where: str, raw: object) -> Names:
        if not isinstance(raw, list) or not all(isinstance(item, str) for item in raw):
            self.note(where, raw, "a list of names")
            return Names(frozenset(), ())
        self.names += len(raw)
        if self.names > NAMES_LIMIT:
            self.note(where, f"{self.names} names", f"at most {NAMES_LIMIT} in all")
            return Names(frozenset(), ())
        patterns = tuple(self.patterns(where, raw))
        return Names(frozenset(item for item in raw if not item.startswith("re:")), patterns)

    def patterns(self, where: str, raw: list[str]) -> Iterator[re.Pattern[str]]:
        for item in raw:
            if not item.startswith("re:"):
                continue
            text = item.removeprefix("re:")
            self.cost += cost(text)
            if self.cost > PATTERN_COST:
                self.note(where, item, "a pattern of few and plain repetitions")
                return
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    yield re.compile(text)
            except (re.error, OverflowError, RecursionError, Warning):
                self.note(where, item, "a regular expression")


def cost(pattern: str) -> int:
    """An upper bound on the ways a backtracking matcher may try on a name of `NAME` characters.

    k loops share the characters of a name in C(n + k, k) ways at most; one over digits has at most
    four of them, the number of a layer or an expert. Each `|` and `?` doubles the ways. A last
    `.*` always matches, in one way. Every pattern counts for `NAME` at least.

    >>> cost(r".*self_attn\\.(q|k|v)_proj$"), cost(".?" * 25) > PATTERN_COST
    (324, True)
    """
    if re.search(r"\)[*+{]|\(\?(?!:)|\\[1-9]", pattern) or len(pattern) > 1000:
        return PATTERN_COST + 1
    pattern = re.sub(r"\.\*\$?$", "", pattern)
    pattern, numbers = re.subn(r"(\\d|\[0-9\])[*+]", "", pattern)
    loops, forks = len(re.findall(r"[*+{]", pattern)), len(re.findall(r"[|?]", pattern))
    if loops + forks + numbers > 40:
        return PATTERN_COST + 1
    return NAME + math.comb(NAME + loops, loops) * 5**numbers * 2**forks


def _is_count(value: object, limit: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= limit


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, int)


def _get(raw: object, key: str) -> object:
    return raw.get(key) if isinstance(raw, dict) else None
