"""`ffnlab list`: the studies there are."""

__all__ = ["list_studies"]


def list_studies() -> None:
    """Lists the studies: name, title, package, and how the last run on this machine ended."""
    from ffnlab.cli.show import show
    from ffnlab.studies.run import overview

    show(overview())
