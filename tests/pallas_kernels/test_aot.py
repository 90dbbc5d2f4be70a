"""Compiling without a device: descriptions, the list of cases, and the report's bookkeeping."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.aot import CHIPS, __main__, collect, lower_for, report, topology, worker
from pallas_kernels.aot.cases import Case
from pallas_kernels.backend import named_capability


def test_chips_are_found_by_the_name_their_driver_gives():
    for chip in CHIPS.values():
        assert chip.platform == "tpu" or named_capability(chip.kind) == chip.capability
    with pytest.raises(ValueError, match="chip='h201' is unknown; accepted: 'h200'"):
        topology.find("h201")


def test_every_case_names_known_chips_and_can_be_made():
    for name, case in collect().items():
        assert case.name == name and case.chips and set(case.chips) <= set(CHIPS)
        function, arguments = case.make()
        assert callable(function) and jax.tree.leaves(arguments)


@pytest.mark.parametrize("chip", ["h200", "v5e"])
def test_lowering_needs_no_device(chip):
    text = lower_for(lambda x: x + 1, (jax.ShapeDtypeStruct((4,), jnp.float32),), chip)
    assert "stablehlo.add" in text


def test_a_failed_compilation_is_a_row(tmp_path):
    def broken():
        raise ValueError("cannot be made")

    row = worker.compiled(Case("none", broken, ("h200",)), "h200", tmp_path)
    assert row == {"wrong": "ValueError: cannot be made"}
    line = __main__.describe({"job": "none@h200", **row})
    assert line == "FAILED none@h200: ValueError: cannot be made"


def test_the_table_is_replaced_and_the_rest_stays(tmp_path, monkeypatch):
    results = tmp_path / "RESULTS.md"
    results.write_text(f"before\n{__main__.BEGIN}\nold\n{__main__.END}\nafter\n")
    monkeypatch.setattr(__main__, "RESULTS", results)
    case = Case("w4a8", lambda: (abs, ()), ("h200",), expect=("QGMMA",))
    __main__.write(
        {"w4a8": case}, [{"job": "w4a8@h200", "registers": 168, "spill": 0, "wrong": ""}]
    )
    text = results.read_text()
    assert "| w4a8 | h200 | 168 | 0 | QGMMA |" in text and "old" not in text
    assert text.startswith("before\n") and text.endswith("after\n")


def test_a_missing_tool_says_what_to_install(monkeypatch):
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="ptxas is missing: pip install nvidia-cuda-nvcc"):
        report.run("ptxas", "--version")


def test_the_readme_runs():
    readme = Path(topology.__file__).parent.parent / "README.md"
    blocks = re.findall(r"```python\n(.*?)```", readme.read_text(), flags=re.DOTALL)
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert blocks
