"""`ffnlab compress`: the main job."""

from pathlib import Path

__all__ = ["compress"]


def compress(
    model: Path | None = None,
    /,
    *,
    recipe: Path | None = None,
    text: tuple[Path, ...] = (),
    also: tuple[Path, ...] = (),
    out: Path = Path("compressed"),
    dense: bool = False,
    resume: bool = False,
    restart: bool = False,
    keys: bool = False,
) -> None:
    """Prunes, sparsifies and quantizes a language model; says what each step cost and bought.

    Writes OUT/model (a Hugging Face directory with ffnlab.json; quantized weights are packed in the
    formats of compressed-tensors), OUT/report.json, OUT/pareto.png and, where the recipe prunes,
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
    from ffnlab.cli.trained import provenance, warn_of_seen
    from ffnlab.data.text.documents import documents_of, read_documents, split
    from ffnlab.errors import ConfigError
    from ffnlab.formats.embedded import open_model, shipped

    if keys:
        show(Group(*recipe_keys()))
        return
    if resume and restart:
        raise ConfigError("--resume and --restart exclude each other")
    source = shipped(model) or str(model)
    has_rival = shipped(model) == "embedded"
    if also and not has_rival:
        raise ConfigError(f"--also compares the embedded model with its rival; model is {source}")
    steps = recipes.default() if recipe is None else recipes.read_recipe(recipe)
    words = job.file_text(text) if text else job.standard_text()
    whole = read_documents(text) if text else documents_of(words.held_out)
    parts = [split(document)[1] for document in whole] if text else whole
    rival = job.embedded_rival(words, steps, job.second_texts(also)) if has_rival else None
    decoder, tokenizer = open_model(model)
    origin = provenance(model)
    warn_of_seen("compress", origin, zip(parts, whole, strict=True))
    print(f"model: {source}; text: {words.source}; recipe: {steps.source}")
    report = job.compress(
        decoder,
        steps,
        job.TextTask(tokenizer, words),
        out,
        source=source,
        rival=rival,
        dense=dense,
        interrupted="resume" if resume else "restart" if restart else "refuse",
        loading=time.perf_counter() - start,
        origin=origin,
    )
    show(report)
    print(f"{out}: model, report.json, pictures")
