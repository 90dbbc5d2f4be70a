"""`ffnlab bench`: speed beside `transformers` on the same weights."""

from pathlib import Path

__all__ = ["bench"]


def bench(
    model: Path | None = None,
    /,
    *,
    prompt: int = 64,
    new: int = 128,
    prefill: int = 512,
    window: int = 512,
    windows: int = 8,
    turns: int = 9,
) -> None:
    """Measures prefill, greedy decoding and evaluation, in turns with transformers on torch.

    The peer runs in its own process: by the interpreter that FFNLAB_PARITY_PYTHON names, else by
    this one where torch is installed.

    Args:
      model: a Hugging Face directory; without one, the model that comes with ffnlab.
      prompt: tokens of the prompt of decoding.
      new: tokens decoded.
      prefill: tokens of the prefill.
      window: predictions in a window of the evaluation.
      windows: how many windows are evaluated.
      turns: times that both sides do each task.
    """
    import contextlib

    import rich

    from ffnlab.bench.versus import Settings, compare, embedded_model

    settings = Settings(prompt, new, prefill, window, windows, turns)
    with embedded_model() if model is None else contextlib.nullcontext(model) as directory:
        rich.print(compare(directory, settings, progress=True))
