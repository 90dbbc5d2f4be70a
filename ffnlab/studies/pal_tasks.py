"""What PAL's designs are asked: facts spread over noisy audio tokens, and digits that were spoken.

Facts: each token of sound carries a key and a value, and the text names one key. Spoken digits are
those of FSDD; the text is a question to a language model of Python source, which answers by the
digit's character. Features of speech are Whisper's states, and patches of the log-mel picture,
which no encoder has seen: their connector learns what it needs.
"""

from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from ffnlab import formats, models
from ffnlab.data import ArrayBatches, FeatureCache, SpokenDigits, find_folder, fsdd, log_mel, resampled
from ffnlab.data.speech import RATE
from ffnlab.models import AudioEncoder, AudioInput, Decoder, DecoderConfig
from ffnlab.routing import pal
from ffnlab.studies.pal_measure import Problems, Task

__all__ = ["facts", "facts_model", "speech", "speech_model"]

KEYS, VALUES, ASK = 16, 8, 24  # ids of values follow those of keys
NOISE = 0.5
WIDTHS = (32, 24)  # of the two encoders' features
SIZES = {"width": 48, "hidden": 96, "layers": 3, "heads": 4, "kv_heads": 4, "head_dim": 12}
VALIDATION, TEST = 256, 512

QUESTION = b"digit = "
HELD_OUT = "theo"
TAKES = 15  # of each digit by each speaker
FRAMES, PATCH, JOINED = 96, 8, 4  # of a second; log-mel frames of a patch, states that are averaged
ENCODERS = ("whisper", "mel patches")


def facts_model(audio: AudioInput, seed: int) -> Decoder:
    """A small decoder of random weights that hears."""
    import jax

    config = DecoderConfig(vocab=ASK + 1, audio=audio, **SIZES)
    return Decoder(config, key=jax.random.key(seed))


def facts(steps: int, *, batch: int, every: int, present: Sequence[bool] | None = None) -> Task:
    """The card's key-value task.

    Args:
      steps, batch, every: see `Task`; rows of a batch.
      present: None for one encoder that has all facts; else two of unlike codes, each with half of
        them, and which of the two is heard.
    """

    def drawn(stream: int, position: int, rows: int) -> Problems:
        return problems(np.random.default_rng((stream, position)), rows, present)

    return Task(
        lambda position: drawn(0, position, batch),
        drawn(1, 0, VALIDATION),
        drawn(2, 0, TEST),
        steps,
        every,
        chosen_at=min(200, steps),
    )


def problems(random: np.random.Generator, rows: int, present: Sequence[bool] | None) -> Problems:
    """Some questions: every key once, in any order, each with a value."""
    codes = np.random.default_rng(7)
    encoders = 1 if present is None else len(present)
    keys = random.permuted(np.tile(np.arange(KEYS), (rows, 1)), axis=1)
    values = random.integers(0, VALUES, (rows, KEYS))
    features, masks = [], []
    for i, part in enumerate(np.split(np.arange(KEYS), encoders)):
        of_key, of_value = (codes.normal(size=(n, WIDTHS[i])) for n in (KEYS, VALUES))
        carried = of_key[keys[:, part]] + of_value[values[:, part]]
        noisy = carried + NOISE * random.normal(size=carried.shape)
        features.append(noisy.astype(np.float32))
        masks.append(np.full(noisy.shape[:2], present is None or present[i]))
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
    from ffnlab import transform

    model, _ = models.embedded()
    return transform.apply(pal.connect(audio, seed=seed), model)[0]


def speech(
    encoders: Sequence[str], steps: int, *, batch: int, every: int, cache: Path, seed: int = 0
) -> Task:
    """Spoken digits, features by encoder of `ENCODERS`; one speaker is never trained on.

    A tenth of the recordings of the others chooses the rates.
    """
    found = fsdd()
    early = found.take < TAKES
    digits = SpokenDigits(
        tuple(w for w, keep in zip(found.waves, early, strict=True) if keep),
        *(column[early] for column in (found.y, found.speaker, found.take)),
        found.names,
        found.rate,
    )
    sounds = heard_by(encoders, digits, cache)
    text = np.frombuffer(QUESTION, np.uint8).astype(np.int32)
    tokens = np.tile(text, (len(digits.y), 1))
    wanted = np.full_like(tokens, -1)
    wanted[:, -1] = ord("0") + digits.y
    whole = Problems(sounds, (tokens, wanted))
    is_test = digits.speaker == digits.names.index(HELD_OUT)
    order = np.random.default_rng(seed).permutation(np.flatnonzero(~is_test))
    few = len(order) // 10
    rows = order[few:], order[:few], np.flatnonzero(is_test)
    train, validation, test = (rows_of(whole, chosen) for chosen in rows)
    return Task(ArrayBatches(train, batch, seed), validation, test, steps, every, chosen_at=steps)


def rows_of(problems: Problems, chosen: np.ndarray) -> Problems:
    """Some of the problems."""
    import jax

    return jax.tree.map(lambda leaf: leaf[chosen], problems)


def heard_by(encoders: Sequence[str], digits: SpokenDigits, cache: Path) -> pal.Sounds:
    """The first second of each recording as the encoders give it, 12 rows of each."""
    waves = [resampled(wave, digits.rate, RATE)[:RATE] for wave in digits.waves]
    frames = np.stack([log_mel(wave, seconds=1) for wave in waves])
    length = np.array([len(wave) * 100 // RATE for wave in waves])
    rows = np.arange(FRAMES // PATCH)
    valid = rows < np.maximum(-(-length // PATCH), 1)[:, None]
    made: dict[str, Float[np.ndarray, "n r c"]] = {}
    if "whisper" in encoders:
        encoder = formats.load(find_folder("whisper_tiny_en_encoder"), dtype=jnp.float32)
        made["whisper"] = FeatureCache(cache, rows=60)("whisper, averaged", averaged, encoder, frames)
    made["mel patches"] = frames[:, :FRAMES].reshape(len(frames), len(rows), -1)
    return pal.Sounds(tuple(made[name] for name in encoders), (valid,) * len(encoders))


def averaged(encoder: AudioEncoder, frames: Float[jnp.ndarray, "b t c"]) -> Float[jnp.ndarray, "b r d"]:
    """Means of four neighbouring states each, of the first 48."""
    states = encoder(frames)[:, : FRAMES // 2]
    return states.reshape(len(frames), -1, JOINED, states.shape[-1]).mean(axis=2)
