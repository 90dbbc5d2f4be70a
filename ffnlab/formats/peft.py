"""Low-rank updates as directories of the PEFT package: a config and safetensors.

    w + s B A,   s = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora

A is [r, in] and B [out, r] there; here `LoRA` has a = Aᵀ and b = Bᵀ. Modules are named as the
Hugging Face family of the model names them, or by our paths with dots. One update of a fused map
(Phi-3's qkv_proj) is one of each of its parts, with the same a; on the way out updates of the
parts become one with all their ranks, which is exact.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ffnlab import tree
from ffnlab.errors import ConfigError, FormatError, SelectionError
from ffnlab.formats.huggingface.dialects import dialect_of
from ffnlab.formats.safetensors import Checkpoint, entry, open_file, write_file
from ffnlab.formats.stream import is_finite
from ffnlab.formats.untrusted import inside, quoted, read_json
from ffnlab.layers import Linear
from ffnlab.models import Decoder, Encoder
from ffnlab.models.stack import in_list, unstack
from ffnlab.storage.files import StrPath, atomic_dir, write_json
from ffnlab.weights import LoRA

__all__ = ["load_adapter", "save_adapter"]

Number = int | float
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
SHOWN = 10
# What a config may ask for that a low-rank update alone is not: key -> values that ask for nothing.
NOTHING: Mapping[str, tuple] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "megatron_config": (None, {}),
    "trainable_token_indices": (None, [], {}),
    "use_qalora": (False, None),
}
TENSOR = re.compile(r"(.+)\.lora_(A|B)(?:\.default)?\.weight")


def load_adapter(model: Any, directory: StrPath) -> Any:
    """The model with the low-rank updates of a directory around its matrices.

    Args:
      model: the base, stacked or not, its matrices in any format.
      directory: as PEFT writes it for LoRA, rsLoRA included.
    Returns:
      a new model; `models.adapters.TRAINS["lora"]` selects what trains.
    Raises:
      FormatError: files that are missing, damaged or hostile; another method than LoRA, DoRA among
        them, or parts beside the updates.
      ConfigError: an adapter of another base: modules that the model has not, or other sizes; all
        are named at once. Or a model that has updates already.
    """
    directory = Path(directory)
    config = read_config(directory)
    checkpoint = open_file(inside(directory, TENSORS))
    pairs = paired(checkpoint)

    def change(model: Any) -> Any:
        linears = tree.select(model, tree.of_type(Linear))
        names = {dotted(path): (path,) for path in linears} | modules(model, linears)
        check_fit(checkpoint, pairs, names, linears)
        new = {}
        for module, (a_name, b_name) in pairs.items():
            a, b = (finite(checkpoint, name) for name in (a_name, b_name))
            paths, start = names[module], 0
            for path in paths:
                base = linears[path].weight
                part = b[start : start + base.shape[1]]
                start += base.shape[1]
                alpha = scale_of(config, module, len(a)) * len(a)
                update = LoRA(base, jnp.asarray(a.T), jnp.asarray(part.T), alpha)
                new[path] = linears[path].replace(update)
        return tree.replace(model, new)

    return in_list(model, change)


def save_adapter(model: Any, directory: StrPath, *, base: str | None = None) -> None:
    """Writes the low-rank updates of a model as PEFT reads them; the directory is whole or absent.

    Args:
      model: stacked or not.
      directory: where to; replaced if it is there.
      base: what `base_model_name_or_path` is to say.
    Raises:
      SelectionError: the model has none.
    """
    model = unstack(model)
    linears = tree.select(model, tree.of_type(Linear))
    updates = {p: m.weight for p, m in linears.items() if isinstance(m.weight, LoRA)}
    if not updates:
        raise SelectionError("no Linear of the model has a low-rank update (weights.LoRA)")
    names = modules(model, linears)
    whole = {m: paths for m, paths in names.items() if any(path in updates for path in paths)}
    arrays, ranks, alphas = {}, {}, {}
    for module, paths in whole.items():
        a, b, alphas[module] = joined([updates.get(path) for path in paths], paths, linears)
        ranks[module] = len(a)
        arrays[f"{PREFIX}{module}.lora_A.weight"] = entry(a)
        arrays[f"{PREFIX}{module}.lora_B.weight"] = entry(b)
    rank, alpha = Counter((ranks[m], alphas[m]) for m in whole).most_common(1)[0][0]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if isinstance(model, Decoder) else "FEATURE_EXTRACTION",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {m: r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {m: x for m, x in alphas.items() if x != alpha},
        "target_modules": targets(whole, names),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
    }
    with atomic_dir(directory) as folder:
        write_json(folder / CONFIG, config)
        write_file(folder / TENSORS, arrays)


def read_config(directory: Path) -> dict[str, Any]:
    """adapter_config.json, checked: a LoRA and nothing beside it."""
    file = inside(directory, CONFIG)
    found = read_json(file)
    if not isinstance(found, dict):
        raise FormatError(f"{file}: {type(found).__name__} instead of an object")
    if found.get("peft_type") != "LORA":
        raise FormatError(f"{file}: peft_type is {quoted(found.get('peft_type'))}; LORA is read")
    for key, nothing in NOTHING.items():
        if found.get(key) not in nothing:
            name = "DoRA (use_dora)" if key == "use_dora" else key
            raise FormatError(f"{file}: {name} is {quoted(found[key])}, which is not read")
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = found.setdefault(key, {}) or {}
        if not isinstance(pattern, dict) or not all(is_positive(v) for v in pattern.values()):
            raise FormatError(f"{file}: {key} must map modules to positive numbers")
        found[key] = pattern
    for key in ("r", "lora_alpha"):
        if not is_positive(found.get(key)):
            raise FormatError(f"{file}: {key} is {quoted(found.get(key))}, no positive number")
    if not isinstance(found.setdefault("use_rslora", False), bool):
        raise FormatError(f"{file}: use_rslora is {quoted(found['use_rslora'])}")
    return found


def is_positive(value: object) -> bool:
    """Whether a JSON value is a finite number above 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e9


def paired(checkpoint: Checkpoint) -> dict[str, tuple[str, str]]:
    """The tensors A and B of every module; FormatError where there is anything else."""
    halves: dict[str, dict[str, str]] = {}
    strange = []
    for name in checkpoint.tensors:
        found = TENSOR.fullmatch(name.removeprefix(PREFIX))
        if found is None or found[2] in halves.get(found[1], {}):
            strange.append(name)
        else:
            halves.setdefault(found[1], {})[found[2]] = name
    dora = [name for name in strange if "lora_magnitude_vector" in name]
    if strange:
        what = "DoRA's magnitudes" if dora else "tensors that are no low-rank update"
        listed = ", ".join(quoted(name) for name in (dora or strange)[:SHOWN])
        raise FormatError(f"{checkpoint.origin}: {what}: {listed}")
    alone = [module for module, both in halves.items() if len(both) != 2]
    if alone or not halves:
        listed = ", ".join(map(quoted, alone[:SHOWN])) or "no module"
        raise FormatError(f"{checkpoint.origin}: {listed} has not both lora_A and lora_B")
    return {module: (both["A"], both["B"]) for module, both in halves.items()}


def modules(model: Any, linears: Mapping[str, Linear]) -> dict[str, tuple[str, ...]]:
    """The linear maps by the name of their module: the family's, else our paths with dots."""
    found: dict[str, tuple[str, ...]] = {}
    has_family = isinstance(model, Decoder | Encoder)
    names = dialect_of(model.config).names(model.config) if has_family else None
    for path in linears:
        place = None if names is None else names.place(f"{path}.w")
        if place is None:
            found[dotted(path)] = (path,)
        else:
            parts = tuple(part.removesuffix(".w") for part in place.paths)
            found[place.name.removesuffix(".weight")] = parts
    return found


def dotted(path: str) -> str:
    """
    >>> dotted("layers[3].attn.q")
    'layers.3.attn.q'
    """
    return re.sub(r"\[(\d+)\]", r".\1", path)


def check_fit(
    checkpoint: Checkpoint,
    pairs: Mapping[str, tuple[str, str]],
    names: Mapping[str, tuple[str, ...]],
    linears: Mapping[str, Linear],
) -> None:
    """Raises ConfigError unless every update fits a map of the model that has none."""
    problems = []
    seen: Counter[str] = Counter()
    for module, (a_name, b_name) in pairs.items():
        if module not in names:
            problems.append(f"{quoted(module)} is no linear map of the model")
            continue
        a, b = checkpoint.tensors[a_name].shape, checkpoint.tensors[b_name].shape
        shapes = [linears[path].weight.shape for path in names[module]]
        wanted = shapes[0][0], sum(shape[1] for shape in shapes)
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or (a[1], b[0]) != wanted:
            problems.append(f"{quoted(module)} has A {a}, B {b}; the map is [in, out] = {wanted}")
        seen.update(names[module])
        there = [p for p in names[module] if isinstance(linears[p].weight, LoRA)]
        problems += [f"{path} has an update already; merge it first" for path in there]
    problems += [f"{path} has two updates" for path, n in seen.items() if n > 1]
    if problems:
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        listed = "\n  ".join(problems[:SHOWN])
        raise ConfigError(f"{checkpoint.origin} is an adapter of another base:\n  {listed}{more}")


def finite(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """One tensor in float32; FormatError unless it is made of numbers."""
    array = checkpoint.read(name)
    if not jnp.issubdtype(array.dtype, jnp.floating) or not is_finite(array):
        raise FormatError(f"{checkpoint.origin}: {quoted(name)} is not made of finite floats")
    return array.astype(np.float32)


def scale_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """What an update is multiplied by."""
    alpha = pattern_of(config["alpha_pattern"], module, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def pattern_of(pattern: Mapping[str, Number], module: str, default: Number) -> Number:
    """The entry of a pattern that names a module, by its whole name or the end of it.

    PEFT takes regular expressions; names are what it writes, and all that is read here.
    """
    for name, value in pattern.items():
        plain = name.removeprefix("^").replace("\\.", ".")
        if module == plain or (not name.startswith("^") and module.endswith(f".{plain}")):
            return value
    return default


def joined(
    updates: list[LoRA | None], paths: tuple[str, ...], linears: Mapping[str, Linear]
) -> tuple[np.ndarray, np.ndarray, float]:
    """(A, B, alpha) of a module from the updates of its parts."""
    if len(updates) == 1 and updates[0] is not None:
        only = updates[0]
        return wide(only.a.T), wide(only.b.T), float(only.alpha)
    there = [update for update in updates if update is not None]
    a = np.concatenate([wide(update.a.T) for update in there])
    b = np.zeros((sum(linears[p].weight.shape[1] for p in paths), len(a)), np.float32)
    row = column = 0
    for path, update in zip(paths, updates, strict=True):
        height = linears[path].weight.shape[1]
        if update is not None:
            width = update.a.shape[-1]
            b[row : row + height, column : column + width] = update.scale * wide(update.b.T)
            column += width
        row += height
    return a, b, float(len(a))


def wide(array: jax.Array) -> np.ndarray:
    """An array as float32, contiguous."""
    return np.ascontiguousarray(np.asarray(array, np.float32))


def targets(chosen: Mapping[str, object], names: Mapping[str, object]) -> list[str]:
    """`target_modules`: ends of names where they say exactly what is chosen, else whole names."""
    ends = sorted({name.rpartition(".")[2] for name in chosen})

    def meant() -> Iterator[str]:
        return (n for n in names if n.rpartition(".")[2] in ends)

    return ends if set(meant()) == set(chosen) else sorted(chosen)
