"""The clock: forms in turns, warmed up, waited for; nothing here depends on how long it took."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import clock
from ffnlab.clock import Spread, Times, compiled, in_turns, timed
from ffnlab.errors import ConfigError
from ffnlab.layers import MLP
from ffnlab.testing import counted


def test_every_form_runs_once_a_turn_each_turn_from_the_next_one_after_a_warm_up():
    ran = []
    calls = {name: lambda name=name: ran.append(name) for name in "abc"}
    times = in_turns(calls, turns=4, warm=2)
    assert "".join(ran) == "aabbcc" + "abc" + "bca" + "cab" + "abc"
    assert set(times.seconds) == set("abc")
    assert all(values.shape == (4,) and (values >= 0).all() for values in times.seconds.values())


def test_seconds_stand_with_the_form_that_took_them(monkeypatch):
    """The clock moves only while a form runs, by an amount of its own and of the turn."""
    now, ran = [0.0], []
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])

    def form(name, seconds):
        def call():
            ran.append(name)
            now[0] += seconds * ran.count(name)

        return call

    times = in_turns({"short": form("short", 1.0), "long": form("long", 10.0)}, turns=3)
    assert times.seconds["short"].tolist() == [2.0, 3.0, 4.0]  # the first run was the warm-up
    assert times.seconds["long"].tolist() == [20.0, 30.0, 40.0]
    assert times.over("long", "short") == Spread(10.0, 10.0, 10.0)


def test_a_result_is_waited_for(monkeypatch):
    waited = []
    monkeypatch.setattr(clock.jax, "block_until_ready", waited.append)
    assert timed(lambda: "result") >= 0
    assert waited == ["result"]
    in_turns({"a": lambda: 1}, turns=2)
    assert waited == ["result", 1, 1, 1]


def test_medians_and_quartiles():
    times = Times({"a": np.array([4.0, 1.0, 2.0, 3.0]), "b": np.array([1.0, 1.0, 4.0, 2.0])})
    assert times.of("a") == Spread(2.5, 1.75, 3.25)
    # Of the ratios in each turn (4, 1, .5, 1.5), and not of the medians (2.5 over 1.5).
    assert times.over("a", "b").median == 1.25


def test_a_compiled_form_is_one_program_on_one_device(key):
    model, x = MLP((3, 4, 2), key=key), jnp.ones((5, 3))
    want = model(x)
    device = jax.devices()[1]
    call = compiled(lambda model, x: model(x), model, x, device=device)
    call()
    with counted() as count:
        found = call()
    assert count.programs == 0 and found.devices() == {device}
    np.testing.assert_allclose(found, want, rtol=1e-6)
    assert compiled(jnp.sin, x)().devices() == {jax.devices()[0]}


def test_bad_input():
    with pytest.raises(ConfigError, match="calls={} leaves nothing"):
        in_turns({})
    for options in ({"turns": 0}, {"warm": 0}):
        with pytest.raises(ConfigError, match="=0 must be at least 1"):
            in_turns({"a": lambda: 1}, **options)
