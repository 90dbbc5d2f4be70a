"""Labelled data as a job's task: scores against NumPy, costs by hand, what does not fit."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.compress import LabelledTask, compress, read_report
from ffnlab.data import Labelled
from ffnlab.errors import ConfigError, NumericalError
from ffnlab.formats import load
from ffnlab.layers import MLP
from ffnlab.models import account
from ffnlab.models.convnet import ConvNet
from ffnlab.recipes import parse_recipe
from ffnlab.weights import Int4

RECIPE = parse_recipe('[[stage]]\ntransform = "nearest"')
CALIBRATION, EVALUATION = RECIPE.stages[0].calibration, RECIPE.evaluation


def examples(n: int, seed: int) -> Labelled:
    """Random images of 4 x 4 and classes of three."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((n, 4, 4, 1)).astype(np.float32)
    return Labelled(x, random.integers(0, 3, n).astype(np.int32))


@pytest.fixture(scope="module")
def model():
    return ConvNet([1, 2, 3], 3, key=jax.random.key(0))


@pytest.fixture(scope="module")
def task():
    return LabelledTask(examples(20, 0), examples(11, 1), "noise")


@pytest.mark.parametrize("batch", [1, 4, 11, 16])
def test_scores_are_means_over_the_examples_however_they_are_cut(model, task, batch):
    found = task.quality(model, task.held_out(model, EVALUATION), batch, label="x")
    logits = np.asarray(model(jnp.asarray(task.test.x)), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert found["nats"] == pytest.approx(-log_p[np.arange(11), task.test.y].mean(), rel=1e-5)
    assert found["accuracy"] == (logits.argmax(1) == task.test.y).mean()


def test_costs_and_speeds_are_of_one_example(model, task):
    cost = task.cost(model, model, task.test, 4)
    # Two convolutions of 3 x 3 on 4 x 4 and on 2 x 2 places, and the head.
    assert cost.flops == 2 * (16 * 9 * 2 + 4 * 9 * 2 * 3 + 3 * 3)
    assert (cost.parameters, cost.nbytes) == (account.parameters(model), account.nbytes(model))
    assert cost.cache_bytes == 0
    speeds = task.speeds(task.test, model, model)
    assert len(speeds) == 2 and all(math.isfinite(s) and s > 0 for s in speeds)


def test_recipes_say_how_many_samples(model, task):
    some = parse_recipe(
        "[calibration]\nsamples = 9\nbatch = 4\n[evaluation]\nsamples = 5\n"
        '[[stage]]\ntransform = "nearest"'
    )
    batches = task.calibration(model, some.stages[0].calibration)
    apart = [0, 2, 5, 7, 10, 12, 15, 17]  # of 20: where classes are sorted, all of them occur
    np.testing.assert_array_equal(np.concatenate(batches), task.train.x[apart])
    scored = task.held_out(model, some.evaluation)
    np.testing.assert_array_equal(scored.x, task.test.x[[0, 2, 4, 6, 8]])
    np.testing.assert_array_equal(scored.y, task.test.y[[0, 2, 4, 6, 8]])
    assert task.counts(scored) == {"images": 5}
    assert [len(b) for b in task.calibration(model, CALIBRATION)] == [8, 8]
    assert task.counts(task.held_out(model, EVALUATION)) == {"images": 11}
    more = parse_recipe(
        '[calibration]\nsamples = 21\n[evaluation]\nsamples = 12\n[[stage]]\ntransform = "nearest"'
    )
    with pytest.raises(ConfigError, match="has 20 examples to calibrate on; samples = 21"):
        task.calibration(model, more.stages[0].calibration)
    with pytest.raises(ConfigError, match="has 11 held-out examples; samples = 12"):
        task.held_out(model, more.evaluation)
    # What is new in a recipe is silent where it is not used: digests stay what they were.
    assert "samples" not in str(RECIPE.as_json()) and "'samples': 9" in str(some.as_json())


def test_what_does_not_fit_is_said(model, task):
    assert task.problems(model, RECIPE) == []
    high = Labelled(task.test.x, task.test.y + 1)
    (said,) = LabelledTask(task.train, high, "noise").problems(model, RECIPE)
    assert said == "label 3 of noise; the model has 3 classes"
    (said,) = task.problems(MLP((5, 3), key=jax.random.key(0)), RECIPE)
    assert "does not take images of shape (4, 4, 1)" in said
    keeps = LabelledTask(examples(4, 0), examples(4, 0), "noise")
    (said,) = keeps.problems(jax.tree.map(lambda x: x, _Same()), RECIPE)
    assert "scores [b, classes] are expected" in said


@jax.tree_util.register_pytree_node_class
class _Same:
    """A model that gives back what it is given."""

    def __call__(self, x):
        return x

    def tree_flatten(self):
        return (), None

    @classmethod
    def tree_unflatten(cls, _, __):
        return cls()


def test_a_broken_model_is_named(model, task):
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, model)
    with pytest.raises(NumericalError, match="stage 1: the mean loss on held-out images is nan"):
        task.quality(broken, task.test, 4, label="stage 1")


def test_the_data_is_known_by_its_digests(task):
    said = task.as_json()
    assert said["held_out_images"] == 11 and said["source"] == "noise"
    other = LabelledTask(task.train, Labelled(task.test.x, task.test.y[::-1].copy()), "noise")
    assert other.as_json()["held_out_sha256"] != said["held_out_sha256"]
    assert other.as_json()["train_sha256"] == said["train_sha256"]


def test_a_convolutional_network_is_compressed_whole(tmp_path):
    model = ConvNet([1, 4, 6], 3, key=jax.random.key(2))
    task = LabelledTask(examples(16, 0), examples(40, 1), "noise")
    recipe = parse_recipe('[[stage]]\ntransform = "nearest"\nformat = "int4"\ngroup = 2')
    before = jax.tree.map(np.asarray, model)
    report = compress(model, recipe, task, tmp_path, progress=False)
    jax.tree.map(np.testing.assert_array_equal, model, before)
    assert read_report(tmp_path / "report.json") == report
    (written,) = report.exports
    assert (written.folder, written.format) == ("model", "ffnlab")
    first, last = report.rows
    small = load(tmp_path / "model")
    assert isinstance(small, ConvNet) and isinstance(small.convs[0].weight, Int4)
    again = task.quality(small, task.test, 8, label="again")
    assert again["nats"] == pytest.approx(last.scores["nats"], rel=1e-6)
    assert again["accuracy"] == last.scores["accuracy"]
    # Rounding to sixteen levels moves the scores, and not far.
    assert 0 < abs(last.scores["nats"] - first.scores["nats"]) < 0.5
    assert last.parameters == first.parameters
    assert report.measured_on == {"images": 40} and report.item == "image"
    said = str(report)
    assert "accuracy" in said and "images/s" in said and "perplexity" not in said
    assert (tmp_path / "pareto.png").stat().st_size > 5000
