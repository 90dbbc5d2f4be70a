"""`ffnlab run SLUG`: the study of a paper."""

from pathlib import Path

__all__ = ["run"]


def run(slug: str, /, *, out: Path | None = None, quick: bool = False, seed: int = 0) -> None:
    """Runs the study of a paper: its claims, the paper's figures and ours, and whether they hold.

    Args:
      slug: name of the study; `ffnlab list` gives them.
      out: folder for result.json and the pictures; nothing is written without it.
      quick: the small form, at most a minute on two cores.
      seed: changes the random draw.
    """
    from ffnlab.cli.show import show
    from ffnlab.studies.run import run_study

    show(run_study(slug, out=out, quick=quick, seed=seed))
    if out is not None:
        print(f"result.json and pictures: {out}")
