"""Which of a kernel's implementations runs.

Each kernel's `api.py` holds a tuple of `Backend`, fastest first and one that runs anywhere last.
`choose` takes the first that fits the platform and the call. A backend that cannot run says why,
and when none can the caller gets every reason at once.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax


def accept(**facts: object) -> None:
    """Refuses nothing; the `refuse` of a backend that runs any call."""


class Backend(NamedTuple):
    """One implementation of a kernel.

    Attributes:
      name: what `backend=` of the public function accepts.
      run: the implementation; all backends of one kernel take the same arguments.
      platforms: names of `jax.default_backend()` it runs on ("cpu", "gpu", "tpu"); empty: all.
      refuse: called with facts about the call; returns None, or the reason why it cannot run.
      automatic: False for implementations that only run when asked for by name.
    """

    name: str
    run: Callable[..., jax.Array]
    platforms: tuple[str, ...] = ()
    refuse: Callable[..., str | None] = accept
    automatic: bool = True


def choose(
    backends: Sequence[Backend],
    requested: str | None = None,
    *,
    platform: str | None = None,
    **facts: object,
) -> Backend:
    """The first backend that can run a call.

    Args:
      backends: implementations in order of preference.
      requested: a name, to take that one or fail.
      platform: "cpu", "gpu" or "tpu"; the default device's when None.
      **facts: what `refuse` of each backend needs to know (shapes, dtypes, options).
    Returns:
      one of `backends`.
    Raises:
      ValueError: unknown name, or no backend can run; the message holds every reason.

    >>> choose([Backend("xla", print)]).name
    'xla'
    """
    candidates = [b for b in backends if b.name == requested]
    if requested is None:
        candidates = [b for b in backends if b.automatic]
    if not candidates:
        accepted = ", ".join(repr(b.name) for b in backends)
        raise ValueError(f"backend={requested!r} is unknown; accepted: None, {accepted}")
    platform = platform or jax.default_backend()
    reasons = []
    for backend in candidates:
        reason = backend.refuse(**facts)
        if backend.platforms and platform not in backend.platforms:
            reason = f"runs on {', '.join(backend.platforms)}, this is {platform}"
        if reason is None:
            return backend
        reasons.append(f"{backend.name}: {reason}")
    raise ValueError("no backend can run this call: " + "; ".join(reasons))
