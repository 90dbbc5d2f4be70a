"""`ffnlab probe`: looks at a model and says what it found."""

import functools
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

if typing.TYPE_CHECKING:
    from rich.table import Table


__all__ = ["probe"]

OPTIONS = {"tokens": ("text",), "graphs": ("graph",)}  # what shows it, by what a model reads
# Kinds of which the data that is shown says the loss.
STEPS = ("decoder", "mlp", "convnet", "vit", "resnet", "revcol", "graph")


def probe(
    name: str | None = None,
    model: Path | None = None,
    /,
    *,
    option: tuple[str, ...] = (),
    text: tuple[Path, ...] = (),
    images: str = "",
    records: str = "",
    graph: str = "",
    size: tuple[int, ...] = (),
    samples: int = 256,
    tokens: int = 2048,
    window: int = 128,
    batch: int = 4,
    out: Path | None = None,
    list: bool = False,
    keys: bool = False,
) -> None:
    """Looks at a model by a probe; prints, draws and writes what it found.

    Writes OUT/report.json and OUT/report.png. A language model or an encoder is shown windows of
    text, a network on graphs a graph with the classes of the nodes that it learns from, any other
    kind pairs of inputs and classes, an autoencoder the inputs alone. A probe that compares a rule
    with a gradient is given one step of backpropagation by AdamW, and the loss of the next token
    or of the class.

    Args:
      name: of the probe, or "module:factory" of one's own; --list names ours.
      model: a model directory, or a model that comes with ffnlab, "embedded" or "embedded_small";
        "embedded" without one.
      option: NAME=VALUE of the probe, VALUE as in TOML, where a string needs no quotes.
      text: UTF-8 files, whose first nine tenths are looked at, as `ffnlab compress` calibrates on
        them. Without any, the standard library of this Python.
      images: for a model of images or rows "digits", "mnist" or a folder with a subfolder for each
        class; what is not held out of them is looked at.
      records: the same of anything: a safetensors file with the tensors "image" and "label".
      graph: for a network on graphs "cora", that of FFNLAB_DATA, or an npz file like it.
      size: height and width of the images; what the model takes without, and of rows a square.
      samples: of the images or records, evenly spaced; fewer where there are fewer.
      tokens: of the text, in evenly spaced windows; rounded down to whole batches, as samples are.
      window: tokens in one row.
      batch: rows in one forward pass.
      out: folder of the report's own; runs/probe/NAME without one.
      list: print the probes there are, and do nothing.
      keys: print the options of every probe, or of NAME, and do nothing.
    """
    from rich.console import Group

    from ffnlab.analysis import METHODS, principal
    from ffnlab.cli.keys import method_keys
    from ffnlab.cli.show import show
    from ffnlab.errors import ConfigError, at_least
    from ffnlab.formats import load
    from ffnlab.formats.embedded import embedded, shipped
    from ffnlab.transform import calibrate

    if list:
        show(overview())
        return
    if keys:
        show(Group(*method_keys(METHODS, [name] if name else METHODS.names(), "ffnlab probe {}")))
        return
    if name is None:
        raise ConfigError(f"name is missing; there are: {', '.join(METHODS.names())}")
    at_least(1, samples=samples, batch=batch)
    asked = Asked(text, images, records, graph, size, samples, tokens, window, batch)
    asked.check()
    options = METHODS.read(name, parsed(option), f"probe {name!r}")
    own = shipped(model)
    network = embedded(own)[0] if own else load(typing.cast("Path", model))
    about: dict[str, object] = {"probe": name, "options": options, "model": own or str(model)}
    look = functools.cache(lambda: shown(network, model, asked))

    def fitted() -> dict[str, Any]:
        """Moments of the layers that are looked at, which compress them."""
        batches = look()[0]
        if not isinstance(batches[0], tuple):
            raise ConfigError(f"probe {name!r} looks at inputs with classes, which this has not")
        transform = principal(batches[0][0], select=str(options.get("select", "**")))
        return calibrate(transform, network, batches)

    made = METHODS.make(name, **options, **given(name, network, model, fitted))
    batches: Sequence = ()
    if made.observe is not None:
        batches, data = look()
        about |= data
    folder = Path("runs/probe") / made.name if out is None else out
    report = made(network, batches)
    show(report)
    report.write(folder, about=about)
    print(f"{folder}: report.json, report.png")


class Asked(NamedTuple):
    """What a model is to be shown; see `probe`."""

    text: tuple[Path, ...]
    images: str
    records: str
    graph: str
    size: tuple[int, ...]
    samples: int
    tokens: int
    window: int
    batch: int

    def check(self) -> None:
        """Raises ConfigError for options that do not go together."""
        from ffnlab.errors import ConfigError

        if sum(map(bool, (self.text, self.images, self.records, self.graph))) > 1:
            raise ConfigError("--text, --images, --records and --graph exclude each other")
        if self.size and not (self.images and len(self.size) == 2 and min(self.size) > 0):
            raise ConfigError(f"size={list(self.size)} must be height and width of --images")


def given(
    name: str, model: Any, place: Path | None, fitted: Callable[[], object]
) -> dict[str, object]:
    """What the command gives a factory that has parameters of these names.

    Args:
      name: of the probe.
      model, place: what is looked at, and where it lies.
      fitted: makes what compresses the layers.
    Raises:
      ConfigError: it wants a rule or a loss, and backpropagation does not train such models.
    """
    from ffnlab.analysis import METHODS
    from ffnlab.cli.inputs.reading import by_name
    from ffnlab.data import Labelled
    from ffnlab.errors import ConfigError
    from ffnlab.formats.kinds import KINDS, check_kind, kind_of, reads_of
    from ffnlab.learning import backprop, labelled, next_token
    from ffnlab.losses import masked

    takes = METHODS.takes(name)
    if not takes:
        return {}
    check_kind(type(model), tuple(KINDS), place)
    kind = kind_of(model) or ""
    if takes & {"rule", "loss"} and kind not in STEPS:
        raise ConfigError(
            f"probe {name!r} takes a step of backpropagation, which this command gives models of "
            f"kind {', '.join(map(repr, STEPS))}, not {kind!r}; Python gives it any rule and loss"
        )
    reads = reads_of(model)
    loss = {"tokens": next_token, "graphs": by_name(masked)}.get(reads, labelled)

    def called(model: Any, batch: Any) -> Any:
        """The model on a batch, with or without classes."""
        if reads == "graphs":
            return model(**batch[0])
        return KINDS[kind].call(model, batch.x if isinstance(batch, Labelled) else batch)

    ours = {"rule": lambda: backprop(loss), "loss": lambda: loss, "fn": lambda: called}
    ours["fitted"] = fitted
    return {parameter: ours[parameter]() for parameter in takes}


def shown(model: Any, place: Path | None, asked: Asked) -> tuple[Sequence, dict[str, object]]:
    """The batches that a model is shown, and what they are.

    Raises:
      ConfigError: the model reads something else, or there is too little of it.
      FFNLabError: it cannot be read.
    """
    from ffnlab.errors import ConfigError
    from ffnlab.formats.kinds import KINDS, check_kind, kind_of, reads_of

    check_kind(type(model), tuple(KINDS), place)
    kind = kind_of(model) or ""
    reads = reads_of(model)
    if reads in ("frames", "fields", "series"):
        raise ConfigError(
            f"a model of kind {kind!r} reads {reads}, which no option gives; a probe that looks at "
            "the model alone takes it, and any does in Python"
        )
    told = [name for name in ("text", "images", "records", "graph") if getattr(asked, name)]
    accepted = OPTIONS.get(reads, ("images", "records"))
    if not set(told) <= set(accepted) or not (told or reads == "tokens"):
        ways = " or ".join(f"--{name}" for name in accepted)
        said = "".join(f", not --{name}" for name in told)
        raise ConfigError(f"a model of kind {kind!r} reads {reads}: give {ways}{said}")
    if reads == "tokens":
        return windows(model, place, asked)
    return nodes(model, asked) if reads == "graphs" else pairs(model, asked)


def nodes(model: Any, asked: Asked) -> tuple[Sequence, dict[str, object]]:
    """A graph with the classes of the nodes that are learned from: one batch."""
    import jax
    import jax.numpy as jnp

    from ffnlab.cli.inputs.data_kinds import GraphConfig
    from ffnlab.cli.inputs.nodes import node_batch, node_data

    found = node_data(GraphConfig(graph=asked.graph), model.config)
    batch = jax.tree.map(jnp.asarray, node_batch(found.nodes))
    return [batch], {"data": dict(found.identity)}


def windows(model: Any, place: Path | None, asked: Asked) -> tuple[Sequence, dict[str, object]]:
    """Windows of text, [b, t]."""
    from ffnlab.compress.text import calibration, file_text, standard_text
    from ffnlab.errors import ConfigError
    from ffnlab.formats import Tokenizer
    from ffnlab.formats.embedded import embedded, shipped
    from ffnlab.recipes import Calibration

    settings = Calibration(asked.tokens, asked.window, asked.batch)
    if asked.window > model.config.max_positions:
        raise ConfigError(
            f"window={asked.window} is longer than the model's context of "
            f"{model.config.max_positions} tokens"
        )
    own = shipped(place)
    tokenizer = embedded(own)[1] if own else Tokenizer.load(typing.cast("Path", place))
    words = file_text(asked.text) if asked.text else standard_text()
    batches = calibration(words, tokenizer, settings, model.config.vocab)
    rows = {"rows": len(batches) * asked.batch, "window": asked.window}
    return batches, {"text": words.as_json() | rows}


def pairs(model: Any, asked: Asked) -> tuple[Sequence, dict[str, object]]:
    """Inputs with classes, or alone where the model has no classes."""
    from ffnlab.cli.inputs.examples import examples
    from ffnlab.compress.labelled import spread
    from ffnlab.data import Labelled
    from ffnlab.errors import ConfigError
    from ffnlab.formats.kinds import KINDS, kind_of

    name = asked.images or asked.records
    found = examples(model, name, are_records=not asked.images, size=asked.size)
    (x, y), b = found.train, asked.batch
    rows = min(asked.samples, len(x)) // b * b
    if not rows:
        raise ConfigError(f"samples={asked.samples} of {len(x)} {found.item}s: no batch of {b}")
    chosen = spread(len(x), rows).reshape(b, -1).T  # a folder is sorted by class, a batch is not
    has_classes = KINDS[kind_of(model) or ""].classes is not None
    batches = [Labelled(x[part], y[part]) if has_classes else x[part] for part in chosen]
    return batches, {"data": found.identity | {"rows": rows}}


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
