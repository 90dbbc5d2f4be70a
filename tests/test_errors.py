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
