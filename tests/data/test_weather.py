"""Weather: waves that satisfy their equations, and a file of air temperature, whole or damaged."""

import numpy as np
import pytest

from ffnlab.data import air_temperature, drawn_waves, wave_fields
from ffnlab.data.scaling import Scaling, scaling_of
from ffnlab.data.weather import EARTH, TURNING
from ffnlab.errors import ConfigError, FFNLabError, FormatError

LAT, LON = np.linspace(-80, 80, 321), np.linspace(-180, 180, 721)


def slopes(field):
    """(by latitude, by longitude) in radians, of fields [n, h, w] inside of the grid."""
    phi, lam = np.radians(LAT), np.radians(LON)
    return (np.gradient(field, phi, axis=1)[:, 2:-2, 2:-2],
            np.gradient(field, lam, axis=2)[:, 2:-2, 2:-2])  # fmt: skip


def test_winds_are_the_slopes_of_the_stream_function():
    psi, u, v = np.moveaxis(wave_fields(drawn_waves(3), LAT, LON, 5.0), -1, 0)
    north, east = slopes(psi)
    cos = np.cos(np.radians(LAT))[2:-2, None]
    inside = (slice(None), slice(2, -2), slice(2, -2))
    assert np.abs(u[inside] + north / EARTH).max() < 2e-3 * np.abs(u).max()
    assert np.abs(v[inside] - east / (EARTH * cos)).max() < 2e-3 * np.abs(v).max()


def test_waves_solve_the_barotropic_vorticity_equation():
    """d zeta / dt + u . grad (zeta + f) = 0, on a fine grid."""
    waves = drawn_waves(3, seed=1)
    phi = np.radians(LAT)[:, None]

    def vorticity(hours):
        psi = wave_fields(waves, LAT, LON, hours)[..., 0]
        north = np.gradient(np.gradient(psi, phi[:, 0], axis=1) * np.cos(phi), phi[:, 0], axis=1)
        east = np.gradient(np.gradient(psi, np.radians(LON), axis=2), np.radians(LON), axis=2)
        return (north / np.cos(phi) + east / np.cos(phi) ** 2) / EARTH**2

    zeta, hour = vorticity(0.0), 0.25
    change = (vorticity(hour) - vorticity(-hour)) / (2 * 3600 * hour)
    _, u, v = np.moveaxis(wave_fields(waves, LAT, LON), -1, 0)
    north, east = slopes(zeta + 2 * TURNING * np.sin(phi))
    inside = (slice(None), slice(4, -4), slice(4, -4))
    u, v, change = (part[:, 2:-2, 2:-2] for part in (u, v, change))
    cos = np.cos(phi)[2:-2]
    moved = (u * east / cos + v * north) / EARTH
    left, largest = (change + moved)[inside], (u * east / cos / EARTH)[inside]
    assert np.abs(left).max() < 0.01 * np.abs(largest).max()


def test_a_wave_keeps_its_shape_and_moves_at_its_speed():
    waves = drawn_waves(4, seed=2)
    hours = np.pi / 720 / waves.speed[0] / 3600 * 4  # a degree of longitude
    now, later = wave_fields(waves, LAT, LON), wave_fields(waves, LAT, LON, hours)
    assert not np.allclose(now[0], later[0])
    scale = np.abs(now[0]).max((0, 1))
    np.testing.assert_allclose(later[0][:, 2:] / scale, now[0][:, :-2] / scale, atol=1e-9)


def test_draws_are_in_their_ranges_and_repeat():
    waves = drawn_waves(500, seed=3)
    assert set(waves.number.tolist()) == {3, 4, 5} and len(set(waves.phase.tolist())) == 500
    for part in (waves.flow, waves.strength):
        assert 4e-6 <= part.min() < 4.1e-6 and 8.9e-6 < part.max() <= 9e-6
    for a, b in zip(waves, drawn_waves(500, seed=3), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ConfigError, match="count=0"):
        drawn_waves(0)


def test_scaling_goes_there_and_back():
    fields = np.random.default_rng(0).normal(3, 2, (5, 4, 3))
    fields[..., 2] = 7
    scaling = scaling_of(fields)
    scaled = scaling(fields)
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled.mean((0, 1)), 0, atol=1e-6)
    np.testing.assert_allclose(scaled.std((0, 1)), [1, 1, 0], atol=1e-6)
    np.testing.assert_allclose(Scaling(*scaling).back(scaled), fields, atol=1e-5)


GOOD = {
    "t2m_k": np.arange(24, dtype=np.float32).reshape(2, 3, 4) + 280,
    "hour_since_epoch": np.array([7, 8]),
    "lat": np.array([58, 57, 56], np.float32),
    "lon": np.array([-1, 0, 1, 2], np.float32),
}


def test_a_file_is_turned_south_and_west_first(tmp_path):
    np.savez(tmp_path / "t.npz", **GOOD)
    found = air_temperature(tmp_path / "t.npz")
    assert found.latitudes.tolist() == [56, 57, 58] and found.longitudes.tolist() == [-1, 0, 1, 2]
    np.testing.assert_array_equal(found.kelvin, GOOD["t2m_k"][:, ::-1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"t2m_k": GOOD["t2m_k"][:1]}, "t2m_k"),
        ({"t2m_k": GOOD["t2m_k"] * np.nan}, "finite"),
        ({"t2m_k": GOOD["t2m_k"] - 273.15}, "above 150.0 K"),
        ({"t2m_k": GOOD["t2m_k"] + 100}, "below 350.0 K"),
        ({"hour_since_epoch": np.array([7, 9])}, "without a gap"),
        ({"hour_since_epoch": np.array([7.0, 8.0])}, "hour_since_epoch"),
        ({"lat": np.array([1, 3, 2], np.float32)}, "lat must ascend or descend"),
    ],
)
def test_damaged_files(tmp_path, change, message):
    np.savez(tmp_path / "t.npz", **(GOOD | change))
    with pytest.raises(FormatError, match=message):
        air_temperature(tmp_path / "t.npz")


def test_no_file(tmp_path, monkeypatch):
    with pytest.raises(FFNLabError, match="there is no such file"):
        air_temperature(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("text")
    with pytest.raises(FormatError, match="holds no air temperature"):
        air_temperature(tmp_path / "text.npz")
    monkeypatch.delenv("FFNLAB_DATA", raising=False)
    with pytest.raises(FFNLabError, match="era5_uk_t2m"):
        air_temperature()


def test_the_real_hours(monkeypatch):
    from ffnlab.data import find_folder

    if find_folder("era5_uk_t2m") is None:
        pytest.skip("FFNLAB_DATA has no folder era5_uk_t2m")
    found = air_temperature()
    assert found.kelvin.shape == (595, 33, 49) and 260 < found.kelvin.min()
    assert (found.latitudes[0], found.latitudes[-1]) == (50, 58)
