"""Models into Hugging Face directories that stock tools load.

A block that lost both sublayers is left out and the config rewritten, unless norms stand after the
sums, where it still does something. A sublayer removed alone is written as zeros, which add
nothing. Weights in formats of ours are written as the dense matrices they stand for, or packed
(`ffnlab.formats.compressed_tensors`), and then such zeros are too. What the files cannot say goes
to `ffnlab.json`. `[in, out]` becomes `[out, in]` in `_stored`, and there.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ffnlab import tree
from ffnlab.errors import ConfigError, FormatError
from ffnlab.formats.compressed_tensors.schemes import Scheme
from ffnlab.formats.compressed_tensors.writing import Encoded, Encoder, extra_of_experts, scheme_of
from ffnlab.formats.directory import keep_others
from ffnlab.formats.huggingface import sidecar
from ffnlab.formats.huggingface.dialects import (
    Config,
    Model,
    dialect_of,
    read_config,
    write_config,
)
from ffnlab.formats.huggingface.finite import not_finite
from ffnlab.formats.huggingface.names import Place
from ffnlab.formats.huggingface.plan import variables
from ffnlab.formats.safetensors import Entry, write_directory
from ffnlab.formats.stream import is_finite
from ffnlab.layers import RMSNorm
from ffnlab.models.config import DecoderConfig
from ffnlab.models.encoder_config import EncoderConfig
from ffnlab.models.stack import unstack
from ffnlab.storage.files import StrPath, atomic_dir, write_json
from ffnlab.weights import Int4, SparseInput, Weight

W = TypeVar("W")
MAX_SHARD_BYTES = 5 * 10**9
IN_SIDECAR = (".ffn.threshold", ".attn.post_scale")
FORMATS = ("dense", "compressed-tensors")
NATIVE = 'format="ffnlab" writes any model of ours, for ffnlab alone'
LAYER = re.compile(r"layers\[(\d+)\]")


def save(
    model: Model,
    directory: StrPath,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    format: Literal["dense", "compressed-tensors"] = "dense",
) -> tuple[str, ...]:
    """Writes a model directory that `transformers` loads; `load` gives the same logits back.

    The directory appears as a whole, or stays as it was; files in it that are not of a model
    (a tokenizer, notes) are kept.

    Args:
      model: a list of blocks or stacked; all on this host.
      directory: where to.
      dtype: of all dense tensors, float32, bfloat16 or float16; when None, the widest that a part
        of the model has (a quantized matrix counts as float32: its values need it, unless packed).
      max_shard_bytes: size above which the tensors are split over several files.
      format: "dense", or "compressed-tensors" to pack Int4, Int8 and Float8 weights so that vLLM
        reads them.
    Returns:
      what tools that read only the Hugging Face files will not do, or may stumble on, one sentence
      each.
    Raises:
      ConfigError: the config's family has no words for the model, dtype is none of the three, the
        format is unknown, or there is nothing to pack.
      FormatError: the model holds a part that is neither a matrix nor in `ffnlab.json`, a number
        that is not finite in the dtype it is written in, or gives such numbers for one token.
    """
    if format not in FORMATS:
        raise ConfigError(f"format={format!r}; accepted: {', '.join(map(repr, FORMATS))}")
    encoder = Encoder() if format == "compressed-tensors" else None
    extra, writer = _writer(model, dtype, encoder)
    entries = {name: _checked(name, item) for name, item in writer.entries()}
    written = write_config(writer.config)
    written |= {"dtype": writer.dtype.name, "torch_dtype": writer.dtype.name}
    if encoder is None:
        _writer(model, dtype, asked := Encoder())
        notes = [f"{note} (as {writer.dtype})" for note in asked.dense()]
    else:
        extra = _without_packed(extra, writer)
        written["quantization_config"] = encoder.quantization_config
        notes = encoder.notes(writer.dtype)
    if isinstance(model.config, EncoderConfig):
        notes += _encoder_notes(model.config)
    with atomic_dir(directory) as temporary:
        keep_others(Path(directory), temporary)
        write_directory(temporary, entries, max_shard_bytes=max_shard_bytes)
        write_json(temporary / "config.json", written)
        for name, content in dialect_of(writer.config).beside(writer.config).items():
            if content is None:
                (temporary / name).unlink(missing_ok=True)
            else:
                write_json(temporary / name, content)
        if extra.is_needed:
            sidecar.write(temporary, extra)
            sidecar.read(temporary, read_config(written))
        _check_logits(model)
    return (*sidecar.sentences(extra), *notes)


def _checked(name: str, item: Entry) -> Entry:
    """The same tensor, refused when it is made if it holds what `load` refuses."""

    def make() -> np.ndarray:
        array = item.make()
        if jnp.issubdtype(array.dtype, jnp.floating) and not is_finite(array):
            raise FormatError(f"tensor {name} holds NaN or infinity as {array.dtype}")
        return array

    return dataclasses.replace(item, make=make)


def _encoder_notes(config: EncoderConfig) -> list[str]:
    """What `transformers` makes of an encoder beside what its files say."""
    if config.family == "bert" and config.head is None and config.pooler is None:
        return ["a pooler is not there: transformers draws a random one, unless told not to"]
    return []


def _check_logits(model: Model) -> None:
    """Raises FormatError for a model, on one device, that gives no number for one token."""
    leaves = [leaf for leaf in jax.tree.leaves(model) if isinstance(leaf, jax.Array)]
    where = not_finite(unstack(model)) if all(len(x.devices()) == 1 for x in leaves) else None
    if where is not None:
        raise FormatError(f"model: {where} gives NaN or infinity for one token")


def is_packable(model: Model) -> bool:
    """Whether format "compressed-tensors" of `save` has something of a model to pack.

    Raises:
      ConfigError, FormatError: as `save` does, in either format.
    """
    return bool(_writer(model, None, Encoder())[1].encoded)


def _writer(
    model: Model, dtype: jax.typing.DTypeLike | None, encoder: Encoder | None
) -> tuple[sidecar.Sidecar, "_Writer"]:
    """The sidecar of a model and the writer of its tensors."""
    model = unstack(model)
    extra = sidecar.extract(model)
    blocks = model.blocks()
    kept = [blocks[i] for i in extra.kept]
    ffns = dialect_of(model.config).ffns
    for i, block in zip(extra.kept, kept, strict=True):
        if block.ffn is not None and not isinstance(block.ffn, ffns):
            kind, known = type(block.ffn).__name__, ", ".join(ffn.__name__ for ffn in ffns)
            raise FormatError(
                f"layers[{i}].ffn is a {kind}; a {model.config.family} directory has {known}; "
                f"{NATIVE}"
            )
    parts = jax.tree.map(lambda leaf: leaf, model)
    parts.layers = nnx.List(kept)
    _check_eps(parts)
    return extra, _Writer(_kept_config(model, extra.kept), variables(parts), dtype, encoder)


def _check_eps(model: Model) -> None:
    """Raises FormatError for an RMS norm of another eps than the config says of all."""
    for path, node in tree.walk(model):
        if isinstance(node, RMSNorm) and node.eps != model.config.eps:
            raise FormatError(
                f"{path} has eps={node.eps}, and a {model.config.family} directory says "
                f"{model.config.eps} of every norm; {NATIVE}"
            )


def _kept_config(model: Model, kept: tuple[int, ...]) -> Config:
    config = model.config
    if not isinstance(config, DecoderConfig):
        if not isinstance(config, EncoderConfig):
            return dataclasses.replace(config, layers=len(kept))
        is_masked = config.head == "masked"
        tied = model.head is None if is_masked else config.tie_embeddings
        return dataclasses.replace(config, layers=len(kept), tie_embeddings=tied)
    of_layers = {"windows": config.windows, "ffns": config.ffns, "hiddens": config.hiddens}
    left = {k: v if v is None else tuple(v[i] for i in kept) for k, v in of_layers.items()}
    hidden = max((config.layer_hidden(i) for i in kept), default=config.hidden)
    more = {"layers": len(kept), "hidden": hidden, "tie_embeddings": model.head is None}
    return dataclasses.replace(config, **more, **left)


def _without_packed(extra: sidecar.Sidecar, writer: "_Writer") -> sidecar.Sidecar:
    """The sidecar without what the packed tensors say themselves, and with what they cannot say."""
    linears = dict(extra.linears)
    for stored, scales in writer.scales().items():
        layer, path = LAYER.match(stored), stored
        if layer is not None:
            path = f"layers[{extra.kept[int(layer[1])]}]{stored[layer.end() :]}"
        said = linears.pop(path, sidecar.LinearExtra())
        said = dataclasses.replace(said, stored=None, act=None, scales=scales)
        if said != sidecar.LinearExtra():
            linears[path] = said
    return dataclasses.replace(extra, linears=linears)


def _dtype(dtype: jax.typing.DTypeLike | None, held: list[jnp.dtype]) -> np.dtype:
    found = jnp.result_type(*held) if dtype is None else jnp.dtype(dtype)
    if found not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ConfigError(f"dtype={found}: float32, bfloat16 or float16 is accepted")
    return found


class _Writer:
    """Lists the tensors of a model, made one at a time when they are written."""

    def __init__(
        self,
        config: Config,
        held: Mapping[str, nnx.Variable],
        dtype: jax.typing.DTypeLike | None,
        encoder: Encoder | None,
    ):
        self.config, self.held = config, held
        self.dialect = dialect_of(config)
        self.names = self.dialect.names(config)
        self.wanted = variables(self.dialect.abstract(config))
        unknown = [p for p in held if p not in self.wanted and not p.endswith(IN_SIDECAR)]
        if unknown:
            raise FormatError(f"{unknown[0]} has no place in a {config.family} directory; {NATIVE}")
        self._check_sizes()
        self.places = list(self._places())
        self.encoded: Mapping[str, Sequence[Encoded]] = (
            {} if encoder is None else dict(self._encode(encoder))
        )
        packed = {
            path for where in self.places if where.name in self.encoded for path in where.paths
        }
        dense = [p for p in held if p in self.wanted and p not in packed]
        self.dtype = _dtype(dtype, [jnp.dtype(held[p].get_value().dtype) for p in dense])

    def _check_sizes(self) -> None:
        """Raises FormatError where a config says other sizes than the parameters have."""
        for path, variable in self.held.items():
            if path in self.wanted:
                found, said = variable.get_value().shape, self.wanted[path].get_value().shape
                if tuple(found) != tuple(said):
                    raise FormatError(
                        f"{path} is {list(found)}, and a {self.config.family} directory can only "
                        f"say {list(said)} of it; {NATIVE}"
                    )

    def _places(self) -> Iterator[Place]:
        for path in self.wanted:
            where = self.names.place(path)
            if where is None:
                family = self.config.family
                raise ConfigError(f"a {family} checkpoint has no place for {path}; {NATIVE}")
            if where.part == 0:
                yield where

    def _encode(self, encoder: Encoder) -> Iterator[tuple[str, Sequence[Encoded]]]:
        for where in self.places:
            if where.is_matrix:
                held = [self._plain(path) for path in where.paths]
                plain = [weight for weight in held if weight is not None]
                count = self._experts(where)
                named = [(where.name, plain)]
                if count is not None:
                    named = [
                        (where.of_expert(e), [_expert(w, e) for w in plain]) for e in range(count)
                    ]
                found = [encoder(n.removesuffix(".weight"), tuple(w)) for n, w in named]
                encoded = [item for item in found if item is not None]
                if encoded:
                    yield where.name, encoded

    def _experts(self, where: Place) -> int | None:
        """How many tensors a mixture's parameter is; None of any other."""
        if not where.is_stacked:
            return None
        return jax.tree.leaves(self.wanted[where.paths[0]].get_value())[0].shape[0]

    def _plain(self, path: str) -> Weight | None:
        """The weight of a linear map without its threshold; of a removed one, packed zeros where
        another block has it in a packed format, else None."""
        if path not in self.held:
            end = LAYER.sub("", path)
            others = (self._plain(other) for other in self.held if LAYER.sub("", other) == end)
            return next((_zeros(w) for w in others if isinstance(scheme_of(w), Scheme)), None)
        weight = self.held[path].get_value()
        return weight.w if isinstance(weight, SparseInput) else weight

    def scales(self) -> dict[str, sidecar.ScalesExtra | None]:
        """What to say of the scales of each packed map, by path without ".w"."""
        found = {}
        for where in self.places:
            encoded = self.encoded.get(where.name)
            if encoded:
                dtype, first = self._scale_dtype(encoded), encoded[0]
                experts = where.is_stacked
                extras = (extra_of_experts(encoded, dtype),) if experts else first.extras(dtype)
                pairs = zip(where.paths, extras, strict=True)
                found |= {path.removesuffix(".w"): e for path, e in pairs if path in self.held}
        return found

    def _scale_dtype(self, encoded: Sequence[Encoded]) -> np.dtype:
        """The dtype of a parameter's scales: one for all experts, float32 where it has to be."""
        fits = all(item.scale_dtype(self.dtype) == self.dtype for item in encoded)
        return self.dtype if fits else np.dtype(np.float32)

    def entries(self) -> Iterator[tuple[str, Entry]]:
        """Pairs (name, tensor) in the order of the model."""
        second = {first: name for name, first in self.dialect.second(self.config).items()}
        for where in self.places:
            count, encoded = self._experts(where), self.encoded.get(where.name)
            if encoded:
                dtype = self._scale_dtype(encoded)
                for item in encoded:
                    yield from item.tensors(dtype).items()
                continue
            if count is not None:
                for e in range(count):
                    yield where.of_expert(e), self._dense(where, e)
                continue
            tensor = self._dense(where)
            yield where.name, tensor
            if where.name in second:
                yield second[where.name], tensor

    def _dense(self, where: Place, expert: int | None = None) -> Entry:
        shapes = [tuple(self.wanted[path].get_value().shape) for path in where.paths]
        shape = where.stored((*shapes[0][:-1], sum(shape[-1] for shape in shapes)))
        return Entry(self.dtype, shape, lambda: self._values(where, expert))

    def _values(self, where: Place, expert: int | None) -> np.ndarray:
        held = (self._part(path, expert) for path in where.paths)
        parts = [_stored(part, self.dtype, where.transposed) for part in held]
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if not where.kernel:
            return whole.reshape((1,) * where.leading + whole.shape)
        return np.moveaxis(whole.reshape(len(whole), *where.kernel, -1), -1, 1)

    def _part(self, path: str, expert: int | None) -> np.ndarray | jax.Array:
        if path not in self.held:  # of a removed sublayer
            shape = self.wanted[path].get_value().shape
            offset = getattr(self.config, "norm_offset", 0.0)
            neutral = 1.0 - offset if path.endswith(".scale") else 0.0
            return np.full(shape, neutral, self.dtype)
        value = self.held[path].get_value()
        if expert is not None:
            value = jax.tree.map(lambda leaf: leaf[expert], value)
        return value.dense() if isinstance(value, Weight) else value


def _expert(weight: W, e: int) -> W:
    """One expert's part of a mixture's weight, ready to be packed: views of arrays on the host."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[e], weight)


def _zeros(weight: Weight) -> Weight:
    """A packed weight of the same format that is zero."""
    neutral = {"divisor": jnp.ones_like(weight.divisor)} if isinstance(weight, Int4) else {}
    codes, scales = jnp.zeros_like(weight.codes), jnp.ones_like(weight.scales)
    return dataclasses.replace(weight, codes=codes, scales=scales, **neutral)  # type: ignore[arg-type]


def _stored(array: np.ndarray | jax.Array, dtype: np.dtype, transposed: bool) -> np.ndarray:
    with np.errstate(over="ignore"):  # told by `_checked`
        values = np.asarray(array).astype(dtype, copy=False)
    return values.T if transposed else values
