"""A search space: named choices, and three forms of one point of it.

A point is a configuration (names to values), a vector (the number of the value of each entry, as
evolution takes it) or one-hot features (as a predictor takes it). Encoding as in DyNAS-T, the code
of "A Hardware-Aware System for Accelerating Deep Neural Network Optimization" (2022).

What differs from that code: a depth makes later entries inactive, so that many vectors name one
network. A variable says here which one is its depth (`within`), and `Space.canonical` gives all
those vectors one form before anything is compared, measured or learned from.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from ffnlab.errors import ConfigError
from ffnlab.options import nearest

__all__ = ["Config", "Space", "Value", "Variable"]

Value = int | float | str
Config = dict[str, tuple[Value, ...]]


@dataclasses.dataclass(frozen=True)
class Variable:
    """Choices of one kind, such as the hidden widths of all blocks.

    Attributes:
      name: of the variable.
      values: what each entry chooses from, all different.
      count: entries, at least 1.
      within: the name of a variable above this one whose values are how many entries are active.
        Its c entries divide the entries here into c runs of equal length, one after another (a
        stage each), and the first of each run are active; None: all are.
    """

    name: str
    values: tuple[Value, ...]
    count: int = 1
    within: str | None = None


@dataclasses.dataclass(frozen=True)
class Space:
    """All combinations of some variables.

    Attributes:
      variables: in the order of the vector's entries; a depth comes before what it is the depth of.
    Raises:
      ConfigError: there are none; a name is given twice; one has no or equal values, or no entry;
        `within` names none above, or one whose values are not whole numbers from 0 to the length
        of a run, or whose number of entries does not divide the count.

    >>> depth = Variable("depth", (1, 2))
    >>> space = Space((depth, Variable("width", (16, 32, 64), count=2, within="depth")))
    >>> space.size, space.features, space.networks
    (3, 8, 12)
    >>> space.decode(np.array([0, 2, 1]))
    {'depth': (1,), 'width': (64, 32)}
    >>> space.canonical(np.array([[0, 2, 1]])).tolist()
    [[0, 2, 0]]
    """

    variables: tuple[Variable, ...]

    def __post_init__(self) -> None:
        if not self.variables:
            raise ConfigError("variables=() is an empty space; give at least one Variable")
        above: dict[str, Variable] = {}
        for variable in self.variables:
            if variable.name in above:
                raise ConfigError(f"variables: the name {variable.name!r} is given twice")
            check(variable)
            if variable.within is not None:
                check_within(variable, above)
            above[variable.name] = variable

    @functools.cached_property
    def options(self) -> Int[np.ndarray, "n"]:
        """How many values each entry chooses from."""
        return np.concatenate([np.full(v.count, len(v.values)) for v in self.variables])

    @property
    def size(self) -> int:
        """Entries of a vector: n."""
        return sum(v.count for v in self.variables)

    @property
    def features(self) -> int:
        """Entries of one-hot features: f."""
        return int(self.options.sum())

    @functools.cached_property
    def slices(self) -> dict[str, slice]:
        """Where the entries of each variable stand in a vector."""
        ends = np.cumsum([v.count for v in self.variables]).tolist()
        return {
            v.name: slice(end - v.count, end) for v, end in zip(self.variables, ends, strict=True)
        }

    @functools.cached_property
    def networks(self) -> int:
        """How many networks there are: different canonical vectors."""
        each: dict[str, int] = {}
        for variable in reversed(self.variables):  # what is within one comes after it
            inside = [each[v.name] for v in self.variables if v.within == variable.name]
            each[variable.name] = sum(
                math.prod(ways ** int(value) for ways in inside) if inside else 1
                for value in variable.values
            )
        return math.prod(each[v.name] ** v.count for v in self.variables if v.within is None)

    def sample(self, rng: np.random.Generator, count: int) -> Int[np.ndarray, "b n"]:
        """Draws vectors, each entry uniformly; they need not be canonical or different."""
        return rng.integers(0, self.options, (count, self.size))

    def every(self) -> Iterator[Int[np.ndarray, "n"]]:
        """All canonical vectors, one for each network, counting up from the last entry."""

        def grown(vector: np.ndarray, column: int) -> Iterator[np.ndarray]:
            if column == self.size:
                yield vector.copy()
                return
            # What is active depends on entries before it only.
            is_free = bool(self.active(vector[None])[0, column])
            for value in range(int(self.options[column]) if is_free else 1):
                vector[column] = value
                vector[column + 1 :] = 0
                yield from grown(vector, column + 1)

        yield from grown(np.zeros(self.size, np.int64), 0)

    def decode(self, vector: Int[np.ndarray, "n"]) -> Config:
        """The configuration of a vector; that of an inactive entry is kept.

        Raises:
          ConfigError: the length is another, or an entry is outside 0 .. values - 1.
        """
        self.check(vector[None])
        return {
            v.name: tuple(v.values[i] for i in vector[self.slices[v.name]].tolist())
            for v in self.variables
        }

    def encode(self, config: Mapping[str, Sequence[Value]]) -> Int[np.ndarray, "n"]:
        """The vector of a configuration.

        Args:
          config: for every variable as many of its values as it has entries.
        Raises:
          ConfigError: a name is missing or unknown, or values are too few, too many or none of the
            variable's.
        """
        known = {v.name: v for v in self.variables}
        for name in config:
            if name not in known:
                raise ConfigError(f"config has no variable {name!r}{nearest(name, known)}")
        entries = []
        for name, variable in known.items():
            if name not in config:
                raise ConfigError(f"config lacks {name!r}; the space has {', '.join(known)}")
            given = config[name]
            if isinstance(given, str) or len(given) != variable.count:
                raise ConfigError(f"config[{name!r}]={given!r} must be {variable.count} values")
            for value in given:
                if value not in variable.values:
                    raise ConfigError(f"config[{name!r}]: {value!r} is none of {variable.values}")
                entries.append(variable.values.index(value))
        return np.array(entries)

    def one_hot(self, vectors: Int[np.ndarray, "b n"]) -> Float[np.ndarray, "b f"]:
        """Features: for each entry as many zeros and ones as it has values.

        Raises:
          ConfigError: as `decode`.
        """
        self.check(vectors)
        starts = np.cumsum(self.options) - self.options
        features = np.zeros((len(vectors), self.features))
        np.put_along_axis(features, vectors + starts, 1.0, axis=1)
        return features

    def from_one_hot(self, features: Float[np.ndarray, "b f"]) -> Int[np.ndarray, "b n"]:
        """The inverse of `one_hot`.

        Raises:
          ConfigError: the width is another, or an entry is not a single one among zeros.
        """
        if features.shape[1] != self.features:
            raise ConfigError(f"features has width {features.shape[1]}; it must be {self.features}")
        parts = np.split(features, np.cumsum(self.options)[:-1], axis=1)
        vectors = np.stack([part.argmax(axis=1) for part in parts], axis=1)
        if not np.array_equal(self.one_hot(vectors), features):
            raise ConfigError("features must have exactly one 1 per entry, and else 0")
        return vectors

    def active(self, vectors: Int[np.ndarray, "b n"]) -> Bool[np.ndarray, "b n"]:
        """Which entries the network of each vector depends on.

        Raises:
          ConfigError: as `decode`.
        """
        self.check(vectors)
        used = np.ones(vectors.shape, bool)
        above = {v.name: v for v in self.variables}
        for variable in self.variables:
            if variable.within is None:
                continue
            depth, where = above[variable.within], self.slices[variable.within]
            run = variable.count // depth.count
            deep = np.array(depth.values)[vectors[:, where]] * used[:, where]  # [b, runs]
            is_first = np.arange(run) < deep[:, :, None]
            used[:, self.slices[variable.name]] = is_first.reshape(len(vectors), variable.count)
        return used

    def canonical(self, vectors: Int[np.ndarray, "b n"]) -> Int[np.ndarray, "b n"]:
        """The vectors with 0 for inactive entries: two are equal where their networks are.

        Raises:
          ConfigError: as `decode`.
        """
        return np.where(self.active(vectors), vectors, 0)

    def keys(self, vectors: Int[np.ndarray, "b n"]) -> list[bytes]:
        """What names the network of each vector: equal where the canonical forms are.

        Raises:
          ConfigError: as `decode`.
        """
        return [row.tobytes() for row in self.canonical(vectors).astype(np.int64)]

    def check(self, vectors: Int[np.ndarray, "b n"]) -> None:
        """Raises ConfigError unless these are vectors of this space."""
        if vectors.shape[1] != self.size:
            raise ConfigError(f"a vector has {vectors.shape[1]} entries; the space has {self.size}")
        outside = np.argwhere((vectors < 0) | (vectors >= self.options))
        if len(outside):
            row, column = outside[0].tolist()
            raise ConfigError(
                f"entry {column} of a vector is {vectors[row, column]}; "
                f"it must lie in 0..{self.options[column] - 1}"
            )


def check(variable: Variable) -> None:
    """Raises ConfigError for values or a count that cannot be."""
    name, values = variable.name, variable.values
    if variable.count < 1:
        raise ConfigError(f"{name!r}: count={variable.count} must be at least 1")
    if not values:
        raise ConfigError(f"{name!r}: values=() leaves nothing to choose")
    if len(set(values)) != len(values):
        raise ConfigError(f"{name!r}: values={values} must all be different")
    if any(isinstance(value, float) and not math.isfinite(value) for value in values):
        raise ConfigError(f"{name!r}: values={values} must be finite")


def check_within(variable: Variable, above: Mapping[str, Variable]) -> None:
    """Raises ConfigError unless a variable above can be the depth of this one."""
    name, within = variable.name, variable.within
    if within not in above:
        said = ", ".join(map(repr, above)) or "none"
        raise ConfigError(f"{name!r}: within={within!r} is no variable above it; there are: {said}")
    depth = above[within]
    if variable.count % depth.count:
        raise ConfigError(
            f"{name!r}: count={variable.count} is not divided by the {depth.count} entries of "
            f"{within!r}, which it is within"
        )
    run = variable.count // depth.count
    if any(type(value) is not int or not 0 <= value <= run for value in depth.values):
        raise ConfigError(
            f"{within!r} says how many of {run} entries of {name!r} are active: its values "
            f"{depth.values} must be whole numbers from 0 to {run}"
        )
