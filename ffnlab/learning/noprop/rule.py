"""NoProp (arXiv 2503.24322): blocks that learn to denoise a class embedding, each alone.

The latent that block t reads is drawn from a distribution fixed beforehand, so nothing crosses from
block to block while learning, forwards or backwards; inside itself a block is differentiated as
usual. At inference the blocks are chained from noise to a class. Three kinds:

- "discrete": T blocks, block t with loss T / 2 eta (SNR(t) - SNR(t - 1)) |u_hat - u|^2, plus the
  cross-entropy of the readout on z_T and KL(q(z_0 | y) || N(0, I)). The losses of all blocks are
  summed and run side by side: each block gets the gradient it would get alone.
- "continuous": one denoiser that takes the time t ~ U(0, 1), loss eta / 2 SNR'(t) |u_hat - u|^2;
  inference integrates the probability flow. abar(t) is a cosine, or is learned with the rest where
  the network has a `LearnedSchedule`.
- "flow": one denoiser of the straight path z_t = t u + (1 - t) z_0, regressed on u - z_0, plus the
  cross-entropy of z_t + (1 - t) v; inference integrates v.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from ffnlab import tree
from ffnlab.errors import ConfigError, is_known
from ffnlab.learning.labels import check_labels
from ffnlab.learning.noprop import core
from ffnlab.learning.optimizers.masters import in_float32
from ffnlab.models.noprop_net import NoPropNet
from ffnlab.rule import Rule

__all__ = ["NoPropOptions", "NoPropState", "block_losses", "noprop"]

KINDS = ("continuous", "discrete", "flow")


class NoPropState(NamedTuple):
    """What NoProp changes.

    Attributes:
      model: the network as learned so far.
      optimizer: optax state, over the trained leaves.
      key: of the next draw of noise.
      step: [] int32, steps taken.
    """

    model: PyTree
    optimizer: PyTree
    key: Array
    step: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class NoPropOptions:
    """The kind and its settings.

    Attributes:
      kind: "discrete", "continuous" or "flow".
      eta: weight of the denoising loss, > 0; the paper takes .1 (discrete) and 1 (continuous).
      abar: of "discrete", the T + 1 levels of signal, rising inside (0, 1); cosine when None.
      integration: of the other kinds, steps of inference.
      noisy: of "discrete", whether inference adds the posterior's noise.
    """

    kind: str = "discrete"
    eta: float | Array = 0.1
    abar: tuple[float, ...] | None = None
    integration: int = 100
    noisy: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"kind={self.kind!r} is not one of {KINDS}")
        if (is_known(self.eta) and not self.eta > 0) or self.integration < 1:
            raise ConfigError(
                f"eta={self.eta} must be positive, integration={self.integration} at least 1"
            )
        if self.abar is not None:
            core.check_schedule(np.asarray(self.abar))

    def levels(self, blocks: int) -> Float[Array, "times"]:
        """abar at times 0 .. blocks.

        Raises:
          ConfigError: `abar` is of another number of blocks.
        """
        if self.abar is None:
            return core.cosine(jnp.linspace(0.0, 1.0, blocks + 1))
        if len(self.abar) != blocks + 1:
            raise ConfigError(
                f"abar has {len(self.abar)} levels; {blocks} blocks need {blocks + 1}"
            )
        return jnp.asarray(self.abar)


def block_losses(
    model: NoPropNet,
    x: Float[Array, "n i"],
    y: Int[Array, "n"],
    abar: Float[Array, "times"],
    key: Array,
    eta: float | Array,
) -> tuple[Float[Array, "T"], Float[Array, ""], Float[Array, ""]]:
    """The losses of the discrete kind.

    Args:
      model: T blocks.
      x: inputs.
      y: their classes.
      abar: levels of signal, [T + 1].
      key: of the noise; block t draws by `fold_in(key, t)`.
      eta: weight of denoising.
    Returns:
      (denoising loss of each block [T], cross-entropy of the readout on z_T [], mean KL []).
    """
    u, total = model.of_class(y), len(abar) - 1

    def denoising(block: PyTree, t: Array, level: Array, weight: Array) -> Array:
        z = core.sample(u, level, jax.random.fold_in(key, t))
        error = jnp.sum((model.guess(block(x, z)) - u) ** 2, axis=-1)
        return 0.5 * total * eta * weight * error.mean()

    times = jnp.arange(1, total + 1)
    each = jax.vmap(denoising)(model.blocks, times, abar[:-1], core.weights_of(abar))
    last = core.sample(u, abar[-1], jax.random.fold_in(key, 0))
    top = optax.softmax_cross_entropy_with_integer_labels(model.out(last), y).mean()
    return each, top, core.kl_to_noise(u, abar[0]).mean()


def discrete(options: NoPropOptions, model: NoPropNet, batch: PyTree, key: Array) -> tuple:
    """Loss and metrics of the discrete kind."""
    x, y = batch
    each, top, kl = block_losses(model, x, y, options.levels(count(model)), key, options.eta)
    return each.sum() + top + kl, {"denoise": each.sum(), "top": top}


def continuous(options: NoPropOptions, model: NoPropNet, batch: PyTree, key: Array) -> tuple:
    """Loss and metrics of the continuous kind."""
    x, y = batch
    times, noise, last = jax.random.split(key, 3)
    u, t = model.of_class(y), jax.random.uniform(times, (len(y),))
    slope = jax.vmap(jax.grad(lambda t: core.snr(model.abar(t))))(t)
    z = core.sample(u, model.abar(t), noise)
    error = jnp.sum((model.guess(model.blocks(x, z, t)) - u) ** 2, axis=-1)
    denoise = 0.5 * options.eta * jnp.mean(slope * error)
    final = core.sample(u, model.abar(jnp.float32(1)), last)
    top = optax.softmax_cross_entropy_with_integer_labels(model.out(final), y).mean()
    kl = core.kl_to_noise(u, model.abar(jnp.float32(0))).mean()
    return denoise + top + kl, {"denoise": denoise, "top": top}


def flow(options: NoPropOptions, model: NoPropNet, batch: PyTree, key: Array) -> tuple:
    """Loss and metrics of flow matching."""
    x, y = batch
    times, noise = jax.random.split(key)
    u, t = model.of_class(y), jax.random.uniform(times, (len(y), 1))
    start = jax.random.normal(noise, u.shape)
    z = t * u + (1 - t) * start
    v = model.blocks(x, z, t[:, 0])
    match = options.eta * jnp.mean(jnp.sum((v - (u - start)) ** 2, axis=-1))
    end = z + (1 - t) * v
    top = optax.softmax_cross_entropy_with_integer_labels(model.out(end), y).mean()
    return match + top, {"denoise": match, "top": top}


LOSSES: dict[str, Callable] = {"continuous": continuous, "discrete": discrete, "flow": flow}


def predicted(options: NoPropOptions, model: NoPropNet, x: Array, key: Array) -> Array:
    """Scores: blocks chained, or the flow integrated, from noise drawn by the key."""
    start, key = jax.random.split(key)
    z = jax.random.normal(start, (len(x), model.table.shape[1]))
    if options.kind == "discrete":
        steps = core.posterior(options.levels(count(model)))

        def step(z: Array, at: tuple) -> tuple[Array, None]:
            block, (a, b, c), k = at
            z = a * model.guess(block(x, z)) + b * z
            noise = jnp.sqrt(c) * jax.random.normal(k, z.shape) if options.noisy else 0.0
            return z + noise, None

        keys = jax.random.split(key, count(model))
        z = jax.lax.scan(step, z, (model.blocks, tuple(steps), keys))[0]
        return model.out(z)

    def field(t: Array, z: Array) -> Array:
        found = model.blocks(x, z, jnp.full(len(x), t))
        if options.kind == "flow":
            return found
        return core.flow_field(model.abar, t, z, model.guess(found))

    return model.out(core.heun(field, z, options.integration))


def count(model: NoPropNet) -> int:
    """How many blocks a discrete network has."""
    return len(jax.tree.leaves(model.blocks)[0])


def noprop(
    options: NoPropOptions = NoPropOptions(),
    optimizer: optax.GradientTransformation | None = None,
) -> Rule:
    """The rule; a batch is (x, y), inputs with classes, and the model a `NoPropNet`.

    Args:
      options: the kind and its settings.
      optimizer: AdamW at 1e-3 with decay 1e-3 when None, as in the paper.
    Returns:
      a Rule; its state is `NoPropState`, its metrics "loss", "denoise" and "top". `predict` draws
      its noise from the state's key. `step` donates its state.
    Raises:
      ConfigError: from `init`, where the network does not fit the kind or its levels.
      ValueError: from `check`, for classes outside the embedding.
    """
    optimizer = optax.adamw(1e-3, weight_decay=1e-3) if optimizer is None else optimizer
    optimizer = in_float32(optimizer)

    def split(model: NoPropNet) -> tuple[PyTree, PyTree]:
        return tree.trained(model, None if model.learned else ~tree.at("embed**"))

    def init(model: NoPropNet, key: Array) -> NoPropState:
        check(options, model)
        model = jax.tree.map(jnp.copy, model)  # the step donates it; the caller's stays intact
        return NoPropState(model, optimizer.init(split(model)[0]), jnp.copy(key), jnp.int32(0))

    def step(state: NoPropState, batch: PyTree) -> tuple[NoPropState, dict[str, Array]]:
        trained, fixed = split(state.model)
        following, draw = jax.random.split(state.key)

        def loss(trained: PyTree) -> tuple[Array, dict[str, Array]]:
            return LOSSES[options.kind](options, tree.combine(trained, fixed), batch, draw)

        (value, extra), gradient = jax.value_and_grad(loss, has_aux=True)(trained)
        updates, memory = optimizer.update(gradient, state.optimizer, trained)
        model = tree.combine(optax.apply_updates(trained, updates), fixed)
        return NoPropState(model, memory, following, state.step + 1), {"loss": value, **extra}

    return Rule(
        "noprop",
        init,
        jax.jit(step, donate_argnums=0),
        jax.jit(lambda state, x: predicted(options, state.model, x, state.key)),
        check=lambda state, batch: check_labels(batch[1], state.model.embed.get_value().shape[0]),
    )


def check(options: NoPropOptions, model: NoPropNet) -> None:
    """Raises ConfigError where a network does not fit the kind or its levels."""
    is_stack = model.blocks.joint.weight.dense().ndim == 3
    if is_stack != (options.kind == "discrete"):
        has = "a stack of blocks" if is_stack else "one block that takes the time"
        raise ConfigError(f"kind={options.kind!r} does not fit a network of {has}")
    outputs = model.blocks.head.weight.shape[-1]
    wanted = model.table.shape[options.kind == "flow"]
    if outputs != wanted:
        raise ConfigError(
            f"kind={options.kind!r} needs denoisers of {wanted} outputs, not {outputs} (velocity=…)"
        )
    if model.schedule is not None and options.kind != "continuous":
        raise ConfigError(
            f"kind={options.kind!r} learns no schedule; schedule=… is for 'continuous' alone"
        )
    if is_stack:
        options.levels(count(model))
