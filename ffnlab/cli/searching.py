"""What `ffnlab search` is asked: the file, the rows that decide, and the budget.

A file is one of `ffnlab train` with a table `[search]`: its model learns as a super-network, or by
the rule "tas". Without `[run]` nothing is trained and `[model] path` names the model directory.
"""

import dataclasses
import functools
import math
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ffnlab import tree
from ffnlab.cli.inputs.corpus import Corpus
from ffnlab.cli.inputs.data_kinds import DataConfig, ImagesConfig, RecordsConfig
from ffnlab.cli.inputs.labelled import LabelledData
from ffnlab.cli.training import TrainConfig, training_of
from ffnlab.clock import compiled, in_turns
from ffnlab.errors import ConfigError, at_least
from ffnlab.formats.embedded import shipped
from ffnlab.formats.opening import kind_at
from ffnlab.losses import Loss, labelled, next_token
from ffnlab.models.calibration import called
from ffnlab.options import nearest
from ffnlab.parallel.config import from_table, read_table
from ffnlab.pruning.search import Config, SearchOptions, Supernet, Tactic, macs

__all__ = [
    "TAS",
    "Asked",
    "Limit",
    "Rows",
    "SearchSettings",
    "as_limits",
    "limit_of",
    "read_search",
    "rows_of",
    "within_target",
]

OBJECTIVES = ("loss", "macs", "bytes", "latency")
TAS = "tas"
TACTICS = (*typing.get_args(Tactic), TAS)
BLOCKED = ("decoder", "vit")  # kinds of which a search takes FFN channels and blocks
OF_TAS = ("tactic", "rows", "turns")  # what else a search by that rule takes is of the rule
UNITS: Mapping[str, str] = {"macs": "macs", "bytes": "bytes", "ms": "latency"}


@dataclasses.dataclass(frozen=True)
class SearchSettings:
    """What is searched for, and how long.

    Attributes:
      tactic: "linas" (evolution on predictors, of which the best are measured), "evolution",
        "random", or "tas" for a file with that rule, whose options say the rest.
      objectives: one to three of "loss", "macs", "bytes", "latency", all to be made small; of the
        networks within a --budget the one with the lowest first objective is chosen.
      widths: how many channels the FFN of a block may have.
      depths: how many blocks may stay, from the first; all without.
      formats: of the weights of a block's FFN, some of "float", "int8", "float8".
      population: networks measured in a round.
      budget_measurements: networks measured in all.
      inner: evaluations of predictors in a round of "linas".
      seed: of the search.
      turns: that a network and the whole model take to be timed.
      rows: held-out rows by which networks are compared; as many others score what is chosen.
    """

    tactic: str = "linas"
    objectives: tuple[str, ...] = ("loss", "macs")
    widths: tuple[int, ...] = ()
    depths: tuple[int, ...] = ()
    formats: tuple[str, ...] = ("float",)
    population: int = 20
    budget_measurements: int = 100
    inner: int = 2000
    seed: int = 0
    turns: int = 21
    rows: int = 256

    def __post_init__(self) -> None:
        at_least(1, rows=self.rows, turns=self.turns)
        for name in self.objectives:
            if name not in OBJECTIVES:
                known = ", ".join(map(repr, OBJECTIVES))
                raise ConfigError(
                    f"objectives: {name!r} is unknown{nearest(name, OBJECTIVES)}; there are {known}"
                )
        if self.tactic not in TACTICS:
            known = ", ".join(map(repr, TACTICS))
            raise ConfigError(f"tactic={self.tactic!r} is not one of {known}")
        if self.tactic != TAS:
            _ = self.options  # which checks the rest

    @property
    def options(self) -> SearchOptions:
        """Of the loop of a search."""
        pace = self.population, self.inner, self.seed
        return SearchOptions(self.objectives, self.budget_measurements, self.tactic, *pace)  # type: ignore[arg-type]


class Asked(NamedTuple):
    """A file of `ffnlab search`.

    Attributes:
      training: the run that makes the model, or a mere `start` with data.
      search: what is searched for.
      trains: whether the run is gone through first.
    """

    training: TrainConfig
    search: SearchSettings
    trains: bool


def read_search(source: str | Path) -> Asked:
    """Reads a file.

    Raises:
      ConfigError: it cannot be read, has unknown keys or values out of range, names no model, or a
        rule, a loss and a tactic that do not go together.
      FormatError: there is no model where it points.
    """
    name, table = read_table(source)
    own = table.pop("search", {})
    is_tas = table.get("rule") == TAS
    usual = {"tactic": TAS} if is_tas else {}
    given = usual | dict(own) if isinstance(own, Mapping) else own
    search = from_table(given, SearchSettings, f"{name}: [search]")  # type: ignore[arg-type]
    if is_tas != (search.tactic == TAS):
        raise ConfigError(
            f"{name}: tactic={search.tactic!r} with rule={table.get('rule', 'backprop')!r}; "
            "tactic='tas' and rule='tas' go together"
        )
    if is_tas and (more := sorted(set(given) - set(OF_TAS))):  # type: ignore[arg-type]
        raise ConfigError(
            f"{name}: {', '.join(more)} in [search] are of other tactics; rule 'tas' is told of "
            f"its sizes by [rule_options], and [search] takes {', '.join(OF_TAS)}"
        )
    table, trains = started_at(name, table), "run" in table
    if not is_tas:
        check_blocks(table)
    if not trains:
        check_untrained(name, table)
        table["run"] = {"steps": 1}
    elif not is_tas:
        table |= elastic_loss(name, table, search)
    training = training_of(name, table)
    check_data(training)
    return Asked(training, search, trains)


def started_at(name: str, table: Mapping[str, object]) -> dict[str, object]:
    """The table with `start` in place of `[model] path`."""
    model = table.get("model")
    if not isinstance(model, Mapping) or "path" not in model:
        return dict(table)
    place = model["path"]
    if not isinstance(place, str) or set(model) != {"path"} or "start" in table:
        raise ConfigError(
            f"{name}: path={place!r} in [model] is the directory of a model, which says the rest "
            f"itself; leave out {', '.join(sorted((set(model) - {'path'}) | {'start'}))}"
        )
    return {key: value for key, value in table.items() if key != "model"} | {"start": place}


def check_blocks(table: Mapping[str, object]) -> None:
    """Raises ConfigError for a model of a kind that has no blocks of FFNs; FormatError for none."""
    start, model = table.get("start"), table.get("model")
    if isinstance(start, str) and start:
        kind = "decoder" if shipped(Path(start)) else kind_at(start)
    else:
        kind = model.get("kind", BLOCKED[0]) if isinstance(model, Mapping) else BLOCKED[0]
    if kind not in BLOCKED:
        raise ConfigError(
            f"a model of kind {kind!r} has no blocks with an FFN each, of which a search takes "
            f"some away; accepted: {', '.join(map(repr, BLOCKED))}"
        )


def check_untrained(name: str, table: Mapping[str, object]) -> None:
    """Raises ConfigError unless a file without `[run]` names a model and nothing of training."""
    if not table.get("start"):
        raise ConfigError(
            f"{name}: no model to search in: set path in [model], or give [run] to train one"
        )
    if more := sorted(set(table) - {"start", "data"}):
        raise ConfigError(
            f"{name}: without [run] nothing is trained, and {', '.join(more)} would be lost; "
            "accepted: model, data, search"
        )


def elastic_loss(
    name: str, table: Mapping[str, object], search: SearchSettings
) -> dict[str, object]:
    """The loss of a super-network as keys of a training file."""
    if "loss" in table or "loss_options" in table:
        raise ConfigError(
            f"{name}: a super-network learns by loss='elastic' with the widths and depths of "
            "[search]; leave loss and loss_options out"
        )
    options = {"widths": list(search.widths), "depths": list(search.depths)}
    return {"loss": "elastic", "loss_options": options}


def check_data(training: TrainConfig) -> None:
    """Raises ConfigError unless networks of the run can be compared by their loss."""
    data, kind = training.data, training.kind
    is_text = isinstance(data, DataConfig) and kind == "decoder"
    if not is_text and not isinstance(data, ImagesConfig | RecordsConfig):
        raise ConfigError(
            f"a search compares networks on the text of a decoder, or on images or records with "
            f"classes; [data] is a {type(data).__name__}, the model of kind {kind!r}"
        )


class Rows(NamedTuple):
    """What networks are measured on.

    Attributes:
      chosen: held-out rows by which networks are compared.
      told: other ones, by which what was chosen is scored.
      inputs: what a network is called with to be counted and timed.
      loss: of both.
    """

    chosen: PyTree
    told: PyTree
    inputs: jax.Array
    loss: Loss


def rows_of(data: object, training: TrainConfig, count: int) -> Rows:
    """Held-out rows of a run, in turns to choose by and to score by.

    Args:
      data: what the run reads.
      training: the run.
      count: of either, where there are as many.
    Raises:
      ConfigError: there are fewer than two.
    """
    if isinstance(data, Corpus):
        length, tokens = training.text.length, np.asarray(data.held_out.tokens, np.int32)
        starts = np.arange(0, len(tokens) - length, length)
        parts = two_of(count, len(starts))
        both = [jnp.asarray(tokens[starts[p][:, None] + np.arange(length + 1)]) for p in parts]
        return Rows(both[0], both[1], both[0][:, :-1], next_token)
    assert isinstance(data, LabelledData)
    x, y = (np.concatenate(part) for part in zip(*data.held_out, strict=True))
    cut = [(jnp.asarray(x[p]), jnp.asarray(y[p])) for p in two_of(count, len(x))]
    return Rows(cut[0], cut[1], cut[0][0], labelled)


def two_of(count: int, there: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of two sets of rows, spread over all that are there."""
    if there < 2:
        raise ConfigError(
            f"{there} rows are held out; one to choose by and one to score are needed"
        )
    spread = np.linspace(0, there - 1, min(2 * count, there - there % 2)).astype(int)
    return spread[::2], spread[1::2]


class Limit(NamedTuple):
    """A --budget.

    Attributes:
      text: as it was given.
      name: the objective that it is of.
      value: the largest accepted, in its own unit: MACs, bytes or milliseconds.
    """

    text: str
    name: str
    value: float

    def check(self, smallest: float) -> None:
        """Raises ConfigError where no network of the space is as small.

        Args:
          smallest: what the smallest network has, in the unit of the limit.
        """
        if self.value < smallest:
            raise ConfigError(
                f"--budget {self.text} is below what the smallest network has: {smallest:.6g}"
            )


def limit_of(text: str, search: SearchSettings) -> Limit | None:
    """What --budget says; None for "".

    Raises:
      ConfigError: it is no "macs=…", "bytes=…" or "ms=…" with a number above 0, or of something
        that is no objective of the search.
    """
    if not text:
        return None
    unit, _, number = text.partition("=")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if unit not in UNITS or not 0 < value < math.inf:
        raise ConfigError(
            f"--budget {text!r}: macs=NUMBER, bytes=NUMBER or ms=NUMBER above 0 is accepted"
        )
    name, is_tas = UNITS[unit], search.tactic == TAS
    if name not in (("macs",) if is_tas else search.objectives):
        known = ["macs"] if is_tas else list(search.objectives)
        raise ConfigError(f"--budget {text}: {name!r} is none of objectives={known}")
    return Limit(text, name, value)


def least(net: Supernet, model: Any, inputs: PyTree, name: str) -> float:
    """MACs or bytes of the smallest network; leaves may be abstract."""
    found = []
    for config in smallest(net):
        shapes = jax.eval_shape(functools.partial(net.cut, config=config), model)
        found.append(macs(shapes, inputs) if name == "macs" else tree.nbytes(shapes))
    return float(min(found))


def smallest(net: Supernet) -> list[Config]:
    """The smallest network, in every format."""
    values = {v.name: v for v in net.space.variables}
    shape = {name: (min(values[name].values),) * values[name].count for name in ("depth", "width")}
    of = values["format"]
    return [{**shape, "format": (form,) * of.count} for form in of.values]


def milliseconds(net: Supernet, model: Any, inputs: PyTree, turns: int) -> tuple[float, float]:
    """What calls of the whole model and of the smallest network take, medians of turns."""
    zeros = functools.partial(jax.tree.map, lambda leaf: jnp.zeros(leaf.shape, leaf.dtype))
    calls: dict[str, Callable] = {"whole": compiled(called, zeros(model), inputs)}
    for i, config in enumerate(smallest(net)):
        small = jax.eval_shape(functools.partial(net.cut, config=config), model)
        calls[f"{i}"] = compiled(called, zeros(small), inputs)
    times = in_turns(calls, turns)
    whole, *others = (1e3 * times.of(name).median for name in calls)
    return whole, min(others)


def as_limits(
    limit: Limit | None, net: Supernet, model: Any, inputs: PyTree, turns: int
) -> dict[str, float]:
    """The limit as `pareto.best_within` takes it: latency over the whole model's.

    Args:
      limit: asked for; None for none.
      net, model: the super-network and its weights, which may be abstract.
      inputs: as `Rows.inputs`.
      turns: of timing.
    Raises:
      ConfigError: the smallest network is above it.
    """
    if limit is None:
        return {}
    if limit.name != "latency":
        limit.check(least(net, model, inputs, limit.name))
        return {limit.name: limit.value}
    whole, small = milliseconds(net, model, inputs, turns)
    limit.check(small)
    return {limit.name: limit.value / whole}


def within_target(training: TrainConfig, limit: Limit | None, whole: int) -> TrainConfig:
    """A run by the rule "tas" whose target is a limit of MACs.

    Args:
      whole: MACs of the whole network, for one row.
    Raises:
      ConfigError: the whole network is within.
    """
    if limit is None:
        return training
    if limit.value >= whole:
        raise ConfigError(f"--budget {limit.text}: the whole network has {whole:.6g} already")
    options = {**training.rule_options, "target": limit.value / whole}
    return dataclasses.replace(training, rule_options=options)
