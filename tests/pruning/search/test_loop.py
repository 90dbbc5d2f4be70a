"""The search loop: equal budgets, no network twice, failures dropped, same bits after a kill."""

import warnings

import numpy as np
import pytest

from ffnlab.errors import ConfigError, FormatError, NumericalError
from ffnlab.pruning.search import (
    Grid,
    SearchOptions,
    Space,
    Variable,
    hypervolume,
    loop,
    measured,
    search,
    start,
)
from ffnlab.pruning.search import linas as inner

WIDTHS = (16, 32, 48, 64)
SPACE = Space((Variable("depth", (1, 2, 3)), Variable("width", WIDTHS, 3, "depth")))
SMALL = Grid((1.0,), (10.0,))


def small(config) -> dict[str, float]:
    """Loss, cost and time of a stack of widths; only active ones count."""
    widths = config["width"][: config["depth"][0]]
    loss = 1 / (1 + sum(np.sqrt(widths))) + 0.02 * (widths[0] == 32)
    return {"loss": loss, "macs": 1e3 * sum(widths), "ms": 0.5 + 0.1 * len(widths)}


def options(tactic="linas", **changes) -> SearchOptions:
    kept = {
        "objectives": ("loss", "macs"),
        "budget": 26,
        "population": 8,
        "inner": 48,
        "grid": SMALL,
    }
    return SearchOptions(**kept | {"tactic": tactic} | changes)


TACTICS = ["linas", "evolution", "random"]
OBJECTIVES = [("macs",), ("loss", "macs"), ("ms", "loss", "macs")]


@pytest.mark.parametrize("objectives", OBJECTIVES, ids=len)
@pytest.mark.parametrize("tactic", TACTICS)
def test_the_budget_is_measured_and_no_network_twice(tactic, objectives):
    asked = []

    def measure(config):
        asked.append(config)
        return small(config)

    log = search(SPACE, measure, options(tactic, objectives=objectives))
    assert log.count == len(asked) == 26
    assert len(set(SPACE.keys(log.vectors))) == 26
    assert np.array_equal(SPACE.canonical(log.vectors), log.vectors)
    for vector, config, values in zip(log.vectors, asked, log.values, strict=True):
        assert SPACE.decode(vector) == config
        assert values.tolist() == [small(config)[name] for name in objectives]
    # The first population is drawn; of the others LINAS said before what it expects.
    assert np.isnan(log.expected[:8]).all()
    said = np.isfinite(log.expected[8:]).all(axis=1)
    assert said.mean() > 0.8 if tactic == "linas" else not said.any()
    alive = log.population[log.population >= 0]
    assert len(set(alive.tolist())) == 8


def test_all_tactics_begin_with_the_same_population_and_then_differ():
    logs = [search(SPACE, small, options(tactic, seed=5)) for tactic in TACTICS]
    assert all(np.array_equal(log.vectors[:8], logs[0].vectors[:8]) for log in logs)
    rest = {log.vectors[8:].tobytes() for log in logs}
    rest |= {search(SPACE, small, options("linas", seed=6)).vectors[8:].tobytes()}
    assert len(rest) == 4


def test_the_inner_evolution_begins_with_networks_that_all_differ(monkeypatch):
    """In a small space many vectors that are drawn name one network."""
    begun, evolution = [], inner.evolution

    def seen(evaluate, first, *more):
        begun.append(SPACE.keys(first))
        return evolution(evaluate, first, *more)

    monkeypatch.setattr(inner, "evolution", seen)
    search(SPACE, small, options("linas"))
    assert len(begun) == 3 and [len(set(keys)) for keys in begun] == [8, 8, 8]


class Killed(BaseException):
    """A kill: nothing catches it."""


@pytest.mark.parametrize(
    ("tactic", "objectives"),
    [
        ("linas", ("loss", "macs")),
        ("evolution", ("ms", "loss", "macs")),
        ("random", ("loss",)),
    ],
)
def test_a_killed_search_goes_on_with_the_same_bits(tactic, objectives, tmp_path):
    wanted = options(tactic, objectives=objectives)
    whole = search(SPACE, small, wanted)
    file, asked = tmp_path / "search.npz", []

    def until(limit):
        def measure(config):
            if len(asked) == limit:
                raise Killed
            asked.append(config)
            return small(config)

        return measure

    for limit in (3, 11, 21):  # within each of the first three rounds
        with pytest.raises(Killed):
            search(SPACE, until(limit), wanted, checkpoint=file)
        done = len(asked) // 8 * 8
        assert file.exists() == (done > 0)
        del asked[done:]
    log = search(SPACE, until(100), wanted, checkpoint=file)
    assert len(asked) == 26  # finished rounds were not measured again
    for name, ours, theirs in zip(log._fields, log, whole, strict=True):
        assert ours.tobytes() == theirs.tobytes() and ours.dtype == theirs.dtype, name
    again = search(SPACE, until(26), wanted, checkpoint=file)  # done: measures nothing
    assert again.values.tobytes() == whole.values.tobytes()


def test_a_checkpoint_of_another_search_is_refused(tmp_path):
    file = tmp_path / "search.npz"
    search(SPACE, small, options("random"), checkpoint=file)
    other = Space((Variable("depth", (1, 2, 3)), Variable("width", (8, 32, 48, 64), 3, "depth")))
    for space, wanted in ((SPACE, options("random", seed=1)), (other, options("random"))):
        with pytest.raises(ConfigError, match="is of another search: its space or options"):
            search(space, small, wanted, checkpoint=file)
    with pytest.raises(FormatError, match="shape"):
        search(SPACE, small, options("random", budget=30), checkpoint=file)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(FormatError, match="cannot be read"):
        search(SPACE, small, options("random"), checkpoint=file)


FAULTS = {
    "NumericalError": NumericalError("loss is NaN"),
    "RuntimeError": RuntimeError("out of memory"),
    "ZeroDivisionError": ZeroDivisionError("no steps"),
    "MemoryError": MemoryError(),
}


@pytest.mark.parametrize("tactic", TACTICS)
def test_failures_are_dropped_with_a_warning_and_no_predictor_sees_them(tactic, monkeypatch):
    """Half of the networks fail, each in one of seven ways."""
    ways = [*FAULTS.values(), float("nan"), float("inf"), float("-inf")]
    asked, seen = [], []

    def measure(config):
        asked.append(config)
        if sum(config["width"]) % 32:
            return small(config)
        way = ways[len(asked) % 7]
        if isinstance(way, Exception):
            raise way
        return small(config) | {"macs": way}

    def fit(features, labels, **rest):
        seen.append((SPACE.from_one_hot(features), labels))
        return real(features, labels, **rest)

    real = inner.fit
    monkeypatch.setattr(inner, "fit", fit)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        log = search(SPACE, measure, options(tactic))
    failed = [not sum(config["width"]) % 32 for config in asked]
    assert 4 < sum(failed) < 22 and len(asked) == 26 == log.count
    assert np.isnan(log.values).all(axis=1).tolist() == failed
    assert np.isnan(log.values).any(axis=1).tolist() == failed
    assert len(set(SPACE.keys(log.vectors))) == 26  # not measured again
    vectors, values = measured(log)
    assert len(vectors) == 26 - sum(failed) and np.isfinite(values).all()
    dropped = [str(w.message) for w in said if str(w.message).startswith("dropped: measuring {")]
    assert len(dropped) == sum(failed) == len(said)
    assert not {*log.population.tolist()} & {*np.flatnonzero(failed).tolist()}
    assert bool(seen) == (tactic == "linas")
    good = [key for key, bad in zip(SPACE.keys(log.vectors), failed, strict=True) if not bad]
    for vectors, labels in seen:
        assert np.isfinite(labels).all() and SPACE.keys(vectors) == good[: len(vectors)]


def test_warnings_name_the_network_and_what_it_did():
    def measure(config):
        return small(config) | ({"macs": float("inf")} if config["depth"] == (1,) else {})

    with pytest.warns(UserWarning, match=r"dropped: measuring \{'depth': \(1,\).*'macs': inf"):
        search(SPACE, measure, options("random"))

    def raising(config):
        if config["depth"] == (1,):
            raise FAULTS["RuntimeError"]
        return small(config)

    with pytest.warns(UserWarning, match="failed with RuntimeError: out of memory"):
        search(SPACE, raising, options("random"))


def test_faults_of_the_program_pass_through(tmp_path):
    def measure(config):
        raise KeyError("widht")

    with pytest.raises(KeyError, match="widht"):
        search(SPACE, measure, options())
    with pytest.raises(ConfigError, match="gives no 'los'; did you mean 'loss'.; it gives 'loss'"):
        search(SPACE, small, options(objectives=("los",)))


@pytest.mark.filterwarnings("ignore:dropped")
def test_a_first_round_without_a_number_ends_the_search(tmp_path):
    with pytest.raises(NumericalError, match="all 8 networks measured so far failed"):
        search(SPACE, lambda c: {"loss": np.nan, "macs": 1.0}, options())


@pytest.mark.parametrize("tactic", TACTICS)
def test_a_whole_space_can_be_measured(tactic):
    space = Space((Variable("depth", (0, 1, 6)), Variable("width", (1, 2), 6, "depth")))

    def measure(config):
        return {"loss": float(sum(config["width"])), "macs": float(config["depth"][0])}

    log = search(space, measure, options(tactic, budget=67, population=20, inner=40))
    assert space.networks == 67 == len(set(space.keys(log.vectors)))


def test_new_networks_are_new_even_where_drawing_does_not_find_them():
    every = np.array(list(SPACE.every()))
    known = frozenset(row.tobytes() for row in every[:-2])
    rng = np.random.default_rng(0)
    found = loop.new_networks(SPACE, 2, known, rng)
    assert sorted(found.tolist()) == every[-2:].tolist()
    assert loop.new_networks(SPACE, 0, known, rng).shape == (0, 4)


def test_predictors_find_the_front_of_what_they_can_predict():
    """LINAS against random search on a landscape that is a sum, as ridge regression has it."""
    space = Space((Variable("width", (0, 1, 2, 3), 10),))
    gain = np.random.default_rng(1).random((10, 4))

    def measure(config):
        widths = np.array(config["width"])
        return {"loss": 9 - gain[np.arange(10), widths].sum(), "macs": 1.0 + widths.sum()}

    volumes = {}
    for tactic in ("linas", "random"):
        wanted = options(tactic, budget=60, population=20, inner=400)
        log = search(space, measure, wanted)
        volumes[tactic] = hypervolume(log.values, (8.0, 31.0))
        if tactic == "linas":
            for said, was in zip(log.expected[40:].T, log.values[40:].T, strict=True):
                assert np.corrcoef(said, was)[0, 1] > 0.9
    assert volumes["linas"] > 1.1 * volumes["random"]


class Shown:
    """A display that remembers."""

    def __init__(self, *how):
        self.how, self.rows = how, []
        SHOWN.append(self)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def show(self, position, figures=None):
        self.rows.append((position, figures))


SHOWN: list[Shown] = []


def test_the_bar_shows_the_best_point_so_far(monkeypatch, tmp_path):
    monkeypatch.setattr(loop, "Display", Shown)
    SHOWN.clear()
    log = search(SPACE, small, options(), checkpoint=tmp_path / "s.npz", progress=False)
    (shown,) = SHOWN
    assert shown.how == (26, 0, False)
    assert [position for position, _ in shown.rows][:10] == [0, *range(1, 9), 8]
    last = shown.rows[-1][1]
    assert shown.rows[-1][0] == 26 and list(last) == ["loss", "macs"]
    assert [*last.values()] in log.values.tolist()
    search(SPACE, small, options(), checkpoint=tmp_path / "s.npz")
    assert SHOWN[1].how == (26, 26, True) and SHOWN[1].rows == [(26, last)]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objectives": ()}, r"objectives=\(\) are 0; 1 to 3"),
        ({"objectives": ("a", "b", "c", "d")}, "are 4; 1 to 3"),
        ({"objectives": ("loss", "loss")}, "has a name twice"),
        ({"budget": 7}, "budget=7 is smaller than population=8"),
        ({"inner": 7}, "inner=7 is smaller than population=8"),
        ({"population": 1}, "population=1 must be at least 2"),
        ({"seed": -1}, "seed=-1 must lie in"),
        ({"grid": Grid((), ())}, "at least one value"),
    ],
)
def test_options_that_cannot_be(changes, said):
    with pytest.raises(ConfigError, match=said):
        options(**changes)


def test_a_tactic_that_is_not_known():
    wanted = options()
    object.__setattr__(wanted, "tactic", "bayes")  # the tests' own check of types comes before
    with pytest.raises(ConfigError, match="tactic='bayes' is not one of 'linas', 'evolution'"):
        wanted.__post_init__()


def test_a_budget_of_more_than_the_space_has():
    with pytest.raises(ConfigError, match="budget=85 is more than the 84 networks of the space"):
        start(SPACE, options(budget=85))
    assert start(SPACE, options(budget=84)).vectors.shape == (84, 4)
