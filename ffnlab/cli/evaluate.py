"""`ffnlab eval`: how good a model is on text, or one with classes on texts, images or records."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flax import nnx

    from ffnlab.compress.task import Task

__all__ = ["evaluate"]


def evaluate(
    model: Path | None = None,
    /,
    *,
    text: tuple[Path, ...] = (),
    texts: str = "",
    images: str = "",
    records: str = "",
    window: int | None = None,
    stride: int | None = None,
    limit: int | None = None,
    held_out: bool = False,
) -> None:
    """Scores every token of a text once, in windows that overlap.

    Documents (files, and what NUL separates in them) are kept apart by what the model was trained
    with; what stands before the first is not scored. Of an encoder with a masked head, windows do
    not overlap, 15 % of their tokens are hidden, always the same ones, and the bits of each are
    given. The figures of an encoder are those that `ffnlab compress` measures on the same windows.

    Args:
      model: a model directory, or a model that comes with ffnlab, "embedded" or
        "embedded_small"; "embedded" without one.
      text: UTF-8 files; without any, the held-out modules of this Python's standard library.
      texts: of an encoder with classes: "polarity" or a file of JSON lines, of which one in ten is
        scored, as training holds it out.
      images: of a classifier of images: "digits", "mnist" or a folder with a subfolder per class,
        scored on what training holds out.
      records: of a classifier of anything: a safetensors file with the tensors "image" and "label",
        of which one in ten is scored.
      window: predictions in a window; the model's max_positions, at most 1024, without it. Of an
        encoder tokens in a row, 128 without it.
      stride: tokens between windows; half a window without it.
      limit: bytes of text to score at most.
      held_out: score only the last tenth of every document of `text`, which training holds out.
    """
    from ffnlab.cli.trained import provenance, warn_of_seen
    from ffnlab.data import stdlib_text
    from ffnlab.data.text.documents import documents_of, joined, read_documents, scored, split
    from ffnlab.errors import ConfigError, at_least
    from ffnlab.formats import open_model
    from ffnlab.formats.embedded import shipped
    from ffnlab.formats.opening import kind_at
    from ffnlab.text.evaluate import perplexity

    at_least(1, limit=limit, window=window, stride=stride)
    if held_out and not text:
        raise ConfigError("--held-out is of --text; without files the text is held out already")
    is_encoder = model is not None and shipped(model) is None and kind_at(model) == "encoder"
    if texts and not is_encoder:
        raise ConfigError("--texts is for an encoder with classes")
    if texts or images or records:
        if sum(map(bool, (text, texts, images, records))) > 1:
            raise ConfigError("--text, --texts, --images and --records exclude each other")
        if model is None or shipped(model) is not None:
            raise ConfigError("--images and --records need the directory of a model with classes")
        if (window, stride, limit) != (None, None, None):
            raise ConfigError("window, stride and limit are of --text; others are scored whole")
        if texts:
            of_classes(model, texts)
        else:
            of_examples(model, images or records, are_records=bool(records))
        return
    if text:
        whole = read_documents(text)
        parts = [split(document)[1] for document in whole] if held_out else whole
        content, source = joined(parts), ", ".join(map(str, text))
    else:
        standard = stdlib_text()
        content = standard.held_out
        parts = whole = documents_of(content)
        source = f"held-out standard library of Python {standard.identity['python']}"
    advice = "" if held_out else "; --held-out scores the tenth that training held out"
    warn_of_seen("eval", provenance(model), zip(parts, whole, strict=True), advice)
    # The text begins with a NUL, which is not scored.
    content = content if limit is None else content[: limit + 1]
    if is_encoder:
        assert model is not None
        of_hidden(model, content, source, window, stride)
        return
    decoder, tokenizer = open_model(model)
    words = scored(content, tokenizer)
    report = perplexity(
        decoder,
        words.tokens,
        window=window,
        stride=stride,
        counted=words.counted,
        nbytes=words.nbytes,
        progress=True,
    )
    print(f"text: {source}")
    print(report)


def of_classes(model: Path, name: str) -> None:
    """Prints how an encoder with classes does on held-out texts."""
    from ffnlab.cli.inputs.examples import texts_task
    from ffnlab.formats import Tokenizer, load

    encoder = load(model, kinds=("encoder",))
    show_scores(texts_task(encoder, Tokenizer.load(model), name, model), encoder)


def of_examples(model: Path, name: str, *, are_records: bool) -> None:
    """Prints how a classifier does on held-out images or records."""
    from ffnlab import recipes
    from ffnlab.cli.inputs.examples import CLASSIFIERS, labelled_task
    from ffnlab.errors import ConfigError
    from ffnlab.formats import load

    network = load(model, kinds=CLASSIFIERS)
    task = labelled_task(network, name, are_records=are_records)
    if problems := task.problems(network, recipes.default("encoder")):
        raise ConfigError("; ".join(problems))
    show_scores(task, network)


def of_hidden(
    model: Path, content: bytes, source: str, window: int | None, stride: int | None
) -> None:
    """Prints how an encoder finds hidden tokens of a text."""
    from ffnlab.cli.inputs.examples import encoder_task
    from ffnlab.compress import Text
    from ffnlab.errors import ConfigError
    from ffnlab.formats import Tokenizer, load

    if stride is not None:
        raise ConfigError("stride is of windows that overlap; those of an encoder do not")
    encoder = load(model, kinds=("encoder",))
    text = Text(content, content, source, "all of it")
    task = encoder_task(encoder, Tokenizer.load(model), text, model)
    if encoder.config.head != "masked":
        raise ConfigError(
            f"{model} has head={encoder.config.head!r}, which gives no figure on plain text; "
            "`ffnlab compress` says how near the vectors of a smaller one stay to its own"
        )
    print(f"text: {source}")
    show_scores(task, encoder, window)


def show_scores(task: "Task", model: "nnx.Module", window: int | None = None) -> None:
    """Prints the scores of a task on all of its held-out data, as `ffnlab compress` has them."""
    from ffnlab import recipes, weights

    usual = recipes.default("encoder").evaluation
    settings = dataclasses.replace(usual, tokens=0, window=window or usual.window)
    samples = task.held_out(model, settings)
    prepared = weights.prepare(model)
    found = task.quality(prepared, samples, settings.batch, label="eval", progress=True)
    counts = ", ".join(f"{n:,} {name}" for name, n in task.counts(samples).items())
    said = ", ".join(f"{score.title} {found[score.name]:.4f}" for score in task.scores)
    print(f"{said} ({counts})")
