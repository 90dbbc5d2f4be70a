"""What a training run of the command line is, and what it may be resumed as."""

import dataclasses
import importlib.metadata
import os
from collections.abc import Mapping
from typing import Any

import jax

from ffnlab.cli.training import TrainConfig
from ffnlab.errors import ConfigError, FormatError
from ffnlab.parallel import Identity, from_table, to_table

__all__ = ["identity_of", "versions"]

# What may differ when a run is resumed: it changes nothing that has been learned so far.
FREE = (
    "steps",
    "mesh",
    "on_bad",
    "patience",
    "log_every",
    "evaluate_every",
    "checkpoint_every",
    "checkpoint_local",
    "checkpoint_local_every",
)


def identity_of(settings: TrainConfig, text: Mapping) -> Identity:
    """What a run is, so that a resumed one is the same but for `FREE`.

    With a trapezoid schedule, more or fewer steps change nothing before the fall begins. Another
    mesh, number of threads or version changes the last bits at most, and is warned of.
    """
    place = {"threads": os.cpu_count(), "processes": jax.process_count()}
    place |= {"versions": versions("jax", "flax", "optax", "numpy")}
    table = {"config": to_table(settings), "text": dict(text), **place}

    def check(found: Any, source: str, position: int | None) -> list[str]:
        earlier, kept = settings_of(found, source), settings.run
        free = {name: getattr(kept, name) for name in FREE}
        check_stages(earlier, settings)
        run = dataclasses.replace(earlier.run, **free)
        adapted = dataclasses.replace(earlier, run=run, pipeline=settings.pipeline)
        same = {"config": adapted == settings, "text": found.get("text") == table["text"]}
        different = " and ".join(name for name in same if not same[name])
        if different:
            raise ConfigError(
                f"this run was started with another {different}; see {source}, or train into "
                "another folder"
            )
        check_extension(earlier, settings, position)
        here, there = place | {"mesh": kept.mesh}, {**found, "mesh": earlier.run.mesh}
        return [
            f"{source} was written with {name} {there[name]!r}, not {here[name]!r}"
            for name in here
            if name in there and there[name] != here[name]
        ]

    return Identity(table, check)


def check_stages(earlier: TrainConfig, now: TrainConfig) -> None:
    """Raises ConfigError where the layers of a run would be in other stages than they are."""
    was, wanted = earlier.schedule, now.schedule
    if was != wanted:
        have = "no pipeline" if was is None else f"{was}"
        asks = "none" if wanted is None else f"{wanted}"
        hint = "" if was is None else f"; set stages = {was.stages} in [pipeline], on any mesh"
        raise ConfigError(f"this run was started with {have}, and the file asks for {asks}{hint}")


def check_extension(earlier: TrainConfig, now: TrainConfig, position: int | None) -> None:
    """Raises ConfigError where other steps would move an extension that has begun."""
    first = min(earlier.run.steps, now.run.steps)
    moved = now.extension.steps and earlier.run.steps != now.run.steps
    if moved and position is not None and position > first:
        raise ConfigError(
            f"steps={now.run.steps}, but this run stands at step {position} and its extension "
            f"begins after step {earlier.run.steps}: it would move over steps that were taken"
        )


def settings_of(table: Any, source: str) -> TrainConfig:
    """The configuration in what a run says of itself; FormatError where there is none."""
    config = table.get("config") if isinstance(table, dict) else None
    if not isinstance(config, dict) or not isinstance(table.get("text"), dict):
        raise FormatError(f"{source} does not say which run it is of")
    try:
        return from_table(config, TrainConfig, source)
    except ConfigError as error:
        raise FormatError(str(error)) from None


def versions(*names: str) -> dict[str, str]:
    """Installed versions of packages by name."""
    return {name: importlib.metadata.version(name) for name in names}
