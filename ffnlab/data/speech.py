"""Speech: WAV files, spoken digits by speaker, another sampling rate, log-mel features.

Log-mel features are those of Whisper (arXiv 2212.04356), in NumPy with float64 inside.
"""

import functools
import gzip
import io
import math
import re
import struct
import tarfile
import wave
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int32

from ffnlab.data.folders import folder
from ffnlab.errors import ConfigError, FFNLabError, FormatError, at_least
from ffnlab.storage.files import open_regular

__all__ = ["Recording", "SpokenDigits", "fsdd", "log_mel", "read_wav", "resampled"]

SIZE_LIMIT = 1 << 28  # bytes of a WAV file, and of an archive after unpacking
RECORDINGS_LIMIT = 1 << 16
PCM = 1
FORMATS = {
    2: "Microsoft ADPCM",
    3: "IEEE float",
    6: "A-law",
    7: "mu-law",
    17: "IMA ADPCM",
    49: "GSM 6.10",
    80: "MPEG",
    85: "MP3",
    0xFFFE: "extensible",
}
BITS = (8, 16, 24, 32)
CHANNELS_LIMIT = 64

# Of `log_mel`; those of Whisper.
RATE = 16_000  # Hz
WINDOW, HOP = 400, 160  # samples
TOP = 8_000.0  # Hz
FLOOR = 1e-10  # of the power
BELOW = 8.0  # decades below the loudest that are kept
# The scale of Slaney's Auditory Toolbox: linear up to a knee, logarithmic beyond.
KNEE_HZ, KNEE_MEL = 1_000.0, 15.0
DECAY = math.log(6.4) / 27


class Recording(NamedTuple):
    """A recorded sound.

    Attributes:
      samples: [t, channels], in [-1, 1).
      rate: samples a second, Hz.
    """

    samples: Float32[np.ndarray, "t c"]
    rate: int


def read_wav(path: str | Path) -> Recording:
    """Reads a WAV file of integers: 8 (unsigned), 16, 24 or 32 bits a sample.

    Args:
      path: the file.
    Raises:
      FFNLabError: there is no file.
      FormatError: no WAV file, a damaged one, another encoding (it is named), no samples, more
        than `CHANNELS_LIMIT` channels, or more than `SIZE_LIMIT` bytes.
    """
    file = Path(path)
    if not file.exists():
        raise FFNLabError(f"{file}: there is no such file")
    with open_regular(file) as opened:
        content = opened.read(SIZE_LIMIT + 1)
    if len(content) > SIZE_LIMIT:
        raise FormatError(f"{file}: more than {SIZE_LIMIT} bytes")
    return decoded(content, str(file))


def decoded(content: bytes, source: str) -> Recording:
    """The recording in the bytes of a WAV file; errors name `source`."""
    kind = encoding(content)
    if kind not in (None, PCM):
        said = FORMATS.get(kind, "unknown")
        raise FormatError(f"{source}: samples are {said} (format {kind}); PCM (1) is read")
    try:
        with wave.open(io.BytesIO(content)) as opened:
            channels, width, rate, count, *_ = opened.getparams()
            data = opened.readframes(count)
    except (wave.Error, EOFError, ValueError, struct.error, RuntimeError) as error:
        raise FormatError(f"{source}: no WAV file: {error or 'it ends too early'}") from None
    if 8 * width not in BITS or not 1 <= channels <= CHANNELS_LIMIT or rate < 1:
        raise FormatError(
            f"{source}: {8 * width} bits, {channels} channels, {rate} Hz; {BITS} bits, "
            f"1 to {CHANNELS_LIMIT} channels and 1 Hz or more are read"
        )
    if not count or len(data) != count * channels * width:
        raise FormatError(
            f"{source}: {len(data)} bytes of samples; its header says {count * channels * width}, "
            "and there must be some"
        )
    return Recording(samples(data, width).reshape(count, channels), rate)


def encoding(content: bytes) -> int | None:
    """The number of the encoding in a WAV file; None where there is none."""
    at = 12  # after "RIFF", a size, "WAVE"
    while at + 10 <= len(content):
        name, size, kind = struct.unpack_from("<4sIH", content, at)
        if name == b"fmt ":
            return kind
        at += 8 + size + size % 2
    return None


def samples(data: bytes, width: int) -> Float32[np.ndarray, "n"]:
    """Little-endian integers of some bytes each as numbers in [-1, 1)."""
    raw = np.frombuffer(data, np.uint8).reshape(-1, width)
    wide = np.zeros((len(raw), 4), np.uint8)
    wide[:, 4 - width :] = raw  # at the upper end, where the sign is
    if width == 1:  # unsigned: zero is 128
        wide[:, 3] ^= 128
    return (wide.view("<i4")[:, 0] / 2.0**31).astype(np.float32)


class SpokenDigits(NamedTuple):
    """Recordings of single digits, n in all, of one rate.

    Attributes:
      waves: n arrays [t], of different lengths, in [-1, 1).
      y: the digit, [n].
      speaker: [n], an index into `names`.
      take: which time the speaker said the digit, [n].
      names: of the speakers.
      rate: Hz.
    """

    waves: tuple[Float32[np.ndarray, "t"], ...]
    y: Int32[np.ndarray, "n"]
    speaker: Int32[np.ndarray, "n"]
    take: Int32[np.ndarray, "n"]
    names: tuple[str, ...]
    rate: int

    def by_speaker(self, *held_out: str) -> tuple["SpokenDigits", "SpokenDigits"]:
        """(train, test): all recordings of the named speakers are in test.

        Raises:
          ConfigError: a name that is none of the speakers, or nobody on one side.
        """
        strangers = sorted(set(held_out) - set(self.names))
        if strangers or not 0 < len(set(held_out)) < len(self.names):
            raise ConfigError(
                f"held_out={held_out}; some of the speakers {self.names}, and not all, are accepted"
            )
        in_test = np.isin(self.speaker, [self.names.index(name) for name in held_out])
        return self._rows(~in_test), self._rows(in_test)

    def _rows(self, keep: np.ndarray) -> "SpokenDigits":
        chosen = np.flatnonzero(keep)
        columns = (self.y[chosen], self.speaker[chosen], self.take[chosen])
        return SpokenDigits(tuple(self.waves[i] for i in chosen), *columns, self.names, self.rate)


# What gzip and tarfile raise on damaged input; headers may refer to each other without end.
ARCHIVE_ERRORS = (
    *(OSError, EOFError, ValueError, IndexError, OverflowError, RecursionError),
    *(zlib.error, tarfile.TarError),
)
NAME = re.compile(r"([0-9])_([a-z]+)_([0-9]{1,4})\.wav")


def fsdd(path: str | Path | None = None) -> SpokenDigits:
    """The Free Spoken Digit Dataset: recordings DIGIT_SPEAKER_TAKE.wav in a folder or an archive.

    Args:
      path: a folder, or a tar.gz, which is unpacked in memory alone; the one archive in fsdd in
        FFNLAB_DATA when None. Files that do not end in .wav are passed over.
    Returns:
      ordered by digit, speaker and take.
    Raises:
      FFNLabError: there is no file.
      FormatError: a damaged archive, one of more than `SIZE_LIMIT` bytes or `RECORDINGS_LIMIT`
        members, a recording of another name, twice, with several channels, or not of the rate of
        the others.
    """
    place = _archive(folder("fsdd")) if path is None else Path(path)
    if not place.exists():
        raise FFNLabError(f"{place}: there is no such file")
    found = {}
    for name, content in _from_folder(place) if place.is_dir() else _from_archive(place):
        match, source = NAME.fullmatch(name), f"{place}: {name[:80]!r}"
        if match is None:
            raise FormatError(f"{source} is not DIGIT_SPEAKER_TAKE.wav")
        key = int(match[1]), match[2], int(match[3])
        if key in found:
            raise FormatError(f"{source} is there twice")
        found[key] = decoded(content, source)
        if found[key].samples.shape[1] != 1:
            raise FormatError(f"{source} has {found[key].samples.shape[1]} channels; 1 is accepted")
    rates = {recording.rate for recording in found.values()}
    if len(rates) != 1:
        raise FormatError(f"{place}: recordings of one rate are accepted; found {sorted(rates)} Hz")
    order = sorted(found)
    names = tuple(sorted({speaker for _, speaker, _ in order}))
    return SpokenDigits(
        tuple(found[key].samples[:, 0] for key in order),
        np.array([digit for digit, _, _ in order], np.int32),
        np.array([names.index(speaker) for _, speaker, _ in order], np.int32),
        np.array([take for _, _, take in order], np.int32),
        names,
        rates.pop(),
    )


def _archive(where: Path) -> Path:
    found = sorted(where.glob("*.tar.gz"))
    if len(found) != 1:
        raise FFNLabError(f"{where} has {len(found)} archives *.tar.gz; give `fsdd` a path")
    return found[0]


def _from_folder(place: Path) -> Iterator[tuple[str, bytes]]:
    left = SIZE_LIMIT
    for file in sorted(place.glob("*.wav")):
        with open_regular(file) as opened:
            content = opened.read(left + 1)
        left -= len(content)
        if left < 0:
            raise FormatError(f"{place}: more than {SIZE_LIMIT} bytes of recordings")
        yield file.name, content


def _from_archive(place: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of the files *.wav of an archive; nothing is written anywhere."""
    try:
        with open_regular(place) as raw, gzip.open(raw) as unpacked:
            content = unpacked.read(SIZE_LIMIT + 1)
        if len(content) > SIZE_LIMIT:
            raise FormatError(f"{place}: more than {SIZE_LIMIT} bytes when unpacked")
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
            for number, member in enumerate(archive):
                if number >= RECORDINGS_LIMIT:
                    raise FormatError(f"{place}: more than {RECORDINGS_LIMIT} members")
                name = member.name.rpartition("/")[2]
                if not name.endswith(".wav"):
                    continue
                # A sparse member may say any size; a link is to a file that is read as itself.
                if not member.isreg() or member.issparse() or not 0 <= member.size <= len(content):
                    raise FormatError(f"{place}: {name[:80]!r} is no regular file")
                opened = archive.extractfile(member)
                yield name, b"" if opened is None else opened.read()
    except ARCHIVE_ERRORS as error:
        if isinstance(error, FFNLabError):
            raise
        raise FormatError(f"{place}: damaged archive: {error}") from None


def resampled(
    samples: Float[np.ndarray, "t *c"], rate: int, to: int
) -> Float32[np.ndarray, "u *c"]:
    """The same sound at another rate: polyphase filtering, which cuts what is above to / 2.

    Args:
      samples: t samples, of any number of channels.
      rate, to: Hz, >= 1; the larger divided by their greatest common divisor is at most 10,000.
    Returns:
      ceil(t to / rate) samples.
    Raises:
      ConfigError: no samples, or rates that are none.
    """
    at_least(1, rate=rate, to=to)
    if not len(samples):
        raise ConfigError(f"samples {samples.shape}; at least one is needed")
    shared = math.gcd(rate, to)
    up, down = to // shared, rate // shared
    if max(up, down) > 10_000:  # the filter is twenty times as long
        raise ConfigError(f"rate={rate}, to={to}: the ratio {up}/{down} has too large terms")
    from scipy.signal import resample_poly  # slow to import, and needed here alone

    return resample_poly(samples.astype(np.float64), up, down, axis=0).astype(np.float32)


def log_mel(
    samples: Float[np.ndarray, "t"], *, seconds: int = 30, bands: int = 80
) -> Float32[np.ndarray, "frames bands"]:
    """Log-mel features of a sound of 16 kHz, as Whisper takes them.

        m = log10(max(P F, 1e-10)),   features = (max(m, max(m) - 8) + 4) / 4
        P: power of frames of 400 samples, Hann window, a frame each 160 samples [frames, 201]
        F: triangles on Slaney's mel scale from 0 to 8 kHz, each of area 1 [201, bands]

    Args:
      samples: at 16,000 Hz (`resampled`), in [-1, 1).
      seconds: the sound is cut or filled with silence to this length; >= 1.
      bands: of the mel scale: 80, or 128 of the largest models.
    Returns:
      features, [100 seconds, bands]; those of `transformers` are [bands, frames].
    Raises:
      ConfigError: no samples, or values that are no numbers, or options below 1.
    """
    at_least(1, seconds=seconds, bands=bands)
    if not len(samples) or not np.isfinite(samples).all():
        raise ConfigError(f"samples {samples.shape}: at least one, and finite ones, are needed")
    length = seconds * RATE
    whole = np.zeros(length)
    whole[: len(samples)] = samples[:length]
    around = np.pad(whole, WINDOW // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(around, WINDOW)[::HOP][: length // HOP]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    power = np.abs(np.fft.rfft(frames * hann)) ** 2
    logs = np.log10(np.maximum(power @ mel_filters(bands), FLOOR))
    return ((np.maximum(logs, logs.max() - BELOW) + 4) / 4).astype(np.float32)


@functools.lru_cache(maxsize=4)
def mel_filters(bands: int) -> Float[np.ndarray, "f bands"]:
    """Triangles between neighbours on the mel scale, of area 1 over Hz, [WINDOW / 2 + 1, bands]."""
    edges = hertz(np.linspace(0, mel(TOP), bands + 2))
    low, middle, high = edges[:-2], edges[1:-1], edges[2:]
    f = np.linspace(0, RATE / 2, WINDOW // 2 + 1)[:, None]
    rising, falling = (f - low) / (middle - low), (high - f) / (high - middle)
    return np.maximum(0, np.minimum(rising, falling)) * 2 / (high - low)


def mel(f: float) -> float:
    """A frequency >= KNEE_HZ, Hz, on Slaney's scale."""
    return KNEE_MEL + math.log(f / KNEE_HZ) / DECAY


def hertz(mels: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """The frequencies, Hz, of places on Slaney's scale."""
    beyond = KNEE_HZ * np.exp(DECAY * (mels - KNEE_MEL))
    return np.where(mels < KNEE_MEL, mels * KNEE_HZ / KNEE_MEL, beyond)
