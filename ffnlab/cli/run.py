"""`ffnlab run SLUG`: the study of a paper; `ffnlab run --all`: all of them."""

from pathlib import Path

from ffnlab.errors import ConfigError

__all__ = ["run"]

RESULTS = Path("results")


def run(
    slug: str = "",
    /,
    *,
    out: Path | None = None,
    quick: bool = False,
    seed: int = 0,
    all: bool = False,
    against: Path | None = None,
) -> int:
    """Runs the study of a paper: its claims, the paper's figures and ours, and whether they hold.

    With --all every study is run whose result is missing or stale, each in a process of its own.
    The exit status is 1 where one fails, or where a claim comes out otherwise than recorded.

    Args:
      slug: name of the study; `ffnlab list` gives them.
      out: folder for result.json and the pictures; nothing is written without it. With --all a
        folder of such folders, results without it.
      quick: the small form, at most a minute on two cores.
      seed: changes the random draw.
      all: run all studies.
      against: with --all, the folder of recorded results to compare with; results without it.
    """
    if all == bool(slug):
        raise ConfigError("`ffnlab run` takes the name of a study (`ffnlab list`) or --all")
    if all:
        from ffnlab.studies.ledger.repeat import run_all

        return run_all(out or RESULTS, against or RESULTS, quick=quick, seed=seed)
    if against is not None:
        raise ConfigError(f"--against {against} goes with --all")
    from ffnlab.cli.show import show
    from ffnlab.studies.run import run_study

    show(run_study(slug, out=out, quick=quick, seed=seed))
    if out is not None:
        print(f"result.json and pictures: {out}")
    return 0
