"""`ffnlab run --all`: what is run and what is not, what differs, failures, interruption."""

import os
import re
import signal

import pytest

from ffnlab.cli.main import main
from ffnlab.studies.ledger import recorded, repeat
from ffnlab.studies.ledger.recorded import file_of, read
from ffnlab.studies.table import STUDIES
from recording import claim, code_of, leave, record, result

SLUGS = ("finercut", "lamb", "noprop")


class Machine:
    """Runs studies in no time.

    Attributes:
      calls: (slug, quick, seed) of all that was run, in order.
      claims: slug -> what it will claim.
      does: slug -> called in place of running it; its value is the exit status.
    """

    def __init__(self):
        self.calls, self.claims, self.does = [], {}, {}

    def __call__(self, slug, out, *, quick, seed):
        self.calls.append((slug, quick, seed))
        if slug in self.does:
            return self.does[slug]()
        leave(result(slug, *self.claims.get(slug, ()), quick=quick, seed=seed), out)
        return 0


@pytest.fixture
def machine(monkeypatch, tmp_path):
    monkeypatch.setattr(repeat, "STUDIES", {slug: STUDIES[slug] for slug in SLUGS})
    monkeypatch.setattr(recorded, "sources", code_of)
    monkeypatch.chdir(tmp_path)
    fake = Machine()
    monkeypatch.setattr(repeat, "run_one", fake)
    return fake


def test_all_are_run_once(machine, tmp_path, capsys):
    assert main(["run", "--all", "--seed", "3"]) == 0
    assert machine.calls == [(slug, False, 3) for slug in SLUGS]
    said = capsys.readouterr().out
    assert re.search(
        r"\n\[3/3\] noprop: 1 of 1 claims hold, after \d+ s; nothing was recorded", said
    )
    assert said.endswith("all studies have results, and no claim differs from what was recorded\n")
    for slug in SLUGS:
        assert read(tmp_path / "results", slug).seed == 3
        names = {file.name for file in (tmp_path / "results" / slug).iterdir()}
        assert names == {"result.json", "line.png"}
    assert main(["run", "--all", "--seed", "3"]) == 0
    assert len(machine.calls) == 3
    said = capsys.readouterr().out
    assert said.count("run before and not stale") == 3 and "nothing was recorded" not in said


def test_missing_and_stale_results_and_other_seeds_are_run(machine, tmp_path, capsys):
    folder = tmp_path / "out"
    record(folder, "finercut", sources={"ffnlab.studies.gone": "0"})
    record(folder, "lamb", seed=1)
    (folder / "finercut" / "old.png").write_bytes(b"")
    assert main(["run", "--all", "--out", "out"]) == 0
    assert [slug for slug, *_ in machine.calls] == list(SLUGS)
    said = capsys.readouterr().out
    assert "finercut: is stale (" in said and "ffnlab.studies.gone" in said
    assert "lamb: has a result of seed 1, is run" in said and "noprop: has no result" in said
    assert not (folder / "finercut" / "old.png").exists()


def test_quick_results_lie_beside_the_full_ones(machine, tmp_path):
    record(tmp_path / "results", "lamb")
    before = file_of(tmp_path / "results", "lamb").read_bytes()
    assert main(["run", "--all", "--quick"]) == 0
    assert machine.calls == [(slug, True, 0) for slug in SLUGS]
    assert file_of(tmp_path / "results", "lamb").read_bytes() == before
    assert (tmp_path / "results" / "lamb" / "line.png").is_file()
    assert {file.name for file in (tmp_path / "results" / "noprop").iterdir()} == {"quick.json"}
    assert read(tmp_path / "results", "noprop", quick=True).quick
    assert main(["run", "--all", "--quick"]) == 0 and len(machine.calls) == 3


def test_a_failure_stops_no_other_and_is_named_at_the_end(machine, tmp_path, capsys):
    machine.does["lamb"] = lambda: 7
    record(tmp_path / "results", "lamb", claim("it works", False), sources={})
    assert main(["run", "--all"]) == 1
    assert [slug for slug, *_ in machine.calls] == list(SLUGS)
    said = capsys.readouterr().out
    assert re.search(r"\nlamb: failed after \d+ s, exit status 7\n$", said)
    assert read(tmp_path / "results", "lamb").status == "0 of 1", "what was there stays"
    del machine.does["lamb"]
    machine.calls.clear()
    assert main(["run", "--all"]) == 1, "it works now, which is not what was recorded"
    assert machine.calls == [("lamb", False, 0)]
    assert main(["run", "--all"]) == 0


def test_what_differs_is_listed_at_the_end(machine, tmp_path, capsys):
    """Compared with what was there before, and with a folder of recorded results."""
    for slug in SLUGS:
        record(tmp_path / "results", slug, claim("a"), claim("b", False))
    machine.claims = dict.fromkeys(SLUGS, [claim("a"), claim("b", False)])
    machine.claims["lamb"] = [claim("a", False), claim("b", False)]
    line = 'lamb differs from what was recorded: "a" held (ours) and does not now (ours)'
    for again in range(2):  # the second time nothing is run, and it differs as before
        assert main(["run", "--all", "--out", "again"]) == 1
        assert len(machine.calls) == 3 and capsys.readouterr().out.splitlines()[-1] == line, again
    assert main(["run", "--all", "--out", "again", "--against", "nothing"]) == 0
    assert read(tmp_path / "results", "lamb").claims[0].holds, "what is recorded stays"
    for slug in SLUGS:
        record(tmp_path / "results", slug, claim("a"), claim("b", False), sources={})
    assert main(["run", "--all"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == line


def test_other_versions_and_another_text_are_said_where_something_differs(
    machine, tmp_path, capsys
):
    other = {"versions": {"python": "3.12.1"}, "settings": {"text": {"sha256": "1"}}}
    record(tmp_path / "results", "lamb", **other)
    assert main(["run", "--all", "--out", "again"]) == 0
    record(tmp_path / "results", "lamb", claim("it works", False), **other)
    assert main(["run", "--all", "--out", "again"]) == 1
    said = capsys.readouterr().out.splitlines()[-2:]
    assert said[0].endswith(": with python 3.11.7, jax 0.10.2; recorded with python 3.12.1")
    assert said[1].endswith(": its text is not the one of the recorded run")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_run_goes_on(machine, tmp_path, capsys, number):
    before = signal.getsignal(number)

    def interrupted():
        os.kill(os.getpid(), number)
        return 0

    machine.does["lamb"] = interrupted
    assert main(["run", "--all"]) == 130
    said = capsys.readouterr()
    assert "2 of 3 studies are left; the same command goes on" in said.out
    assert said.err.endswith("ffnlab run: interrupted\n")
    assert signal.getsignal(number) == before
    machine.does.clear()
    machine.calls.clear()
    assert main(["run", "--all"]) == 0
    assert [slug for slug, *_ in machine.calls] == ["lamb", "noprop"]


def test_a_damaged_result_is_refused_before_anything_runs(machine, tmp_path, capsys):
    record(tmp_path / "results", "noprop")
    file_of(tmp_path / "results", "noprop").write_text("{}")
    for arguments in (["run", "--all"], ["run", "--all", "--out", "again"]):
        assert main(arguments) == 2
        printed = capsys.readouterr()
        assert "noprop/result.json is not the file that was written" in printed.err
        assert printed.out == "", "the same command does not go on"
    assert machine.calls == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run"], "takes the name of a study"),
        (["run", "lamb", "--all"], "takes the name of a study"),
        (["run", "lamb", "--against", "x"], "--against x goes with --all"),
        (["run", "--all", "--seed", "-1"], "seed=-1"),
    ],
)
def test_bad_arguments(machine, tmp_path, capsys, arguments, said):
    assert main(arguments) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_process_of_its_own_that_fails(monkeypatch, tmp_path, capfd):
    """The real thing, of a study that is in the table of this process alone."""
    monkeypatch.setattr(repeat, "STUDIES", {"no-study": STUDIES["lamb"]})
    assert repeat.run_all(tmp_path / "out", tmp_path / "none") == 1
    said = capfd.readouterr()
    assert said.out.splitlines()[-1].endswith(" s, exit status 2")
    assert "ffnlab run: error: no study 'no-study'" in said.err
    assert not list((tmp_path / "out").iterdir())
