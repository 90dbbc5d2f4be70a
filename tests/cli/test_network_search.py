"""`ffnlab search`: what is found is written, loaded, counted; resumed, chosen anew, refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import formats, tree
from ffnlab.cli import search as command
from ffnlab.cli import searching as searching_
from ffnlab.cli.inputs.data_kinds import DataConfig
from ffnlab.cli.main import main
from ffnlab.cli.search import late
from ffnlab.cli.search_pages import table_of
from ffnlab.cli.searching import as_limits, limit_of, read_search, rows_of, within_target
from ffnlab.cli.train import load_data
from ffnlab.clock import Times
from ffnlab.data import digits
from ffnlab.errors import ConfigError
from ffnlab.formats import load
from ffnlab.layers import MLP
from ffnlab.losses import next_token
from ffnlab.models import Decoder, DecoderConfig, ViT, ViTConfig
from ffnlab.pruning.search import macs, measuring, supernet
from ffnlab.quantization import nearest
from ffnlab.testing import equal
from ffnlab.transform import apply
from tests.often import often

CONFIG = ViTConfig((8, 8), 4, 6, 8, 2, 1, channels=1, classes=10, pool="mean")
SEARCH = """
[data]
kind = "images"
[search]
objectives = ["loss", "macs", "bytes"]
widths = [2, 8]
depths = [1, 2]
formats = ["float", "int8"]
population = 3
budget_measurements = 6
inner = 12
rows = 20
turns = 2
"""
TEXT = """
[model]
vocab = 256
width = 8
hidden = 12
layers = 2
heads = 1
kv_heads = 1
head_dim = 4
[run]
steps = 1
[search]
widths = [4, 12]
population = 2
budget_measurements = 2
"""
TAS = """
rule = "tas"
[rule_options]
slack = 0.3
strength = 50.0
rate = 0.1
[model]
kind = "mlp"
sizes = [64, 12, 12, 10]
[data]
kind = "images"
batch = 16
[run]
steps = 6
log_every = 1
dtype = "float32"
[search]
rows = 40
turns = 2
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, a file, and a finished search."""
    folder = tmp_path_factory.mktemp("search")
    formats.save(ViT(CONFIG, key=jax.random.key(0)), folder / "net", format="ffnlab")
    (folder / "a.toml").write_text(f'[model]\npath = "{folder / "net"}"\n{SEARCH}')
    assert searching(folder, "out") == 0
    return folder


def searching(folder, out, *more):
    return main(["search", str(folder / "a.toml"), "--out", str(folder / out), *more])


@pytest.fixture
def brief(monkeypatch):
    """No pictures, and no closing times: what other tests look at."""
    monkeypatch.setattr(command, "drawn", lambda file, draw: file.write_bytes(b""))
    monkeypatch.setattr(command, "compared", lambda models, rows, turns: [{}, {"ms": 2.0}])
    monkeypatch.setattr(command, "table_of", str)


def read(folder, name):
    return json.loads((folder / name).read_text())


def test_all_that_was_measured_is_written(place):
    front = read(place / "out", "front.json")
    points = front["points"]
    assert len(points) == 6 and front["objectives"] == ["loss", "macs", "bytes"]
    assert len({json.dumps(point["config"]) for point in points}) == 6
    told = [point["expected"]["loss"] is not None for point in points]
    assert told[:3] == [False] * 3 and any(told[3:]), "predictors speak after the first round"
    values = np.array([list(point["measured"].values()) for point in points])
    below = (values[:, None] <= values).all(-1) & (values[:, None] < values).any(-1)
    assert [point["front"] for point in points] == (~below.any(0)).tolist()
    assert (place / "out" / "front.png").read_bytes().startswith(b"\x89PNG")


def test_the_chosen_network_is_one_of_its_own(place):
    record, model = read(place / "out", "chosen.json"), load(place / "out" / "model")
    whole, chosen = record["networks"]
    assert record["config"] in [p["config"] for p in read(place / "out", "front.json")["points"]]
    images = jnp.zeros((20, 8, 8, 1))
    assert chosen["macs"] == macs(model, images) == record["searched"]["macs"]
    assert chosen["bytes"] == tree.nbytes(model) == record["searched"]["bytes"]
    assert whole["macs"] > chosen["macs"] and min(whole["ms"], chosen["ms"]) > 0
    assert chosen["loss"] != record["searched"]["loss"], "of other rows"
    assert len(table_of(record["networks"]).rows) == 2


@pytest.mark.parametrize("unit", often(["macs", "bytes"], "macs"))
def test_a_finished_search_is_chosen_from_anew(unit, place, brief, capsys):
    points = [p["measured"] for p in read(place / "out", "front.json")["points"]]
    state = (place / "out" / "search.npz").read_bytes()
    limit = sorted(point[unit] for point in points)[2]
    assert searching(place, "out", "--resume", "--budget", f"{unit}={limit}") == 0
    found = read(place / "out", "chosen.json")["searched"]
    assert found["loss"] == min(p["loss"] for p in points if p[unit] <= limit)
    assert (place / "out" / "search.npz").read_bytes() == state
    capsys.readouterr()
    assert searching(place, "out") == 2
    assert "holds a search; --resume goes on with it" in capsys.readouterr().err


def test_a_killed_search_goes_on_with_the_same_bits(place, brief, monkeypatch, capsys):
    measuring = command.measuring

    def stopping(*arguments, **options):
        measure, asked = measuring(*arguments, **options), []

        def one(config):
            asked.append(config)
            if len(asked) == 5:
                raise KeyboardInterrupt
            return measure(config)

        return one

    monkeypatch.setattr(command, "measuring", stopping)
    assert searching(place, "killed", "--no-progress") == 130
    assert "--resume" in capsys.readouterr().err
    assert not (place / "killed" / "front.json").exists()
    monkeypatch.setattr(command, "measuring", measuring)
    assert searching(place, "killed", "--resume") == 0
    assert read(place / "killed", "front.json") == read(place / "out", "front.json")
    file = place / "a.toml"
    text = file.read_text()
    file.write_text(text.replace("inner = 12", "inner = 13"))
    assert searching(place, "killed", "--resume") == 2
    file.write_text(text)
    assert "another search: its search differ" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "more", "told"),
    [
        (("macs", "mac"), [], "'mac' is unknown; did you mean 'macs'"),
        (('["loss", "macs", "bytes"]', "[]"), [], "are 0; 1 to 3 are accepted"),
        (("[2, 8]", "[2, 9]"), [], "widths=[2, 9]: one or more from 1 to 8"),
        (("[2, 8]", "[]"), [], "widths=[]"),
        (("[1, 2]", "[3]"), [], "depths=[3]: one or more from 1 to 2"),
        (('"int8"', '"int3"'), [], "some of ['float', 'int8', 'float8']"),
        (("measurements = 6", "measurements = 2"), [], "budget=2 is smaller than population=3"),
        (("measurements = 6", "measurements = 99"), [], "more than the 20 networks"),
        (("turns", "turn"), [], "unknown key 'turn'; accepted: "),
        (("[data]", "[optimizer]\n[data]"), [], "without [run] nothing is trained, and optimizer"),
        (('kind = "images"', 'kind = "captioned"'), [], "a model of kind 'vit' reads"),
        (("[search]", '[search]\ntactic = "tas"'), [], "tactic='tas' and rule='tas' go together"),
        (("[search]", '[search]\ntactic = "best"'), [], "tactic='best' is not one of"),
        (("", ""), ["--budget", "macs=9"], "--budget macs=9 is below what the smallest network"),
        (("", ""), ["--budget", "bytes=9"], "--budget bytes=9 is below what the smallest"),
        (("", ""), ["--budget", "ms=1"], "'latency' is none of objectives=['loss', 'macs',"),
        (("", ""), ["--budget", "watts=1"], "ms=NUMBER above 0 is accepted"),
        (("", ""), ["--budget", "macs=-1"], "ms=NUMBER above 0 is accepted"),
    ],
)
def test_what_is_refused(place, tmp_path, capsys, change, more, told):
    file = tmp_path / "b.toml"
    file.write_text((place / "a.toml").read_text().replace(*change, 1))
    if change[0] == "macs":
        file.write_text((place / "a.toml").read_text().replace('"macs"', '"mac"'))
    assert main(["search", str(file), "--out", str(tmp_path / "out"), *more]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out" / "search.npz").exists()


def test_the_smallest_size_is_said(place, tmp_path, capsys):
    searching(place, "none", "--budget", "macs=9")
    smallest = 2 * 8 * 8 * 1 * 6 // 2 + 4 * (4 * 6 * 6 + 2 * 6 * 2) + 2 * 4 * 4 * 6 + 6 * 10
    assert f"has: {smallest}" in capsys.readouterr().err


def test_a_model_without_blocks(tmp_path, capsys):
    formats.save(MLP((64, 5, 10), key=jax.random.key(0)), tmp_path / "net", format="ffnlab")
    (tmp_path / "a.toml").write_text(f'[model]\npath = "{tmp_path / "net"}"\n{SEARCH}')
    assert searching(tmp_path, "out") == 2
    assert "kind 'mlp' has no blocks with an FFN each" in capsys.readouterr().err


def by_latency(place, tmp_path):
    """The same search by loss and latency."""
    text = (place / "a.toml").read_text()
    (tmp_path / "a.toml").write_text(text.replace('"macs", "bytes"', '"latency"'))
    return read_search(tmp_path / "a.toml")


def test_a_budget_of_milliseconds_is_a_share_of_the_whole_network_s(place, tmp_path, monkeypatch):
    """By a clock on which it takes 4 ms, and the smallest network 2 or, of int8, 1."""
    seconds = {"whole": 4e-3, "0": 2e-3, "1": 1e-3}

    def in_turns(calls, turns):
        assert list(calls) == list(seconds)
        return Times({name: np.full(turns, taken) for name, taken in seconds.items()})

    monkeypatch.setattr(searching_, "in_turns", in_turns)
    asked = by_latency(place, tmp_path).search
    model = jax.eval_shape(lambda key: ViT(CONFIG, key=key), jax.random.key(0))
    net = supernet(model, asked.widths, depths=asked.depths, formats=asked.formats)
    given = net, model, jnp.zeros((3, 8, 8, 1)), 2
    assert as_limits(limit_of("ms=3", asked), *given) == {"latency": pytest.approx(0.75)}
    assert as_limits(limit_of("ms=1", asked), *given) == {"latency": pytest.approx(0.25)}
    with pytest.raises(ConfigError, match="ms=0.9 is below what the smallest network has: 1"):
        as_limits(limit_of("ms=0.9", asked), *given)


def test_a_network_that_was_late_in_the_end_is_said_to_be(place, tmp_path):
    limit = limit_of("ms=3", by_latency(place, tmp_path).search)
    assert late(limit, {"ms": 3.0}) == "" == late(None, {"ms": 9.0})
    assert "the chosen network took 3.25 ms in the end" in late(limit, {"ms": 3.25})
    assert late(limit_of("bytes=3", read_search(place / "a.toml").search), {"ms": 9.0}) == ""


@pytest.mark.slow
def test_a_search_within_milliseconds(place, tmp_path):
    by_latency(place, tmp_path)
    assert searching(tmp_path, "out", "--budget", "ms=1000") == 0
    record = read(tmp_path / "out", "chosen.json")
    points = [p["measured"] for p in read(tmp_path / "out", "front.json")["points"]]
    assert record["searched"]["loss"] == min(p["loss"] for p in points)
    assert 0 < record["searched"]["latency"] <= record["limits"]["latency"]
    assert searching(tmp_path, "none", "--budget", "ms=0.000001") == 2
    assert not (tmp_path / "none" / "search.json").exists()


def test_rows_that_choose_are_not_those_that_score(place, tmp_path):
    asked = read_search(place / "a.toml")
    rows = rows_of(load_data(asked.training), asked.training, 20)
    test = digits()[1].x.reshape(-1, 8, 8, 1)
    place_of = lambda x: {int(np.flatnonzero((test == i).all((1, 2, 3)))[0]) for i in x}  # noqa: E731
    one, other = (place_of(np.asarray(part[0])) for part in (rows.chosen, rows.told))
    assert len(one) == len(other) == 20 and not one & other and max(one | other) == len(test) - 1

    text_file(tmp_path, TEXT)
    asked = read_search(tmp_path / "t.toml")
    assert isinstance(asked.training.data, DataConfig) and asked.trains
    assert asked.training.loss == "elastic"
    assert asked.training.loss_options == {"widths": [4, 12], "depths": []}
    rows = rows_of(load_data(asked.training), asked.training, 3)
    assert rows.chosen.shape == rows.told.shape == (3, 10) and rows.inputs.shape == (3, 9)
    assert not (rows.chosen[:, None] == rows.told).all(-1).any()


def text_file(folder, rest):
    """A file of a search on text, and its text."""
    (folder / "t.txt").write_bytes(bytes(range(65, 91)) * 40)
    (folder / "h.txt").write_bytes(bytes(range(32, 96)) * 2)
    data = f'[data]\ntext = ["{folder / "t.txt"}"]\nheld_out = ["{folder / "h.txt"}"]\n'
    (folder / "t.toml").write_text(f"{rest}{data}batch = 2\nlength = 9\n")


DECODER = DecoderConfig(256, 8, 12, 2, 1, 1, 4)


def test_networks_of_a_decoder_are_compared_by_their_next_tokens(tmp_path):
    text_file(tmp_path, TEXT)
    asked = read_search(tmp_path / "t.toml")
    rows = rows_of(load_data(asked.training), asked.training, 3)
    model = Decoder(DECODER, key=jax.random.key(0))
    net = supernet(model, asked.search.widths, depths=(1, 2))
    config = {"depth": (1,), "width": (4, 12), "format": ("float", "float")}
    ask = measuring(net, model, rows.chosen, loss=rows.loss, inputs=rows.inputs, turns=None)
    found, small = ask(config), net.cut(model, config)
    assert found["loss"] == pytest.approx(float(next_token(small, rows.chosen)[0]), rel=1e-5)
    assert found["macs"] == macs(small, rows.inputs) and found["bytes"] == tree.nbytes(small)


@pytest.mark.slow
def test_a_text_model_is_searched_and_its_tokenizer_goes_along(tmp_path):
    formats.save(Decoder(DECODER, key=jax.random.key(0)), tmp_path / "net", format="ffnlab")
    search = "[search]\nwidths = [4, 12]\ndepths = [1, 2]\npopulation = 2\ninner = 4\n"
    search += "budget_measurements = 4\nrows = 3\nturns = 2\n"
    text_file(tmp_path, f'[model]\npath = "{tmp_path / "net"}"\n{search}')
    out = tmp_path / "out"
    assert main(["search", str(tmp_path / "t.toml"), "--out", str(out)]) == 0
    record, found = read(out, "chosen.json"), load(out / "model")
    asked = read_search(tmp_path / "t.toml")
    rows = rows_of(load_data(asked.training), asked.training, 3)
    assert isinstance(found, Decoder) and (out / "model" / "tokenizer.json").exists()
    assert record["networks"][1]["macs"] == macs(found, jnp.zeros((1, 9), jnp.int32))
    loss = float(next_token(found, rows.told)[0])
    assert record["networks"][1]["loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.slow
def test_a_quantized_model_is_refused_before_a_file_is_written(tmp_path, capsys):
    packed, _ = apply(nearest(format="int8", group=None), ViT(CONFIG, key=jax.random.key(0)))
    formats.save(packed, tmp_path / "net", format="ffnlab")
    (tmp_path / "a.toml").write_text(f'[model]\npath = "{tmp_path / "net"}"\n{SEARCH}')
    assert searching(tmp_path, "out") == 2
    assert "layers[0].ffn.up.w is a Int8 that is quantized" in capsys.readouterr().err
    assert not (tmp_path / "out" / "search.json").exists()


@pytest.mark.slow
def test_a_model_is_trained_as_a_super_network_first(tmp_path):
    model = 'kind = "vit"\nimage = [8, 8]\npatch = 4\nwidth = 6\nhidden = 8\nlayers = 2\n'
    model += "heads = 1\nchannels = 1\nclasses = 10\n"
    run = '[run]\nsteps = 2\nlog_every = 1\ndtype = "float32"\n'
    (tmp_path / "a.toml").write_text(f"[model]\n{model}{run}{SEARCH}")
    assert searching(tmp_path, "out") == 0
    rows = (tmp_path / "out" / "training" / "metrics.jsonl").read_text().splitlines()
    assert {"largest", "smallest"} <= json.loads(rows[0]).keys()
    trained = load(tmp_path / "out" / "training" / "model")
    whole = read(tmp_path / "out", "chosen.json")["networks"][0]
    assert whole["bytes"] == tree.nbytes(trained)
    assert not equal(trained, ViT(CONFIG, key=jax.random.key(0)))


def test_a_budget_of_the_rule_tas(tmp_path):
    (tmp_path / "a.toml").write_text(TAS)
    asked = read_search(tmp_path / "a.toml")
    assert asked.search.tactic == "tas" and asked.trains
    limit = limit_of("macs=600", asked.search)
    assert within_target(asked.training, limit, 1000).rule_options["target"] == 0.6
    with pytest.raises(ConfigError, match="the whole network has 500 already"):
        within_target(asked.training, limit, 500)
    with pytest.raises(ConfigError, match=r"'latency' is none of objectives=\['macs'\]"):
        limit_of("ms=1", asked.search)
    (tmp_path / "a.toml").write_text(f"{TAS}widths = [1]\n")
    with pytest.raises(ConfigError, match="widths in \\[search\\] are of other tactics"):
        read_search(tmp_path / "a.toml")


@pytest.mark.slow
def test_the_rule_tas_finds_one_network(tmp_path, capsys):
    (tmp_path / "a.toml").write_text(TAS)
    assert searching(tmp_path, "out", "--budget", "macs=600") == 0
    whole, found = read(tmp_path / "out", "front.json")["points"]
    assert whole["macs"] == 64 * 12 + 12 * 12 + 12 * 10 and whole["loss"] is None
    model = load(tmp_path / "out" / "model")
    assert found["macs"] == macs(model, jnp.zeros((1, 64))) <= 600
    assert (tmp_path / "out" / "front.png").exists()
    assert "found" in capsys.readouterr().out
