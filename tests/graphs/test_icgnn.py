"""Precoding and powers by one network: symmetries, limits, one program, learning, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffnlab import formats
from ffnlab.errors import ConfigError
from ffnlab.graphs import (
    POWER,
    PRECODING,
    CellFreeBatches,
    CellularBatches,
    allocate,
    cell_free,
    cell_free_rates,
    cellular,
    fractional,
    link_features,
    power_loss,
    precode,
    precoding_loss,
    rates,
    rzf,
    user_features,
)
from ffnlab.graphs import icgnn as module
from ffnlab.graphs.channels import LIMIT
from ffnlab.graphs.precoding import gram_of
from ffnlab.learning import backprop
from ffnlab.models import ICGNNConfig
from ffnlab.parallel import parse_mesh, train

K, N, SNR = 5, 6, 10.0
NET = PRECODING.make(key=jax.random.key(0))
LINKS = POWER.make(key=jax.random.key(0))
CLOSE = 1e-5  # of the card: relative to the power


def padded(seed, users, antennas, channels=2):
    """Channels in arrays of K users and N antennas."""
    case = cellular(seed, channels, (users,), antennas)
    h = np.zeros((channels, K, N), np.complex64)
    h[:, :users, :antennas] = case.h
    return jnp.asarray(h), jnp.asarray(np.arange(K) < users)[None].repeat(channels, 0)


@settings(max_examples=5)
@given(st.integers(0, 2**16))
def test_renumbered_users_and_turned_antennas(seed):
    h, valid = padded(seed, 4, N)
    v, p, q = precode(NET, h, SNR, 1.0, valid=valid)
    random = np.random.default_rng(seed)
    order = random.permutation(K)
    there = precode(NET, h[:, order], SNR, 1.0, valid=valid[:, order])
    for ours, theirs in zip((v, p, q), there, strict=True):
        np.testing.assert_allclose(ours[..., order], theirs, atol=SNR * CLOSE)
    turn = np.linalg.qr(random.standard_normal((N, N)) + 1j * random.standard_normal((N, N)))[0]
    other, *powers = precode(NET, h @ turn.astype(np.complex64), SNR, 1.0, valid=valid)
    np.testing.assert_allclose(powers, (p, q), atol=SNR * CLOSE)
    np.testing.assert_allclose(
        rates(h @ turn.astype(np.complex64), other, 1.0), rates(h, v, 1.0), atol=1e-3
    )


def test_five_sizes_are_one_program_and_padding_changes_nothing():
    module.driven.clear_cache()
    for users, antennas in ((1, 2), (2, 5), (3, 3), (4, 6), (5, 4)):
        h, valid = padded(users, users, antennas)
        precode(NET, h, SNR, 1.0, valid=valid)
    assert module.driven._cache_size() == 1  # what jax offers to count programs
    h, valid = padded(3, 3, 3)
    v, p, q = precode(NET, h, SNR, 1.0, valid=valid)
    assert not np.asarray(v[:, :, 3:]).any() and not np.asarray(v[:, 3:]).any()
    assert not np.asarray(p[:, 3:]).any() and not np.asarray(q[:, 3:]).any()
    for whole in (p.sum(1), q.sum(1), (jnp.abs(v) ** 2).sum((1, 2))):
        np.testing.assert_allclose(whole, SNR, rtol=1e-6)  # of the card
    alone, *_ = precode(NET, h[:, :3, :3], SNR, 1.0)
    np.testing.assert_allclose(alone, v[:, :3, :3], atol=1e-4)


def test_power_and_noise_count_by_their_ratio_and_steps_are_those_of_the_solver():
    h, valid = padded(0, 5, 6)
    v, p, _ = precode(NET, h, SNR, 1.0, valid=valid)
    loud, more, _ = precode(NET, h, 4 * SNR, 4.0, valid=valid)
    np.testing.assert_allclose(more, 4 * p, rtol=1e-5)
    np.testing.assert_allclose(loud, 2 * v, atol=1e-4)
    found = [
        float(rates(h, precode(NET, h, SNR, 1.0, valid=valid, steps=s)[0], 1.0).sum())
        for s in (1, 2, 5)
    ]
    assert found[0] < found[1] < found[2]


def test_what_the_network_is_told_is_finite_and_the_loss_is_the_rate():
    batch = CellularBatches((1, 4), 6, batch=32)(0)
    assert sorted(set(batch.valid.sum(1))) == [1, 4]
    told = user_features(gram_of(jnp.asarray(batch.h)), *map(jnp.asarray, batch[1:]))
    assert all(np.isfinite(value).all() for value in told.values())
    alike = np.asarray(told["edges"][..., 0])
    assert alike.min() >= 0 and alike.max() <= 1 + 1e-5
    h = batch.h.astype(np.complex128)
    inner = np.abs(np.einsum("bkn,bjn->bkj", h, h.conj())) ** 2
    size = (np.abs(h) ** 2).sum(-1)
    many = batch.valid.sum(1) == 4
    expected = inner[many] / size[many][:, None] / size[many][..., None]
    np.testing.assert_allclose(alike[many], expected, atol=1e-5)
    np.testing.assert_allclose(told["nodes"][many][..., 0], np.log(size[many]), atol=1e-5)
    (loss, metrics), slopes = jax.jit(jax.value_and_grad(precoding_loss, has_aux=True))(NET, batch)
    v, *_ = precode(NET, batch.h, batch.snr, 1.0, valid=batch.valid)
    total = np.asarray(rates(batch.h, v, 1.0).sum(-1))
    assert float(metrics["rate"]) == pytest.approx(total.mean(), rel=1e-4)
    assert float(loss) == pytest.approx(-(total / batch.valid.sum(1)).mean(), rel=1e-4)
    leaves = jax.tree.leaves(slopes)
    assert all(np.isfinite(leaf).all() for leaf in leaves) and any(leaf.any() for leaf in leaves)


def test_powers_of_links_of_any_size():
    batches = CellFreeBatches(((4, 3, 2, 4), (5, 2, 3, 1)), batch=2)
    module.given_powers.clear_cache()
    for i, (points, users) in enumerate(((4, 3), (5, 2))):
        batch = batches(i)
        assert batch.gains.shape == (2, 5, 3)
        rho = np.asarray(allocate(LINKS, *batch))
        assert not rho[~batch.served].any() and (rho[batch.served] > 0).all()
        assert (rho.sum(-1) <= LIMIT * (1 + 1e-6)).all()
        small = tuple(part[:, :points, :users] for part in batch[:2])
        np.testing.assert_allclose(
            allocate(LINKS, *small, batch.antennas), rho[:, :points, :users], rtol=1e-4
        )
    told = link_features(*map(jnp.asarray, batch))
    np.testing.assert_allclose(told["nodes"][0, 0, 0, 0], np.log10(batch.gains[0, 0, 0]) / 2, 1e-5)
    batch = batches(0)
    order = np.random.default_rng(0).permutation(5)
    turned = allocate(LINKS, batch.gains[:, order], batch.served[:, order], batch.antennas)
    np.testing.assert_allclose(turned, allocate(LINKS, *batch)[:, order], rtol=1e-4)
    (loss, metrics), slopes = jax.jit(jax.value_and_grad(power_loss, has_aux=True))(LINKS, batch)
    total = np.asarray(cell_free_rates(turned[:, np.argsort(order)], *batch[::2]).sum(-1))
    assert float(metrics["rate"]) == pytest.approx(total.mean(), rel=1e-4)
    assert float(loss) == pytest.approx(-total.mean() / 3, rel=1e-4)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))
    module.given_powers.clear_cache()
    for i in range(4):
        allocate(LINKS, *batches(i))
    assert module.given_powers._cache_size() == 1


def test_batches_are_those_of_their_position():
    for batches in (CellularBatches((2, 3), 4, batch=3), CellFreeBatches(((4, 3, 2, 4),), batch=2)):
        for one, other in zip(batches(5), batches(5), strict=True):
            np.testing.assert_array_equal(one, other)
        assert (batches(5)[0] != batches(6)[0]).any()


def test_a_batch_over_eight_devices_learns_the_same():
    rule = backprop(precoding_loss, optax.sgd(1e-2))
    small = ICGNNConfig(2, 2, edges=2, layers=1, width=8).make(key=jax.random.key(2))
    batches = CellularBatches((2, 3), 3, batch=8)
    one, eight = (
        train(rule, small, batches, 2, key=jax.random.key(0), mesh=mesh).state.model
        for mesh in (None, parse_mesh("dp=8"))
    )
    for a, b, c in zip(*map(jax.tree.leaves, (one, eight, small)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
        assert (np.asarray(a) != np.asarray(c)).any() or not np.asarray(c).any()


def test_a_network_comes_back_from_its_file(tmp_path):
    formats.save(NET, tmp_path / "net", format="ffnlab")
    found = formats.load(tmp_path / "net", progress=False)
    h, valid = padded(0, 4, 6)
    pair = (precode(net, h, SNR, 1.0, valid=valid) for net in (found, NET))
    for a, b in zip(*pair, strict=True):
        np.testing.assert_array_equal(a, b)


H, THERE = padded(0, 4, 6)
LAST = cell_free(0, 1, 4, 3, 2, 2)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: precode(NET, H, SNR, 1.0), "a row of zeros, a user without a channel"),
        (lambda: precode(NET, H, SNR, 0.0, valid=THERE), "noise=0.0 must be positive"),
        (lambda: precode(NET, H, -1.0, 1.0, valid=THERE), "power=-1.0 must be positive"),
        (lambda: precode(NET, H, SNR, 1.0, valid=THERE, steps=0), "steps=0 must be at least 1"),
        (lambda: precode(LINKS, H, SNR, 1.0, valid=THERE), "model: a network of .*'nodes': 3"),
        (lambda: allocate(NET, *LAST), "model: a network of .*'nodes': 2"),
        (lambda: allocate(LINKS, LAST[0], LAST[1] & False, 2.0), "is served by no point"),
        (lambda: allocate(LINKS, LAST[0], LAST[1], 0.0), "antennas=0.0 must be at least 1"),
        (lambda: cellular(0, 1, (), 2), "users=0 must be at least 1"),
        (lambda: cellular(0, 1, (2,), 2, snr_db=(3.0, 1.0)), "snr_db"),
        (lambda: CellularBatches(batch=0), "channels=0"),
        (lambda: CellularBatches(seed=-1), "seed=-1"),
        (lambda: CellFreeBatches(()), "sizes"),
        (lambda: CellFreeBatches(((3, 2, 4, 1),)), "serving=4"),
    ],
)
def test_what_is_refused(call, said):
    with pytest.raises(ConfigError, match=said):
        call()


@pytest.mark.slow
def test_a_trained_precoder_keeps_up_with_regularized_zero_forcing_at_sizes_unseen():
    """Half of the card's training; its bars at 10 dB, which the study judges on more channels."""
    rule = backprop(precoding_loss, optax.adam(2e-3))
    outcome = train(rule, NET, CellularBatches(), 300, key=jax.random.key(0), together=50)
    for users, antennas, least in ((4, 8, 0.99), (8, 8, 1.02), (8, 16, 0.99)):
        case = cellular(7, 200, (users,), antennas)
        v, *_ = precode(outcome.state.model, case.h, SNR, 1.0)
        ours = float(rates(case.h, v, 1.0).sum(-1).mean())
        theirs = float(rates(case.h, rzf(case.h, SNR, 1.0), 1.0).sum(-1).mean())
        assert ours >= least * theirs, (users, antennas)


@pytest.mark.slow
def test_trained_powers_beat_every_split_at_sizes_unseen():
    rule = backprop(power_loss, optax.adam(1e-3))
    net = ICGNNConfig(3, 1, axes=2, layers=3).make(key=jax.random.key(1))
    outcome = train(rule, net, CellFreeBatches(), 600, key=jax.random.key(0), together=50)
    for size in ((16, 6, 6, 4), (16, 6, 16, 4)):
        case = cell_free(11, 100, *size)
        rate = lambda rho, case=case: float(  # noqa: E731
            cell_free_rates(rho, case.gains, case.antennas).sum(-1).mean()
        )
        splits = [rate(fractional(*case[:2], exponent=e)) for e in (0.0, 0.5, 1.0)]
        assert rate(allocate(outcome.state.model, *case)) >= 1.02 * max(splits), size
