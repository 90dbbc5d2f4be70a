"""Tables and reports on standard output, as they are: brackets in a name are no markup."""

__all__ = ["show"]


def show(renderable: object) -> None:
    """Prints what rich can draw, in colour on a terminal; strings in it are taken literally.

    A folder may be called "[/v2]", which `rich.print` would read as the end of a style.
    """
    from rich.console import Console

    Console(markup=False, emoji=False).print(renderable)
