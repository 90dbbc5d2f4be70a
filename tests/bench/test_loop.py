"""The bench of the loop runs; how fast it is, `make bench-check` says."""

from ffnlab.bench.loop import overhead
from ffnlab.models import DecoderConfig

TINY = DecoderConfig(vocab=256, width=8, hidden=16, layers=1, heads=1, kv_heads=1, head_dim=8)


def test_a_run_takes_longer_than_its_steps():
    assert 1 < overhead(0.002, 4, TINY) < 1000
