"""`ffnlab COMMAND …`: finds the command, parses its arguments, turns errors of use into one line.

Only the module of the command asked for is imported, so that help and errors of spelling are quick.

Exit status: 0, or what the command returns; 2 for an error of use, a full disk among them (one line
on standard error; FFNLAB_TRACEBACK=1 gives the traceback), 3 where that is a mesh which fits
neither its devices nor what is to be cut; 130 when interrupted; 141 where the
reader of the output has gone, as when SIGPIPE ends a program. Anything else is a bug and shows its
traceback. A standard stream that was closed is the null device.
"""

import difflib
import importlib
import inspect
import itertools
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import NamedTuple

import ffnlab
from ffnlab.cli import streams
from ffnlab.cli.arguments import described, description_of
from ffnlab.errors import ConfigError, FFNLabError, MeshError, MissingExtraError, require

__all__ = ["COMMANDS", "main"]

USAGE_ERROR, DOES_NOT_FIT, INTERRUPTED, UNREAD = 2, 3, 130, 141
OURS = tuple(
    str(Path(ffnlab.__file__).resolve().parent.with_name(name)) + os.sep
    for name in ("ffnlab", "pallas_kernels")
)


class Command(NamedTuple):
    """A sub-command: "module:function", and one line of help.

    A command may have parts, commands themselves: `ffnlab bench sparse`. Without the name of one,
    what follows are arguments of the command's own function.
    """

    target: str
    summary: str
    parts: Mapping[str, "Command"] = MappingProxyType({})

    def load(self) -> Callable[..., int | None]:
        """Imports the function."""
        module, _, name = self.target.partition(":")
        return getattr(importlib.import_module(module), name)


BENCHES = {
    "model": Command("ffnlab.cli.bench:model", "a model, beside transformers or qwix"),
    "sparse": Command("ffnlab.cli.bench:sparse", "an FFN that skips inactive channels"),
    "bottleneck": Command(
        "ffnlab.cli.bench:bottleneck", "a residual block of images, by its spatial step"
    ),
    "columns": Command(
        "ffnlab.cli.bench:columns", "reversible columns, by what is kept for the backward pass"
    ),
    "elastic": Command("ffnlab.cli.bench:elastic", "steps that train networks of all widths"),
    "folding": Command("ffnlab.cli.bench:folding", "an FFN with idle channels, folded"),
    "structured": Command("ffnlab.cli.bench:structured", "FFNs of thin products and of blocks"),
    "routing": Command("ffnlab.cli.bench:routing", "a mixture of experts, beside a dense layer"),
    "loading": Command("ffnlab.cli.bench:loading", "memory while a checkpoint is loaded"),
    "train": Command("ffnlab.cli.bench:train", "training steps, beside torch"),
    "learning": Command("ffnlab.cli.bench:learning", "an LSTM and small networks, beside torch"),
    "graphs": Command("ffnlab.cli.bench:graphs", "products and layers on graphs, beside torch"),
    "analysis": Command(
        "ffnlab.cli.bench:analysis", "inner loops of probes, beside other ways to the same"
    ),
    "metanetwork": Command("ffnlab.cli.bench:metanetwork", "meta-training, beside training"),
    "editing": Command("ffnlab.cli.bench:editing", "facts found together, beside one alone"),
    "loop": Command("ffnlab.cli.bench:loop", "what the training loop adds to its steps"),
    "kernels": Command("ffnlab.cli.bench:kernels", "GPU kernels beside XLA and torch"),
}
COMMANDS: Mapping[str, Command] = MappingProxyType(
    {
        "compress": Command(
            "ffnlab.cli.compress:compress",
            "prune, sparsify and quantize a model; say what each step cost and bought",
        ),
        "train": Command("ffnlab.cli.train:train", "train a model from a preset or a file"),
        "launch": Command(
            "ffnlab.cli.launch:launch", "a training run in several processes, which some survive"
        ),
        "search": Command(
            "ffnlab.cli.search:search", "find a smaller network by loss, products, bytes or time"
        ),
        "report": Command("ffnlab.cli.report:report", "where the time of a training run went"),
        "plan": Command("ffnlab.cli.plan:plan", "what a training run would take on a mesh"),
        "edit": Command("ffnlab.cli.edit:edit", "change what a model says of some subjects"),
        "generate": Command("ffnlab.cli.generate:generate", "continue a prompt"),
        "eval": Command("ffnlab.cli.evaluate:evaluate", "measure how well a model predicts a text"),
        "probe": Command(
            "ffnlab.cli.probe:probe", "look at a model: its weights, costs, gradients"
        ),
        "bench": Command(
            "ffnlab.cli.bench:model",
            "measure speed beside other libraries",
            MappingProxyType(BENCHES),
        ),
        "tune": Command(
            "ffnlab.cli.tune:tune", "time the GPU kernels' configurations, keep the best"
        ),
        "run": Command("ffnlab.cli.run:run", "run the study of a paper"),
        "list": Command("ffnlab.cli.list:list_studies", "list the studies and their last results"),
    }
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      arguments: those after the program's name; from `sys.argv` when None.
    Returns:
      the exit status.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    streams.open_missing()
    try:
        try:
            return dispatch(arguments)
        finally:
            sys.stdout.flush()
    except OSError as error:
        return failed("ffnlab", error)
    except SystemExit as done:
        if isinstance(done.__context__, BrokenPipeError):  # so rich ends where its reader has gone
            return UNREAD
        raise


def dispatch(arguments: list[str]) -> int:
    """Finds the command and calls it; arguments and result as `main`."""
    if not arguments:
        streams.complain(overview())
        return USAGE_ERROR
    if arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"ffnlab {ffnlab.__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        complain("ffnlab", f"unknown command {name!r}; {hint}there are: {', '.join(COMMANDS)}")
        return USAGE_ERROR
    command = COMMANDS[name]
    if rest and rest[0] in command.parts:
        part, *rest = rest
        name, command = f"{name} {part}", command.parts[part]
    return guarded(name, command, rest)


def guarded(name: str, command: Command, arguments: list[str]) -> int:
    """Calls a command; errors of use and interruptions end in a line and an exit status."""
    try:
        return call(name, command, arguments)
    except KeyboardInterrupt:
        streams.complain(f"\nffnlab {name}: interrupted{how_to_resume(name, command, arguments)}")
        return INTERRUPTED
    except (ValueError, OSError, MissingExtraError) as error:
        if not is_error_of_use(error):
            raise
        return failed(f"ffnlab {name}", error)


def failed(prefix: str, error: Exception) -> int:
    """The exit status after an error that is the user's to mend, which it says in one line."""
    if os.environ.get("FFNLAB_TRACEBACK"):
        raise error
    message = message_of(error)
    nameless = isinstance(error, OSError) and error.errno and error.filename is None
    if nameless and streams.output_fails():  # an error of writing to a file names the file
        streams.silence_output()
        if isinstance(error, BrokenPipeError):
            return UNREAD
        message = f"standard output: {message}"
    complain(prefix, message)
    return DOES_NOT_FIT if isinstance(error, MeshError) else USAGE_ERROR


def call(name: str, command: Command, arguments: list[str]) -> int:
    """Parses the arguments by the function's signature and calls it."""
    tyro = require("tyro", extra="run")
    check_flags(arguments)
    function = command.load()
    status = tyro.cli(
        described(function),
        args=arguments,
        prog=f"ffnlab {name}",
        description=description_of(function),
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    return status if isinstance(status, int) else 0


def check_flags(arguments: Sequence[str]) -> None:
    """Raises ConfigError for a flag that is given twice: the first one's values would be lost."""
    own = itertools.takewhile(lambda each: each != "--", arguments)  # behind it is another command
    flags = [each.partition("=")[0] for each in own if each.startswith("--")]
    for flag in flags:
        if flags.count(flag) > 1:
            raise ConfigError(f"{flag} is given twice; all its values follow one {flag}")


def is_error_of_use(error: Exception) -> bool:
    """Whether the user can mend it: ours, a file's, or a ValueError that our own code raised.

    A ValueError from within another library is a bug of ours, and its traceback is wanted.
    """
    if isinstance(error, FFNLabError | MissingExtraError | OSError):
        return True
    return raised_in(error.__traceback__).startswith(OURS)


def raised_in(traceback: TracebackType | None) -> str:
    """The source file of the innermost frame."""
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return "" if traceback is None else os.path.realpath(traceback.tb_frame.f_code.co_filename)


def message_of(error: Exception) -> str:
    """What an error says; of a system error the file and the reason, without its number."""
    if isinstance(error, OSError) and error.strerror:
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        said = ": ".join([*names, error.strerror])
    else:
        said = str(error) or type(error).__name__
    return "; ".join([said, *getattr(error, "__notes__", ())])


def complain(prefix: str, message: str) -> None:
    """Prints an error to standard error, its first line behind the command's name."""
    streams.complain(f"{prefix}: error: {message}")


def how_to_resume(name: str, command: Command, arguments: list[str]) -> str:
    """The command line that goes on, for commands that can."""
    try:
        parameters = inspect.signature(command.load()).parameters
    except ImportError:
        return ""
    if "resume" not in parameters:
        return ""
    kept = [a for a in arguments if a not in ("--resume", "--restart")]
    again = shlex.join(["ffnlab", *name.split(), *kept, "--resume"])
    return f"; what was finished is kept. Go on with:\n  {again}"


def overview() -> str:
    """The help of `ffnlab` itself."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: ffnlab [--help] [--version] COMMAND …",
            "",
            (ffnlab.__doc__ or "").partition("\n")[0],
            "",
            "commands:",
            *lines,
            "",
            "`ffnlab COMMAND --help` lists a command's options.",
        ]
    )
