"""Spaces: three forms of a point, and one form for all vectors of one network."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from ffnlab.errors import ConfigError
from ffnlab.pruning.search import Space, Variable

# Kernels, expansions and depths of five stages, as the MobileNetV3 of once-for-all has them.
MOBILE = Space(
    (
        Variable("depth", (2, 3, 4), count=5),
        Variable("kernel", (3, 5, 7), count=20, within="depth"),
        Variable("expand", (3, 4, 6), count=20, within="depth"),
    )
)
NESTED = Space(
    (
        Variable("format", ("float", "int8", "fp8")),
        Variable("stages", (0, 2, 1)),
        Variable("depth", (1, 2), count=2, within="stages"),
        Variable("width", (8, 16, 24), count=4, within="depth"),
    )
)


def test_the_space_of_the_card_has_its_sizes():
    assert (MOBILE.size, MOBILE.features) == (45, 135)
    assert MOBILE.networks == (9**2 + 9**3 + 9**4) ** 5


@hypothesis.settings(max_examples=30)
@hypothesis.given(seed=st.integers(0, 2**32 - 1), space=st.sampled_from([MOBILE, NESTED]))
def test_round_trips(seed, space):
    vectors = space.sample(np.random.default_rng(seed), 20)
    assert ((vectors >= 0) & (vectors < space.options)).all()
    for vector in vectors:
        assert space.encode(space.decode(vector)).tolist() == vector.tolist()
    features = space.one_hot(vectors)
    assert (features.sum(axis=1) == space.size).all() and set(np.unique(features)) == {0.0, 1.0}
    assert np.array_equal(space.from_one_hot(features), vectors)


def test_a_thousand_vectors_come_back():
    vectors = MOBILE.sample(np.random.default_rng(0), 1000)
    back = [MOBILE.encode(MOBILE.decode(vector)) for vector in vectors]
    assert np.array_equal(back, vectors)
    # All values of every entry are drawn, about equally often.
    counts = MOBILE.one_hot(vectors).mean(axis=0)
    assert np.abs(counts - 1 / 3).max() < 0.07


def test_features_are_one_hot_entry_by_entry():
    assert NESTED.one_hot(np.array([[2, 1, 0, 1, 0, 1, 2, 0]])).tolist() == [
        [0, 0, 1, 0, 1, 0, 1, 0, 0, 1, 1, 0, 0, 0, 1, 0, 0, 0, 1, 1, 0, 0]
    ]


def built(config) -> tuple:
    """The network of a NESTED configuration, written out by hand: a list of stages of widths."""
    (stages,), depth, width = config["stages"], config["depth"], config["width"]
    return config["format"], [width[2 * s : 2 * s + depth[s]] for s in range(stages)]


@hypothesis.settings(max_examples=10)
@hypothesis.given(seed=st.integers(0, 2**32 - 1))
def test_canonical_forms_are_equal_exactly_where_networks_are(seed):
    vectors = NESTED.sample(np.random.default_rng(seed), 60)
    networks = [built(NESTED.decode(vector)) for vector in vectors]
    canonical = NESTED.canonical(vectors)
    keys = NESTED.keys(vectors)
    for i in range(60):
        assert built(NESTED.decode(canonical[i])) == networks[i]
        for j in range(i):
            assert (networks[i] == networks[j]) == (keys[i] == keys[j])
    assert np.array_equal(NESTED.canonical(canonical), canonical)
    assert NESTED.keys(canonical) == keys


def test_every_network_once():
    listed = np.array(list(NESTED.every()))
    assert len(listed) == NESTED.networks == len(set(NESTED.keys(listed))) == 3 * (1 + 12 + 12**2)
    assert np.array_equal(NESTED.canonical(listed), listed)
    drawn = NESTED.canonical(NESTED.sample(np.random.default_rng(0), 3000))
    assert {row.tobytes() for row in drawn} <= {row.tobytes() for row in listed}


def test_runs_of_a_depth_are_active_from_their_first_entry():
    space = Space((Variable("depth", (0, 1, 3), count=2), Variable("w", (1, 2), 6, "depth")))
    assert space.active(np.array([[1, 2, *[1] * 6], [0, 0, *[1] * 6]]))[:, 2:].tolist() == [
        [True, False, False, True, True, True],
        [False] * 6,
    ]


ONE, THREE = Variable("width", (1, 2)), Variable("w", (1, 2), 3, "depth")


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ((), r"variables=\(\) is an empty space"),
        ((ONE, Variable("depth", (1,)), ONE), "'width' is given twice"),
        ((Variable("width", ()),), r"values=\(\) leaves nothing to choose"),
        ((Variable("width", (1, 2), count=0),), "count=0 must be at least 1"),
        ((Variable("width", (1, 2, 1)),), "must all be different"),
        ((Variable("width", (1.0, float("nan"))),), "must be finite"),
        ((Variable("width", (1, 2), 2, "depth"),), "within='depth' is no variable above it"),
        ((Variable("width", (1, 2), 2, "width"),), "within='width' is no variable above it"),
        (
            (Variable("depth", (1, 2), 2), THREE),
            "count=3 is not divided",
        ),
        (
            (Variable("depth", (1, 4)), THREE),
            "whole numbers from 0 to 3",
        ),
        (
            (Variable("depth", (-1, 1)), THREE),
            "whole numbers from 0 to 3",
        ),
        ((Variable("depth", (1.0, 2)), THREE), "whole numbers from 0"),
    ],
)
def test_spaces_that_cannot_be(variables, said):
    with pytest.raises(ConfigError, match=said):
        Space(variables)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stages": (3,)}, "3 is none of"),
        ({"depth": (1,)}, r"config\['depth'\]=\(1,\) must be 2 values"),
        ({"format": "float"}, "must be 1 values"),
        ({"widths": (8,)}, "no variable 'widths'; did you mean 'width'"),
        ({"width": None}, "config lacks 'width'; the space has format, stages, depth, width"),
    ],
)
def test_configurations_that_are_not_of_the_space(change, said):
    config = NESTED.decode(np.zeros(8, int)) | change
    with pytest.raises(ConfigError, match=said):
        NESTED.encode({name: value for name, value in config.items() if value is not None})


def test_vectors_and_features_that_are_not_of_the_space():
    with pytest.raises(ConfigError, match="a vector has 7 entries; the space has 8"):
        NESTED.decode(np.zeros(7, int))
    for entry in (-1, 3):
        wrong = np.zeros((2, 8), int)
        wrong[1, 1] = entry
        for call in (NESTED.one_hot, NESTED.active, NESTED.keys):
            with pytest.raises(ConfigError, match=rf"entry 1 of a vector is {entry}; .* 0..2"):
                call(wrong)
    with pytest.raises(ConfigError, match="width 21; it must be 22"):
        NESTED.from_one_hot(np.zeros((1, 21)))
    for value in (0.0, 0.5):
        features = NESTED.one_hot(np.zeros((1, 8), int))
        features[0, 0] = value
        with pytest.raises(ConfigError, match="exactly one 1 per entry"):
            NESTED.from_one_hot(features)
