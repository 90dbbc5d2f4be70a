"""The command line itself: finding commands, errors in one line, exit status, interruption."""

import os
import subprocess
import sys
import types

import pytest

import ffnlab
from ffnlab.cli import main as cli
from ffnlab.cli.main import COMMANDS, Command, main
from ffnlab.errors import ConfigError, MissingExtraError


@pytest.fixture
def command(monkeypatch):
    """Puts a function in the place of a command, as `ffnlab fake`."""

    def install(function):
        module = types.ModuleType("ffnlab_fake_command")
        module.fake = function
        monkeypatch.setitem(sys.modules, module.__name__, module)
        commands = {"fake": Command("ffnlab_fake_command:fake", "a test")}
        monkeypatch.setattr(cli, "COMMANDS", commands)

    return install


def program(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs `python -m ffnlab` in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-m", "ffnlab", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )


def test_help_lists_the_commands(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out and c.summary in out for name, c in COMMANDS.items())


def test_without_a_command_help_goes_to_standard_error(capsys):
    assert main([]) == 2
    assert "usage: ffnlab" in capsys.readouterr().err


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ffnlab {ffnlab.__version__}\n"


def test_an_unknown_command_gets_the_nearest_one(capsys):
    assert main(["compres"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ffnlab: error: unknown command 'compres'; did you mean 'compress'? ")


WITH_PARTS = [*COMMANDS, *(f"{name} {part}" for name in COMMANDS for part in COMMANDS[name].parts)]


@pytest.mark.parametrize("name", WITH_PARTS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as done:
        main([*name.split(), "--help"])
    assert done.value.code == 0
    out = capsys.readouterr().out
    assert f"usage: ffnlab {name}" in out
    assert "--help" in out


def test_help_needs_neither_jax_nor_an_extra():
    block = "import sys; sys.modules.update(jax=None, numpy=None, tyro=None, rich=None); "
    script = block + "from ffnlab.cli.main import main; sys.exit(main(['--help']))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_missing_extra_names_itself(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert main(["list"]) == 2
    assert "pip install 'ffnlab[run]'" in capsys.readouterr().err


def test_wrong_arguments_end_in_status_2(capsys):
    with pytest.raises(SystemExit) as done:
        main(["list", "--all"])
    assert done.value.code == 2
    assert "--all" in capsys.readouterr().err


def test_arguments_reach_the_function(command):
    seen = []

    def fake(name: str, /, *, size: int = 1) -> None:
        """A test."""
        seen.append((name, size))

    command(fake)
    assert main(["fake", "x", "--size", "3"]) == 0
    assert seen == [("x", 3)]


def test_a_part_of_a_command_takes_the_arguments_after_its_name(command, capsys, monkeypatch):
    seen = []

    def fake(name: str = "", /, *, size: int = 1) -> None:
        """A test."""
        seen.append((name, size))
        raise KeyboardInterrupt

    command(fake)
    own = Command("ffnlab_fake_command:fake", "a test")
    monkeypatch.setattr(cli, "COMMANDS", {"fake": own._replace(parts={"part": own})})
    for arguments in (["part", "x", "--size", "2"], ["x"], ["--size", "3"], []):
        assert main(["fake", *arguments]) == 130
    assert seen == [("x", 2), ("x", 1), ("", 3), ("", 1)]
    said = capsys.readouterr().err.split("\n")
    assert "ffnlab fake part: interrupted" in said and "ffnlab fake: interrupted" in said


def test_help_of_a_command_names_its_parts(capsys):
    for name, command in COMMANDS.items():
        if command.parts:
            with pytest.raises(SystemExit):
                main([name, "--help"])
            said = " ".join(capsys.readouterr().out.split())
            assert all(f"{name} {part}" in said for part in command.parts)


def test_a_command_may_return_its_status(command):
    def fake() -> int:
        """A test."""
        return 3

    command(fake)
    assert main(["fake"]) == 3


def noted(error: Exception, note: str) -> Exception:
    error.add_note(note)
    return error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConfigError("size=0; accepted: 1 and more"), "size=0; accepted: 1 and more"),
        (ValueError("plain"), "plain"),
        (MissingExtraError("no x"), "no x"),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), "a.txt: No such file"),
        (OSError("the disk is on fire"), "the disk is on fire"),
        (noted(OSError("one"), "two"), "one; two\n"),
        (BrokenPipeError(32, "Broken pipe"), "Broken pipe"),  # of a pipe that is not ours
        (ConfigError(), "ConfigError"),
    ],
)
def test_errors_of_use_are_one_line(command, capsys, monkeypatch, error, said):
    def fake() -> None:
        """A test."""
        raise error

    command(fake)
    # As if the function stood in one of our own files.
    monkeypatch.setattr(cli, "OURS", (os.path.dirname(os.path.realpath(__file__)),))
    assert main(["fake"]) == 2
    streams = capsys.readouterr()
    assert streams.err.startswith(f"ffnlab fake: error: {said}")
    assert streams.err.count("\n") == 1 and not streams.out.strip()


def test_a_value_error_from_elsewhere_is_a_bug_and_keeps_its_traceback(command):
    def fake() -> None:
        """A test."""
        int("x")  # raised here, outside of ffnlab

    command(fake)
    with pytest.raises(ValueError, match="invalid literal"):
        main(["fake"])


def test_the_traceback_can_be_had(command, monkeypatch):
    def fake() -> None:
        """A test."""
        raise ConfigError("x")

    command(fake)
    monkeypatch.setenv("FFNLAB_TRACEBACK", "1")
    with pytest.raises(ConfigError):
        main(["fake"])


def interrupted(*, resume: bool):
    """A command that the user stops."""
    if resume:

        def fake(*, out: str = "", resume: bool = False, restart: bool = False) -> None:
            """A test."""
            raise KeyboardInterrupt
    else:

        def fake() -> None:
            """A test."""
            raise KeyboardInterrupt

    return fake


def test_an_interruption_says_how_to_go_on(command, capsys):
    command(interrupted(resume=True))
    assert main(["fake", "--out", "my dir", "--restart"]) == 130
    error = capsys.readouterr().err
    assert error.endswith("Go on with:\n  ffnlab fake --out 'my dir' --resume\n")


def test_an_interruption_of_a_command_that_cannot_resume(command, capsys):
    command(interrupted(resume=False))
    assert main(["fake"]) == 130
    assert capsys.readouterr().err == "\nffnlab fake: interrupted\n"


def test_the_module_runs():
    done = program("list", COLUMNS="200")
    assert done.returncode == 0 and "finercut" in done.stdout


def test_an_unknown_study_lists_those_there_are(capsys):
    assert main(["run", "finrcut"]) == 2
    assert "did you mean 'finercut'?" in capsys.readouterr().err


def test_a_flag_that_is_given_twice_is_refused(capsys):
    """Its first values would be lost without a word."""
    given = ["--option", "select=a", "--option=select=b"]
    assert main(["probe", "weight_norms", *given]) == 2
    assert "--option is given twice; all its values follow one --option" in capsys.readouterr().err
