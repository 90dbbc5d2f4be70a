"""What PAL's designs are asked: facts spread over noisy audio tokens, and digits that were spoken.

Facts: each token of sound carries a key and a value, and the text names one key. Spoken digits are
those of FSDD; the text is a question to a language model of Python source, which answers by the
digit's character. Features of speech are Whisper's states, and patches of the log-mel picture,
which no encoder has seen: their connector learns what it needs.
"""

from collections.abc import Sequence

import jax
import numpy as np

from ffnlab import formats, models, transform
from ffnlab.data import (
    ArrayBatches,
    FeatureCache,
    SpokenDigits,
    asked,
    find_folder,
    folder,
    fsdd,
    sound_rows,
)
from ffnlab.models import AudioInput, Decoder, DecoderConfig
from ffnlab.routing import pal
from ffnlab.storage.files import StrPath
from ffnlab.studies.pal_measure import Problems, Task

__all__ = ["facts", "facts_model", "speech", "speech_model"]

KEYS, VALUES, ASK = 16, 8, 24  # ids of values follow those of keys
NOISE = 0.5
WIDTHS = (32, 24)  # of the two encoders' features
SIZES = {"width": 48, "hidden": 96, "layers": 3, "heads": 4, "kv_heads": 4, "head_dim": 12}
VALIDATION, TEST = 512, 512

QUESTION = "n = "
HELD_OUT = "theo"
TAKES = 15  # of each digit by each speaker
PATCH = 8  # frames of a row
ENCODERS = {"whisper": 384, "mel patches": 80 * PATCH}  # widths of features


def facts_model(audio: AudioInput, seed: int) -> Decoder:
    """A small decoder of random weights that hears."""
    config = DecoderConfig(vocab=ASK + 1, audio=audio, **SIZES)
    return Decoder(config, key=jax.random.key(seed))


def facts(steps: int, *, batch: int, every: int, encoders: int = 1) -> Task:
    """The card's key-value task.

    Args:
      steps, batch, every: see `Task`; rows of a batch.
      encoders: 1 that has all facts, or 2 of unlike codes that have half of them each.
    """

    def drawn(stream: int, position: int, rows: int) -> Problems:
        return problems(np.random.default_rng((stream, position)), rows, encoders)

    return Task(
        lambda position: drawn(0, position, batch),
        drawn(1, 0, VALIDATION),
        drawn(2, 0, TEST),
        steps,
        every,
        chosen_at=min(200, steps),
    )


def problems(random: np.random.Generator, rows: int, encoders: int) -> Problems:
    """Some questions: every key once, in any order, each with a value."""
    codes = np.random.default_rng(7)
    keys = random.permuted(np.tile(np.arange(KEYS), (rows, 1)), axis=1)
    values = random.integers(0, VALUES, (rows, KEYS))
    features, masks = [], []
    for i, part in enumerate(np.split(np.arange(KEYS), encoders)):
        of_key, of_value = (codes.normal(size=(n, WIDTHS[i])) for n in (KEYS, VALUES))
        carried = of_key[keys[:, part]] + of_value[values[:, part]]
        noisy = carried + NOISE * random.normal(size=carried.shape)
        features.append(noisy.astype(np.float32))
        masks.append(np.ones(noisy.shape[:2], bool))
    place = random.integers(0, KEYS, rows)
    asked, answer = (x[np.arange(rows), place] for x in (keys, values))
    tokens = np.stack([np.full(rows, ASK), asked], axis=1).astype(np.int32)
    wanted = np.stack([np.full(rows, -1), KEYS + answer], axis=1).astype(np.int32)
    return Problems(pal.Sounds(tuple(features), tuple(masks)), (tokens, wanted))


def has_speech() -> bool:
    """Whether the recordings and the encoder are there."""
    return None not in (find_folder("fsdd"), find_folder("whisper_tiny_en_encoder"))


def speech_model(audio: AudioInput, seed: int) -> Decoder:
    """The embedded language model with connectors of random weights."""
    model, _ = models.embedded()
    return transform.apply(pal.connect(audio, seed=seed), model)[0]


def speech(
    encoders: Sequence[str], steps: int, *, batch: int, every: int, cache: StrPath, seed: int = 0
) -> Task:
    """Spoken digits; one speaker is never trained on.

    Args:
      encoders: of `ENCODERS`, whose features are heard, 12 rows of each for the first second.
      steps, batch, every: see `Task`; rows of a batch.
      cache: folder of Whisper's features.
      seed: of the order of recordings, a tenth of which chooses the rates.
    """
    digits = first_takes(fsdd())
    found = {}
    if "whisper" in encoders:
        encoder = formats.load(folder("whisper_tiny_en_encoder"), dtype=np.float32)
        kept = FeatureCache(cache, rows=60)
        found["whisper"] = sound_rows(digits.waves, digits.rate, encoder, size=PATCH, cache=kept)
    found["mel patches"] = sound_rows(digits.waves, digits.rate, size=PATCH)
    sounds = pal.Sounds(*map(tuple, zip(*(found[name] for name in encoders), strict=True)))
    whole = Problems(sounds, asked(QUESTION, list(map(str, digits.y))))
    is_test = digits.speaker == digits.names.index(HELD_OUT)
    order = np.random.default_rng(seed).permutation(np.flatnonzero(~is_test))
    few = len(order) // 10
    train, validation, test = (
        jax.tree.map(lambda leaf, rows=rows: leaf[rows], whole)
        for rows in (order[few:], order[:few], np.flatnonzero(is_test))
    )
    return Task(ArrayBatches(train, batch, seed), validation, test, steps, every, chosen_at=steps)


def first_takes(digits: SpokenDigits) -> SpokenDigits:
    """The recordings of the first `TAKES` takes."""
    early = digits.take < TAKES
    waves = tuple(wave for wave, keep in zip(digits.waves, early, strict=True) if keep)
    y, speaker, take = (column[early] for column in (digits.y, digits.speaker, digits.take))
    return SpokenDigits(waves, y, speaker, take, digits.names, digits.rate)
