"""Transforms: calibration loops passes, chains calibrate on what came before, stats resume."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import transform, tree, weights
from ffnlab.testing import batches, tiny
from ffnlab.transform import ChainStats, Transform, apply, calibrate, chain

UP = tree.at("layers[*].ffn.up")


class Total(NamedTuple):
    """Sum of the squared logits so far, and passes made."""

    value: jax.Array
    passes: jax.Array


def scale_by_output(passes: int = 1, factor: float = 0.5) -> Transform:
    """A toy: scales every up projection by a factor of the calibrated mean square of the logits."""

    @jax.jit
    def measure(model, batch):
        return jnp.mean(model(batch) ** 2)

    def advance(model, stats):
        stats = stats._replace(passes=stats.passes + 1)
        return stats, int(stats.passes) == passes

    def rewrite(model, stats):
        scale = factor / (1.0 + stats.value)
        return tree.map_at(
            model, UP, lambda up: up.replace(weights.Dense(up.weight.dense() * scale))
        )

    return Transform(
        name=f"scale{passes}",
        init=lambda model: Total(jnp.float32(0), jnp.int32(0)),
        observe=lambda stats, model, batch: stats._replace(
            value=stats.value + measure(model, batch)
        ),
        advance=advance,
        rewrite=rewrite,
    )


def offline() -> Transform:
    """A toy that observes nothing: rounds every up projection to FP8."""
    quantize = lambda up: up.replace(weights.Float8.quantize(up.weight.dense()))  # noqa: E731
    return Transform(
        name="round",
        init=lambda model: (),
        observe=None,
        rewrite=lambda model, stats: tree.map_at(model, UP, quantize),
    )


def leaves_equal(a: object, b: object) -> bool:
    """Same structure and values."""
    same = jax.tree.structure(a) == jax.tree.structure(b)
    return same and all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


@pytest.mark.parametrize("passes", [1, 3])
def test_calibrate_makes_as_many_passes_as_asked(passes):
    seen = []
    t = scale_by_output(passes)
    spy = Transform(
        t.name,
        t.init,
        lambda s, m, b: (seen.append(1), t.observe(s, m, b))[1],
        t.rewrite,
        t.advance,
    )
    stats = calibrate(spy, tiny(), batches())
    assert len(seen) == 2 * passes and int(stats.passes) == passes


@pytest.mark.parametrize("make", [scale_by_output, offline])
def test_model_is_untouched_and_result_repeats(make):
    model = tiny()
    before = jax.tree.map(np.array, model)
    first, stats = apply(make(), model, batches())
    second, again = apply(make(), model, batches())
    assert leaves_equal(before, model) and leaves_equal(first, second)
    assert leaves_equal(stats, again)
    assert not leaves_equal(first, model)


def test_chain_equals_one_after_the_other():
    steps = (scale_by_output(2), offline(), scale_by_output(1, 3.0), offline())
    by_hand = tiny()
    for step in (*steps[:2], steps[2]):
        by_hand, _ = apply(step, by_hand, batches())
    by_hand, _ = apply(steps[3], by_hand, batches())
    chained, stats = apply(chain(*steps), tiny(), batches())
    assert leaves_equal(chained, by_hand)
    assert isinstance(stats, ChainStats) and len(stats.done) == 4
    nested = chain(steps[0], chain(steps[1], chain(steps[2], steps[3])))
    assert leaves_equal(apply(nested, tiny(), batches())[0], by_hand)


def test_a_chain_decides_on_the_model_that_came_before():
    """`observe` and `advance` of the second get what the first rewrote, not what the chain gets."""
    seen = []

    def note(stats, model, *_):
        seen.append(model.layers[0].ffn.up.weight.dense())
        return stats

    watching = Transform(
        "watching",
        lambda model: note((), model),
        note,
        lambda model, stats: note(model, model),
        lambda model, stats: (note(stats, model), True),
    )
    calibrate(chain(offline(), watching, offline()), tiny(), batches())
    wanted = offline().rewrite(tiny(), ()).layers[0].ffn.up.weight.dense()
    assert len(seen) == 5, "init, two batches, advance, rewrite"
    for up in seen:
        np.testing.assert_array_equal(up, wanted)


def test_chain_replays_its_decisions_on_another_copy():
    t = chain(scale_by_output(2), offline())
    stats = calibrate(t, tiny(), batches())
    assert leaves_equal(t.rewrite(tiny(), stats), apply(t, tiny(), batches())[0])
    with pytest.raises(ValueError, match="scale2 is still observing"):
        t.rewrite(tiny(), t.init(tiny()))


def test_chain_of_offline_transforms_makes_no_pass():
    t = chain(offline(), offline())
    assert t.observe is None
    assert leaves_equal(apply(t, tiny())[0], apply(offline(), apply(offline(), tiny())[0])[0])
    with pytest.raises(ValueError, match="at least one"):
        chain()


def test_calibration_resumes_from_its_checkpoint(tmp_path):
    path = tmp_path / "stats.npz"
    t = scale_by_output(4)
    whole = calibrate(t, tiny(), batches())

    count = 0

    def interrupted(stats, model, batch):
        nonlocal count
        count += 1
        if count == 6:
            raise KeyboardInterrupt
        return t.observe(stats, model, batch)

    broken = Transform(t.name, t.init, interrupted, t.rewrite, t.advance)
    with pytest.raises(KeyboardInterrupt):
        calibrate(broken, tiny(), batches(), checkpoint=path)
    seen = []
    counted = Transform(
        t.name,
        t.init,
        lambda s, m, b: (seen.append(1), t.observe(s, m, b))[1],
        t.rewrite,
        t.advance,
    )
    assert leaves_equal(calibrate(counted, tiny(), batches(), checkpoint=path), whole)
    assert len(seen) == 4  # two of four passes were left
    assert leaves_equal(calibrate(t, tiny(), batches(), checkpoint=path), whole)


def test_bad_batches_are_refused():
    with pytest.raises(ValueError, match="re-iterable"):
        calibrate(scale_by_output(), tiny(), iter(batches()))
    with pytest.raises(ValueError, match="batches is empty"):
        calibrate(scale_by_output(), tiny(), [])
    with pytest.raises(ValueError, match="does not take a chain"):
        calibrate(chain(scale_by_output()), tiny(), batches(), checkpoint="x.npz")


def test_a_transform_without_observe_must_be_done_at_once():
    endless = Transform("endless", lambda m: (), None, lambda m, s: m, lambda m, s: (s, False))
    with pytest.raises(ValueError, match="endless observes nothing"):
        calibrate(endless, tiny())
    assert transform.finished(tiny(), 3) == (3, True)
