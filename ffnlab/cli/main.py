"""`ffnlab COMMAND …`: finds the command, parses its arguments, turns errors of use into one line.

Only the module of the command asked for is imported, so that help and errors of spelling are quick.

Exit status: 0, or what the command returns; 2 for an error of use (one line on standard error;
FFNLAB_TRACEBACK=1 gives the traceback); 130 when interrupted. Anything else is a bug and shows its
traceback.
"""

import difflib
import importlib
import inspect
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import NamedTuple, TextIO

import ffnlab
from ffnlab.cli.arguments import described, description_of
from ffnlab.errors import FFNLabError, MissingExtraError, require

__all__ = ["COMMANDS", "main"]

USAGE_ERROR, INTERRUPTED = 2, 130
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
    "loading": Command("ffnlab.cli.bench:loading", "memory while a checkpoint is loaded"),
    "train": Command("ffnlab.cli.bench:train", "training steps, beside torch"),
    "loop": Command("ffnlab.cli.bench:loop", "what the training loop adds to its steps"),
    "kernels": Command("ffnlab.cli.bench:kernels", "GPU kernels beside XLA and torch"),
}
COMMANDS: Mapping[str, Command] = MappingProxyType(
    {
        "compress": Command(
            "ffnlab.cli.compress:compress",
            "prune, sparsify and quantize a model; say what each step cost and bought",
        ),
        "train": Command("ffnlab.cli.train:train", "train a language model from a preset"),
        "plan": Command("ffnlab.cli.plan:plan", "what a training run would take on a mesh"),
        "generate": Command("ffnlab.cli.generate:generate", "continue a prompt"),
        "eval": Command("ffnlab.cli.evaluate:evaluate", "measure perplexity and bits per byte"),
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
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview(), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else USAGE_ERROR
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
    except BrokenPipeError:  # the reader of our output has gone
        silence(sys.stdout)
        return 0
    except KeyboardInterrupt:
        hint = how_to_resume(name, command, arguments)
        print(f"\nffnlab {name}: interrupted{hint}", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, MissingExtraError) as error:
        if os.environ.get("FFNLAB_TRACEBACK") or not is_error_of_use(error):
            raise
        complain(f"ffnlab {name}", message_of(error))
        return USAGE_ERROR


def call(name: str, command: Command, arguments: list[str]) -> int:
    """Parses the arguments by the function's signature and calls it."""
    tyro = require("tyro", extra="run")
    function = command.load()
    status = tyro.cli(
        described(function),
        args=arguments,
        prog=f"ffnlab {name}",
        description=description_of(function),
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    sys.stdout.flush()
    return status if isinstance(status, int) else 0


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
        return ": ".join([*names, error.strerror])
    return str(error) or type(error).__name__


def complain(prefix: str, message: str) -> None:
    """Prints an error to standard error, its first line behind the command's name."""
    print(f"{prefix}: error: {message}", file=sys.stderr)


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


def silence(stream: TextIO) -> None:
    """Sends what is still buffered nowhere, so that the interpreter's last flush does not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


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
