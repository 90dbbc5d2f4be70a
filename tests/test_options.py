"""Options read off a signature: which TOML values an annotation admits."""

from collections.abc import Callable, Sequence
from typing import Literal

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffnlab.options import Mismatch, convert, describe, options_from, toml


@pytest.mark.parametrize(
    ("value", "annotation", "result"),
    [
        (3, int, 3),
        (3, float, 3.0),
        (3, float | int, 3),
        (3, int | float, 3),
        (0.5, int | float, 0.5),
        ("a", Literal["a", 1], "a"),
        (1, Literal["a", 1], 1),
        ("none", int | None, None),
        ("none", str | None, "none"),
        ([1, 2], tuple[int, ...], (1, 2)),
        ([1], Sequence[float], (1.0,)),
        ([["a"]], list[tuple[str, ...]], (("a",),)),
        ("x", tuple[str, ...] | str, "x"),
    ],
)
def test_values_that_fit(value, annotation, result):
    converted = convert(value, annotation)
    assert converted == result and type(converted) is type(result)


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (True, int, "integer"),
        (1, bool, "true or false"),
        (True, Literal[1], "1"),
        (float("inf"), float, "number"),
        ("1", int, "integer"),
        ([1], int, "integer"),
        ([1, "a"], tuple[int, ...], "integer"),
        (1, tuple[int, ...], "list of integer"),
        ("nil", int | None, "integer or 'none'"),
        (1, jax.Array, ""),
        ([1], tuple[int, str], ""),
    ],
)
def test_values_that_do_not(value, annotation, expected):
    with pytest.raises(Mismatch) as caught:
        convert(value, annotation)
    assert str(caught.value) == expected


def test_what_toml_cannot_write_is_no_option():
    def factory(
        first: int = 0,
        /,
        *rest: int,
        keep: float,
        key: jax.Array | None = None,
        hook: Callable | None = None,
        names: tuple[str, ...] = ("a", "b"),
        **others: int,
    ): ...

    found = options_from(factory)
    assert [str(option) for option in found.values()] == [
        "keep: number (required)",
        "names: list of string (default ['a', 'b'])",
    ]


def test_what_is_not_annotated_is_read_off_its_default():
    def factory(bits=4, *, keep=0.5, on=True, kind="a", hook=None, lost: "Nowhere" = 1): ...

    found = [str(option) for option in options_from(factory).values()]
    assert found == [
        "bits: integer (default 4)",
        "keep: number (default 0.5)",
        "on: true or false (default true)",
        "kind: string (default 'a')",
    ]


def test_descriptions():
    assert describe(int | Literal["all"] | None) == "integer or 'all' or 'none'"
    assert describe(tuple[float, ...]) == "list of number"
    assert describe(Callable[[int], int]) == ""


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner),
        max_leaves=6,
    ),
    st.sampled_from(
        [int, float, bool, str, int | None, Literal["a", 2], tuple[int, ...], float | str]
    ),
)
def test_any_value_fits_or_is_a_mismatch(value, annotation):
    try:
        convert(value, annotation)
    except Mismatch:
        assert isinstance(toml(value), str)
