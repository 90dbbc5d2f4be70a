"""What a training file makes of a model before it learns, and what it is to learn by.

    start = "DIR"                 # a model directory, or one that comes with ffnlab, to go on from
    trainable = "lora"            # what learns: a part that an adapter added, or paths
    loss = "random_choices"       # instead of the loss of the data
    [[transform]]
    name = "duo"
    ratio = 16

A transform here needs no data, but for a start that looks at the graph of a run ("virgo"). What
else calibrates is a stage of `ffnlab compress`.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, PyTree

from ffnlab import transform, tree
from ffnlab.cli.inputs.data_kinds import ImagesConfig
from ffnlab.errors import ConfigError
from ffnlab.formats import load
from ffnlab.formats.embedded import embedded, shipped
from ffnlab.formats.kinds import KINDS, kind_of
from ffnlab.formats.opening import loaded_config
from ffnlab.losses import InformedLoss, Loss
from ffnlab.models.adapters import TRAINS
from ffnlab.outside import Methods
from ffnlab.parallel.config import to_table
from ffnlab.recipes import METHODS

__all__ = [
    "LOSSES",
    "changed",
    "check_changes",
    "check_loss",
    "is_informed",
    "loss_named",
    "selected",
    "started",
    "table_at",
]

# Transforms that look at the graph of a run, and at nothing of the model but its widths.
LOOKING = frozenset({"virgo"})

# A factory is given the loss of the data where it has a parameter `loss`; the rest are options.
LOSSES: Methods = Methods(
    "loss",
    "ffnlab.losses",
    Callable,  # type: ignore[arg-type]
    MappingProxyType(
        {
            "augmented": "ffnlab.data:augmented",
            "budgeted": "ffnlab.routing.duo:budgeted",
            "distilled": "ffnlab.losses:distilled",
            "elastic": "ffnlab.pruning.search.supernet:elastic_ffns",
            "random_choices": "ffnlab.routing.duo:random_choices",
            "routed": "ffnlab.losses:routed",
            "self_guided": "ffnlab.structure.structured_ffn:self_guided",
            "specialized": "ffnlab.routing.lora_mixer:specialized",
            "supervised": "ffnlab.structure.revcol:supervised",
        }
    ),
    given=frozenset({"loss"}),
)


def check_changes(tables: Sequence[Mapping[str, object]]) -> None:
    """Checks `[[transform]]` tables without importing what they name.

    Raises:
      ConfigError: one has no name, or one that is not known.
    """
    for i, table in enumerate(tables):
        name = table.get("name")
        if not isinstance(name, str):
            raise ConfigError(f"[[transform]] {i + 1} has no name; {', '.join(METHODS.names())} …")
        METHODS.check(name)


def check_loss(loss: str, data: object) -> None:
    """Checks that a loss that is named is of a run's data.

    Raises:
      ConfigError: images augmented where there are none with classes, a teacher beside another
        loss, or a loss without its teacher.
    """
    teacher = getattr(data, "teacher", "")
    if loss == "augmented" and not isinstance(data, ImagesConfig):
        raise ConfigError("loss='augmented' is of images with classes: [data] of kind 'images'")
    if teacher and loss not in ("", "distilled"):
        raise ConfigError(
            f"teacher={teacher!r} says what it sees in the images as they are, which loss={loss!r} "
            "does not take; leave one of them out"
        )
    if loss == "distilled" and not teacher:
        raise ConfigError("loss='distilled' is of a teacher: set one in [data], kind 'images'")


def changed(
    model: Any,
    tables: Sequence[Mapping[str, object]],
    graph: Callable[[], PyTree] | None = None,
) -> Any:
    """The model after the transforms of a training file, in their order.

    Args:
      model: under `jax.jit` and `jax.eval_shape` too.
      tables: `[[transform]]`.
      graph: gives the batch of a run that sees a whole graph; None of other runs.
    Raises:
      ConfigError: bad options, a transform that calibrates, or what one says of the model.
    """
    for table in tables:
        name = str(table["name"])
        given = {key: value for key, value in table.items() if key != "name"}
        made = METHODS.make(name, **METHODS.read(name, given, f"[[transform]] {name!r}"))
        if made.observe is not None and graph is not None and name in LOOKING:
            look = functools.partial(transform.calibrate, made, model, progress=False)
            # In a thread of its own nothing is traced: a run asks for its model's shapes too.
            with ThreadPoolExecutor(1) as pool:
                stats = pool.submit(lambda look=look: look([graph()])).result()
            model = made.rewrite(model, stats)
            continue
        if made.observe is not None:
            raise ConfigError(
                f"[[transform]] {name!r} calibrates on data, as a stage of `ffnlab compress` does; "
                "here transforms change a model without looking at any"
            )
        model, _ = transform.apply(made, model)
    return model


def loss_named(name: str, options: Mapping[str, object], of_data: Loss) -> Loss | InformedLoss:
    """The loss that a file names.

    Args:
      options: `[loss_options]`.
      of_data: what the data would be learned by without.
    Raises:
      ConfigError: there is none, or it takes other options.
    """
    found = LOSSES.read(name, options, "[loss_options]")
    if "loss" in LOSSES.takes(name):
        found["loss"] = of_data
    return LOSSES.make(name, **found)


def is_informed(loss: Callable) -> bool:
    """Whether a loss takes a moment (`ffnlab.losses.InformedLoss`).

    >>> is_informed(lambda model, batch: 0), is_informed(lambda model, batch, moment: 0)
    (False, True)
    """
    try:
        inspect.signature(loss).bind("model", "batch", "moment")
    except TypeError:
        return False
    return True


def selected(trainable: str) -> tree.Selector:
    """What learns: by the name of an adapter's part, or by a pattern of paths."""
    return TRAINS[trainable] if trainable in TRAINS else tree.at(trainable)


def table_at(start: str) -> dict[str, object]:
    """`[model]` of the model that a run goes on from.

    Raises:
      ConfigError, FormatError: there is none.
    """
    own = shipped(Path(start))
    config = embedded(own)[0].config if own else loaded_config(start, tuple(KINDS))
    return {"kind": kind_of(config)} | to_table(config)


def widened(leaf: Array) -> Array:
    """A bfloat16 or float16 array in float32, which has all their numbers; another one as it is."""
    is_narrow = leaf.dtype in (jnp.bfloat16, jnp.float16)
    return leaf.astype(jnp.float32) if is_narrow else leaf


def started(start: str, config: object) -> nnx.Module:
    """The model that a run goes on from, float32.

    Raises:
      ConfigError: its configuration is another than the file's `[model]`.
      FormatError: there is none.
    """
    own = shipped(Path(start))
    with jax.ensure_compile_time_eval():  # shapes of a run are asked for too, without its arrays
        model = embedded(own)[0] if own else load(start)
    model = jax.tree.map(widened, model)
    if getattr(model, "config", config) != config:
        raise ConfigError(f"[model] is not that of start={start!r}; leave it out")
    return model
