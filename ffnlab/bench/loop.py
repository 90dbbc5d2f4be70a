"""What the training loop costs beside the step itself.

    ratio = seconds of a run / seconds of the run that passed inside its steps

A step here sleeps for a given time and then hands on a state of the embedded model's size, so that
all else is the loop's: cutting batches, reading and writing metrics, copying and saving the state,
the wait for the last save included.
"""

import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree

from ffnlab.data import TextBatches
from ffnlab.formats import embedded
from ffnlab.learning import backprop
from ffnlab.models import Decoder, DecoderConfig
from ffnlab.parallel import LoopOptions, Work, train
from ffnlab.rule import Rule

__all__ = ["overhead"]

ROWS, LENGTH = 8, 256
OPTIONS = LoopOptions(log_every=20, checkpoint_every=200, progress=False)


def overhead(seconds: float = 0.1, steps: int = 200, config: DecoderConfig | None = None) -> float:
    """The ratio above, for a run that logs every 20 steps and saves every 200 and at its end.

    Args:
      seconds: of a step, > 0.
      steps: of the run, >= 2.
      config: of the model whose state is handed on; the embedded model's when None.
    """
    config = embedded()[0].config if config is None else config
    model, key = Decoder(config, key=jax.random.key(0)), jax.random.key(1)
    text = np.random.default_rng(0).integers(0, 256, 1 << 20).astype(np.uint8)
    batches, spent = TextBatches(text, ROWS, LENGTH), []
    rule, work = sleeping(seconds, spent), Work(lambda position: ROWS * LENGTH)
    with tempfile.TemporaryDirectory() as folder:
        common = {"key": key, "options": OPTIONS, "work": work}
        train(rule, model, batches, 2, folder=f"{folder}/first", **common)  # compiles and imports
        spent.clear()
        whole = train(rule, model, batches, steps, folder=f"{folder}/run", **common).seconds
    return whole / sum(spent)


def sleeping(seconds: float, spent: list[float]) -> Rule:
    """A rule with AdamW's state that learns nothing.

    Args:
      seconds: that a step takes, and little more.
      spent: receives the seconds that each step took.
    """
    like = backprop(optimizer=optax.adamw(1e-3))

    def hand_on(state: PyTree, batch: ArrayLike) -> tuple[PyTree, dict[str, Array]]:
        state = state._replace(step=state.step + 1)
        names = ("loss", "bits", "gradient_norm")
        return state, dict.fromkeys(names, jnp.mean(batch, dtype=jnp.float32))

    jitted = jax.jit(hand_on, donate_argnums=0)

    def step(state: PyTree, batch: ArrayLike) -> tuple[PyTree, dict[str, Array]]:
        begin = time.perf_counter()
        time.sleep(seconds)
        done = jax.block_until_ready(jitted(state, batch))
        spent.append(time.perf_counter() - begin)
        return done

    return Rule("sleeping", like.init, step, like.predict)
