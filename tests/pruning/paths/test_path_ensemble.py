"""Which paths the head does not read: brute force, one program, what becomes of the model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import models, transform
from ffnlab.data import Labelled
from ffnlab.errors import ConfigError, NumericalError
from ffnlab.layers import EnsembleScale
from ffnlab.losses import labelled, next_token
from ffnlab.models import ViT, ViTConfig
from ffnlab.models.paths import path_names, with_ensemble
from ffnlab.pruning import finercut, path_ensemble
from ffnlab.pruning.finercut_core import DISTANCES
from ffnlab.pruning.paths.path_ensemble import summing
from ffnlab.pruning.paths.path_search import left_out
from ffnlab.quantization import nearest
from ffnlab.recipes import parse_recipe
from ffnlab.testing import batches, counted, equal, tiny
from ffnlab.transform import apply, calibrate

CONFIG = ViTConfig((8, 8), 4, 8, 12, 2, 2, channels=1, classes=3, pool="mean")
VIT = ViT(CONFIG, key=jax.random.key(0))
X = np.asarray(jax.random.uniform(jax.random.key(1), (2, 6, 8, 8, 1)))
DIGITS = [
    Labelled(X[0], np.array([0, 1, 2, 0, 1, 2])),
    Labelled(X[1], np.array([2, 2, 1, 0, 0, 1])),
]
TOKENS = [np.asarray(batch) for batch in batches()]


@functools.cache
def cut(**options):
    """A transform that is shared by the tests, so that its search compiles once."""
    return path_ensemble(**options)


def masked(model, gone):
    """The model whose head does not read some paths, whatever it had before."""
    kept = np.ones(len(path_names(model)))
    kept[list(gone)] = 0
    return with_ensemble(model, EnsembleScale(kept))


of_labels = jax.jit(lambda m, b: labelled(m, b)[0])
of_tokens = jax.jit(lambda m, b: next_token(m, b)[0])


def losses(model, data, gone=()):
    """Mean loss of a model whose head does not read some paths."""
    loss = of_labels if isinstance(model, ViT) else of_tokens
    model = masked(model, gone)
    return float(np.mean([loss(model, batch) for batch in data]))


@pytest.mark.parametrize(
    ("model", "data"), [(VIT, DIGITS), pytest.param(tiny(), TOKENS, marks=pytest.mark.slow)]
)
def test_deltas_are_those_of_brute_force(model, data):
    stats = calibrate(cut(remove=0), model, data, progress=False)
    paths = len(path_names(model))
    whole = losses(model, data)
    want = [losses(model, data, [j]) - whole for j in range(paths)]
    np.testing.assert_allclose(stats.whole[0], whole, rtol=1e-6)
    np.testing.assert_allclose(stats.deltas, want, atol=2e-6)
    assert np.ptp(want) > 1e-3 and stats.passes == 1 and not left_out(stats)
    assert equal(cut(remove=0).rewrite(model, stats), model)


def test_greedy_takes_the_best_at_every_step_and_compiles_once():
    model = tiny()
    gone = []
    for _ in range(4):
        left = [j for j in range(7) if j not in gone]
        found = [losses(model, TOKENS, [*gone, j]) for j in left]
        gone.append(left[int(np.argmin(found))])
    summing.cache_clear()  # what other searches have compiled
    search = path_ensemble(remove=4, how="greedy")
    with counted() as count:
        stats = calibrate(search, model, TOKENS, progress=False)
    assert left_out(stats) == gone and stats.passes == 4
    assert count.programs == 1
    np.testing.assert_allclose(stats.losses[3][gone[3]], losses(model, TOKENS, gone), rtol=1e-5)
    assert np.isnan(stats.losses[1][gone[0]]) and np.isnan(stats.losses[4]).all()
    new = search.rewrite(model, stats)
    np.testing.assert_array_equal(new.ensemble.kept[...] == 0, np.isin(range(7), gone))


def test_searches_share_their_program():
    """Options that only decide what goes compile nothing again."""
    calibrate(path_ensemble(remove=1), tiny(), TOKENS, progress=False)
    with counted() as count:
        calibrate(path_ensemble(rate=0.3), tiny(), TOKENS, progress=False)
    assert count.programs == 0


def test_one_pass_takes_the_best_together():
    stats = calibrate(cut(rate=0.45), tiny(), TOKENS, progress=False)
    assert left_out(stats) == np.argsort(stats.deltas)[:3].tolist() and stats.passes == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kl", "js", "norm"])
def test_distances_are_from_the_model_as_it_was(name):
    model, data = tiny(), TOKENS[:1]
    stats = calibrate(path_ensemble(remove=1, distance=name), model, data, progress=False)
    metric, y = DISTANCES[name], model(jnp.asarray(data[0]))
    other = masked(model, [2])(jnp.asarray(data[0]))
    want = metric.total(y, other, None, None) / metric.terms(2, 24, 64)
    np.testing.assert_allclose(stats.losses[0][2], want, rtol=1e-4)
    assert abs(stats.whole[0]) < 1e-6


@pytest.mark.slow
def test_padding_does_not_count():
    tokens, other = np.array(TOKENS[0]), np.array(TOKENS[0])
    segments = np.ones_like(tokens)
    segments[:, 8:] = 0
    other[:, 8:] = 3
    first, second = (
        calibrate(cut(remove=0), tiny(), [{"tokens": rows, "segments": segments}], progress=False)
        for rows in (tokens, other)
    )
    np.testing.assert_allclose(first.deltas, second.deltas, atol=1e-6)
    np.testing.assert_allclose(first.whole[0], of_tokens(tiny(), tokens[:, :8]), rtol=1e-5)
    assert first.passes == 1 and np.ptp(first.deltas) > 1e-3


def test_an_ensemble_that_is_there_keeps_its_scale():
    weights = jax.random.uniform(jax.random.key(5), (7, 16))
    kept = np.array([1, 1, 0, 1, 1, 1, 1])
    model = with_ensemble(tiny(), EnsembleScale(kept, weights))
    stats = calibrate(cut(remove=2), model, TOKENS, progress=False)
    new = cut(remove=2).rewrite(model, stats)
    assert np.isnan(stats.deltas[2]) and new.ensemble.kept[2] == 0
    assert new.ensemble.kept[...].sum() == 4
    np.testing.assert_array_equal(new.ensemble.scale[...], weights)
    first = left_out(stats)[0]
    less = with_ensemble(model, EnsembleScale(kept * (np.arange(7) != first), weights))
    whole, without = (np.mean([of_tokens(m, b) for b in TOKENS]) for m in (model, less))
    np.testing.assert_allclose(stats.deltas[first], without - whole, atol=2e-6)


def test_sublayers_that_are_gone_are_no_candidates():
    stats = calibrate(cut(remove=0), models.remove(tiny(), [2]), TOKENS, progress=False)
    assert np.isnan(stats.deltas).tolist() == [False, False, False, True, False, False, False]


@pytest.mark.parametrize("model", [tiny(), pytest.param(VIT, marks=pytest.mark.slow)])
def test_it_is_pruned_quantized_and_saved_further(model, tmp_path):
    data = DIGITS if isinstance(model, ViT) else TOKENS
    plain = [batch[0] for batch in DIGITS] if isinstance(model, ViT) else TOKENS
    new, _ = apply(path_ensemble(remove=2), model, data, progress=False)
    new, _ = apply(finercut(remove=1, protect=None), new, plain, progress=False)
    new, _ = apply(nearest(format="int8", group=None), new)
    assert new.ensemble.kept[...].sum() == len(path_names(model)) - 2
    assert len(models.removed(new)) == 1
    models.save(new, tmp_path / "m", format="ffnlab")
    back = models.load(tmp_path / "m")
    run = jax.jit(lambda m, x: m(x))
    y = run(new, plain[0])
    assert equal(back, new) and np.isfinite(y).all()
    np.testing.assert_array_equal(run(back, plain[0]), y)


def test_recipes_name_it():
    text = '[[stage]]\ntransform = "path_ensemble"\nrate = 0.25\nhow = "greedy"\n'
    recipe = parse_recipe(text + '[[stage]]\ntransform = "ensemble_scale"\ndrop = [1, 2]\n')
    new, _ = apply(recipe.stages[0].build(), tiny(), TOKENS, progress=False)
    assert new.ensemble.kept[...].sum() == 6
    with pytest.raises(ConfigError, match="'one_out' or 'greedy'|there are 'one_out' and 'greedy'"):
        parse_recipe('[[stage]]\ntransform = "path_ensemble"\nremove = 1\nhow = "all"\n')


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one"),
        ({"remove": 1, "rate": 0.1}, "exactly one"),
        ({"remove": -1}, "paths >= 0"),
        ({"remove": True}, "paths >= 0"),
        ({"rate": 1.0}, r"outside \[0, 1\)"),
        ({"remove": 1, "how": "both"}, "'one_out' and 'greedy'"),
        ({"remove": 1, "distance": "perplexity"}, "None is the loss"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        path_ensemble(**options)


@pytest.mark.parametrize(
    ("model", "batch", "options", "message"),
    [
        (VIT, X[0], {}, "a batch without classes"),
        (VIT, (X[0], np.zeros(5, int)), {}, "of 6 images"),
        (VIT, (X[0], np.zeros(6)), {}, "integers, one for each"),
        (VIT, (X[0], np.full(6, 3)), {}, "tells 3 apart"),
        (tiny(), [[1]], {}, "t >= 2"),
        (tiny(), {"embeddings": np.ones((1, 2, 16), np.float32)}, {}, "are accepted"),
        (tiny(), TOKENS[0], {"remove": 7}, "one has to stay"),
    ],
)
def test_models_and_batches_that_do_not_fit_are_refused(model, batch, options, message):
    with pytest.raises(ConfigError, match=message):
        calibrate(path_ensemble(**{"remove": 1, **options}), model, [batch], progress=False)


def test_stats_of_another_model_and_numbers_that_are_none_are_refused():
    search = cut(remove=1)
    stats = search.init(tiny())
    with pytest.raises(ConfigError, match="leave 0 paths of 1 out"):
        search.rewrite(tiny(), stats)
    with pytest.raises(ConfigError, match="stats are of a model with other paths"):
        search.rewrite(VIT, stats)
    broken = jax.tree.map(lambda x: x * jnp.nan, tiny())
    with pytest.raises(NumericalError, match="not finite on this batch"):
        calibrate(cut(remove=0), broken, TOKENS, progress=False)


def test_images_without_classes_take_a_distance():
    search = transform.chain(path_ensemble(remove=1, distance="kl"))
    stats = calibrate(search, VIT, list(X), progress=False)
    assert len(left_out(stats.done[0])) == 1
