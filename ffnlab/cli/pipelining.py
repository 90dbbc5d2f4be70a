"""The pipeline of a training run: what a file says of it, and the model in its stages."""

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PyTree

from ffnlab import parallel
from ffnlab.errors import ConfigError, at_least
from ffnlab.formats.kinds import KINDS
from ffnlab.layers.pipelining import Schedule
from ffnlab.models import Pipelined, pipeline, unpipeline
from ffnlab.rule import Rule

__all__ = [
    "PipelineConfig",
    "check_staged",
    "in_list",
    "in_stages",
    "of_whole_batches",
    "schedule_of",
]

M = TypeVar("M", bound=nnx.Module)


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """Layers in stages that work at the same time (`ffnlab.models.pipeline`).

    Attributes:
      stages: parts of the model; 0 for as many as the devices along `pp` of the mesh. A run goes on
        with its stages on any mesh whose `pp` divides them.
      microbatches: parts of a batch that go through them one after the other; 0 for as many as
        stages.
      repeats: how often each goes through all stages.
    """

    stages: int = 0
    microbatches: int = 0
    repeats: int = 1

    def __post_init__(self) -> None:
        at_least(0, stages=self.stages, microbatches=self.microbatches)
        at_least(1, repeats=self.repeats)


def schedule_of(config: PipelineConfig, mesh: str) -> Schedule | None:
    """The schedule of a run on a mesh; None where it has no pipeline.

    Raises:
      ConfigError: keys of a pipeline without stages, or stages that are left to the devices.
    """
    devices = parallel.mesh_sizes(mesh).get("pp", 1)
    if devices == -1 and not config.stages:
        raise ConfigError(
            f"mesh={mesh!r}: pp=-1 leaves open what the model is; set stages in [pipeline]"
        )
    stages = config.stages or devices
    if stages > 1 or config.stages:
        return Schedule(stages, config.microbatches or stages, config.repeats)
    if config != PipelineConfig():
        raise ConfigError(
            f"[pipeline] is set, but mesh={mesh!r} has no pp: add pp=SIZE to it, or set stages"
        )
    return None


def check_staged(schedule: Schedule | None, kind: str) -> None:
    """Raises ConfigError where a run has stages and its kind of model none."""
    if schedule is not None and not getattr(KINDS[kind].model, "pipelines", False):
        known = [name for name, found in KINDS.items() if getattr(found.model, "pipelines", False)]
        raise ConfigError(
            f"pp in the mesh or stages in [pipeline]: a model of kind {kind!r} has no stages; "
            f"{' or '.join(known)} has"
        )


def in_stages(model: M, schedule: Schedule | None) -> M:
    """The model in the stages of a run; itself where there are none; errors as `pipeline`."""
    return model if schedule is None else pipeline(model, **dataclasses.asdict(schedule))


def in_list(model: M) -> M:
    """The model with layers that are in no pipeline; leaves may be abstract."""
    if not isinstance(getattr(model, "layers", None), Pipelined):
        return model
    is_abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(model))
    return jax.eval_shape(unpipeline, model) if is_abstract else unpipeline(model)


def of_whole_batches(rule: Rule, rows: int) -> Rule:
    """The rule, whose `predict` takes any number of rows: the last one fills up whole batches.

    Args:
      rule: of a pipelined model.
      rows: of a batch, which its microbatches and its mesh divide.
    """

    def predict(state: PyTree, inputs: PyTree) -> PyTree:
        asked = len(jax.tree.leaves(inputs)[0])

        def filled(x: Any) -> Any:
            return jnp.concatenate([x, jnp.repeat(x[-1:], -asked % rows, axis=0)])

        return jax.tree.map(lambda y: y[:asked], rule.predict(state, jax.tree.map(filled, inputs)))

    return dataclasses.replace(rule, predict=predict)
