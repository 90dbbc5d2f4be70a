"""Weather to forecast: waves whose motion is known exactly, and real air temperature.

Rossby-Haurwitz waves are solutions of the barotropic vorticity equation on a turning sphere
(Haurwitz 1940): a pattern of R waves around the globe that keeps its shape and travels at a speed
that depends on R and on the flow it rides on.

    th = R (lam - nu t) + phase,   nu = (R (3 + R) w - 2 Omega) / ((1 + R) (2 + R))
    psi = -a^2 w sin(phi) + a^2 K cos(phi)^R sin(phi) cos(th)
    u = a w cos(phi) + a K cos(phi)^(R-1) (R sin(phi)^2 - cos(phi)^2) cos(th)
    v = -a K R cos(phi)^(R-1) sin(phi) sin(th)

    phi, lam: latitude, longitude;  psi: stream function, m^2/s;  u, v: wind to the east and to the
    north, m/s;  w, K: of the flow and of the wave, 1/s;  a: of the Earth, m;  Omega: its turning
"""

import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int

from ffnlab.data.folders import folder
from ffnlab.errors import FFNLabError, FormatError, at_least, check_seed, first_line
from ffnlab.storage.npz import READ_ERRORS, read_member

__all__ = [
    "AirTemperature",
    "Waves",
    "air_temperature",
    "drawn_waves",
    "wave_fields",
]

EARTH, TURNING = 6.371e6, 7.292e-5  # m, 1/s
NUMBERS, STRENGTHS = (3, 4, 5), (4e-6, 9e-6)  # of R; of w and K, 1/s
COLDEST, HOTTEST = 150.0, 350.0  # K


class Waves(NamedTuple):
    """Waves, by what tells them apart.

    Attributes:
      number: R, [n].
      flow, strength: w and K, [n], 1/s.
      phase: [n], radians.
    """

    number: Int[np.ndarray, "n"]
    flow: Float[np.ndarray, "n"]
    strength: Float[np.ndarray, "n"]
    phase: Float[np.ndarray, "n"]

    @property
    def speed(self) -> Float[np.ndarray, "n"]:
        """Of the pattern to the east (nu), radians a second."""
        r = self.number
        return (r * (3 + r) * self.flow - 2 * TURNING) / ((1 + r) * (2 + r))


def drawn_waves(count: int, seed: int = 0) -> Waves:
    """Waves of 3 to 5 crests, flows and strengths of 4e-6 to 9e-6 a second, at any phase.

    Raises:
      ConfigError: count below 1, or a seed that is none.
    """
    at_least(1, count=count)
    check_seed(seed)
    random = np.random.default_rng(seed)
    number = random.choice(NUMBERS, count)
    flow, strength = random.uniform(*STRENGTHS, (2, count))
    return Waves(number, flow, strength, random.uniform(0, 2 * np.pi, count))


def wave_fields(
    waves: Waves,
    latitudes: Float[np.ndarray, "h"],
    longitudes: Float[np.ndarray, "w"],
    hours: float = 0.0,
) -> Float[np.ndarray, "n h w 3"]:
    """psi, u and v of waves at a time.

    Args:
      waves: n of them.
      latitudes, longitudes: degrees.
      hours: since the phase was what it is.

    >>> one = Waves(np.array([4]), np.array([7e-6]), np.array([7e-6]), np.array([0.0]))
    >>> wave_fields(one, np.array([0.0, 90.0]), np.array([0.0])).shape
    (1, 2, 1, 3)
    """
    phi, lam = np.radians(latitudes)[:, None], np.radians(longitudes)
    r, w, k, phase = (part[:, None, None] for part in waves)
    turned = lam - waves.speed[:, None, None] * 3600 * hours
    th = r * turned + phase
    sin, cos = np.sin(phi), np.cos(phi)
    crest = cos ** (r - 1)
    psi = EARTH**2 * (-w * sin + k * crest * cos * sin * np.cos(th))
    u = EARTH * (w * cos + k * crest * (r * sin**2 - cos**2) * np.cos(th))
    v = -EARTH * k * r * crest * sin * np.sin(th)
    return np.stack(np.broadcast_arrays(psi, u, v), -1)


class AirTemperature(NamedTuple):
    """Air temperature 2 m above the ground, hour after hour.

    Attributes:
      kelvin: [t, h, w] float32, from south to north and from west to east.
      hours: since 1970-01-01, [t] int64, one after the other.
      latitudes, longitudes: degrees, ascending, [h] and [w].
    """

    kelvin: Float32[np.ndarray, "t h w"]
    hours: Int[np.ndarray, "t"]
    latitudes: Float[np.ndarray, "h"]
    longitudes: Float[np.ndarray, "w"]


def air_temperature(path: str | Path | None = None) -> AirTemperature:
    """Hours of ERA5, the reanalysis of ECMWF, over the United Kingdom in March 2019.

    An npz file with t2m_k [t, h, w] float32, hour_since_epoch [t] int64, lat [h] and lon [w]
    float32, which may descend. That of FFNLAB_DATA contains modified Copernicus Climate Change
    Service information 2019.

    Args:
      path: a file of this format; era5_uk_t2m/t2m_first80pct.npz in FFNLAB_DATA when None.
    Returns:
      595 hours of 33 parallels and 49 meridians.
    Raises:
      FFNLabError: there is no file.
      FormatError: it is damaged, of another format, has hours missing or a temperature that no air
        has.
    """
    file = folder("era5_uk_t2m") / "t2m_first80pct.npz" if path is None else Path(path)
    if not file.is_file():
        raise FFNLabError(f"{file}: there is no such file")
    try:
        with zipfile.ZipFile(file) as archive:
            found = temperature_of(archive)
    except READ_ERRORS as error:
        raise FormatError(f"{file} holds no air temperature: {first_line(error)}") from None
    if not (len(found.hours) > 1 and (np.diff(found.hours) == 1).all()):
        raise FormatError(f"{file}: hour_since_epoch must be two hours or more without a gap")
    if not (np.isfinite(found.kelvin).all() and COLDEST < found.kelvin.min()):
        raise FormatError(f"{file}: t2m_k must be finite, above {COLDEST} K")
    if not found.kelvin.max() < HOTTEST:
        raise FormatError(f"{file}: t2m_k must be below {HOTTEST} K")
    return found


def temperature_of(archive: zipfile.ZipFile) -> AirTemperature:
    """What an open file holds, south and west first."""
    hours = read_member(archive, "hour_since_epoch", (None,), np.dtype(np.int64))
    lat, lon = (
        read_member(archive, name, (None,), np.dtype(np.float32)).astype(np.float64)
        for name in ("lat", "lon")
    )
    shape = (len(hours), len(lat), len(lon))
    kelvin = read_member(archive, "t2m_k", shape, np.dtype(np.float32))
    for name, axis, values in (("lat", 1, lat), ("lon", 2, lon)):
        steps = np.diff(values)
        if not ((steps > 0).all() or (steps < 0).all()):
            raise FormatError(f"{name} must ascend or descend")
        if len(steps) and steps[0] < 0:
            kelvin = np.flip(kelvin, axis)
    kelvin = np.ascontiguousarray(kelvin)
    return AirTemperature(kelvin, hours, np.sort(lat), np.sort(lon))
