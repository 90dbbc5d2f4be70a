"""WAV files, spoken digits, another rate, and log-mel features as transformers gives them."""

import gzip
import importlib.util
import io
import math
import random
import struct
import tarfile
import wave

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffnlab.data import find_folder, fsdd, log_mel, read_wav, resampled
from ffnlab.errors import ConfigError, FFNLabError, FormatError

MEL_TOLERANCE = 1e-4  # asked for; features lie in about [-1.5, 1.5]


def wav(numbers, width=2, channels=1, rate=8000):
    """Bytes of a WAV file by the standard library; one of 8 bits holds unsigned numbers."""
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        numbers = [n + 128 for n in numbers] if width == 1 else numbers
        file.writeframes(b"".join(n.to_bytes(width, "little", signed=width > 1) for n in numbers))
    return out.getvalue()


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_integers_of_every_width(tmp_path, width):
    top = 2 ** (8 * width - 1)
    numbers = [0, 1, -1, top - 1, -top, top // 2]
    (tmp_path / "a.wav").write_bytes(wav(numbers, width, channels=2, rate=11025))
    found = read_wav(tmp_path / "a.wav")
    assert found.rate == 11025 and found.samples.shape == (3, 2)
    wanted = (np.array(numbers).reshape(3, 2) / top).astype(np.float32)
    np.testing.assert_array_equal(found.samples, wanted)


def with_format(kind):
    """A file that says another encoding, behind a part that is none of the sound."""
    body = struct.pack("<HHIIHH", kind, 1, 8000, 32000, 4, 32)
    parts = b"LIST" + struct.pack("<I", 7) + b"fmt \3\0\0\0"
    parts += b"fmt " + struct.pack("<I", len(body)) + body
    parts += b"data" + struct.pack("<I", 8) + bytes(8)
    return b"RIFF" + struct.pack("<I", 4 + len(parts)) + b"WAVE" + parts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (with_format(3), r"samples are IEEE float \(format 3\); PCM"),
        (with_format(7), "samples are mu-law"),
        (with_format(0xFFFE), "samples are extensible"),
        (with_format(999), r"samples are unknown \(format 999\)"),
        (b"", "no WAV file"),
        (b"RIFX" + wav([1, 2])[4:], "no WAV file"),
        (wav([1, 2])[:30], "no WAV file"),
        (wav([1, 2])[:-1], "3 bytes of samples; its header says 4"),
        (wav([]), "there must be some"),
        (wav([0] * 65, channels=65), "65 channels"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, content, message):
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(FormatError, match=f"a.wav.*{message}"):
        read_wav(tmp_path / "a.wav")
    with pytest.raises(FFNLabError, match="no such file"):
        read_wav(tmp_path / "none.wav")


def test_a_part_before_the_encoding_is_passed_over(tmp_path):
    (tmp_path / "a.wav").write_bytes(with_format(1))
    np.testing.assert_array_equal(read_wav(tmp_path / "a.wav").samples, np.zeros((2, 1)))


FILES = {
    f"{digit}_{who}_{take}.wav": wav([digit, take, at])
    for digit in (0, 9)
    for at, who in enumerate(("zoe", "ann", "bob"))
    for take in (2, 10)
}


def archive(files, extra=()):
    """Bytes of a tar.gz of files, and of members without content; the same at any time."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as file:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
        for member in extra:
            file.addfile(member)
    return gzip.compress(out.getvalue(), mtime=0)


def test_an_archive_and_a_folder_are_read_alike(tmp_path):
    (tmp_path / "all.tar.gz").write_bytes(archive({"recordings/README": b"x"} | FILES))
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    (folder / "notes.txt").write_text("x")
    for path in (tmp_path / "all.tar.gz", folder):
        found = fsdd(path)
        assert found.names == ("ann", "bob", "zoe") and found.rate == 8000
        assert found.y.tolist() == [0] * 6 + [9] * 6
        assert found.speaker.tolist() == [0, 0, 1, 1, 2, 2] * 2
        assert found.take.tolist() == [2, 10] * 6
        for i, samples in enumerate(found.waves):
            who = ("zoe", "ann", "bob").index(found.names[found.speaker[i]])
            assert (samples * 2**15).tolist() == [found.y[i], found.take[i], who]


def test_speakers_are_in_one_part_alone(tmp_path):
    (tmp_path / "all.tar.gz").write_bytes(archive(FILES))
    found = fsdd(tmp_path / "all.tar.gz")
    train, test = found.by_speaker("zoe", "ann")
    assert train.speaker.tolist() == [1] * 4 and set(test.speaker.tolist()) == {0, 2}
    assert [w.tolist() for w in train.waves] == [found.waves[i].tolist() for i in (2, 3, 8, 9)]
    assert test.y.tolist() == [0] * 4 + [9] * 4 and test.take.tolist() == [2, 10] * 4
    for names in ((), ("eve",), ("zoe", "ann", "bob")):
        with pytest.raises(ConfigError, match="held_out"):
            found.by_speaker(*names)


def link(name, kind=tarfile.SYMTYPE):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "/etc/passwd"
    return member


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (archive({"one_ann_0.wav": wav([1])}), "is not DIGIT_SPEAKER_TAKE.wav"),
        (archive({"10_ann_0.wav": wav([1])}), "is not DIGIT_SPEAKER_TAKE.wav"),
        (archive({"a/1_ann_0.wav": wav([1]), "b/1_ann_0.wav": wav([1])}), "is there twice"),
        (archive({"1_ann_0.wav": wav([1, 2], channels=2)}), "has 2 channels"),
        (archive({"1_ann_0.wav": wav([1]), "1_ann_1.wav": wav([1], rate=9)}), r"\[9, 8000\] Hz"),
        (archive({"1_ann_0.wav": b"RIFF"}), "'1_ann_0.wav': no WAV file"),
        (archive({}), r"found \[\] Hz"),
        (archive({}, [link("1_ann_0.wav")]), "is no regular file"),
        (archive({}, [link("1_ann_0.wav", tarfile.LNKTYPE)]), "is no regular file"),
        (b"no gzip", "damaged archive"),
        (gzip.compress(b"no tar" * 200, mtime=0), "damaged archive"),
    ],
)
def test_other_archives_are_refused(tmp_path, content, message):
    (tmp_path / "all.tar.gz").write_bytes(content)
    with pytest.raises(FormatError, match=message):
        fsdd(tmp_path / "all.tar.gz")


def test_an_archive_is_unpacked_to_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("ffnlab.data.speech.SIZE_LIMIT", 100_000)
    path = tmp_path / "all.tar.gz"
    path.write_bytes(archive({"1_ann_0.wav": wav([0] * 60_000)}))
    assert path.stat().st_size < 1000
    with pytest.raises(FormatError, match="more than 100000 bytes when unpacked"):
        fsdd(path)
    (tmp_path / "1_ann_0.wav").write_bytes(wav([0] * 60_000))
    for read in (lambda: fsdd(tmp_path), lambda: read_wav(tmp_path / "1_ann_0.wav")):
        with pytest.raises(FormatError, match="more than 100000 bytes"):
            read()
    monkeypatch.setattr("ffnlab.data.speech.RECORDINGS_LIMIT", 3)
    path.write_bytes(archive(dict(list(FILES.items())[:4])))
    with pytest.raises(FormatError, match="more than 3 members"):
        fsdd(path)


def test_files_that_are_cut_or_flipped_are_refused_or_read(tmp_path):
    draw, path = random.Random(0), tmp_path / "all"
    whole = archive(dict(list(FILES.items())[:2]))
    cases = [(whole, fsdd), (gzip.decompress(whole), fsdd), (wav([1, -2, 3]), read_wav)]
    for content, read in cases:
        for _ in range(60):
            part = bytearray(
                content[: draw.randrange(len(content))] if draw.random() < 0.3 else content
            )
            for _ in range(bool(part)):
                # Mostly within the first header: the rest of a small archive is empty.
                at = draw.randrange(min(len(part), draw.choice([600, len(part)])))
                part[at] ^= 1 << draw.randrange(8)
            packed = read is fsdd and content is not whole
            path.write_bytes(gzip.compress(part) if packed else part)
            try:
                read(path)
            except FormatError as error:
                assert str(path) in str(error)


@pytest.mark.skipif(find_folder("fsdd") is None, reason="needs fsdd")
def test_the_real_digits():
    found = fsdd()
    assert found.names == ("george", "jackson", "lucas", "theo") and found.rate == 8000
    assert len(found.waves) == 1200 and np.bincount(found.y).tolist() == [120] * 10
    assert np.bincount(found.speaker).tolist() == [300] * 4 and found.take.max() == 29
    seconds = np.array([len(w) for w in found.waves]) / found.rate
    assert 0.1 < seconds.min() and seconds.max() < 3 and 0.2 < np.median(seconds) < 0.7
    assert max(abs(w).max() for w in found.waves) <= 1


@settings(max_examples=20)
@given(st.integers(1, 500), st.sampled_from([8000, 11025, 16000]), st.sampled_from([8000, 16000]))
def test_length_at_another_rate(count, rate, to):
    found = resampled(np.ones(count, np.float32), rate, to)
    assert len(found) == math.ceil(count * to / rate) and found.dtype == np.float32


@pytest.mark.parametrize(("rate", "to"), [(8000, 16000), (44100, 16000), (16000, 16000)])
def test_tones_stay_and_those_beyond_are_cut(rate, to):
    tone = lambda at, f: np.sin(2 * np.pi * f * np.arange(at) / at)  # noqa: E731
    middle = slice(to // 10, -to // 10)  # without the ends, where the sound begins and stops
    both = np.stack([tone(rate, 1000), 0.5 * tone(rate, 300)], -1)
    found = resampled(both, rate, to)
    assert found.shape == (to, 2)
    # The filter's pass band ripples by some thousandths (a Kaiser window of beta 5).
    np.testing.assert_allclose(found[middle, 0], tone(to, 1000)[middle], atol=5e-3)
    np.testing.assert_allclose(found[middle, 1], 0.5 * tone(to, 300)[middle], atol=5e-3)
    if rate > to:
        assert abs(resampled(tone(rate, 12_000), rate, to)[middle]).max() < 5e-3


def test_rates_that_are_none():
    one = np.ones(3, np.float32)
    for samples, rate, to in ((one[:0], 8000, 16000), (one, 0, 1), (one, 1, 0), (one, 1, 10_001)):
        with pytest.raises(ConfigError, match="samples|rate|to"):
            resampled(samples, rate, to)


@pytest.fixture(scope="module")
def recorded(fixtures):
    """The recipe's module and what it recorded."""
    path = fixtures / "log_mel" / "record.py"
    spec = importlib.util.spec_from_file_location("record_log_mel", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with np.load(path.with_name("expected.npz")) as found:
        return module, dict(found)


@pytest.mark.parametrize("name", ["full", "short", "cut", "long"])
def test_log_mel_are_those_of_transformers(recorded, name):
    module, expected = recorded
    count, seconds, bands = module.CASES.get(name, module.LONG)
    found = log_mel(module.sound(count), seconds=seconds, bands=bands)
    assert found.shape == (100 * seconds, bands) and found.dtype == np.float32
    found = found[:: module.EVERY] if name == "long" else found
    np.testing.assert_allclose(found, expected[name], rtol=0, atol=MEL_TOLERANCE)


def test_sounds_that_are_none():
    one = np.ones(3, np.float32)
    with pytest.raises(ConfigError, match="samples"):
        log_mel(one[:0])
    with pytest.raises(ConfigError, match="finite"):
        log_mel(one * np.nan)
    for options in ({"seconds": 0}, {"bands": 0}):
        with pytest.raises(ConfigError, match="=0"):
            log_mel(one, **options)
