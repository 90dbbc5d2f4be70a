"""`ffnlab search`: a smaller network of a model, found, cut out, saved, and measured."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import PyTree
from rich.console import Group

from ffnlab import parallel, tree
from ffnlab.cli.changes import widened
from ffnlab.cli.inputs.loading import RunData, load_data
from ffnlab.cli.inputs.teacher import sha256_of
from ffnlab.cli.keys import training_keys
from ffnlab.cli.search_pages import drawn, front_of, points_of, ratios, table_of
from ffnlab.cli.searching import (
    TAS,
    Asked,
    Limit,
    Rows,
    SearchSettings,
    as_limits,
    limit_of,
    read_search,
    rows_of,
    within_target,
)
from ffnlab.cli.show import show
from ffnlab.cli.streams import mute_orbax
from ffnlab.cli.train import report, run
from ffnlab.cli.training import fresh
from ffnlab.clock import compiled, in_turns
from ffnlab.errors import ConfigError, NumericalError
from ffnlab.formats import load, save
from ffnlab.models.calibration import called
from ffnlab.parallel import to_table
from ffnlab.pruning.search import (
    Log,
    Supernet,
    best_within,
    knee,
    macs,
    measured,
    measuring,
    supernet,
)
from ffnlab.pruning.search import search as searched
from ffnlab.storage.files import read_json, write_json
from ffnlab.studies.found_networks import shape

__all__ = ["search"]


def search(
    config: Path | None = None,
    /,
    *,
    out: Path = Path("runs/search"),
    budget: str = "",
    resume: bool = False,
    no_progress: bool = False,
    keys: bool = False,
) -> int:
    """Finds a smaller network in a model, cuts it out, saves it and measures it.

    The networks of a model of blocks have fewer channels in their FFNs, fewer blocks, or weights of
    fewer bits. Some are measured, predictors of the rest are fitted to them, and what these say is
    best is measured next (LINAS). A file with rule = "tas" is trained by that rule instead, which
    finds one network.

    For example `ffnlab search digits.toml --budget macs=1e6`, where the file says [model] path =
    "runs/vit/model"; [data] kind = "images"; [search] widths = [16, 32, 64].

    Args:
      config: a TOML file with a table [search] and [data], as `ffnlab train` reads it, and of the
        rest either path in [model], a directory whose model is searched as it is, or a training
        run, whose model learns as a super-network first.
      out: folder of the search: front.json with all that was measured, front.png, chosen.json, and
        model/, what was chosen.
      budget: the largest value accepted of one of "macs=1e6" (of a row), "bytes=2e6" and "ms=3" (of
        a call with all rows, on this machine); without one the knee of the front is chosen.
      resume: go on with an interrupted search in `out`; of a finished one, choose anew.
      no_progress: show no bar; without this there is one on a terminal.
      keys: print every key of [search] with type, default and meaning, and do nothing.
    Returns:
      0, also when a signal stopped training and its checkpoint is saved.
    Raises:
      ConfigError: a bad file or budget, a model without FFN blocks, or `out` holds another search.
    """
    if keys:
        show(Group(*training_keys(SearchSettings, "search")))
        return 0
    if config is None:
        raise ConfigError("give a TOML file with a table [search]; --keys lists what it may say")
    mute_orbax()
    asked = read_search(config)
    limit = limit_of(budget, asked.search)
    out, progress = Path(out), not no_progress
    with parallel.locked(out):
        if asked.search.tactic == TAS:
            by_rule(asked, limit, out, resume=resume, progress=progress)
        else:
            by_measuring(asked, limit, out, resume=resume, progress=progress)
    return 0


def by_rule(asked: Asked, limit: Limit | None, out: Path, *, resume: bool, progress: bool) -> None:
    """Trains by the rule "tas", which writes what it finds, and measures that."""
    data = load_data(asked.training)
    rows = rows_of(data, asked.training, asked.search.rows)
    key = jax.random.key(asked.training.run.seed)
    shapes = jax.eval_shape(functools.partial(fresh, asked.training), key)
    training = within_target(asked.training, limit, macs(shapes, rows.inputs))
    record = run(training, out, resume=resume, progress=progress)
    report(record, out)
    if not record["finished"]:
        return
    whole, found = fresh(training, key), loaded(out / "model")
    table = compared({"whole": whole, "found": found}, rows, asked.search.turns)
    if not training.start:
        table[0] |= {"loss": None}  # it was not trained alone
    write_json(out / "front.json", {"tactic": TAS, "points": table})
    drawn(out / "front.png", functools.partial(ratios, out / "metrics.jsonl"))
    show(table_of(table))
    print(f"{out}: model, front.json, front.png")


def by_measuring(
    asked: Asked, limit: Limit | None, out: Path, *, resume: bool, progress: bool
) -> None:
    """Searches a super-network, which is trained first where the file says so."""
    settings, data = asked.search, load_data(asked.training)
    rows = rows_of(data, asked.training, settings.rows)
    key = jax.random.key(asked.training.run.seed)
    shapes = jax.eval_shape(functools.partial(fresh, asked.training), key)
    net = supernet(shapes, settings.widths, depths=settings.depths, formats=settings.formats)
    check_budget(net, settings)
    limits = as_limits(limit, net, shapes, rows.inputs, settings.turns)
    model = model_of(asked, out, resume=resume, progress=progress)
    if model is None:
        return
    begin(asked, model, data, out, resume=resume)
    is_timed = "latency" in settings.objectives
    turns, given = settings.turns if is_timed else None, {"loss": rows.loss, "inputs": rows.inputs}
    measure = measuring(net, model, rows.chosen, turns=turns, **given)
    log = searched(
        net.space, measure, settings.options, checkpoint=out / "search.npz", progress=progress
    )
    _, found = chosen(net, model, log, limits, settings, rows, data, out)
    if said := late(limit, found):
        print(said)


def check_budget(net: Supernet, settings: SearchSettings) -> None:
    """Raises ConfigError where there are fewer networks than are to be measured."""
    if settings.budget_measurements > net.space.networks:
        raise ConfigError(
            f"budget_measurements={settings.budget_measurements} is more than the "
            f"{net.space.networks} networks of these widths, depths and formats"
        )


def model_of(asked: Asked, out: Path, *, resume: bool, progress: bool) -> nnx.Module | None:
    """The model that is searched, float32; None where a signal stopped its training."""
    if not asked.trains:
        return fresh(asked.training, jax.random.key(0))
    folder = out / "training"
    record = run(asked.training, folder, resume=resume, progress=progress)
    report(record, folder)
    return loaded(folder / "model") if record["finished"] else None


def loaded(folder: Path) -> nnx.Module:
    """A model of a directory, float32."""
    return jax.tree.map(widened, load(folder, progress=False))


def begin(asked: Asked, model: nnx.Module, data: RunData, out: Path, *, resume: bool) -> None:
    """Writes what the search is of, or checks that it goes on with that.

    Raises:
      ConfigError: `out` holds a search and it is not resumed, or it is another one.
    """
    file = out / "search.json"
    identity = {
        "training": to_table(asked.training),
        "search": to_table(asked.search),
        "data": dict(data.identity),
        "model": sha256_of(model),
    }
    if not file.exists():
        write_json(file, identity)
        return
    if not resume:
        raise ConfigError(f"{out} holds a search; --resume goes on with it, or name another folder")
    known = read_json(file)
    other = [k for k in identity if not isinstance(known, Mapping) or known.get(k) != identity[k]]
    if other:
        raise ConfigError(
            f"{file} is of another search: its {' and '.join(other)} differ; name another folder"
        )


def chosen(
    net: Supernet,
    model: nnx.Module,
    log: Log,
    limits: Mapping[str, float],
    settings: SearchSettings,
    rows: Rows,
    data: RunData,
    out: Path,
) -> list[dict[str, object]]:
    """Writes the front, and the network chosen of it; measures and prints that.

    Returns:
      the whole network and the chosen one, as `compared` has them.
    Raises:
      ConfigError: no network that was measured is within the limits.
    """
    names = settings.objectives
    front = {"tactic": settings.tactic, "objectives": names, "points": points_of(net, log, names)}
    write_json(out / "front.json", front)
    vectors, values = measured(log)
    row = best_within(values, names, limits) if limits else knee(values)
    picture = functools.partial(front_of, values=values, names=names, row=row)
    drawn(out / "front.png", picture)
    config = net.space.decode(vectors[row])
    written(net.cut(model, config), data, rows.inputs, out / "model")
    found = load(out / "model", progress=False)
    table = compared({"whole": model, "chosen": found}, rows, settings.turns)
    said = dict(zip(names, values[row].tolist(), strict=True))
    record = {"config": config, "limits": dict(limits), "searched": said, "networks": table}
    write_json(out / "chosen.json", record)
    show(table_of(table))
    print(f"{out}: model, front.json, front.png, chosen.json")
    return table


def late(limit: Limit | None, found: Mapping[str, Any]) -> str:
    """What is to be said where the chosen network took longer in the end than was asked for; a
    search compares ratios to the whole network, whose own time is another each time.

    Args:
      limit: the budget, if any.
      found: the chosen network, as `compared` has it.
    """
    if limit is None or limit.name != "latency" or found["ms"] <= limit.value:
        return ""
    return (
        f"--budget {limit.text} was met in the search, but the chosen network took "
        f"{found['ms']:.3g} ms in the end; time it again, or ask for less"
    )


def written(model: nnx.Module, data: RunData, inputs: PyTree, folder: Path) -> None:
    """Saves a network, and checks that what is loaded again computes the same.

    Raises:
      NumericalError: it does not.
    """
    save(model, folder, format="ffnlab")
    data.save_beside(folder)
    answer = jax.jit(called)
    ours, theirs = (np.asarray(answer(m, inputs)) for m in (model, load(folder, progress=False)))
    if not np.array_equal(ours, theirs):
        change = float(np.abs(ours - theirs).max())
        raise NumericalError(
            f"{folder}: what was saved computes something else, by up to {change:.3g}; are its "
            "files changed by another program?"
        )


def compared(models: Mapping[str, Any], rows: Rows, turns: int) -> list[dict[str, object]]:
    """What networks cost, timed in turns, and their loss on rows that chose nothing."""
    calls = {name: compiled(called, model, rows.inputs) for name, model in models.items()}
    times, loss = in_turns(calls, turns), jax.jit(rows.loss)
    found = []
    for name, model in models.items():
        spread = times.of(name)
        found.append(
            {
                "network": name,
                "shape": shape(model),
                "macs": macs(model, rows.inputs),
                "bytes": tree.nbytes(model),
                "ms": 1e3 * spread.median,
                "ms_quartiles": [1e3 * spread.low, 1e3 * spread.high],
                "loss": float(loss(model, rows.told)[0]),
            }
        )
    return found
