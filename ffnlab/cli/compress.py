"""`ffnlab compress`: the main job."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from ffnlab.compress import Text

__all__ = ["compress"]


def compress(
    model: Path | None = None,
    /,
    *,
    recipe: Path | None = None,
    text: tuple[Path, ...] = (),
    also: tuple[Path, ...] = (),
    texts: str = "",
    images: str = "",
    records: str = "",
    out: Path = Path("compressed"),
    dense: bool = False,
    resume: bool = False,
    restart: bool = False,
    keys: bool = False,
) -> None:
    """Prunes, sparsifies and quantizes a model; says what each step cost and bought.

    Writes OUT/model (a Hugging Face directory with ffnlab.json; quantized weights are packed in the
    formats of compressed-tensors; of a model that has no family there, ffnlab's own format),
    OUT/report.json, OUT/pareto.png and, where the recipe prunes,
    OUT/removal.png. The embedded model is compared with a dense one of as many bytes of files.

    A decoder is scored by perplexity and bits per byte of held-out text; an encoder by the bits of
    tokens that are hidden from it, by accuracy where it has classes, and by how near its vectors
    stay to those of the original where it has neither; classifiers by accuracy.

    Args:
      model: a model directory, or a model that comes with ffnlab, "embedded" or
        "embedded_small"; "embedded" without one.
      recipe: TOML file; without one, FinerCut, CHESS and FireQ as in ffnlab/recipes/default.toml,
        or FinerCut and INT4 weights as in encoder.toml beside it.
      text: UTF-8 files; the last tenth of every document, from the line break before it, is held
        out as in training, and the rest calibrates. Without any, the standard library of this
        Python.
      also: UTF-8 files, as a whole, on which the compressed embedded model and the dense one are
        compared too.
      texts: of an encoder with classes, what it is calibrated and scored on: "polarity" (sentences
        of film reviews) or a file of JSON lines {"text": "...", "label": ...}; one in ten is held
        out.
      images: of a classifier of images, what it is calibrated and scored on: "digits", "mnist" or a
        folder with a subfolder for each class; one in ten is held out where nothing else is.
      records: the same of a classifier of anything: a safetensors file with the tensors "image" and
        "label".
      out: folder for the results.
      dense: write OUT/dense too, where OUT/model has packed weights: the same model as plain
        matrices, which transformers loads without the compressed-tensors package.
      resume: continue the interrupted run in OUT, if there is one.
      restart: throw away the interrupted run in OUT.
      keys: print every key of a recipe with type, default and meaning, and do nothing.
    """
    import time

    start = time.perf_counter()
    from rich.console import Group

    from ffnlab import compress as job
    from ffnlab import recipes
    from ffnlab.cli.keys import recipe_keys
    from ffnlab.cli.show import show
    from ffnlab.errors import ConfigError
    from ffnlab.formats.embedded import shipped
    from ffnlab.formats.kinds import kind_of
    from ffnlab.formats.opening import kind_at

    if keys:
        show(Group(*recipe_keys()))
        return
    if resume and restart:
        raise ConfigError("--resume and --restart exclude each other")
    if sum(map(bool, (text or also, texts, images, records))) > 1:
        raise ConfigError(
            "--text, --texts, --images and --records exclude each other: a model has one task"
        )
    read = None if recipe is None else recipes.read_recipe(recipe)
    if images or records:
        if model is None or read is None:
            raise ConfigError(
                "--images and --records need a model directory and --recipe FILE; the default "
                "recipes are for models of text"
            )
        given = labelled_job(model, images or records, are_records=bool(records))
    elif model is not None and shipped(model) is None and kind_at(model) == "encoder":
        given = encoder_job(model, text, also, texts)
    else:
        if texts:
            raise ConfigError(f"--texts is for an encoder with classes; model is {model}")
        given = language_job(model, text, also)
    steps = recipes.default(kind_of(given.model) or "") if read is None else read
    rival = None if given.rival is None else given.rival(steps)
    print(f"model: {given.source}; {given.data}; recipe: {steps.source}")
    report = job.compress(
        given.model,
        steps,
        given.task,
        out,
        source=given.source,
        rival=rival,
        dense=dense,
        interrupted="resume" if resume else "restart" if restart else "refuse",
        loading=time.perf_counter() - start,
        origin=given.origin or {},
    )
    show(report)
    print(f"{out}: model, report.json, pictures")


class Given(NamedTuple):
    """What a job is given.

    Attributes:
      model: what is compressed.
      task: what it is for.
      source: where the model came from.
      data: what it is measured on, for people.
      rival: recipe -> what measures the model to compare with, or None.
      origin: what the model was trained on.
    """

    model: Any
    task: Any
    source: str
    data: str
    rival: Any = None
    origin: Any = None


def language_job(model: Path | None, text: tuple[Path, ...], also: tuple[Path, ...]) -> Given:
    """A language model and text for it."""
    from ffnlab import compress as job
    from ffnlab.errors import ConfigError
    from ffnlab.formats.embedded import open_model, shipped

    source = shipped(model) or str(model)
    has_rival = shipped(model) == "embedded"
    if also and not has_rival:
        raise ConfigError(f"--also compares the embedded model with its rival; model is {source}")
    second = job.second_texts(also) if has_rival else ()
    words = text_for(text)
    rival = (lambda steps: job.embedded_rival(words, steps, second)) if has_rival else None
    decoder, tokenizer = open_model(model)
    origin = origin_of(model, words, text)
    task = job.TextTask(tokenizer, words)
    return Given(decoder, task, source, f"text: {words.source}", rival, origin)


def encoder_job(model: Path, text: tuple[Path, ...], also: tuple[Path, ...], texts: str) -> Given:
    """An encoder, and texts with classes or text for it."""
    from ffnlab.cli.inputs.examples import encoder_task, texts_task
    from ffnlab.errors import ConfigError
    from ffnlab.formats import Tokenizer, load

    if also:
        raise ConfigError(f"--also compares the embedded model with its rival; model is {model}")
    encoder, tokenizer = load(model, kinds=("encoder",)), Tokenizer.load(model)
    if texts:
        task = texts_task(encoder, tokenizer, texts, model)
        return Given(encoder, task, str(model), f"data: {task.source}")
    words = text_for(text)
    found = encoder_task(encoder, tokenizer, words, model)
    origin = origin_of(model, words, text)
    return Given(encoder, found, str(model), f"text: {words.source}", None, origin)


def text_for(text: tuple[Path, ...]) -> "Text":
    """The text of files, or the standard library."""
    from ffnlab import compress as job

    return job.file_text(text) if text else job.standard_text()


def origin_of(model: Path | None, words: "Text", text: tuple[Path, ...]) -> dict[str, object]:
    """What a model was trained on, with a warning where it is measured on that."""
    from ffnlab.cli.trained import provenance, warn_of_seen
    from ffnlab.data.text.documents import documents_of, read_documents, split

    whole = read_documents(text) if text else documents_of(words.held_out)
    parts = [split(document)[1] for document in whole] if text else whole
    origin = provenance(model)
    warn_of_seen("compress", origin, zip(parts, whole, strict=True))
    return origin


def labelled_job(model: Path, name: str, *, are_records: bool) -> Given:
    """A classifier and labelled examples for it."""
    from ffnlab.cli.inputs.examples import CLASSIFIERS, labelled_task
    from ffnlab.formats import load

    network = load(model, kinds=CLASSIFIERS)
    task = labelled_task(network, name, are_records=are_records)
    return Given(network, task, str(model), f"data: {task.source}")
