"""Damaged files, for readers that must refuse or read them and never fail otherwise."""

import random
from collections.abc import Iterator


def damaged(whole: bytes, count: int) -> Iterator[bytes]:
    """A file of which some are cut short, and nearly all have one bit flipped."""
    draw = random.Random(0)
    for _ in range(count):
        content = bytearray(whole[: draw.randrange(len(whole))] if draw.random() < 0.4 else whole)
        if content:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        yield bytes(content)
