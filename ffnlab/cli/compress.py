"""`ffnlab compress`: the main job."""

from pathlib import Path

__all__ = ["compress"]


def compress(
    model: Path | None = None,
    /,
    *,
    recipe: Path | None = None,
    text: tuple[Path, ...] = (),
    out: Path = Path("compressed"),
    dense: bool = False,
    resume: bool = False,
    restart: bool = False,
) -> None:
    """Prunes, sparsifies and quantizes a language model; says what each step cost and bought.

    Writes OUT/model (a Hugging Face directory with ffnlab.json; quantized weights are packed in the
    formats of compressed-tensors), OUT/report.json, OUT/pareto.png and, where the recipe prunes,
    OUT/removal.png.

    Args:
      model: a Hugging Face directory; without one, the model that comes with ffnlab.
      recipe: TOML file; without one, FinerCut, CHESS and FireQ as in ffnlab/recipes/default.toml.
      text: UTF-8 files; the last tenth of every document, from the line break before it, is held
        out as in training, and the rest calibrates. Without any, the standard library of this
        Python.
      out: folder for the results.
      dense: write OUT/dense too, where OUT/model has packed weights: the same model as plain
        matrices, which transformers loads without the compressed-tensors package.
      resume: continue the interrupted run in OUT, if there is one.
      restart: throw away the interrupted run in OUT.
    """
    import time

    start = time.perf_counter()
    from functools import partial

    import rich

    from ffnlab import compress as job
    from ffnlab import recipes
    from ffnlab.cli.trained import provenance, warn_of_seen
    from ffnlab.data.documents import documents_of, read_documents, split
    from ffnlab.errors import ConfigError
    from ffnlab.models import Tokenizer, load
    from ffnlab.models.embedded import embedded

    if resume and restart:
        raise ConfigError("--resume and --restart exclude each other")
    steps = recipes.default() if recipe is None else recipes.read_recipe(recipe)
    words = job.file_text(text) if text else job.standard_text()
    source = "embedded" if model is None else str(model)
    decoder, tokenizer = embedded() if model is None else (load(model), Tokenizer.load(model))
    whole = read_documents(text) if text else documents_of(words.held_out)
    parts = [split(document)[1] for document in whole] if text else whole
    origin = provenance(model)
    warn_of_seen("compress", origin, zip(parts, whole, strict=True))
    rich.print(f"model: {source}; text: {words.source}; recipe: {steps.source}")
    report = job.compress(
        decoder,
        tokenizer,
        steps,
        words,
        out,
        source=source,
        rival=partial(job.embedded_rival, text=words) if model is None and not text else None,
        dense=dense,
        interrupted="resume" if resume else "restart" if restart else "refuse",
        loading=time.perf_counter() - start,
        origin=origin,
    )
    rich.print(report)
    rich.print(f"{out}: model, report.json, pictures")
