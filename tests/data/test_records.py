"""Records by position: Grain over lists, TFDS datasets, folders of images, IDX files."""

import gzip
import os
import struct
import tracemalloc
import zlib

import numpy as np
import pytest

from ffnlab.data import (
    ArrayBatches,
    ImageFolder,
    PackedBatches,
    RecordBatches,
    TextBatches,
    mnist,
    mnist_folder,
    read_idx,
    tfds_records,
)
from ffnlab.data.text.packing import checked_position
from ffnlab.errors import FFNLabError, FormatError
from tests.damaging import damaged

RECORDS = [{"x": np.full(3, i, np.float32), "y": np.int32(i)} for i in range(20)]


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_threads_and_where_a_run_resumed_change_nothing(threads):
    plain = RecordBatches(RECORDS, 6, seed=3, threads=0)
    straight = [plain(position)["y"] for position in range(9)]
    batches = RecordBatches(RECORDS, 6, seed=3, threads=threads)
    for position in (0, 1, 2, 7, 8, 3, 3, 4):
        found = batches(position)
        np.testing.assert_array_equal(found["y"], straight[position])
        np.testing.assert_array_equal(found["x"], np.repeat(found["y"][:, None], 3, 1))
    order = np.concatenate(straight)[:40].reshape(2, 20)
    np.testing.assert_array_equal(np.sort(order, axis=1), [np.arange(20)] * 2)  # epochs
    assert not np.array_equal(order[0], order[1])
    assert not np.array_equal(RecordBatches(RECORDS, 6, seed=4)(0)["y"], straight[0])


def test_parts_are_the_rows_of_the_whole():
    batches = RecordBatches(RECORDS, 6, seed=1)
    for position in (0, 1, 5):
        parts = [batches.part(index, 3)(position)["y"] for index in range(3)]
        np.testing.assert_array_equal(np.concatenate(parts), batches(position)["y"])
    with pytest.raises(FFNLabError, match="batch=6 does not divide into 4"):
        batches.part(0, 4)


class Damaged(list):
    """A list whose record 4 is gone."""

    def __getitem__(self, index):
        if index == 4:
            raise OSError("checksum does not match")
        return super().__getitem__(index)


@pytest.mark.parametrize("threads", [0, 2])
def test_bad_records_are_named(threads):
    damaged = RecordBatches(Damaged(RECORDS), 20, threads=threads, name="the archive")
    with pytest.raises(FFNLabError, match="record 4 of the archive cannot be read: checksum"):
        damaged(0)
    odd = [*RECORDS[:7], {"x": np.zeros(4, np.float32), "y": np.int32(1)}]
    with pytest.raises(FFNLabError, match=r"record 7 of .* float32\[4\].*, unlike record 0"):
        RecordBatches(odd, 8, threads=threads)(0)


@pytest.mark.parametrize("threads", [0, 4])
@pytest.mark.parametrize(
    "record", [None, {}, object(), {"x": object()}], ids=["none", "empty", "object", "of objects"]
)
def test_records_that_hold_nothing_are_named(threads, record):
    """Grain takes None for a record that was filtered out, and looks for the next for ever."""
    for records in ([record] * 8, [*RECORDS[:7], record]):
        with pytest.raises(FFNLabError, match=r"record \d of the list is .*a tree of arrays"):
            RecordBatches(records, 8, threads=threads, name="the list")(0)
    emptied = RecordBatches(RECORDS, 4, threads=threads, transform=lambda record: None)
    with pytest.raises(FFNLabError, match="record .* is None; a tree of arrays"):
        emptied(0)


class Bomb:
    """No array can be made of it."""

    def __array__(self, *args, **options):
        raise RuntimeError("no array")


def test_what_numpy_cannot_take_is_named():
    with pytest.raises(FFNLabError, match=r"record \d of .* cannot be read: no array"):
        RecordBatches([*RECORDS[:7], Bomb()], 8)(0)


@pytest.mark.parametrize("position", [1.5, "1", None])
def test_positions_are_integers(position):
    with pytest.raises(FFNLabError, match="position=.* must be an integer of at least 0"):
        checked_position(position)
    assert checked_position(np.int64(7)) == 7


@pytest.mark.parametrize("position", [-1, -(2**70)])
def test_positions_are_not_negative(position):
    tokens = np.arange(100)
    for batches in (
        RecordBatches(RECORDS, 4),
        RecordBatches(RECORDS, 4, threads=0),
        ArrayBatches(np.arange(20), 4),
        TextBatches(tokens, 4, 8),
        PackedBatches([tokens], 4, 8),
    ):
        for call in (batches, *([batches.part(0, 2)] if hasattr(batches, "part") else [])):
            with pytest.raises(FFNLabError, match="position=.* must be an integer of at least 0"):
                call(position)


def test_grain_has_nothing_to_warn_of(caplog):
    for threads in (1, 4, 9):
        RecordBatches(RECORDS, 4, threads=threads)(0)
    assert not caplog.records


def test_transforms_and_bad_arguments():
    doubled = RecordBatches(RECORDS, 4, transform=lambda r: 2 * r["y"])
    np.testing.assert_array_equal(doubled(0), 2 * RecordBatches(RECORDS, 4)(0)["y"])
    with pytest.raises(FFNLabError, match="batch=0 must be at least 1"):
        RecordBatches(RECORDS, 0)
    with pytest.raises(FFNLabError, match="nothing has no records"):
        RecordBatches([], 2, name="nothing")


@pytest.fixture(scope="module")
def digits_dataset(tmp_path_factory):
    """scikit-learn's digits as a TFDS dataset on disk: (folder of the version, images, labels)."""
    tfds = pytest.importorskip("tensorflow_datasets", reason="needs the extra 'data'")
    from sklearn.datasets import load_digits

    images, labels = (load_digits()[name][:60].astype(np.uint8) for name in ("images", "target"))

    class Handwriting(tfds.core.GeneratorBasedBuilder):
        """Small digits."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Tensor(shape=(8, 8), dtype=np.uint8),
                "label": tfds.features.ClassLabel(num_classes=10),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {
                "train": self._generate_examples(0, 50),
                "test": self._generate_examples(50, 60),
            }

        def _generate_examples(self, low, high):
            for i in range(low, high):
                yield i, {"image": images[i], "label": labels[i]}

    folder = tmp_path_factory.mktemp("tfds")
    builder = Handwriting(data_dir=str(folder), file_format="array_record")
    builder.download_and_prepare()
    return folder / "handwriting" / "1.0.0", images, labels


def test_a_tfds_dataset_is_read_back(digits_dataset):
    folder, images, labels = digits_dataset
    train, test = tfds_records(folder), tfds_records(str(folder), "test")
    assert (len(train), len(test)) == (50, 10)
    known = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    batch = RecordBatches(train, 50, seed=2)(0)
    assert batch["image"].shape == (50, 8, 8) and batch["image"].dtype == np.uint8
    assert len({image.tobytes() for image in batch["image"]}) == len(set(map(bytes, images[:50])))
    for image, label in zip(batch["image"], batch["label"], strict=True):
        assert known[image.tobytes()] == label
    assert len(tfds_records(folder, "train[:20%]")) == 10


def test_bad_tfds_datasets_are_refused(digits_dataset, tmp_path):
    folder, *_ = digits_dataset
    with pytest.raises(FFNLabError, match="split='validation'.*there are 'train', 'test'"):
        tfds_records(folder, "validation")
    with pytest.raises(FFNLabError, match="is no prepared TFDS dataset"):
        tfds_records(tmp_path)
    with pytest.raises(FFNLabError, match="dataset='no_such_dataset' is unknown to TFDS"):
        tfds_records("no_such_dataset", data_dir=tmp_path)
    with pytest.raises(FFNLabError, match="mnist.* is not prepared in"):
        tfds_records("mnist", data_dir=tmp_path)


@pytest.fixture
def pictures(tmp_path):
    """A folder of three images in two classes."""
    image = pytest.importorskip("PIL.Image", reason="needs the extra 'data'")
    for name, value in (("cat/a.png", 10), ("cat/deep/b.png", 20), ("dog/c.png", 30)):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.fromarray(np.full((6, 4, 3), value, np.uint8)).save(path)
    (tmp_path / "dog" / "notes.txt").write_text("not an image")
    return tmp_path


def test_images_in_folders(pictures):
    folder = ImageFolder(pictures, (6, 4))
    assert folder.classes == ["cat", "dog"] and len(folder) == 3
    for index, (value, label) in enumerate([(10, 0), (20, 0), (30, 1)]):
        record = folder[index]
        np.testing.assert_array_equal(record["image"], np.full((6, 4, 3), value, np.uint8))
        assert record["label"] == label and record["label"].dtype == np.int32
    small = ImageFolder(pictures, (2, 3), mode="L")[2]["image"]
    assert small.shape == (2, 3, 1) and (small == 30).all()
    assert RecordBatches(folder, 3)(0)["image"].shape == (3, 6, 4, 3)


def test_bad_images_are_named(pictures):
    whole = (pictures / "dog" / "c.png").read_bytes()
    (pictures / "dog" / "c.png").write_bytes(whole[: len(whole) // 2])
    (pictures / "cat" / "a.png").write_text("no image at all")
    folder = ImageFolder(pictures, (6, 4))
    for index, name in ((0, "a.png"), (2, "c.png")):
        with pytest.raises(FormatError, match=name):
            folder[index]
    with pytest.raises(FFNLabError, match=r"record \d of the pets cannot be read: .*(a|c).png"):
        RecordBatches(folder, 3, name="the pets")(0)
    with pytest.raises(FFNLabError, match="has no images"):
        ImageFolder(pictures / "dog", (6, 4))
    with pytest.raises(FFNLabError, match="mode='CMYK'"):
        ImageFolder(pictures, (6, 4), mode="CMYK")


def png(width, height):
    """The smallest PNG file that says this size; its pixels are missing."""
    chunks = [(b"IHDR", struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("size", [(50_000, 50_000), (10_000, 10_000), (8193, 8192)])
def test_images_of_absurd_size_are_named(pictures, size):
    (pictures / "cat" / "a.png").write_bytes(png(*size))
    with pytest.raises(FormatError, match=r"a\.png: .*pixels"):
        ImageFolder(pictures, (6, 4))[0]


def test_pipes_and_devices_are_no_files(pictures):
    os.mkfifo(pictures / "dog" / "pipe.png")
    (pictures / "dog" / "zero.png").symlink_to("/dev/zero")
    folder = ImageFolder(pictures, (6, 4))
    names = [path.name for path, _ in folder.files]
    for name in ("pipe.png", "zero.png"):
        with pytest.raises(FormatError, match=f"{name}: there is no such regular file"):
            folder[names.index(name)]
        with pytest.raises(FormatError, match=f"{name}: there is no such regular file"):
            read_idx(pictures / "dog" / name)
    os.mkfifo(pictures / "dataset_info.json")
    pytest.importorskip("tensorflow_datasets", reason="needs the extra 'data'")
    with pytest.raises(FFNLabError, match="is no prepared TFDS dataset"):
        tfds_records(pictures)


def test_idx_files_that_unpack_without_end(tmp_path):
    file = tmp_path / "bomb"
    head = b"\0\0\x08\x01" + struct.pack(">I", 10)
    file.write_bytes(gzip.compress(head + bytes(200 << 20), 1))
    tracemalloc.start()
    with pytest.raises(FormatError, match=r"says \(10,\) of 1 bytes each and holds more than 10"):
        read_idx(file)
    assert tracemalloc.get_traced_memory()[1] < 5 << 20
    tracemalloc.stop()
    sides = struct.pack(">2I", 2**31, 2**31)
    file.write_bytes(gzip.compress(b"\0\0\x08\x02" + sides + bytes(100)))
    with pytest.raises(FormatError, match="holds 100 bytes"):
        read_idx(file)
    file.write_bytes(b"\0\0\x08\x46" + bytes(4 * 70))
    with pytest.raises(FormatError, match="has 70 axes; at most 8"):
        read_idx(file)


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files(tmp_path, packed):
    array = np.arange(-6, 6, dtype=np.int32).reshape(2, 3, 2)
    data = b"\0\0\x0c\x03" + struct.pack(">3I", 2, 3, 2) + array.astype(">i4").tobytes()
    file = tmp_path / "numbers"
    file.write_bytes(gzip.compress(data) if packed else data)
    found = read_idx(file)
    np.testing.assert_array_equal(found, array)
    assert found.dtype == np.int32 and found.dtype.isnative
    for bad, message in (
        (b"\0\0\x0c\x03" + data[4:10], "ends within its header"),
        (data[:-1], "says \\(2, 3, 2\\) of 4 bytes each and holds 47 bytes"),
        (b"PNG" + data, "is no IDX file: it begins with 504e4700"),
        (gzip.compress(data, mtime=0)[:-9], "damaged gzip"),
        (b"", "begins with nothing"),
    ):
        file.write_bytes(bad)
        with pytest.raises(FormatError, match=message):
            read_idx(file)


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_that_are_cut_or_flipped_are_refused_or_read(tmp_path, packed):
    whole = b"\0\0\x0b\x02" + struct.pack(">2I", 2, 3) + np.arange(6, dtype=">i2").tobytes()
    file = tmp_path / "numbers"
    for content in damaged(gzip.compress(whole) if packed else whole, 100):
        file.write_bytes(content)
        try:
            assert read_idx(file).nbytes <= len(whole)
        except FormatError as error:
            assert str(file) in str(error)


@pytest.fixture
def small_mnist(tmp_path):
    """Three images to train on, two to test on."""
    for prefix, n in (("train", 3), ("t10k", 2)):
        images = np.arange(n * 4, dtype=np.uint8).reshape(n, 2, 2)
        head = b"\0\0\x08\x03" + struct.pack(">3I", *images.shape)
        (tmp_path / f"{prefix}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        head = b"\0\0\x08\x01" + struct.pack(">I", n)
        packed = gzip.compress(head + bytes(range(n)))
        (tmp_path / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(packed)
    return tmp_path


def test_mnist_files(small_mnist, monkeypatch):
    train, test = mnist(small_mnist)
    assert train.x.shape == (3, 4) and test.y.tolist() == [0, 1]
    np.testing.assert_allclose(train.x[1], np.array([4, 5, 6, 7]) / 255, rtol=1e-6)
    (small_mnist / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FFNLabError, match=r"has no IDX file t10k\*labels\*"):
        mnist(small_mnist)
    head = b"\0\0\x08\x01" + struct.pack(">I", 1)
    (small_mnist / "t10k-labels-idx1-ubyte").write_bytes(head + b"\1")
    with pytest.raises(FormatError, match=r"images \(2, 2, 2\) and labels \(1,\)"):
        mnist(small_mnist)
    monkeypatch.delenv("FFNLAB_DATA", raising=False)
    assert mnist_folder() is None
    with pytest.raises(FFNLabError, match="data 'mnist': FFNLAB_DATA is not set"):
        mnist()


def test_mnist_is_what_it_is(data):
    train, test = mnist(data / "mnist")
    assert train.x.shape == (60000, 784) and test.x.shape == (5000, 784)
    assert test.y[:5].tolist() == [7, 2, 1, 0, 4] and train.x.max() == 1
