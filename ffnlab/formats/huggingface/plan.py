"""What goes where when a checkpoint is loaded: matched and checked before any value is read."""

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ffnlab.errors import FormatError
from ffnlab.formats.huggingface.dialects import Config, Model, dialect_of
from ffnlab.formats.huggingface.names import Place
from ffnlab.formats.safetensors import Checkpoint
from ffnlab.formats.stream import Stack, Stored
from ffnlab.formats.untrusted import quoted
from ffnlab.weights import Weight

PROBLEMS_SHOWN = 20
STORED_DTYPES = tuple(np.dtype(d) for d in (np.float32, jnp.bfloat16, np.float16, np.float64))


@dataclasses.dataclass(frozen=True)
class Packed:
    """A linear map that a checkpoint holds in a quantized form.

    Attributes:
      names: the tensors it is made of, as the checkpoint calls them.
      problems: what is wrong with them; empty if nothing is.
      scheme: how it is quantized, comparable: the experts of a mixture have to agree.
      build: reads them, refusing NaN and infinity where its argument says so, and makes the
        weights, one per part of a fused map, leaves of NumPy or jax; called once, and only if the
        whole checkpoint has no problem.
    """

    names: frozenset[str]
    problems: tuple[str, ...]
    scheme: Hashable
    build: Callable[[bool], list[Weight]]


@runtime_checkable
class Decode(Protocol):
    """Recognizes the quantized linear maps of a checkpoint with a `quantization_config`."""

    def __call__(
        self, checkpoint: Checkpoint, name: str, rows: int, columns: tuple[int, ...]
    ) -> Packed | None:
        """What `name` is stored as.

        Args:
          checkpoint: opened and checked.
          name: of the linear map, as the checkpoint calls it, without ".weight".
          rows: logical `in`.
          columns: logical `out` of each part; one entry unless the map is fused.
        Returns:
          how to build it, or None for a map that is stored dense.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Task:
    """One tensor to read, or one quantized linear map.

    Attributes:
      paths: the parameters it fills; several where it is fused.
      source: a `Stored` per path, a `Stack` of one for each expert, or a `Packed` for all.
    """

    paths: tuple[str, ...]
    source: tuple[Stored | Stack, ...] | Packed


@dataclasses.dataclass(frozen=True)
class Plan:
    """A model without arrays, and where each of them comes from.

    Attributes:
      model: abstract, in float32.
      tasks: together they fill every parameter.
    """

    model: Model
    tasks: tuple[Task, ...]


def variables(model: nnx.Module) -> dict[str, nnx.Variable]:
    """The parameters of a model by path, in tree order."""
    flat, _ = jax.tree_util.tree_flatten_with_path(model, is_leaf=is_variable)
    return {jax.tree_util.keystr(path).removeprefix("."): leaf for path, leaf in flat}


def is_variable(node: object) -> bool:
    """Whether a tree node is an `nnx.Variable`; for `is_leaf=`."""
    return isinstance(node, nnx.Variable)


def make_plan(
    config: Config, checkpoint: Checkpoint, found: Mapping[str, str], decode: Decode | None
) -> Plan:
    """Matches the parameters of a config with the tensors of a checkpoint.

    Args:
      config: what the model is.
      checkpoint: what there is.
      found: what the checkpoint calls each tensor, by its plain name (`Dialect.found`).
      decode: recognizes quantized linear maps; None if there are none.
    Raises:
      FormatError: tensors are missing, of another shape or dtype, or not part of the model; the
        first `PROBLEMS_SHOWN` of them are named.
    """
    if config.layers > len(found):
        raise FormatError(
            f"{checkpoint.origin}: config.json says num_hidden_layers={config.layers}, but there "
            f"are only {len(found)} tensors"
        )
    mixture = getattr(config, "mixture", None)
    if mixture is not None and mixture.experts > len(found):
        raise FormatError(
            f"{checkpoint.origin}: config.json says {mixture.experts} experts, but there are only "
            f"{len(found)} tensors"
        )
    model = dialect_of(config).abstract(config)
    matcher = _Matcher(config, checkpoint, found, decode, variables(model))
    tasks = tuple(matcher.tasks())
    matcher.finish()
    return Plan(model, tasks)


def stacked(experts: Sequence[Packed]) -> Packed:
    """The packed maps of all experts as one, its leaves [e, …]; their schemes are the same."""

    def build(check_finite: bool) -> list[Weight]:
        weights = [weight for expert in experts for weight in expert.build(check_finite)]
        return [jax.tree.map(lambda *leaves: np.stack(leaves), *weights)]

    names = frozenset().union(*(expert.names for expert in experts))
    problems = tuple(problem for expert in experts for problem in expert.problems)
    return Packed(names, problems, experts[0].scheme, build)


class _Matcher:
    def __init__(
        self,
        config: Config,
        checkpoint: Checkpoint,
        found: Mapping[str, str],
        decode: Decode | None,
        wanted: Mapping[str, nnx.Variable],
    ):
        self.names = dialect_of(config).names(config)
        self.checkpoint, self.found, self.decode, self.wanted = checkpoint, found, decode, wanted
        self.problems: list[str] = []
        self.used: set[str] = set()
        # What the checkpoint calls a linear map, whose tensors end in ".weight…".
        self.originals: dict[str, str] = {}
        for plain, original in found.items():
            stem, end, rest = plain.rpartition(".weight")
            self.originals.setdefault(stem, original.removesuffix(f"{end}{rest}"))

    def tasks(self) -> Iterator[Task]:
        """One per tensor; notes problems on the way."""
        for path in self.wanted:
            where = self.names.place(path)
            if where is None:
                self.problems.append(f"a {self.names.family} model has no {path}")
            elif where.part == 0:
                task = self._task(where)
                if task is not None:
                    yield task

    def _task(self, where: Place) -> Task | None:
        shapes = [tuple(self.wanted[path].get_value().shape) for path in where.paths]
        names = [where.name]
        if where.is_stacked:
            count = jax.tree.leaves(self.wanted[where.paths[0]].get_value())[0].shape[0]
            names = [where.of_expert(e) for e in range(count)]
        if where.is_matrix and self.decode is not None:
            packed = [self._packed(self.decode, name, shapes) for name in names]
            known = [each for each in packed if each is not None]
            if len({None if each is None else each.scheme for each in packed}) > 1:
                self.problems.append(f"{quoted(where.name)}: its experts are not quantized alike")
                return None
            if known:
                return Task(where.paths, stacked(known) if where.is_stacked else known[0])
        if where.is_stacked:
            parts = [self._stored(where, name, shapes) for name in names]
            whole = [part[0] for part in parts if part is not None]
            return Task(where.paths, (Stack(tuple(whole)),)) if len(whole) == len(names) else None
        stored = self._stored(where, where.name, shapes)
        return None if stored is None else Task(where.paths, stored)

    def _stored(
        self, where: Place, name: str, shapes: list[tuple[int, ...]]
    ) -> tuple[Stored, ...] | None:
        """The parts of one tensor; notes what is wrong with it."""
        if name not in self.found:
            self.problems.append(f"{quoted(name)} is missing")
            return None
        info = self.checkpoint.tensors[self.found[name]]
        self.used.add(info.name)
        whole = where.stored((*shapes[0][:-1], sum(shape[-1] for shape in shapes)))
        if info.shape != whole:
            self.problems.append(
                f"{quoted(info.name)} has shape {list(info.shape)}, config.json asks for "
                f"{list(whole)}"
            )
        if info.dtype not in STORED_DTYPES:
            self.problems.append(
                f"{quoted(info.name)} is {info.dtype}, which only a quantization_config could "
                "explain; float32, bfloat16, float16 and float64 are accepted"
            )
        starts = [sum(shape[-1] for shape in shapes[:i]) for i in range(len(shapes))]
        how = where.transposed, math.prod(where.kernel) if where.kernel else 0, where.leading
        return tuple(Stored(info, a, s, *how) for a, s in zip(starts, shapes, strict=True))

    def _packed(self, decode: Decode, name: str, shapes: list[tuple[int, ...]]) -> Packed | None:
        plain = name.removesuffix(".weight")
        name = self.originals.get(plain, plain)
        columns = tuple(shape[-1] for shape in shapes)
        packed = decode(self.checkpoint, name, math.prod(shapes[0][:-1]), columns)
        if packed is not None:
            self.used |= packed.names
            self.problems += [f"{quoted(name)}: {problem}" for problem in packed.problems]
        return packed

    def finish(self) -> None:
        """Raises FormatError with everything noted."""
        problems = self.problems + [
            f"{quoted(name)} is not part of the model"
            for name in self.found.values()
            if name not in self.used
        ]
        if problems:
            more = len(problems) - PROBLEMS_SHOWN
            shown = "\n  ".join(problems[:PROBLEMS_SHOWN])
            rest = f"\n  and {more} more" if more > 0 else ""
            raise FormatError(
                f"{self.checkpoint.origin}: {len(problems)} problems:\n  {shown}{rest}"
            )
