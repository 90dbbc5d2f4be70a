"""`ffnlab train`: from a TOML file to a model directory, killed and resumed to the same bits."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.cli.inputs.corpus import Corpus, load_corpus, load_text, xz_bits
from ffnlab.cli.train import TrainConfig, run, train
from ffnlab.errors import ConfigError
from ffnlab.formats import Tokenizer, load
from ffnlab.learning import BackpropState
from ffnlab.models.account import parameters
from ffnlab.parallel import read_config

CONFIG = """
[model]
vocab = 256
width = 8
hidden = 16
layers = 1
heads = 1
kv_heads = 1
head_dim = 8

[data]
text = ["{text}"]
batch = 2
length = 16
stride = 8

[optimizer]
name = "muon"
rate = 1e-2
warmup = 5

[run]
steps = 40
log_every = 1
evaluate_every = 30
"""


def live_bytes() -> int:
    """Bytes of all arrays of this process."""
    return sum(array.nbytes for array in jax.live_arrays())


@pytest.fixture
def config(tmp_path) -> Path:
    """A run of seconds on a text of a few kilobytes."""
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat; " * 200)
    path = tmp_path / "tiny.toml"
    path.write_text(CONFIG.format(text=text.as_posix()))
    return path


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_ends_in_a_model_directory(config, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(config, out=out, no_progress=True) == 0
    assert "bits per byte on held-out text (xz -9: " in capsys.readouterr().out
    logged = rows(out)
    losses = [row["loss"] for row in logged if "loss" in row]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    record = json.loads((out / "model" / "training.json").read_text())
    assert record["steps"] == 40 and record["tokens"] == 40 * 2 * 16
    # What is logged is of the float32 parameters, what is recorded of the bfloat16 ones written.
    assert record["held_out_bits_per_byte"] == pytest.approx(logged[-1]["held_out_bits"], rel=0.02)
    assert record["recipe"]["optimizer"]["name"] == "muon"
    assert {"python", "train_sha256", "held_out_sha256"} <= set(record["text"])
    model, tokenizer = load(out / "model"), Tokenizer.load(out / "model")
    assert model.embed.weight.dtype == jnp.bfloat16
    ids = jnp.asarray([tokenizer.encode("the cat")])
    assert np.isfinite(model(ids)).all()


def test_longer_rows_at_the_end(config, tmp_path):
    more = "\n[extension]\nsteps = 3\nbatch = 1\nlength = 32\n"
    config.write_text(config.read_text().replace("steps = 40", "steps = 4") + more)
    settings = read_config(config, TrainConfig)
    batches = load_corpus(settings.data, settings.model.vocab).batches(settings)
    assert [batches(p).shape for p in range(6)] == [(2, 17)] * 4 + [(1, 33)] * 2
    np.testing.assert_array_equal(batches.part(0, 1)(5), batches(5))
    with pytest.raises(ValueError, match="batch=1 does not divide into 2"):
        batches.part(0, 2)
    record = run(settings, tmp_path / "run")
    assert record["steps"] == 7 and record["tokens"] == 4 * 2 * 16 + 3 * 32
    assert record["held_out_window"] == {"length": 32, "stride": 16}


@pytest.mark.slow
def test_a_run_on_a_mesh_of_scanned_layers_ends_alike(config, tmp_path):
    short = config.read_text().replace("steps = 40", "steps = 4")
    config.write_text(short)
    plain = run(read_config(config, TrainConfig), tmp_path / "plain")
    config.write_text(short + 'mesh = "dp=2,tp=2"\nscan = true\nremat = "nothing"\n')
    cut = run(read_config(config, TrainConfig), tmp_path / "cut")
    assert cut["held_out_bits_per_byte"] == pytest.approx(plain["held_out_bits_per_byte"], abs=1e-3)
    a, b = load(tmp_path / "plain" / "model"), load(tmp_path / "cut" / "model")
    assert jax.tree.structure(a) == jax.tree.structure(b)


PIPELINED = 'mesh = "dp=2,pp=2"\n[pipeline]\nmicrobatches = 4\nrepeats = 2\n'


@pytest.mark.slow
def test_a_run_in_stages_ends_alike_and_goes_on_on_another_mesh(config, tmp_path):
    text = config.read_text().replace("layers = 1", "layers = 8").replace("batch = 2", "batch = 8")
    text = text.replace("steps = 40", "steps = 12")
    config.write_text(text)
    one = run(read_config(config, TrainConfig), tmp_path / "one")
    config.write_text(text + PIPELINED)
    assert run(read_config(config, TrainConfig), tmp_path / "staged")["finished"]
    wanted, found = (
        [row["loss"] for row in rows(tmp_path / name) if "loss" in row]
        for name in ("one", "staged")
    )
    np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=0)
    record = json.loads((tmp_path / "staged" / "model" / "training.json").read_text())
    bits = [figures["held_out_bits_per_byte"] for figures in (record, one)]
    assert bits[0] == pytest.approx(bits[1], abs=1e-3)
    config.write_text(text + PIPELINED.replace("dp=2,pp=2", "pp=4"))
    with pytest.raises(ConfigError, match=r"set stages = 2 in \[pipeline\], on any mesh"):
        train(config, out=tmp_path / "staged", steps=14, resume=True, no_progress=True)
    config.write_text(text + PIPELINED.replace("dp=2,pp=2", "fsdp=2") + "stages = 2\n")
    with pytest.warns(UserWarning, match="was written with mesh"):
        train(config, out=tmp_path / "staged", steps=14, resume=True, no_progress=True)
    assert len(load(tmp_path / "staged" / "model").layers) == 8


def test_a_pipeline_needs_stages_and_a_model_that_has_some(config):
    config.write_text(config.read_text() + "[pipeline]\nrepeats = 2\n")
    with pytest.raises(ConfigError, match="has no pp: add pp=SIZE to it, or set stages"):
        read_config(config, TrainConfig)
    text = '[model]\nkind = "mlp"\nsizes = [4, 4]\n[data]\nkind = "images"\n'
    text += '[run]\nsteps = 1\nmesh = "pp=2"\n'
    config.write_text(text)
    with pytest.raises(ConfigError, match="kind 'mlp' has no stages; decoder or encoder has"):
        read_config(config, TrainConfig)


def test_a_resumed_run_must_be_the_same_run(config, tmp_path):
    settings = read_config(config, TrainConfig)
    half = dataclasses.replace(settings, run=dataclasses.replace(settings.run, steps=20))
    run(half, tmp_path / "run")
    with pytest.raises(ConfigError, match="holds a run"):
        run(settings, tmp_path / "run")
    other = dataclasses.replace(settings, data=dataclasses.replace(settings.data, batch=3))
    with pytest.raises(ConfigError, match="started with another config"):
        run(other, tmp_path / "run", resume=True)
    text = Path(settings.data.text[0])
    text.write_text(text.read_text() + "more")
    with pytest.raises(ConfigError, match="started with another text"):
        run(settings, tmp_path / "run", resume=True)


def test_sigterm_in_a_process_and_resumed_to_the_same_bits(config, tmp_path):
    whole = run(read_config(config, TrainConfig), tmp_path / "whole")
    out = tmp_path / "cut"
    arguments = f"Path({str(config)!r}), out=Path({str(out)!r}), steps=40"
    code = f"from pathlib import Path; from ffnlab.cli.train import train; train({arguments})"
    slow = "import ffnlab.data.text.windows as t, time; f = t.TextBatches.__call__; "
    slow += "t.TextBatches.__call__ = lambda s, p: (time.sleep(0.2), f(s, p))[1]; "
    process = subprocess.Popen(
        [sys.executable, "-c", slow + code], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    deadline = time.monotonic() + 300
    while not (out / "metrics.jsonl").exists() or len(rows(out)) < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "--resume goes on" in printed
    assert len(rows(out)) < 40 and not (out / "model").exists()
    resumed = run(read_config(config, TrainConfig), out, resume=True)
    assert resumed["held_out_bits_per_byte"] == whole["held_out_bits_per_byte"]
    same = [load(tmp_path / name / "model") for name in ("whole", "cut")]
    for a, b in zip(*map(jax.tree.leaves, same), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.slow
def test_accumulation_and_bfloat16_learn_alike(config, tmp_path):
    short = config.read_text().replace("steps = 40", "steps = 6").replace("muon", "adamw")
    found = {}
    for name, more in {
        "plain": "",
        "parts": "microbatches = 2",
        "mixed": 'compute = "bfloat16"',
    }.items():
        config.write_text(f"{short}\n{more}\n")
        run(read_config(config, TrainConfig), tmp_path / name)
        found[name] = [row["loss"] for row in rows(tmp_path / name) if "loss" in row]
    np.testing.assert_allclose(found["parts"], found["plain"], atol=1e-4)
    np.testing.assert_allclose(found["mixed"], found["plain"], atol=0.05)
    assert found["mixed"] != found["plain"]
    assert all(row["tokens_per_second"] > 0 for row in rows(tmp_path / "plain")[1:6])


@pytest.mark.slow
def test_packed_rows_in_parts_are_one_step(config, tmp_path):
    documents = tmp_path / "documents.txt"
    documents.write_text("\0".join("the cat sat on the mat"[: 3 + 5 * i % 19] for i in range(80)))
    text = config.read_text().replace("steps = 40", "steps = 5").replace("batch = 2", "batch = 4")
    text = text.replace((tmp_path / "text.txt").as_posix(), documents.as_posix())
    text = text.replace("[data]", "[data]\npacked = true")
    found = {}
    for parts in (1, 4):
        config.write_text(f"{text}\nmicrobatches = {parts}\n")
        run(read_config(config, TrainConfig), tmp_path / str(parts))
        found[parts] = [row for row in rows(tmp_path / str(parts)) if "loss" in row]
    assert len({row["count"] for row in found[1]}) > 1, "rows of unequal counts"
    for name in ("loss", "bits", "count", "gradient_norm"):
        one, four = ([row[name] for row in found[parts]] for parts in (1, 4))
        np.testing.assert_allclose(four, one, rtol=1e-4)


def test_a_dry_run_prints_the_plan_and_does_nothing(config, tmp_path, capsys):
    config.write_text(config.read_text() + 'mesh = "dp=2"\n')
    assert train(config, out=tmp_path / "run", dry_run=True) == 0
    printed = capsys.readouterr().out
    for part in ("backprop, 40 steps", "1,280", "2 rows of 16 tokens", "dp=2", "MiB"):
        assert part in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("dp=3", "axis 'batch' of size 2"),
        ("pp=2", "stages=2 x repeats=1 do not divide the 1 layers"),
        ("pp=-1", r"pp=-1 leaves open what the model is; set stages in \[pipeline\]"),
        ("sp=3", "attention over 16 tokens: sp=3 cuts a row in 6 equal parts"),
        ("dp=0", "'dp=0' must be at least 1"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_before_anything_is_written(
    config, tmp_path, mesh, message
):
    config.write_text(config.read_text() + f'mesh = "{mesh}"\n')
    for dry_run in (True, False):
        with pytest.raises(ConfigError, match=message):
            train(config, out=tmp_path / "run", dry_run=dry_run)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("packed", ["true", "false"])
def test_the_rows_of_the_extension_are_checked_at_the_start(config, tmp_path, packed):
    text = config.read_text().replace("[data]", f"[data]\npacked = {packed}")
    more = 'mesh = "dp=2"\n[extension]\nsteps = 3\nbatch = {}\nlength = 32\n'
    config.write_text(text + more.format(1))
    for dry_run in (True, False):
        with pytest.raises(ConfigError, match="axis 'batch' of size 1"):
            train(config, out=tmp_path / "run", dry_run=dry_run)
    assert not (tmp_path / "run").exists()
    config.write_text(text + more.format(2))
    assert train(config, out=tmp_path / "run", dry_run=True) == 0


def test_text_of_files(config, tmp_path):
    data = read_config(config, TrainConfig).data
    text, held, identity = load_text(data)
    assert len(held) == 1 + 480 and len(text) == 1 + 4320 + 1  # NULs around
    assert identity["train_bytes"] == len(text)
    (tmp_path / "held.txt").write_text("held out")
    given = dataclasses.replace(data, held_out=(str(tmp_path / "held.txt"),))
    whole, held, _ = load_text(given)
    assert held == b"\0held out" and len(whole) == 1 + 4800 + 1
    with pytest.raises(
        ConfigError, match="must be 'stdlib', 'stdlib-validation' or a list of files"
    ):
        load_text(dataclasses.replace(data, text="wikipedia"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps = 40", "steps = 0", "steps=0 must be at least 1"),
        ("steps = 40", 'steps = 4\ndtype = "int4"', "dtype='int4' is not one of"),
        ("steps = 40", 'steps = 4\ncompute = "int4"', "compute='int4' is not one of"),
        ("steps = 40", "steps = 4\nmicrobatches = 0", "microbatches=0 must be at least 1"),
        ("steps = 40", 'steps = 4\non_bad = "go"', "on_bad='go' is not one of"),
        (
            "[model]",
            'rule = "perceptron"\n[model]',
            "unknown rule 'perceptron'; there are: backprop, counter_current, dann, forward_gnn,",
        ),
        ("stride = 8", "stride = 80", "stride=80 must lie between"),
        ("heads = 1\nkv", "heads = 3\nkv_heads = 2 #", "not a multiple"),
    ],
)
def test_bad_configurations(config, tmp_path, old, new, message):
    config.write_text(config.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        train(config, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_xz_is_that_of_the_command():
    text = b"abc" * 1000
    assert 0 < xz_bits(text) < 1


@pytest.mark.parametrize("mesh", ["", "dp=2"])
def test_nothing_lies_beside_the_state_of_a_run(config, tmp_path, monkeypatch, mesh):
    beside = []
    settings = read_config(config, TrainConfig)
    settings = dataclasses.replace(
        settings, run=dataclasses.replace(settings.run, steps=2, mesh=mesh)
    )
    before = live_bytes()

    def scorer(corpus, settings):
        def scores(predict):
            (state,) = predict.args  # the model alone, once the run is over
            if isinstance(state, BackpropState):
                size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
                beside.append((live_bytes() - before - size, parameters(state.model) * 4))
            return {corpus.watched: 0.0}

        return scores

    monkeypatch.setattr(Corpus, "scorer", scorer)
    run(settings, tmp_path / "out")
    assert beside and all(more < model / 2 for more, model in beside), beside


MIXTURE = """
[model.mixture]
experts = 4
k = 2
hidden = 16
"""


@pytest.mark.slow
def test_a_mixture_is_trained_with_its_balance_and_saved(config, tmp_path):
    text = config.read_text().replace("vocab =", 'family = "mixtral"\nvocab =')
    config.write_text(text.replace("steps = 40", "steps = 2") + MIXTURE)
    assert train(config, out=tmp_path / "run", no_progress=True) == 0
    row = rows(tmp_path / "run")[0]
    assert 1 <= row["balance"] <= 4 and row["unrouted"] == 0
    assert sum(row[f"load.expert_{i}"] for i in range(4)) == pytest.approx(1)
    assert load(tmp_path / "run" / "model").config.mixture.experts == 4
