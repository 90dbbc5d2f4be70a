"""`ffnlab probe`: looks at a language model and says what it found."""

import typing
from collections.abc import Mapping, Sequence
from pathlib import Path

if typing.TYPE_CHECKING:
    from rich.table import Table


__all__ = ["probe"]


def probe(
    name: str | None = None,
    model: Path | None = None,
    /,
    *,
    option: tuple[str, ...] = (),
    text: tuple[Path, ...] = (),
    tokens: int = 2048,
    window: int = 128,
    batch: int = 4,
    out: Path | None = None,
    list: bool = False,
    keys: bool = False,
) -> None:
    """Looks at a language model by a probe; prints, draws and writes what it found.

    Writes OUT/report.json and OUT/report.png. A probe that compares a rule with a gradient is
    given one step of backpropagation by AdamW, and the loss of the next token.

    Args:
      name: of the probe, or "module:factory" of one's own; --list names ours.
      model: a Hugging Face directory, or a model that comes with ffnlab, "embedded" or
        "embedded_small"; "embedded" without one.
      option: NAME=VALUE of the probe, VALUE as in TOML, where a string needs no quotes.
      text: UTF-8 files, whose first nine tenths are looked at, as `ffnlab compress` calibrates on
        them. Without any, the standard library of this Python.
      tokens: of that text, in evenly spaced windows; rounded down to whole batches.
      window: tokens in one row.
      batch: rows in one forward pass.
      out: folder of the report's own; runs/probe/NAME without one.
      list: print the probes there are, and do nothing.
      keys: print the options of every probe, or of NAME, and do nothing.
    """
    from rich.console import Group

    from ffnlab.analysis import METHODS
    from ffnlab.cli.keys import method_keys
    from ffnlab.cli.show import show
    from ffnlab.compress.text import calibration, file_text, standard_text
    from ffnlab.errors import ConfigError
    from ffnlab.formats.embedded import open_model, shipped
    from ffnlab.recipes import Calibration

    if list:
        show(overview())
        return
    if keys:
        show(Group(*method_keys(METHODS, [name] if name else METHODS.names(), "ffnlab probe {}")))
        return
    if name is None:
        raise ConfigError(f"name is missing; there are: {', '.join(METHODS.names())}")
    options = METHODS.read(name, parsed(option), f"probe {name!r}")
    made = METHODS.make(name, **options, **given(name))
    folder = Path("runs/probe") / made.name if out is None else out
    decoder, tokenizer = open_model(model)
    about: dict[str, object] = {"probe": name, "options": options}
    about["model"] = shipped(model) or str(model)
    if made.observe is None:
        batches = ()
    else:
        words = file_text(text) if text else standard_text()
        settings = Calibration(tokens, window, batch)
        batches = calibration(words, tokenizer, settings, decoder.config.vocab)
        about["text"] = words.as_json() | {"rows": len(batches) * batch, "window": window}
    report = made(decoder, batches)
    show(report)
    report.write(folder, about=about)
    print(f"{folder}: report.json, report.png")


def given(name: str) -> dict[str, object]:
    """What the command gives a factory that has parameters of these names."""
    from ffnlab.analysis import METHODS
    from ffnlab.learning import backprop, next_token

    ours = {"rule": backprop, "loss": lambda: next_token}
    return {parameter: ours[parameter]() for parameter in METHODS.takes(name)}


def parsed(options: Sequence[str]) -> Mapping[str, object]:
    """Options of a command line as a table.

    Raises:
      ConfigError: one is not NAME=VALUE, or is there twice.

    >>> parsed(["seed=3", "select=layers[0]**"])
    {'seed': 3, 'select': 'layers[0]**'}
    """
    import tomllib

    from ffnlab.errors import ConfigError

    found: dict[str, object] = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not (name and equals) or name in found:
            raise ConfigError(f"option {option!r} must be NAME=VALUE, each name once")
        try:
            found[name] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            found[name] = value
    return found


def overview() -> "Table":
    """The probes by name, with what they look at; of one that cannot be had, the reason."""
    from rich.table import Table
    from rich.text import Text

    from ffnlab.analysis import METHODS
    from ffnlab.docstrings import prose
    from ffnlab.errors import ConfigError

    table = Table()
    table.add_column("probe", no_wrap=True)
    table.add_column("what it looks at", overflow="fold")
    for name in METHODS.names():
        try:
            said = next(iter(prose(METHODS.factory(name))), "")
        except ConfigError as error:
            said = str(error)
        table.add_row(Text(name), Text(said))
    return table
