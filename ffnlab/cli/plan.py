"""`ffnlab plan`: what a training run would take on a mesh, before renting it."""

import dataclasses
import functools
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
from rich.table import Table

from ffnlab import parallel
from ffnlab.cli.inputs.data_kinds import ImagesConfig
from ffnlab.cli.inputs.reading import reading_of
from ffnlab.cli.show import show
from ffnlab.cli.training import (
    RunConfig,
    TrainConfig,
    abstract_batch,
    find_methods,
    fresh,
    read_training,
    rule_of,
)
from ffnlab.errors import ConfigError, at_least
from ffnlab.formats.huggingface import dialects
from ffnlab.formats.opening import config_of
from ffnlab.layers.pipelining import Schedule
from ffnlab.parallel import pretended
from ffnlab.parallel.program import read_program
from ffnlab.storage.files import read_json

__all__ = ["measure", "plan"]

GIB = 2**30
LAYERED = ("decoder", "encoder", "vit")  # kinds whose blocks are scanned


def plan(
    config: Path,
    /,
    *,
    mesh: str | None = None,
    batch: int | None = None,
    length: int | None = None,
    microbatches: int | None = None,
    remat: Literal["nothing", "products"] | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> None:
    """Compiles the training step for a mesh of pretended devices, without any data.

    Parameters and optimizer state are exact; the memory of the step, and what is sent between
    devices in it, are those of a program compiled for CPU devices, whose activations are float32.

    Args:
      config: a TOML file of `ffnlab train`, or a model directory or config.json.
      mesh: "dp=2,fsdp=16,tp=8"; the configured one when not given, else one device.
      batch: rows of a batch, over the whole mesh; the configured number when not given.
      length: predictions in a row; likewise.
      microbatches: parts of a batch that go through the stages of a mesh with `pp`; likewise, else
        as many as stages.
      remat: "nothing" or "products", what blocks keep for the backward pass; as configured when not
        given, else all.
      dtype: of the parameters, "float32" or "bfloat16".
    Raises:
      ConfigError: no such file, or a bad one; a malformed mesh, or a size of it is left open.
      FFNLabError: whatever else does not fit, as the process that compiles says it.
    """
    at_least(1, batch=batch, length=length, microbatches=microbatches)
    settings = settings_of(config)
    find_methods(settings)  # as `ffnlab train` finds them; the other process searches more
    mesh = settings.run.mesh or "dp=1" if mesh is None else mesh
    sizes = parallel.mesh_sizes(mesh).values()
    if -1 in sizes:
        raise ConfigError(f"mesh={mesh!r}: a plan needs every size, there are no devices to count")
    request = {"config": str(config), "mesh": mesh, "batch": batch, "length": length}
    request |= {"microbatches": microbatches, "remat": remat, "dtype": dtype}
    found = pretended.ask("ffnlab.cli.plan", request, math.prod(sizes))
    show(as_table(found, mesh))


def as_table(found: dict, mesh: str) -> Table:
    """The figures for people."""
    count = found["parameters"]
    size = f"{count / 1e9:.3g} G" if count >= 1e9 else f"{count / 1e6:.3g} M"
    table = Table(title=f"{size} parameters on {mesh}")
    what = f"rows of {found['length']} tokens" if found["length"] else "inputs"
    table.caption = (
        f"{found['rows']} {what}; traced in "
        f"{found['lower_seconds']:.1f} s, compiled in {found['compile_seconds']:.1f} s"
    )
    for name in ("part", "GiB per device", "how known"):
        table.add_column(name, justify="right" if "GiB" in name else "left")
    for name, size in found["state"].items():
        table.add_row(f"state: {name}", f"{size / GIB:.3f}", "exact, from the layout")
    how = "compiled for CPU, float32 activations"
    table.add_row("working memory", f"{found['temporary'] / GIB:.3f}", how)
    if found["pipeline"] is not None:
        schedule = Schedule(**found["pipeline"])
        table.caption += (
            f"\n{schedule.stages} stages, {schedule.microbatches} microbatches, "
            f"{schedule.repeats} repeats: {schedule.ticks} ticks, a bubble of {schedule.bubble:.1%}"
        )
    table.add_row("all", f"{(sum(found['state'].values()) + found['temporary']) / GIB:.3f}", "")
    for kind, (count, size) in sorted(found["sent"].items()):
        table.add_row(f"sent: {kind}", f"{size / GIB:.3f}", f"{count} results a step, as compiled")
    return table


def settings_of(path: Path) -> TrainConfig:
    """The run that is asked about.

    Raises:
      ConfigError: no such file, or a bad one.
    """
    if path.suffix == ".toml":
        return read_training(path)
    if path.is_dir():
        model = config_of(path, LAYERED)
    else:
        try:
            model = dialects.read_config(read_json(path), where=str(path))
        except OSError as error:
            raise ConfigError(f"config {str(path)!r} cannot be read: {error.strerror}") from None
    data = reading_of(model).data[0]
    given = {"size": model.image, "colour": model.channels == 3} if data is ImagesConfig else {}
    return TrainConfig(model, RunConfig(steps=1), data(**given))


def measure(request: dict) -> dict[str, object]:
    """Compiles the step abstractly.

    Args:
      request: the arguments of `plan`.
    Returns:
      bytes per device of each part of the rule's state and of the step, seconds, sizes.
    Raises:
      ConfigError: the layout does not divide a parameter or the batch, an axis of the mesh cuts
        nothing, or a bad configuration.
    """
    settings = settings_of(Path(request["config"]))
    mesh = parallel.parse_mesh(request["mesh"])
    rows = settings.data.batch if request["batch"] is None else request["batch"]
    length = getattr(settings.data, "length", 0) if request["length"] is None else request["length"]
    key, dtype = jax.random.key(0), jnp.dtype(request["dtype"])

    has_layers = settings.kind in LAYERED
    parts = request.get("microbatches")
    staged = settings.pipeline if parts is None else replace(settings.pipeline, microbatches=parts)
    changed = {
        "mesh": request["mesh"],
        "scan": has_layers,
        "remat": request["remat"] or settings.run.remat,
    }
    settings = replace(settings, run=replace(settings.run, **changed), pipeline=staged)
    rule = rule_of(settings)
    make = functools.partial(fresh, settings, dtype=dtype)

    model = jax.eval_shape(make, key)
    state = jax.eval_shape(rule.init, model, key)
    state = parallel.abstract(state, mesh)
    tokens = abstract_batch(settings, mesh, rows, length)
    step = parallel.make_step(rule, mesh)
    begin = time.perf_counter()
    lowered = step.trace(state, tokens).lower()
    middle = time.perf_counter()
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    assert memory is not None  # CPUs tell
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(model)),
        "rows": rows,
        "length": length,
        "pipeline": None if (found := settings.schedule) is None else dataclasses.asdict(found),
        "state": {name: parallel.bytes_per_device(part) for name, part in state._asdict().items()},
        "temporary": memory.temp_size_in_bytes,
        "sent": {kind: list(sent) for kind, sent in read_program(compiled.as_text()).sent.items()},
        "lower_seconds": middle - begin,
        "compile_seconds": time.perf_counter() - middle,
    }


if __name__ == "__main__":
    pretended.answer(measure)
