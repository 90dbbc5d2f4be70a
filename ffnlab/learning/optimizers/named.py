"""Optimizers by name, as optax chains with a learning-rate schedule.

Muon (arXiv 2502.16982 and optax.contrib.muon) orthogonalizes the momentum of the matrices inside
the layers; tables of the vocabulary and vectors follow AdamW beside it. Decay of weights applies
to matrices only.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import optax
from flax import nnx
from jaxtyping import Array, PyTree

from ffnlab.errors import ConfigError, at_least
from ffnlab.learning.optimizers.masters import in_float32
from ffnlab.learning.optimizers.noise import gradient_noise
from ffnlab.learning.optimizers.trust import lamb, matrices
from ffnlab.outside import Methods

Rate = Callable[[float], optax.Schedule]  # from a peak to the rate by step

SCHEDULES = ("trapezoid", "cosine", "constant")
OWN_SETTINGS = ("table_rate", "weight_decay", "b1", "b2")  # settings of our optimizers alone


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer and its schedule.

    Attributes:
      name: "adamw", "lamb", "lion", "muon" or "sgd"; or that of one from outside
        (`ffnlab.outside`), which takes the rate by step, as optax's do: "optax:adan".
      rate: peak learning rate (of Muon's matrices where name is "muon"), > 0.
      table_rate: peak rate of what Muon leaves to AdamW.
      schedule: "trapezoid" (constant, then linear to zero over the last `decay` of the steps),
        "cosine" (to zero) or "constant"; all after a linear warm-up.
      warmup: steps of the warm-up.
      decay: fraction of the steps in which a trapezoid falls, 0 < decay <= 1.
      weight_decay: per unit of learning rate, on matrices.
      clip: gradients are scaled to at most this global norm; 0 for no clipping.
      b1, b2: AdamW's, LAMB's and Lion's averages; b1 is also the momentum of Muon and SGD.
      noise: variance of the first step's noise on the clipped gradients
        (`ffnlab.learning.gradient_noise`), which then decays; 0 for none.
      options: of an optimizer from outside, in place of those that only ours have: table_rate,
        weight_decay, b1 and b2.
    """

    name: str = "adamw"
    rate: float = 1e-3
    table_rate: float = 3e-3
    schedule: str = "trapezoid"
    warmup: int = 100
    decay: float = 0.4
    weight_decay: float = 0.1
    clip: float = 1.0
    b1: float = 0.9
    b2: float = 0.95
    noise: float = 0.0
    options: Mapping[str, object] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        OPTIMIZERS.check(self.name)
        self._check_options()
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"schedule={self.schedule!r} is not one of {list(SCHEDULES)}")
        for field in ("rate", "table_rate"):
            if not getattr(self, field) > 0:
                raise ConfigError(f"{field}={getattr(self, field)} must be positive")
        if not 0 < self.decay <= 1:
            raise ConfigError(f"decay={self.decay} must lie in (0, 1]")
        for field in ("warmup", "weight_decay", "clip", "noise"):
            if getattr(self, field) < 0:
                raise ConfigError(f"{field}={getattr(self, field)} must not be negative")

    def _check_options(self) -> None:
        if self.name in OURS:
            if self.options:
                raise ConfigError(f"options={dict(self.options)!r}, but {self.name} takes none")
            return
        for field in dataclasses.fields(self):
            if field.name in OWN_SETTINGS and getattr(self, field.name) != field.default:
                raise ConfigError(
                    f"{field.name}={getattr(self, field.name)} is of our optimizers; {self.name} "
                    "takes what stands in its options"
                )


@dataclasses.dataclass(frozen=True)
class Extension:
    """More steps after the schedule has ended, with rows of another length.

    A model learns most from short rows, which are cheap, and needs few steps to use longer ones.

    Attributes:
      steps: how many; 0 for none.
      batch, length: of these steps' batches.
      rate: peak, as a fraction of the optimizer's; warmed up over a tenth, then linear to zero.
    """

    steps: int = 0
    batch: int = 4
    length: int = 512
    rate: float = 0.25

    def __post_init__(self) -> None:
        if self.steps < 0 or not self.rate > 0:
            raise ConfigError(
                f"extension needs steps >= 0 and rate > 0, got steps={self.steps}, rate={self.rate}"
            )
        at_least(1, batch=self.batch, length=self.length)


def rate_at(
    config: OptimizerConfig, peak: float, steps: int, extension: Extension = Extension()
) -> optax.Schedule:
    """The learning rate by step, over a run of `steps` steps and those of the extension.

    >>> rate = rate_at(OptimizerConfig(warmup=10, decay=0.5), 1.0, steps=100)
    >>> [round(float(rate(step)), 2) for step in (0, 5, 10, 50, 75, 100)]
    [0.0, 0.5, 1.0, 1.0, 0.5, 0.0]
    """
    warmup = min(config.warmup, steps)
    if config.schedule == "constant":
        after = optax.constant_schedule(peak)
    elif config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(1, steps - warmup))
    else:
        fall = min(max(1, round(config.decay * steps)), max(1, steps - warmup))
        after = optax.linear_schedule(peak, 0.0, fall, transition_begin=steps - warmup - fall)
    parts, starts = [optax.linear_schedule(0.0, peak, max(1, warmup)), after], [warmup]
    if extension.steps:
        top, rise = peak * extension.rate, -(-extension.steps // 10)
        parts += [optax.linear_schedule(0.0, top, rise)]
        parts += [optax.linear_schedule(top, 0.0, max(1, extension.steps - rise))]
        starts += [steps, steps + rise]
    return optax.join_schedules(parts, starts)


def make_optimizer(
    config: OptimizerConfig,
    steps: int,
    extension: Extension = Extension(),
    *,
    key: Array | None = None,
) -> optax.GradientTransformation:
    """The optimizer of a configuration, for a run of `steps` steps and those of the extension.

    Args:
      config: what to build.
      steps: of the run, before the extension.
      extension: see `Extension`.
      key: of the noise, where the configuration asks for some.
    Returns:
      an optax transformation that accepts any tree of floating arrays; its state is float32.
    Raises:
      ConfigError: noise without a key; an optimizer from outside that cannot be had, or other
        options than it takes.
    """
    parts = [optax.clip_by_global_norm(config.clip)] if config.clip else []
    if config.noise:
        parts.append(gradient_noise(config.noise, key=key))
    rate = lambda peak: rate_at(config, peak, steps, extension)  # noqa: E731
    if config.name in OURS:
        inner = OPTIMIZERS.make(config.name, config, rate)
    else:
        options = OPTIMIZERS.read(config.name, config.options, "[optimizer.options]")
        inner = OPTIMIZERS.make(config.name, rate(config.rate), **options)
    return in_float32(optax.chain(*parts, inner) if parts else inner)


def layer_matrices(params: PyTree) -> PyTree:
    """Muon's dimension numbers for matrices that map activations, None for the other leaves.

    A parameter whose logical axes name the vocabulary is a table, not a map; axes before the last
    two are stacks.
    """
    dims = optax.contrib.MuonDimensionNumbers(-2, -1)

    def of_node(node: PyTree, is_matrix: PyTree) -> PyTree:
        axes = node.get_metadata().get("axes") if isinstance(node, nnx.Variable) else None
        is_table = "vocab" in (axes or ())
        return jax.tree.map(lambda yes: dims if yes and not is_table else None, is_matrix)

    is_variable = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
    return jax.tree.map(of_node, params, matrices(params), is_leaf=is_variable)


def _adamw(config: OptimizerConfig, rate: Rate) -> optax.GradientTransformation:
    decay = {"weight_decay": config.weight_decay, "mask": matrices}
    return optax.adamw(rate(config.rate), config.b1, config.b2, **decay)


def _lamb(config: OptimizerConfig, rate: Rate) -> optax.GradientTransformation:
    decay = config.weight_decay
    return lamb(rate(config.rate), config.b1, config.b2, weight_decay=decay)


def _lion(config: OptimizerConfig, rate: Rate) -> optax.GradientTransformation:
    decay = {"weight_decay": config.weight_decay, "mask": matrices}
    return optax.lion(rate(config.rate), config.b1, config.b2, **decay)


def _sgd(config: OptimizerConfig, rate: Rate) -> optax.GradientTransformation:
    decay = optax.add_decayed_weights(config.weight_decay, matrices)
    return optax.chain(decay, optax.sgd(rate(config.rate), config.b1 or None))


def _muon(config: OptimizerConfig, rate: Rate) -> optax.GradientTransformation:
    return optax.contrib.muon(
        rate(config.rate),
        beta=config.b1,
        adam_b1=config.b1,
        adam_b2=config.b2,
        weight_decay=config.weight_decay,
        adam_learning_rate=rate(config.table_rate),
        muon_weight_dimension_numbers=layer_matrices,
        consistent_rms=0.2,
    )


OURS: dict[str, Callable[[OptimizerConfig, Rate], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "lamb": _lamb,
    "lion": _lion,
    "muon": _muon,
    "sgd": _sgd,
}
# What a training file may name, optimizers from outside too.
OPTIMIZERS = Methods(
    "optimizer", "ffnlab.optimizers", optax.GradientTransformation, OURS, leading=1
)
