"""Progress bars that are silent where nobody watches."""

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import IO, TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")


class Lossy:
    """A text stream without its errors: a terminal that has been closed is no reason to stop."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes a text, or loses it."""
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Writes what is buffered, or loses it."""
        with contextlib.suppress(OSError):
            self._stream.flush()


def console() -> "Console":
    """Where bars are drawn: standard error, as long as somebody watches."""
    from rich.console import Console

    return Console(file=cast("IO[str]", Lossy(sys.stderr)))


def track(items: Iterable[T], label: str, *, enabled: bool = True) -> Iterator[T]:
    """Yields the items; on a terminal it also draws a bar on standard error."""
    if not (enabled and sys.stderr.isatty()):
        yield from items
        return
    from rich.markup import escape
    from rich.progress import track as draw

    yield from draw(items, description=escape(label), console=console(), transient=True)
