"""FinerCut: the authors' orders, brute force, what removal means, the search as a transform."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import models, tree
from ffnlab.errors import ConfigError, NumericalError
from ffnlab.layers import LayerInputs
from ffnlab.models.units import present
from ffnlab.pruning import finercut, removal_order
from ffnlab.pruning.finercut import together
from ffnlab.storage import npz
from ffnlab.testing import batches, counted, tiny
from ffnlab.transform import apply, calibrate, chain

LEVELS = {"am": "both", "a": "attention", "m": "ffn"}
SEARCHES = range(10)


@functools.cache
def cut(**options):
    """A transform that is shared by the tests, so that its search compiles once."""
    return finercut(**options)


def search(model, data=None, **options):
    """Stats of a finished search, without a progress bar."""
    return calibrate(cut(**options), model, batches() if data is None else data, progress=False)


@jax.jit
def gated(model, tokens, gates):
    """Logits with gates: the one forward pass that the oracles use."""
    return model(tokens, inputs=LayerInputs(gates=gates))


def keep(n: int, units=()) -> np.ndarray:
    """Gates of all ones but for the units."""
    gates = np.ones((n, 2), np.float32)
    gates.reshape(-1)[list(units)] = 0
    return gates


def without_effect(model, blocks):
    """A copy whose given blocks have zero output projections."""
    for i in blocks:
        for path in (f"layers[{i}].attn.o.w", f"layers[{i}].ffn.down.w"):
            zero = functools.partial(jax.tree.map, jnp.zeros_like)
            model = tree.map_at(model, tree.at(path), zero, expect=1)
    return model


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def plain_distance(name, original, pruned):
    """The distances as the paper's code writes them, in float64."""
    y, z = np.asarray(original, np.float64), np.asarray(pruned, np.float64)
    log_p, log_q = log_softmax(y), log_softmax(z)
    p, q = np.exp(log_p), np.exp(log_q)
    m = (p + q) / 2
    if name == "js":
        return np.mean(m * (np.log(m) - log_p) + m * (np.log(m) - log_q)) / 2
    if name == "js_textbook":
        return np.mean(np.sum(p * (log_p - np.log(m)) + q * (log_q - np.log(m)), -1)) / 2
    if name == "kl":
        return np.mean(p * (log_p - log_q))
    if name == "norm":
        return np.mean(np.sqrt(np.sum((y - z) ** 2, axis=(1, 2))))
    cosine = np.sum(y * z, -1) / np.linalg.norm(y, axis=-1) / np.linalg.norm(z, axis=-1)
    return np.mean(np.arccos(np.clip(cosine, 0, 1)))


def brute_force(model, tokens, name, rounds):
    """The greedy loop, written out: every candidate of every round, one at a time."""
    n = model.config.layers
    original, gone, scores = gated(model, tokens, keep(n)), [], []
    left = sorted(range(2 * n), key=lambda u: f"{u // 2}." + ("mlp" if u % 2 else "self_attn"))
    for r in range(rounds):
        # x = 0 holds block 0 back in the first round, and appends it to the candidates.
        left = left if r else [u for u in left if u // 2 != 0]
        row = [
            plain_distance(name, original, gated(model, tokens, keep(n, [*gone, u]))) for u in left
        ]
        gone.append(left.pop(int(np.argmin(row))))
        scores.append(min(row))
        left += [1, 0] if r == 0 else []
    return gone, scores


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ["js", "js_textbook", "kl", "norm", "angular"])
def test_order_equals_brute_force(name, seed):
    model, data = tiny(jax.random.key(seed)), batches()
    stats = search(model, data, remove="all", distance=name)
    order, scores = brute_force(model, np.concatenate(data), name, 6)
    assert removal_order(stats) == order
    ours = [stats.scores[r].reshape(-1)[u] for r, u in enumerate(order)]
    np.testing.assert_allclose(ours, scores, rtol=2e-4)  # float32 logits and sums


@functools.cache
def tiny_llama(folder):
    return models.load(folder)


@pytest.mark.parametrize("index", SEARCHES)
def test_whole_search_equals_the_official_one(fixtures, index):
    """Order and every score of the authors' main() on a random Llama; all but one run stacked."""
    recorded = json.loads((fixtures / "finercut" / "searches.json").read_text())
    assert len(recorded["searches"]) == len(SEARCHES)
    official = recorded["searches"][index]
    model = tiny_llama(fixtures / "finercut" / "tiny_llama")
    stats = search(
        models.stack(model) if index else model,
        [np.array(recorded["tokens"], np.int32)],
        remove="all",
        distance=official["distance"],
        units=LEVELS[official["level"]],
        protect=official["protect"],
        one_shot=official["one_shot"],
    )
    assert removal_order(stats) == official["order"]
    ours = stats.scores[~np.isnan(stats.scores)]
    theirs = [score for _, score in official["scores"]]
    assert len(ours) == len(theirs)
    # Near 0 their float32 loses a distance of 1e-7 or an angle of 3e-4; logits round to 1e-6.
    absolute = {"angular": 1e-3, "norm": 2e-5}.get(official["distance"], 2e-7)
    np.testing.assert_allclose(np.sort(ours), np.sort(theirs), rtol=2e-4, atol=absolute)


def test_ties_go_to_the_first_name_as_a_string():
    """In a model that does nothing all scores are 0: block 10 before 2, FFN before attention."""
    config = models.DecoderConfig(
        vocab=11, width=8, hidden=8, layers=12, heads=2, kv_heads=1, head_dim=4
    )
    model = without_effect(models.Decoder(config, key=jax.random.key(0)), range(12))
    stats = search(models.stack(model), [batches()[0] % 11], remove="all", protect=None)
    blocks = [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]
    assert removal_order(stats) == [2 * b + half for b in blocks for half in (1, 0)]
    assert np.nanmax(stats.scores) <= 1e-7


def test_gates_and_physical_removal_are_the_same_function():
    model, tokens = tiny(), batches()[0]
    rewritten, stats = apply(cut(remove=3), model, batches(), progress=False)
    units = removal_order(stats, 3)
    assert models.removed(rewritten) == sorted(units)
    limit = 1e-6 * float(jnp.abs(model(tokens)).max())  # float32 epsilon times a few
    np.testing.assert_allclose(
        rewritten(tokens), gated(model, tokens, keep(3, units)), rtol=1e-6, atol=limit
    )


def test_a_block_that_does_nothing_goes_first_with_score_zero():
    model = without_effect(tiny(), [1])
    for name in ("js", "kl", "norm", "angular"):
        stats = search(model, remove=2, distance=name)
        assert removal_order(stats) == [3, 2]
        # The forward passes are equal to rounding: logits to 1e-6, distances to its square or it.
        assert stats.scores[0, 1, 1] <= (1e-7 if name in ("js", "kl") else 1e-4)


def test_smaller_models_are_nested_in_one_search():
    stats = search(tiny(), remove="all")
    for k in range(6):
        assert removal_order(stats, k) == removal_order(stats)[:k]
        pruned = cut(remove=k).rewrite(tiny(), stats)
        assert models.removed(pruned) == sorted(removal_order(stats)[:k])
    assert removal_order(search(tiny(), remove=2)) == removal_order(stats)[:2]
    assert removal_order(search(tiny(), rate=0.34)) == removal_order(stats)[:2]  # floor(6 * 0.34)


@pytest.mark.parametrize("form", [lambda m: m, models.stack], ids=["list", "stacked"])
def test_the_whole_search_compiles_once(form):
    model, transform = form(tiny()), finercut(remove="all")
    stats = transform.init(model)
    with counted() as first:
        stats = transform.observe(stats, model, batches()[0])
    done = False
    with counted() as rest:
        for i in range(20):
            stats = transform.observe(stats, model, batches()[i % 2])
            stats, done = transform.advance(model, stats)
            if done:
                break
    assert done and len(removal_order(stats)) == 6
    assert first.programs >= 1 and rest.programs <= 2  # 2: the batches themselves are drawn


def test_stacked_model_gives_the_same_order_and_comes_out_unstacked():
    a, b = search(tiny(), remove="all"), search(models.stack(tiny()), remove="all")
    assert removal_order(a) == removal_order(b)
    np.testing.assert_allclose(a.scores, b.scores, rtol=1e-4)  # other fusions, other rounding
    assert not isinstance(cut(remove=2).rewrite(models.stack(tiny()), b).layers, models.Stacked)


def test_chunks_and_memory_do_not_change_the_scores():
    whole = np.concatenate(batches())
    reference = search(tiny(), [whole], remove="all")
    for data in (batches(), list(whole[:, None])):
        stats = search(tiny(), data, remove="all")
        np.testing.assert_allclose(stats.scores, reference.scores, rtol=1e-4)
    memory = 420_000  # groups of four: the last of each pass is filled with repeats
    assert together(tiny(), whole.shape, memory) == 4
    grouped = search(tiny(), [whole], remove="all", memory=memory)
    np.testing.assert_allclose(grouped.scores, reference.scores, rtol=1e-4)


def test_candidates_evaluated_together_follow_the_memory():
    model = tiny()
    assert together(model, (2, 12), 0) == 1
    small, large = (together(model, (2, 12), m) for m in (1 << 20, 1 << 21))
    assert 1 < small < large <= 2 * small + 1
    assert together(model, (4, 12), 1 << 20) <= small // 2 + 1


def test_search_saves_and_resumes_in_the_middle_of_a_pass(tmp_path):
    model, transform = tiny(), cut(remove=4)
    stats = transform.init(model)
    for batch in batches():
        stats = transform.observe(stats, model, batch)
    stats, _ = transform.advance(model, stats)
    stats = transform.observe(stats, model, batches()[0])
    npz.save_stats(tmp_path / "search.npz", stats)
    stats = npz.load_stats(tmp_path / "search.npz", transform.init(model))
    stats, done = transform.advance(model, transform.observe(stats, model, batches()[1]))
    while not done:
        for batch in batches():
            stats = transform.observe(stats, model, batch)
        stats, done = transform.advance(model, stats)
    expected = search(model, remove=4)
    for ours, theirs in zip(stats, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_calibration_that_was_cut_off_goes_on_from_its_checkpoint(tmp_path):
    seen = []

    def observe(stats, model, batch):
        seen.append(batch)
        if len(seen) == 5:  # the first batch of the third pass
            raise KeyboardInterrupt
        return cut(remove=4).observe(stats, model, batch)

    transform = dataclasses.replace(cut(remove=4), observe=observe)
    options = {"progress": False, "checkpoint": tmp_path / "stats.npz"}
    with pytest.raises(KeyboardInterrupt):
        calibrate(transform, tiny(), batches(), **options)
    stats = calibrate(transform, tiny(), batches(), **options)
    np.testing.assert_array_equal(stats.step, search(tiny(), remove=4).step)
    assert len(seen) == 5 + 4  # two passes are left, not four


def test_what_an_earlier_method_removed_is_no_candidate():
    model = models.remove(tiny(), [2, 3])
    stats = search(model, remove="all")
    assert sorted(removal_order(stats)) == [0, 1, 4, 5]
    assert np.isnan(stats.scores[:, 1]).all()
    first = removal_order(stats)[0]
    assert models.removed(cut(remove=1).rewrite(model, stats)) == sorted([2, 3, first])


def test_chains_with_itself():
    twice = chain(cut(remove=1), cut(remove=1, units="attention", protect=None))
    model, stats = apply(twice, tiny(), batches(), progress=False)
    first, second = (removal_order(part) for part in stats.done)
    assert models.removed(model) == sorted(first + second) and second[0] % 2 == 0


@pytest.mark.parametrize("units", ["attention", "ffn", "block"])
def test_kinds_of_units(units):
    stats = search(tiny(), remove=2, units=units)
    order = removal_order(stats)
    if units == "block":
        assert len(order) == 4 and order[1] == order[0] + 1 and order[3] == order[2] + 1
        assert removal_order(stats, 1) == order[:2]
        assert len(set(stats.step[order[0] // 2])) == 1
    else:
        assert {u % 2 for u in order} == {0 if units == "attention" else 1}
    assert models.removed(cut(remove=2, units=units).rewrite(tiny(), stats)) == sorted(order)


def test_one_shot_ranks_by_the_first_pass():
    stats = search(tiny(), remove="all", one_shot=True)
    first = [u for u in np.argsort(stats.scores[0].reshape(-1)) if u > 1]
    assert removal_order(stats)[:4] == first
    assert sorted(removal_order(stats)[4:]) == [0, 1] and stats.passes == 2


def test_the_model_stays_and_bfloat16_is_scored_in_float32():
    model = tiny(dtype=jnp.bfloat16)
    before = jax.tree.map(np.array, model)
    pruned, stats = apply(cut(remove=2), model, batches(), progress=False)
    assert all(
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(model), strict=True)
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(pruned)} == {jnp.dtype(jnp.bfloat16)}
    assert stats.scores.dtype == np.float64


def test_rewrite_works_on_shapes():
    stats = search(tiny(), remove=2)
    abstract = jax.eval_shape(lambda m: cut(remove=2).rewrite(m, stats), tiny())
    concrete = cut(remove=2).rewrite(tiny(), stats)
    assert jax.tree.structure(abstract) == jax.tree.structure(concrete)


def test_removing_nothing_makes_no_pass():
    model, stats = apply(cut(remove=0), tiny(), progress=False)
    assert models.removed(model) == [] and removal_order(stats) == []
    pruned, stats = apply(cut(rate=0.1), tiny(), batches(), progress=False)
    assert models.removed(pruned) == [] and removal_order(stats) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one"),
        ({"remove": 1, "rate": 0.5}, "exactly one"),
        ({"remove": -1}, "remove=-1"),
        ({"rate": 1.5}, r"outside \[0, 1\]"),
        ({"rate": float("nan")}, r"outside \[0, 1\]"),
        ({"remove": 1, "protect": 1.0}, r"outside \[0, 1\)"),
        ({"remove": 1, "protect": -0.1}, r"outside \[0, 1\)"),
        ({"remove": 1, "protect": 0.4, "units": "block"}, "not protected"),
        ({"remove": 1, "distance": "cosine"}, "there are js"),
        ({"remove": 1, "memory": -1}, "at least 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        finercut(**options)


def test_more_units_than_there_are():
    with pytest.raises(ConfigError, match="has 6 such units"):
        finercut(remove=7).init(tiny())
    with pytest.raises(ConfigError, match="has 3 such units"):
        finercut(remove=4, units="ffn").init(tiny())
    with pytest.raises(ConfigError, match="leaves 2 candidates"):
        finercut(remove=3, protect=0.5).init(tiny())
    finercut(remove=2, protect=0.5).init(tiny())


def test_empty_calibration_set():
    with pytest.raises(ValueError, match="empty"):
        calibrate(cut(remove=1), tiny(), [], progress=False)
    with pytest.raises(ConfigError, match="calibration set is empty"):
        cut(remove=1).advance(tiny(), cut(remove=1).init(tiny()))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (np.zeros((0, 4), np.int32), "integer tokens .* are accepted"),
        (np.zeros((2, 0), np.int32), "integer tokens .* are accepted"),
        (np.full((1, 4), 64, np.int32), r"0\.\.63"),
        (np.full((1, 4), -1, np.int32), r"0\.\.63"),
    ],
)
def test_bad_batches(batch, message):
    transform = cut(remove=1)
    with pytest.raises(ConfigError, match=message):
        transform.observe(transform.init(tiny()), tiny(), batch)


def test_logits_that_are_not_finite():
    def spoil(model, path):
        return tree.map_at(
            model, tree.at(path), lambda w: jax.tree.map(lambda x: x * jnp.nan, w), expect=1
        )

    transform = cut(remove=1)
    broken = spoil(tiny(), "layers[1].ffn.down.w")
    with pytest.raises(NumericalError, match="original model's logits are not finite"):
        transform.observe(transform.init(broken), broken, batches()[0])


def test_stats_of_another_model_and_of_an_unfinished_search():
    stats = search(tiny(), remove=1)
    with pytest.raises(ConfigError, match="other sublayers"):
        cut(remove=1).rewrite(models.remove(tiny(), [0]), stats)
    with pytest.raises(ConfigError, match="1 removals of 3"):
        cut(remove=3).rewrite(tiny(), stats)


def test_sublayers_of_a_stacked_model():
    model = models.remove(tiny(), [0, 2, 4])
    np.testing.assert_array_equal(present(model), present(models.stack(model)))
    assert present(model).tolist() == [[False, True]] * 3
