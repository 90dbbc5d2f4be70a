"""TOML tables as dataclasses: round trip, presets, and every problem reported at once."""

import dataclasses

import pytest

from ffnlab.cli.inputs.data_kinds import DataConfig
from ffnlab.cli.train import TrainConfig
from ffnlab.errors import ConfigError
from ffnlab.parallel import from_table, read_config, to_table
from ffnlab.parallel.config import presets


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int
    rate: float = 0.5

    def __post_init__(self):
        if self.size < 1:
            raise ConfigError(f"size={self.size} must be at least 1")


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner
    names: tuple[str, ...] = ()
    kind: str | tuple[str, ...] = "one"
    flag: bool = False
    limit: int | None = None


def test_round_trip():
    table = {"inner": {"size": 3, "rate": 1}, "names": ["a", "b"], "kind": ["x"], "limit": 4}
    config = from_table(table, Outer)
    assert config == Outer(Inner(3, 1.0), ("a", "b"), ("x",), limit=4)
    assert isinstance(config.inner.rate, float)
    assert from_table(to_table(config), Outer) == config
    assert "limit" not in to_table(Outer(Inner(1)))


def test_all_problems_at_once():
    table = {"inner": {"sise": 3, "rate": "fast"}, "names": [1], "flag": 1, "limit": True}
    with pytest.raises(ConfigError) as caught:
        from_table(table, Outer, "my.toml")
    message = str(caught.value)
    assert message.startswith("my.toml: ")
    for part in (
        "unknown key 'inner.sise'; accepted: rate, size",
        "inner.rate='fast' is not of type float",
        "missing key 'inner.size'",
        "names=[1] is not of type",
        "flag=1 is not of type bool",
        "limit=True is not of type",
    ):
        assert part in message


def test_values_are_checked_by_their_dataclass():
    with pytest.raises(ConfigError, match="my.toml: inner: size=0"):
        from_table({"inner": {"size": 0}}, Outer, "my.toml")
    with pytest.raises(ConfigError, match="inner must be a table"):
        from_table({"inner": 3}, Outer)


def test_files(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("[inner]\nsize = 2\n")
    assert read_config(path, Outer) == Outer(Inner(2))
    path.write_text("[inner\n")
    with pytest.raises(ConfigError, match="a.toml is not valid TOML"):
        read_config(path, Outer)
    with pytest.raises(ConfigError, match=r"presets are \['captioned_digits', 'dann_moons'"):
        read_config("embeded", Outer)


@pytest.mark.parametrize("name", presets())
def test_presets_are_whole(name):
    config = read_config(name, TrainConfig)
    assert config.run.steps > 0
    if isinstance(config.data, DataConfig):
        assert config.model.vocab == 256
    assert from_table(to_table(config), TrainConfig) == config
