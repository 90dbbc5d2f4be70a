"""What the loop remembers comes back to the bit; `run.json` is checked against the checkpoint."""

import json
import math

import pytest

from ffnlab.errors import ConfigError, FormatError
from ffnlab.parallel.memory import RUN_FILE, Identity, Memory, keep_table, memory_of


def test_what_is_remembered_comes_back_to_the_bit():
    figures = {"a": 0.1 + 0.2, "b": math.nan, "c": -math.inf, "d": -0.0}
    memory = Memory(3.0, figures, {10: {"cost": math.nan}, 9: {"cost": 1 / 3, "x": 5e-324}})
    table = json.loads(json.dumps(memory.table(), allow_nan=False))
    found = memory_of(table)
    assert repr(found) == repr(memory) and list(found.evaluations) == [10, 9]
    assert memory_of(Memory().table()) == Memory()


@pytest.mark.parametrize("table", [None, [], {}, {"skipped": "x"}, {"skipped": "1", "metrics": 3}])
def test_what_is_no_memory_is_refused(table):
    with pytest.raises(FormatError, match="is not what a loop remembers"):
        memory_of(table)


def test_known_figures_are_the_last_of_each():
    memory = Memory(0.0, {"loss": 1.0}, {2: {"cost": 5.0, "old": 7.0}, 4: {"cost": 6.0}})
    assert memory.known() == {"loss": 1.0, "cost": 6.0, "old": 7.0}
    assert memory.watched("cost", 2) == [5.0, 6.0]
    assert memory.watched("cost", 4) == [6.0], "what was evaluated at another interval"


def identity(rate):
    def check(table, source, position):
        if not isinstance(table, dict) or "rate" not in table:
            raise FormatError(f"{source} does not say which run it is of")
        if table["rate"] != rate:
            raise ConfigError(f"{source}: another rate")
        return ["another moon"] if table.get("moon") else []

    return Identity({"rate": rate}, check)


def test_the_table_of_a_new_run_is_written_over_one_without_a_checkpoint(tmp_path):
    (tmp_path / RUN_FILE).write_text('{"rate": 1}')
    keep_table(tmp_path, identity(2), None)
    assert json.loads((tmp_path / RUN_FILE).read_text()) == {"rate": 2}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "is missing"),
        ("[]", "does not say which run"),
        ("{}", "does not say which run"),
        ('{"rate"', "is not valid JSON"),
    ],
)
def test_a_table_that_is_lost_or_damaged_comes_back_from_the_checkpoint(tmp_path, content, problem):
    if content is not None:
        (tmp_path / RUN_FILE).write_text(content)
    saved = {"rate": 2, "moon": "full"}
    with pytest.warns(UserWarning, match=rf"run\.json.*{problem}.*again from the checkpoint"):
        keep_table(tmp_path, identity(2), saved)
    assert json.loads((tmp_path / RUN_FILE).read_text()) == saved
    keep_table(tmp_path, identity(2), saved)


@pytest.mark.parametrize("resumed", [None, {"rate": 2}])
def test_a_folder_in_place_of_the_table_is_refused_and_left(tmp_path, resumed):
    (tmp_path / RUN_FILE / "mine").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"run\.json is a folder; remove it"):
        keep_table(tmp_path, identity(2), resumed)
    assert [item.name for item in tmp_path.rglob("*")] == [RUN_FILE, "mine"]


def test_a_table_of_another_run_than_the_checkpoint_is_refused(tmp_path):
    (tmp_path / RUN_FILE).write_text('{"rate": 1}')
    with pytest.raises(ConfigError, match="another rate"):
        keep_table(tmp_path, identity(2), {"rate": 2})


def test_a_checkpoint_of_another_run_is_refused_and_of_another_place_warned_of():
    with pytest.raises(ConfigError, match="step 3: another rate"):
        identity(2).accept({"run": {"rate": 1}, "step": 3}, "step 3")
    with pytest.raises(FormatError, match="does not say which run"):
        identity(2).accept({"run": None, "step": 3}, "step 3")
    with pytest.warns(UserWarning, match="another moon: the last bits may differ"):
        identity(2).accept({"run": {"rate": 2, "moon": 1}, "step": 3}, "step 3")
