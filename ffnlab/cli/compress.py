"""`ffnlab compress`: the main job."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from ffnlab.recipes import Recipe

__all__ = ["compress"]


def compress(
    model: Path | None = None,
    /,
    *,
    recipe: Path | None = None,
    text: tuple[Path, ...] = (),
    also: tuple[Path, ...] = (),
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

    Args:
      model: a model directory, or a model that comes with ffnlab, "embedded" or
        "embedded_small"; "embedded" without one.
      recipe: TOML file; without one, FinerCut, CHESS and FireQ as in ffnlab/recipes/default.toml.
      text: UTF-8 files; the last tenth of every document, from the line break before it, is held
        out as in training, and the rest calibrates. Without any, the standard library of this
        Python.
      also: UTF-8 files, as a whole, on which the compressed embedded model and the dense one are
        compared too.
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

    if keys:
        show(Group(*recipe_keys()))
        return
    if resume and restart:
        raise ConfigError("--resume and --restart exclude each other")
    steps = recipes.default() if recipe is None else recipes.read_recipe(recipe)
    if images or records:
        given = labelled_job(model, recipe, text, also, images, records)
    else:
        given = language_job(model, steps, text, also)
    print(f"model: {given.source}; {given.data}; recipe: {steps.source}")
    report = job.compress(
        given.model,
        steps,
        given.task,
        out,
        source=given.source,
        rival=given.rival,
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
      rival: measures the model to compare with, or None.
      origin: what the model was trained on.
    """

    model: Any
    task: Any
    source: str
    data: str
    rival: Any = None
    origin: Any = None


def language_job(
    model: Path | None, steps: "Recipe", text: tuple[Path, ...], also: tuple[Path, ...]
) -> Given:
    """A language model and text for it."""
    from ffnlab import compress as job
    from ffnlab.cli.trained import provenance, warn_of_seen
    from ffnlab.data.text.documents import documents_of, read_documents, split
    from ffnlab.errors import ConfigError
    from ffnlab.formats.embedded import open_model, shipped

    source = shipped(model) or str(model)
    has_rival = shipped(model) == "embedded"
    if also and not has_rival:
        raise ConfigError(f"--also compares the embedded model with its rival; model is {source}")
    words = job.file_text(text) if text else job.standard_text()
    whole = read_documents(text) if text else documents_of(words.held_out)
    parts = [split(document)[1] for document in whole] if text else whole
    rival = job.embedded_rival(words, steps, job.second_texts(also)) if has_rival else None
    decoder, tokenizer = open_model(model)
    origin = provenance(model)
    warn_of_seen("compress", origin, zip(parts, whole, strict=True))
    task = job.TextTask(tokenizer, words)
    return Given(decoder, task, source, f"text: {words.source}", rival, origin)


def labelled_job(
    model: Path | None,
    recipe: Path | None,
    text: tuple[Path, ...],
    also: tuple[Path, ...],
    images: str,
    records: str,
) -> Given:
    """A classifier and labelled examples for it."""
    from ffnlab.cli.inputs.examples import CLASSIFIERS, labelled_task
    from ffnlab.errors import ConfigError
    from ffnlab.formats import load

    if text or also or (images and records):
        raise ConfigError("--images, --records and --text exclude each other: a model has one task")
    if model is None or recipe is None:
        raise ConfigError(
            "--images and --records need a model directory and --recipe FILE; the default recipe "
            "is for language models"
        )
    network = load(model, kinds=CLASSIFIERS)
    task = labelled_task(network, images or records, are_records=bool(records))
    return Given(network, task, str(model), f"data: {task.source}")
