"""`[data]` of runs that learn from channels of wireless networks, drawn at every step."""

import dataclasses

from ffnlab.errors import ConfigError, at_least

__all__ = ["CellFreeConfig", "CellularConfig"]


@dataclasses.dataclass(frozen=True)
class CellularConfig:
    """Rayleigh channels of one transmitter to its users (`ffnlab.graphs.cellular`).

    Scored on channels of their own, beside regularized zero forcing.

    Attributes:
      users: numbers of users, drawn among these for each channel.
      antennas: of the transmitter.
      snr_db: ends of the power over noise, dB.
      batch: channels of a batch.
      held_out: channels to score on.
    """

    users: tuple[int, ...] = (4, 6)
    antennas: int = 8
    snr_db: tuple[float, ...] = (5.0, 15.0)
    batch: int = 128
    held_out: int = 300

    def __post_init__(self) -> None:
        at_least(1, users=min(self.users, default=0), antennas=self.antennas)
        at_least(1, batch=self.batch, held_out=self.held_out)
        if len(self.snr_db) != 2 or self.snr_db[0] > self.snr_db[1]:
            raise ConfigError(f"snr_db={list(self.snr_db)} must be a lower and an upper end")


@dataclasses.dataclass(frozen=True)
class CellFreeConfig:
    """Cell-free networks of several sizes, in turns (`ffnlab.graphs.cell_free`).

    Scored on networks of their own, beside splits of power by gains.

    Attributes:
      points, users, serving, antennas: of each size in turn; the second user count goes with the
        second number of points, and so on.
      batch: networks of a batch, all of one size.
      held_out: networks to score on, of each size.
    """

    points: tuple[int, ...] = (16, 20, 12)
    users: tuple[int, ...] = (6, 8, 5)
    serving: tuple[int, ...] = (6, 8, 5)
    antennas: tuple[int, ...] = (4, 2, 4)
    batch: int = 64
    held_out: int = 100

    def __post_init__(self) -> None:
        at_least(1, batch=self.batch, held_out=self.held_out)
        names = ("points", "users", "serving", "antennas")
        columns = [getattr(self, name) for name in names]
        if len({len(column) for column in columns}) != 1 or not self.points:
            found = {name: len(column) for name, column in zip(names, columns, strict=True)}
            raise ConfigError(f"sizes given: {found}; as many of each, one or more, are accepted")
        for name, column in zip(names, columns, strict=True):
            at_least(1, **{name: min(column)})
        if any(m > count for m, count in zip(self.serving, self.points, strict=True)):
            raise ConfigError(
                f"serving={list(self.serving)}: at most points={list(self.points)} can serve"
            )

    @property
    def sizes(self) -> tuple[tuple[int, int, int, int], ...]:
        """(points, users, serving, antennas) of each."""
        return tuple(zip(self.points, self.users, self.serving, self.antennas, strict=True))
