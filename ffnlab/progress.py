"""Progress bars that are silent where nobody watches."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], label: str, *, enabled: bool = True) -> Iterator[T]:
    """Yields the items; on a terminal it also draws a bar on standard error."""
    if not (enabled and sys.stderr.isatty()):
        yield from items
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import track as draw

    console = Console(stderr=True)
    yield from draw(items, description=escape(label), console=console, transient=True)
