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
) -> None:
    """Scores every token of a text once, in windows that overlap.

    Args:
      model: a Hugging Face directory, or a model that comes with ffnlab, "embedded" or
        "embedded_small"; "embedded" without one.
      text: UTF-8 files; without any, the held-out modules of this Python's standard library.
      window: predictions in a window; the model's max_positions, at most 1024, without it.
      stride: tokens between windows; half a window without it.
      limit: bytes of text to score at most.
    """
    from ffnlab import models
    from ffnlab.data import read_text, stdlib_text
    from ffnlab.errors import at_least
    from ffnlab.models.evaluate import perplexity

    at_least(1, limit=limit, window=window, stride=stride)
    decoder, tokenizer = models.open_model(model)
    if text:
        content, source = read_text(text), ", ".join(map(str, text))
    else:
        standard = stdlib_text()
        content = standard.held_out
        source = f"held-out standard library of Python {standard.identity['python']}"
    content = content[:limit]
    # A cut may fall inside a character.
    words = content.decode("utf-8", errors="ignore" if limit is not None else "strict")
    ids = tokenizer.encode(words, special=True)
    report = perplexity(
        decoder, ids, window=window, stride=stride, nbytes=len(words.encode()), progress=True
    )
    print(f"text: {source}")
    print(report)
