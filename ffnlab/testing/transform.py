"""The contract of a transform: a model in, another one out, and what was decided beside it."""

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import PyTree

from ffnlab import models, transform, tree
from ffnlab.storage import npz
from ffnlab.testing import small
from ffnlab.testing.compiling import counted
from ffnlab.testing.contract import equal, hold, need
from ffnlab.transform import Transform

__all__ = ["TransformCase", "check_transform"]


@dataclasses.dataclass(frozen=True)
class TransformCase:
    """A transform with a model that it rewrites, as tables of contract tests hold them.

    Attributes:
      make: the transform, with options under which it changes the model.
      model: makes what it rewrites, called as `model(batch)`.
      batches: makes what it calibrates on; `ffnlab.transform.calibrate` takes the same.
      rtol: see `check_transform`.
    """

    make: Callable[[], Transform]
    model: Callable[[], PyTree] = small.tiny
    batches: Callable[[], Sequence[PyTree]] = small.batches
    rtol: float = 1e-5

    def check(self) -> None:
        """Holds it against the contract (`check_transform`)."""
        model, batches = self.model(), self.batches()
        check_transform(self.make, model=model, batches=batches, rtol=self.rtol)


@dataclasses.dataclass(frozen=True)
class Case:
    """A transform under check.

    Attributes:
      make: the transform.
      model: what it rewrites.
      batches: what it calibrates on.
      rtol: see `check_transform`.
    """

    make: Callable[[], Transform]
    model: PyTree
    batches: Sequence[PyTree]
    rtol: float

    @functools.cached_property
    def transform(self) -> Transform:
        """The transform, made once."""
        return self.make()

    @functools.cached_property
    def outcome(self) -> tuple[PyTree, PyTree]:
        """The rewritten model, and the stats."""
        return self.applied(self.transform, self.model)

    def applied(self, made: Transform, model: PyTree) -> tuple[PyTree, PyTree]:
        """What a transform makes of a model, and the stats."""
        return transform.apply(made, model, self.batches, progress=False)


def check_transform(
    make: Callable[[], Transform],
    *,
    model: PyTree | None = None,
    batches: Sequence[PyTree] | None = None,
    rtol: float = 1e-5,
) -> None:
    """Holds a transform against its contract; takes some seconds.

    Args:
      make: the transform, with options under which it changes the model.
      model: what it rewrites, called as `model(batch)`, or `model(**batch)` where a batch is a
        mapping; `ffnlab.testing.tiny()` when None. Of one with layers in a list the stacked form
        (`ffnlab.models.stack`) is tried too. Its configuration may be another in the end, where
        sizes are.
      batches: what it calibrates on; `ffnlab.testing.batches()` when None.
      rtol: how far the output of the stacked form may be from the flat one's, of its norm. Scanned
        blocks round in another order, which may move a code of a quantizer by one.
    Raises:
      AssertionError: names the line of the contract that is broken, and how.

    >>> from ffnlab.quantization import nearest
    >>> check_transform(lambda: nearest(format="int4", group=8))
    """
    lines = (
        it_is_a_transform,
        arguments_stay_and_the_result_repeats_bit_for_bit,
        the_model_is_rewritten_and_still_runs,
        observing_other_numbers_compiles_nothing,
        calibration_holds_no_more_of_four_times_the_batches,
        stats_are_saved_and_applied_elsewhere,
        stacked_models_are_taken,
    )
    model = small.tiny() if model is None else model
    batches = small.batches() if batches is None else batches
    hold("the transform", lines, Case(make, model, batches, rtol))


def it_is_a_transform(case: Case) -> None:
    kind = type(case.transform).__name__
    need(isinstance(case.transform, Transform), f"{kind} is no ffnlab.transform.Transform")


def arguments_stay_and_the_result_repeats_bit_for_bit(case: Case) -> None:
    before = jax.tree.map(np.array, (case.model, case.batches))
    new, stats = case.outcome
    again, stats_again = case.applied(case.make(), case.model)
    need(equal(before, (case.model, case.batches)), "the model or a batch was changed")
    need(equal(stats, stats_again), "the stats are others the second time")
    need(equal(new, again), "the model is another the second time")


def the_model_is_rewritten_and_still_runs(case: Case) -> None:
    new, batch = case.outcome[0], case.batches[0]
    need(type(new) is type(case.model), f"{type(new).__name__} came of the model")
    need(not equal(new, case.model), "nothing was changed")
    before, after = output(case.model, batch), output(new, batch)
    need(before.shape == after.shape, f"its output is {after.shape}, not {before.shape}")
    need(bool(np.all(np.isfinite(after))), "its output is not finite")


@jax.jit
def output(model: PyTree, batch: PyTree) -> jax.Array:
    """What a model gives for a batch, which is its first argument or all that it is called with."""
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def observing_other_numbers_compiles_nothing(case: Case) -> None:
    t = case.transform
    if t.observe is None:
        need(t.advance(case.model, t.init(case.model))[1], "nothing is observed, and yet not done")
        return
    transform.calibrate(t, case.model, case.batches, progress=False)
    larger = lambda leaf: 1.5 * leaf if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf  # noqa: E731
    other, stats = jax.tree.map(larger, case.model), t.init(case.model)
    with counted() as count:
        t.observe(stats, other, case.batches[-1])
    need(count.programs == 0, f"{count.programs} programs were compiled")


def calibration_holds_no_more_of_four_times_the_batches(case: Case) -> None:
    observe = case.transform.observe
    if observe is None:
        return
    held(case, observe, 1)  # what is kept for good is there from here on
    once, four = held(case, observe, 1), held(case, observe, 4)
    need(once == four, f"bytes of live arrays and of stats: {once} of one pass, {four} of four")


def held(case: Case, observe: Callable, times: int) -> tuple[int, int]:
    """Bytes of all live arrays at most, and of the stats, over some passes in a row."""
    live, stats = [], case.transform.init(case.model)
    for _ in range(times):
        for batch in case.batches:
            stats = jax.block_until_ready(observe(stats, case.model, batch))
            live.append(sum(array.nbytes for array in jax.live_arrays()))
    return max(live), tree.nbytes(stats)


def stats_are_saved_and_applied_elsewhere(case: Case) -> None:
    new, stats = case.outcome
    if jax.tree.leaves(stats):
        with tempfile.TemporaryDirectory() as folder:
            npz.save_stats(Path(folder) / "stats.npz", stats)
            stats = npz.load_stats(Path(folder) / "stats.npz", stats)
    elsewhere = case.make().rewrite(jax.tree.map(lambda leaf: leaf, case.model), stats)
    need(equal(elsewhere, new), "rewrite of the saved stats is another")


def stacked_models_are_taken(case: Case) -> None:
    if not isinstance(getattr(case.model, "layers", None), nnx.List):
        return
    flat, batch = case.outcome[0], case.batches[0]
    back, _ = case.applied(case.make(), models.stack(case.model))
    is_stacked = isinstance(back.layers, models.Stacked) or hasattr(back, "unstacked")
    back = models.unstack(back) if is_stacked else back
    same = jax.tree.structure(back) == jax.tree.structure(flat)
    need(same, "unstacked, the model has another structure than that of the flat one")
    error = jnp.linalg.norm(output(back, batch) - output(flat, batch))
    far = error / jnp.linalg.norm(output(flat, batch))
    need(bool(far < case.rtol), f"the outputs differ by {float(far):.2g} of their norm")
