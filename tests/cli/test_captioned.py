"""`ffnlab train` on images between captions: read, trained, on a mesh, scored, refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import models
from ffnlab.cli.inputs.captioned import load_captioned
from ffnlab.cli.inputs.data_kinds import CaptionedConfig
from ffnlab.cli.main import main
from ffnlab.cli.train import run
from ffnlab.cli.training import TrainConfig, abstract_batch, fresh, read_training
from ffnlab.cli.work import work_of
from ffnlab.data.interleaved import LETTERS, answered
from ffnlab.errors import ConfigError
from ffnlab.formats import load
from ffnlab.models.cost import multiply_adds
from ffnlab.parallel import from_table, parse_mesh

MODEL = {"vocab": 44, "width": 8, "hidden": 16, "layers": 1, "heads": 2, "kv_heads": 2}
MODEL |= {"head_dim": 4, "max_positions": 96}
RUN = {"steps": 2, "log_every": 1, "checkpoint_every": 1, "dtype": "float32"}
SGD = {"name": "sgd", "rate": 0.1, "warmup": 0}


def settings(data=(), model=(), **options):
    """A run of two steps whose tokens have copies by what they are."""
    return from_table(
        {
            "model": MODEL | dict(model),
            "data": {"kind": "captioned", "batch": 4} | dict(data),
            "run": RUN | options,
            "optimizer": SGD,
            "transform": [{"name": "untie", "starts": [28]}],
        },
        TrainConfig,
    )


@pytest.mark.slow
def test_trained_and_on_a_mesh(tmp_path, capsys):
    record = run(settings(), tmp_path / "whole")
    assert record["held_out_bits"] == pytest.approx(np.log2(44), rel=0.1)
    assert 0 <= record["held_out_named"] <= 1 and record["data"]["images"] == "digits"
    assert not (tmp_path / "whole" / "model" / "tokenizer.json").exists()
    run(settings(mesh="dp=2,ep=2"), tmp_path / "mesh")
    whole, mesh = (load(tmp_path / name / "model") for name in ("whole", "mesh"))
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(mesh), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)  # sums in another order
    (tmp_path / "run.toml").write_text(toml())
    assert main(["train", "--config", str(tmp_path / "run.toml"), "--dry-run"]) == 0
    assert "digits" in capsys.readouterr().out


def toml() -> str:
    """A training file."""
    lines = ["[model]", *(f"{k} = {json.dumps(v)}" for k, v in MODEL.items())]
    lines += ['[data]\nkind = "captioned"\nbatch = 4\n[run]\nsteps = 1']
    return "\n".join([*lines, '[[transform]]\nname = "untie"\nstarts = [28]'])


def test_a_batch_is_as_it_is_said_to_be_and_so_is_its_work():
    of = settings()
    batch = load_captioned(of.data).batches(of)(0)
    abstract = abstract_batch(of, parse_mesh("", devices=jax.devices()[:1]), 4, 0)
    assert jax.tree.map(jnp.shape, batch) == jax.tree.map(lambda leaf: leaf.shape, abstract)
    model = fresh(of, jax.random.key(0))
    work = work_of(of, model)
    assert (work.item, work.items(0)) == ("input", 4)
    row = jax.ShapeDtypeStruct((1, batch.tokens.shape[1]), jnp.int32)
    assert work.flops == 6 * multiply_adds(models.Decoder.__call__, model, row)


def test_scores_are_those_of_what_was_predicted():
    """A model that knows each row names all; one that names "zero" always, the zeros."""
    of = settings()
    data = load_captioned(of.data)
    score = data.scorer(of)

    def sure(tokens, said):
        following = np.concatenate([said[:, 1:], said[:, :1]], 1)
        return 30.0 * jax.nn.one_hot(following[: len(tokens)], 44)

    by_row = {row.tobytes(): row for row in data.held_out.tokens}
    knows = lambda tokens: sure(tokens, np.stack([by_row[row.tobytes()] for row in tokens]))  # noqa: E731
    found = score(knows)
    assert found["held_out_named"] == 1 and found["held_out_bits"] < 1e-6
    named = [LETTERS.index(letter) for letter in "zero"]
    rows = data.held_out.tokens
    at = dict(zip(by_row, answered(data.held_out), strict=True))

    def says_zero(tokens):
        said = tokens.copy()
        for row in said:
            row[at[row.tobytes()]] = np.resize(named, at[row.tobytes()].sum())
        return sure(tokens, said)

    zeros = np.mean([row[at[row.tobytes()]].tolist() == named for row in rows[1::2]])
    assert 0 < zeros < 0.3 and score(says_zero)["held_out_named"] == zeros
    blind = score(lambda tokens: jnp.zeros((*tokens.shape, 44)))
    assert blind["held_out_named"] == 0
    np.testing.assert_allclose(blind["held_out_bits"], np.log2(44), rtol=1e-6)


def test_folders_give_their_own_names(tmp_path):
    pil = pytest.importorskip("PIL.Image")
    for name in ("cat", "horse"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(6):
            value = np.full((5, 4), 200 if name == "cat" else 20, np.uint8)
            pil.fromarray(value + i).save(tmp_path / "images" / name / f"{i}.png")
    place = str(tmp_path / "images")
    with pytest.raises(ConfigError, match="1 are held out"):
        load_captioned(CaptionedConfig(place, size=(2, 2)))
    for i in range(6, 12):
        for name, value in (("cat", 200), ("horse", 20)):
            image = pil.fromarray(np.full((5, 4), value, np.uint8))
            image.save(tmp_path / "images" / name / f"{i}.png")
    data = load_captioned(CaptionedConfig(place, size=(2, 2), batch=3))
    assert data.names == ["cat", "horse"] and data.held_out.tokens.shape == (2, 24)
    assert len(data.train.y) == 22 and data.train.x.shape == (22, 4)
    levels = {int(row[9]) - 28 for row in data.batches(settings())(0).tokens}
    assert levels <= {1, 2, 13}, "of values 20 to 25 and 200 to 205, in sixteenths of 255"
    (tmp_path / "images" / "cat").rename(tmp_path / "images" / "Cat 2")
    with pytest.raises(ConfigError, match="name 'Cat 2' of a class"):
        load_captioned(CaptionedConfig(place, size=(2, 2)))


def test_the_preset_is_whole():
    of = read_training("captioned_digits")
    model = jax.eval_shape(lambda key: fresh(of, key), jax.random.key(0))
    batch = of.reading.batch(of.data, of.model, 2, 0)
    assert jax.eval_shape(lambda m, x: m(x), model, batch.tokens).shape == (2, 84, 44)


@pytest.mark.slow
def test_the_preset_names_digits(tmp_path):
    assert run(read_training("captioned_digits"), tmp_path / "run")["held_out_named"] > 0.75


def test_what_is_refused(tmp_path):
    for wrong, message in (
        ({"vocab": 43}, "vocab=43"),
        ({"max_positions": 83}, "rows of 84"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(settings(model=wrong), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoint").exists()
    with pytest.raises(ConfigError, match=r"size=\[9, 8\]"):
        run(settings(data={"size": [9, 8]}), tmp_path / "run")
    with pytest.raises(ConfigError, match="batch"):
        settings(data={"batch": 0})
    one = RUN | {"steps": 1}
    with pytest.raises(ConfigError, match="loss='augmented' is of images"):
        table = {"model": MODEL, "data": {"kind": "captioned"}, "run": one}
        from_table(table | {"loss": "augmented"}, TrainConfig)
    with pytest.raises(ConfigError, match="extension"):
        table = {"model": MODEL, "data": {"kind": "captioned"}, "run": {"steps": 1}}
        from_table(table | {"extension": {"steps": 1}}, TrainConfig)
    mlp = {"kind": "mlp", "sizes": [4, 2]}
    with pytest.raises(ConfigError, match="set kind in .data."):
        from_table({"model": mlp, "data": {"kind": "captioned"}, "run": {"steps": 1}}, TrainConfig)
