"""`ffnlab eval`: perplexity and bits per byte of a model on a text."""

from pathlib import Path

__all__ = ["evaluate"]


def evaluate(
    model: Path | None = None,
    /,
    *,
    text: tuple[Path, ...] = (),
    window: int | None = None,
    stride: int | None = None,
    limit: int | None = None,
    held_out: bool = False,
) -> None:
    """Scores every token of a text once, in windows that overlap.

    Documents (files, and what NUL separates in them) are kept apart by what the model was trained
    with; what stands before the first is not scored.

    Args:
      model: a model directory, or a model that comes with ffnlab, "embedded" or
        "embedded_small"; "embedded" without one.
      text: UTF-8 files; without any, the held-out modules of this Python's standard library.
      window: predictions in a window; the model's max_positions, at most 1024, without it.
      stride: tokens between windows; half a window without it.
      limit: bytes of text to score at most.
      held_out: score only the last tenth of every document of `text`, which training holds out.
    """
    from ffnlab.cli.trained import provenance, warn_of_seen
    from ffnlab.data import stdlib_text
    from ffnlab.data.text.documents import documents_of, joined, read_documents, scored, split
    from ffnlab.errors import ConfigError, at_least
    from ffnlab.formats import open_model
    from ffnlab.text.evaluate import perplexity

    at_least(1, limit=limit, window=window, stride=stride)
    if held_out and not text:
        raise ConfigError("--held-out is of --text; without files the text is held out already")
    decoder, tokenizer = open_model(model)
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
    words = scored(content if limit is None else content[: limit + 1], tokenizer)
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
