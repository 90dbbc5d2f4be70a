"""Training files that go on from a model, change it, choose what learns and by which loss."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import models, tree
from ffnlab.cli.main import main
from ffnlab.cli.train import run
from ffnlab.cli.training import fresh, read_training, rule_of
from ffnlab.errors import ConfigError, FormatError
from ffnlab.formats import load
from ffnlab.layers import ByChoice, Guided
from ffnlab.testing import equal, tiny
from ffnlab.weights import BlockShuffle, Merged

MODEL = """
[model]
vocab = 256
width = 8
hidden = 16
layers = 2
heads = 1
kv_heads = 1
head_dim = 8
"""
PARTS = ("calibration", "evaluation")  # of a recipe
REST = """
[data]
text = ["{text}"]
batch = 2
length = 8
stride = 4
[optimizer]
rate = 1e-2
[run]
steps = {steps}
dtype = "float32"
"""


@pytest.fixture
def write(tmp_path):
    """(keys before the tables, tables, steps) -> a training file on a short text."""
    text = tmp_path / "text.txt"
    text.write_text("a line of text that says little\n" * 40)

    def written(head: str = "", tables: str = MODEL, steps: int = 2) -> Path:
        file = tmp_path / "run.toml"
        file.write_text(head + tables + REST.format(text=text, steps=steps))
        return file

    return written


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        ("", {"balance", "z", "unrouted"}),
        ('loss = "routed"\nloss_options = { z = 1e-3 }\n', {"balance", "z", "unrouted"}),
        ('loss = "specialized"\n', {"entropy", "share"}),
    ],
)
def test_mixtures_that_a_transform_makes_are_balanced(write, loss, told):
    """The loss of the data is, and a named one says what it adds; both can be traced."""
    tables = '[[transform]]\nname = "upcycle"\nexperts = 2\n'
    if "specialized" in loss:
        tables += '[[transform]]\nname = "lora_experts"\nexperts = 2\nrank = 2\n'
    settings = read_training(write(loss + tables))
    model, rule = fresh(settings, jax.random.key(0)), rule_of(settings)
    batch = jax.random.randint(jax.random.key(1), (2, 9), 0, 256)
    state = jax.eval_shape(rule.init, model, jax.random.key(0))
    _, metrics = jax.eval_shape(rule.step, state, batch)
    assert told <= metrics.keys() and "bits" in metrics
    assert ("balance" in metrics) == ("balance" in told)


@pytest.mark.slow
def test_a_duo_is_trained_by_its_own_loss_and_written_whole(write, tmp_path):
    head = 'loss = "random_choices"\n[[transform]]\nname = "duo"\nratio = 4\nskip = true\n'
    settings = read_training(write(head))
    record = run(settings, tmp_path / "out")
    assert record["finished"] and record["recipe"]["transform"] == [
        {"name": "duo", "ratio": 4, "skip": True}
    ]
    model = load(tmp_path / "out" / "model")
    start = fresh(settings, jax.random.key(settings.run.seed))
    assert [block.ffn.choices for block in model.layers] == [3, 3]
    for after, before in zip(model.layers, start.layers, strict=True):
        small, was = after.ffn.branches[1].up.weight.w, before.ffn.branches[1].up.weight.w
        assert not np.array_equal(small, was), "both branches learn"
    resumed = run(read_training(write(head, steps=3)), tmp_path / "out", resume=True)
    assert resumed["steps"] == 3


@pytest.mark.slow
def test_structured_ffns_are_trained_from_scratch_with_guides_that_are_dropped(write, tmp_path):
    """By files alone: a training file, then a recipe."""
    head = 'loss = "self_guided"\n'
    tables = MODEL + (
        "[loss_options]\nsteps = 2\n"
        '[[transform]]\nname = "structured"\nform = "block_shuffle"\nstart = "spectral"\n'
        '[[transform]]\nname = "guided"\n'
    )
    only = tables[: tables.rindex("[[transform]]")].replace("[loss_options]\nsteps = 2\n", "")
    run(read_training(write("", only, steps=1)), tmp_path / "alone")
    assert isinstance(load(tmp_path / "alone" / "model").layers[1].ffn.up.weight, BlockShuffle)
    run(read_training(write(head, tables, steps=3)), tmp_path / "out")
    guides = tree.select(load(tmp_path / "out" / "model"), tree.of_type(Guided))
    assert len(guides) == 3 and all(float(g.alpha[...]) == 0 for g in guides.values())
    recipe = tmp_path / "drop.toml"
    stages = ('transform = "unguided"', 'transform = "premerged"\nrows = 4')
    few = "".join(f"[{part}]\ntokens = 64\nwindow = 16\nbatch = 2\n" for part in PARTS)
    recipe.write_text(few + "".join(f"[[stage]]\n{stage}\n" for stage in stages))
    options = ["--recipe", str(recipe), "--out", str(tmp_path / "small")]
    text = ["--text", str(tmp_path / "text.txt")]
    assert main(["compress", str(tmp_path / "out" / "model"), *text, *options]) == 0
    small = load(tmp_path / "small" / "model")
    up = small.layers[1].ffn.up.weight
    assert isinstance(up, Merged) and isinstance(up.factors, BlockShuffle)


@pytest.mark.slow
def test_copies_for_ids_learn_and_are_written(write, tmp_path):
    head = '[[transform]]\nname = "untie"\nstarts = [110]\nparts = ["ffn", "norms"]\n'
    run(read_training(write(head)), tmp_path / "out")
    model = load(tmp_path / "out" / "model")
    tokens = jnp.array([[97, 109, 110, 255]])
    assert model.modalities(tokens).tolist() == [[0, 0, 1, 1]] and model.layers[0].ffn.groups == 2
    up = np.asarray(model.layers[0].ffn.up.weight.dense())
    assert not np.array_equal(up[0], up[1]), "tied at first, they learned from other tokens"


@pytest.mark.slow
def test_routers_alone_learn_after_going_on_from_a_directory(write, tmp_path):
    first = '[[transform]]\nname = "duo"\nratio = 4\n'
    run(read_training(write(first)), tmp_path / "duo")
    start = tmp_path / "duo" / "model"
    head = f'start = "{start}"\nloss = "budgeted"\ntrainable = "layers**.router**"\n'
    tables = '[loss_options]\nbudget = 0.5\nsteps = 2\n[[transform]]\nname = "with_routers"\n'
    settings = read_training(write(head, tables))
    assert settings.model == load(start).config, "[model] is the one of the directory"
    run(settings, tmp_path / "routed")
    model, before = load(tmp_path / "routed" / "model"), fresh(settings, jax.random.key(0))
    bare = lambda m: tree.map_at(m, tree.of_type(ByChoice), lambda c: c.branches)  # noqa: E731
    assert equal(bare(model), bare(before)) and not equal(model, before)


@pytest.mark.slow
def test_adapters_alone_learn_on_a_model_of_the_package(write, tmp_path):
    head = 'start = "embedded_small"\ntrainable = "lora"\n[[transform]]\nname = "lora"\nrank = 2\n'
    settings = read_training(write(head, ""))
    run(settings, tmp_path / "out")
    model, (base, _) = load(tmp_path / "out" / "model"), models.embedded("embedded_small")
    for after, before in zip(model.layers, base.layers, strict=True):
        new, old = (np.asarray(b.attn.q.weight.dense(), np.float32) for b in (after, before))
        sizes = np.linalg.svd(new - old, compute_uv=False)
        assert sizes[1] > 10 * sizes[2], "an update of rank 2, in the matrix that others read"
        np.testing.assert_array_equal(after.ffn_norm.scale[...], before.ffn_norm.scale[...])


def test_a_fresh_model_goes_on_as_a_family_s_where_it_can_be_said(write, tmp_path):
    run(read_training(write()), tmp_path / "first")
    head = f'start = "{tmp_path / "first" / "model"}"\n'
    run(read_training(write(head, "")), tmp_path / "second")
    assert (tmp_path / "second" / "model" / "config.json").exists()
    # The same run from the same weights: the start counts, not the seed alone.
    again = run(read_training(write()), tmp_path / "third")
    one, other = (load(tmp_path / name / "model") for name in ("second", "third"))
    assert not equal(one, other) and again["finished"]


@pytest.mark.parametrize(
    ("head", "tables", "said"),
    [
        ('loss = "random_choice"\n', MODEL, "did you mean 'random_choices'"),
        ('loss = "budgeted"\n', MODEL, "budget is missing"),
        ("", MODEL + "[loss_options]\nbudget = 0.5\n", "no loss is named"),
        ("[[transform]]\nratio = 4\n", MODEL, "has no name"),
        ('[[transform]]\nname = "dua"\n', MODEL, "did you mean 'duo'"),
        ('[[transform]]\nname = "duo"\nratoi = 4\n', MODEL, "did you mean 'ratio'"),
        ('[[transform]]\nname = "finercut"\nremove = 1\n', MODEL, "calibrates on data"),
        ('trainable = "nothing**"\n', MODEL, "nothing"),
        ('rule = "counter_current"\ntrainable = "lora"\n', MODEL, "counter_current"),
        ("", "", "missing key 'model'"),
    ],
)
def test_what_cannot_be_is_refused_before_any_step(write, tmp_path, head, tables, said):
    with pytest.raises(ValueError, match=said):
        run(read_training(write(head, tables)), tmp_path / "out")
    assert not (tmp_path / "out" / "model").exists()


def test_another_model_than_that_of_the_start_is_refused(write, tmp_path):
    models.save(tiny(), tmp_path / "tiny")
    with pytest.raises(ConfigError, match=r"\[model\] is not that of start"):
        run(read_training(write(f'start = "{tmp_path / "tiny"}"\n')), tmp_path / "out")
    with pytest.raises(FormatError, match="not a directory"):
        read_training(write('start = "nowhere"\n', ""))
