"""`ffnlab report`: where the time of a training run went."""

from pathlib import Path

__all__ = ["report"]


def report(run: Path, /, *, out: Path | None = None) -> None:
    """Prints how much of a run's wall clock took it forward (goodput), and where the rest went.

    Parts that died count: steps that had to be taken again, and the time until the next part began.
    A run that still goes on is shown as far as it has come.

    Args:
      run: folder of `ffnlab train`, with times.jsonl in it.
      out: folder for report.json and a picture, report.png; of its own.
    Raises:
      FormatError: the file holds no times of a run.
    """
    from ffnlab.cli.show import show
    from ffnlab.parallel.goodput import Goodput

    found = Goodput.read(run)
    show(found)
    if out is not None:
        found.write(out, about={"run": str(run)})
        print(f"report.json and report.png: {out}")
