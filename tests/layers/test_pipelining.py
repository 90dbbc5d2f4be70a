"""The schedule of a pipeline against its closed forms, and a batch through it against a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffnlab.errors import ConfigError
from ffnlab.layers.pipelining import Schedule, circulate

SIZES = st.builds(Schedule, st.integers(1, 6), st.integers(1, 13), st.integers(1, 4))


@given(SIZES)
def test_every_microbatch_is_in_every_stage_once_per_repeat_and_in_order(schedule):
    repeat, number, busy = schedule.work()
    assert busy.shape == (schedule.ticks, schedule.stages)
    when = {}
    for t, s in np.argwhere(busy):
        step = (number[t, s], repeat[t, s] * schedule.stages + s)
        assert step not in when, "a stage does the same work twice"
        when[step] = t
    layers = schedule.repeats * schedule.stages
    assert set(when) == {(m, i) for m in range(schedule.microbatches) for i in range(layers)}
    for m in range(schedule.microbatches):
        ticks = [when[m, i] for i in range(layers)]
        assert ticks == sorted(set(ticks)), "a stage works on what the one before has not made"
    assert busy[-1].any() and busy[0].any(), "the first and the last tick are of use"
    assert schedule.bubble == pytest.approx(1 - busy.mean())


@given(SIZES)
def test_the_bubble_is_that_of_the_literature(schedule):
    s, m, r = schedule.stages, schedule.microbatches, schedule.repeats
    if m % s == 0:
        assert schedule.ticks == r * m + s - 1
        assert schedule.bubble == pytest.approx((s - 1) / (r * m + s - 1))
    if r == 1:
        assert schedule.ticks == m + s - 1, "places without a microbatch take no time"


@given(SIZES, st.integers(1, 3))
def test_every_row_has_its_place(schedule, each):
    rows = each * schedule.microbatches
    by_number = schedule.by_number(rows)
    assert by_number.shape == (schedule.microbatches, each)
    assert sorted(by_number.flat) == list(range(rows))
    if schedule.is_even:  # a device that holds a stage and a part of the rows holds them in a piece
        places = schedule.places(rows)
        np.testing.assert_array_equal(places.reshape(-1), np.arange(rows))


def work(schedule, rows, seed=0):
    """A batch, what goes along with it, and the weights of every stage in every repeat."""
    keys = jax.random.split(jax.random.key(seed), 3)
    w = jax.random.normal(keys[0], (schedule.stages, schedule.repeats, 3))
    return w, jax.random.normal(keys[1], (rows, 3)), jax.random.normal(keys[2], (rows,))


def through(schedule, remat=None):
    """A batch through the stages: (weights, h, rows) -> (h, what each stage made of each part)."""

    def stage(w, number, h, rows):
        h = jnp.sin(h * w + rows[:, None]) + 0.1 * number
        return h, h.sum()

    return lambda w, h, rows: circulate(schedule, stage, w, h, rows, remat=remat)


def one_by_one(schedule, w, h, rows):
    """The same by loops in float64: (h, sums), and the gradient of sum(h^2) + sum(sums)."""
    w, h, rows = (np.asarray(x, np.float64) for x in (w, h, rows))
    done, slopes = h.copy(), [np.zeros_like(x) for x in (w, h, rows)]
    sums = np.zeros((schedule.repeats, schedule.stages, schedule.microbatches))
    layers = [(r, s) for r in range(schedule.repeats) for s in range(schedule.stages)]
    for m, own in enumerate(schedule.by_number(len(h))):
        parts = [h[own]]
        for r, s in layers:
            parts.append(np.sin(parts[-1] * w[s, r] + rows[own][:, None]) + 0.1 * m)
            sums[r, s, m] = parts[-1].sum()
        done[own] = parts[-1]
        slope = 2 * parts[-1]
        for (r, s), x in reversed(list(zip(layers, parts, strict=False))):
            inner = (slope + 1) * np.cos(x * w[s, r] + rows[own][:, None])
            slopes[0][s, r] += (inner * x).sum(0)
            slopes[2][own] += inner.sum(1)
            slope = inner * w[s, r]
        slopes[1][own] = slope
    return (done, sums), tuple(slopes)


@pytest.mark.parametrize(
    ("sizes", "remat"), [((3, 6, 2), None), ((4, 3, 1), "nothing"), ((3, 4, 2), None)]
)
def test_a_batch_goes_through_all_stages_and_gradients_come_back(sizes, remat):
    schedule = Schedule(*sizes)
    given = work(schedule, 2 * schedule.microbatches)

    def loss(*given):
        h, sums = through(schedule, remat)(*given)
        return (h**2).sum() + sums.sum(), (h, sums)

    slopes, found = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*given)
    wanted, slopes_wanted = one_by_one(schedule, *given)
    for a, b in zip((*found, *slopes), (*wanted, *slopes_wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


# Places that wait at each stage: 2, 3 or 4, which divide the turns of the line or do not.
LONG = [(2, 5), (2, 6), (2, 8), (2, 8, 2), (2, 10), (3, 9), (3, 12, 2), (4, 13, 3), (4, 16, 2)]


@pytest.mark.parametrize("sizes", LONG)
def test_every_row_ends_where_it_began_however_many_wait(sizes):
    schedule = Schedule(*sizes)
    given = work(schedule, 2 * schedule.microbatches)
    found = jax.jit(through(schedule))(*given)
    for a, b in zip(found, one_by_one(schedule, *given)[0], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_what_a_stage_makes_of_rows_that_are_not_its_own_is_thrown_away():
    """The logarithm of the logarithm is finite here, and a third one is not."""
    run = jax.jit(lambda w, h: circulate(Schedule(2, 3), log_stage, w, h, ())[0])
    found = run(jnp.ones((2, 1, 1)), jnp.full((3, 1), jnp.e**2))
    np.testing.assert_allclose(found, np.full((3, 1), np.log(2.0)), rtol=1e-5)


def log_stage(w, number, h, rows):
    return jnp.log(h) * w, None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": 0, "microbatches": 1}, "stages=0 must be at least 1"),
        ({"stages": 1, "microbatches": -1}, "microbatches=-1 must be at least 1"),
        ({"stages": 1, "microbatches": 1, "repeats": 0}, "repeats=0 must be at least 1"),
    ],
)
def test_bad_schedules(options, message):
    with pytest.raises(ConfigError, match=message):
        Schedule(**options)


def test_rows_that_do_not_divide():
    with pytest.raises(ConfigError, match="microbatches=4 do not divide the 6 rows of a batch"):
        through(Schedule(2, 4))(*work(Schedule(2, 4), 6))
