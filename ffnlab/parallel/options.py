"""When the loop does what: intervals and positions in steps, and what else it is told."""

import dataclasses
from collections.abc import Sequence
from numbers import Integral

from ffnlab.errors import ConfigError

__all__ = ["LoopOptions"]

INTERVALS = ("log_every", "evaluate_every", "checkpoint_every", "checkpoint_local_every")


def check_positions(evaluate_at: object) -> None:
    """Raises ConfigError unless positions are a sequence of integers of at least 0."""
    is_sequence = isinstance(evaluate_at, Sequence)
    if not is_sequence or any(not isinstance(at, Integral) or int(at) < 0 for at in evaluate_at):
        raise ConfigError(
            f"evaluate_at={evaluate_at!r} must hold positions, integers of at least 0"
        )


@dataclasses.dataclass(frozen=True)
class LoopOptions:
    """How often the loop does what, all in steps, 0 for never before the end; and what else.

    Attributes:
      log_every: metrics are written; they also are where `evaluate` runs.
      evaluate_every: `evaluate` runs; it also runs after the last step.
      checkpoint_every: the state is saved; it is also saved after the last step and when stopped.
      checkpoint_local_every: every process saves what it holds in `checkpoint_local`; never before
        the end, where the state is saved for all.
      checkpoint_local: a folder on a disk of each machine (`ffnlab.parallel.local`).
      progress: a progress bar where standard error is a terminal.
      on_bad: what a metric that is not finite does: "stop" ends the run and saves the state beside
        the checkpoints; "skip" undoes the step, counts it, and goes on.
      watch: the figure of `evaluate` by which the run stops early; the lower the better.
      patience: evaluations in a row without a new lowest `watch` after which it stops; 0 for never.
      tensorboard: event files too, in `events/`; needs the extra "log".
      profile: steps traced by the profiler, from the third one on, into `profile/`.
      evaluate_at: further positions where `evaluate` runs; 0 is before the first step.
      began: when the process began, seconds since 1970, so that its start counts in the times of
        the run; None for when the loop does.
    """

    log_every: int = 20
    evaluate_every: int = 0
    checkpoint_every: int = 0
    progress: bool = True
    on_bad: str = "stop"
    watch: str = ""
    patience: int = 0
    tensorboard: bool = False
    profile: int = 0
    evaluate_at: tuple[int, ...] = ()
    began: float | None = None
    checkpoint_local_every: int = 0
    checkpoint_local: str = ""

    def __post_init__(self) -> None:
        for name in (*INTERVALS, "patience", "profile"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must not be negative")
        check_positions(self.evaluate_at)
        if bool(self.checkpoint_local) != bool(self.checkpoint_local_every):
            raise ConfigError(
                f"checkpoint_local={self.checkpoint_local!r} and "
                f"checkpoint_local_every={self.checkpoint_local_every} go together: a folder, and "
                "how often it is written to"
            )
        if self.on_bad not in ("stop", "skip"):
            raise ConfigError(f"on_bad={self.on_bad!r} is not one of 'stop', 'skip'")
        if self.patience and not (self.watch and self.evaluate_every):
            raise ConfigError(
                f"patience={self.patience} needs a figure to watch (watch={self.watch!r}) and "
                f"evaluations (evaluate_every={self.evaluate_every})"
            )

    def due(self, what: str, position: int, steps: int) -> bool:
        """Whether something is done at a position of a run of so many steps.

        Args:
          what: name of an interval.
          position: steps taken.
          steps: where the run ends.

        >>> [LoopOptions(log_every=3).due("log_every", p, 7) for p in (2, 3, 7)]
        [False, True, True]
        """
        every = getattr(self, what)
        also = what == "evaluate_every" and position in self.evaluate_at
        return also or position == steps or (every > 0 and position % every == 0 < position)

    def next_due(self, position: int, steps: int) -> int:
        """The first position after this one at which anything is done.

        >>> LoopOptions(log_every=20, evaluate_every=9, evaluate_at=(4, 30)).next_due(4, 100)
        9
        """
        everies = [every for name in INTERVALS if (every := getattr(self, name))]
        ends = [steps, *((position // every + 1) * every for every in everies)]
        return min([*ends, *(int(at) for at in self.evaluate_at if at > position)])
