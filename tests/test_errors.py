"""Tests of ffnlab.errors: one base class, and a missing extra that names itself."""

import sys

import pytest

from ffnlab import errors


@pytest.mark.parametrize("name", ["SelectionError", "FormatError", "ConfigError", "NumericalError"])
def test_every_input_error_is_a_value_error(name):
    cls = getattr(errors, name)
    assert issubclass(cls, errors.FFNLabError) and issubclass(cls, ValueError)


def test_require_returns_the_named_module():
    import xml.dom

    assert errors.require("xml.dom", extra="run") is xml.dom


def test_require_names_the_extra():
    with pytest.raises(errors.MissingExtraError, match=r"pip install 'ffnlab\[run\]'") as caught:
        errors.require("ffnlab_no_such_package.part", extra="run")
    assert isinstance(caught.value, ImportError)


def test_require_passes_other_failures_through(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "needs_a_part.py").write_text("import ffnlab_absent_part\n")
    (tmp_path / "needs_a_device.py").write_text("raise RuntimeError('no GPU')\n")
    with pytest.raises(ModuleNotFoundError, match="ffnlab_absent_part") as caught:
        errors.require("needs_a_part", extra="gpu")
    assert not isinstance(caught.value, errors.MissingExtraError)
    with pytest.raises(RuntimeError, match="no GPU"):
        errors.require("needs_a_device", extra="gpu")
    assert "needs_a_device" not in sys.modules


@pytest.mark.parametrize("value", [1.5, 2.0, float("nan"), "2", [2]])
def test_what_is_no_whole_number_counts_nothing(value):
    with pytest.raises(errors.ConfigError, match="steps=.* must be at least 1, a whole number"):
        errors.at_least(1, limit=None, steps=value)
    with pytest.raises(errors.ConfigError, match="seed=.* must lie in 0"):
        errors.check_seed(value)


def test_a_count_that_is_too_small_is_named():
    with pytest.raises(errors.ConfigError, match="^steps=0 must be at least 1$"):
        errors.at_least(1, window=1, steps=0)
