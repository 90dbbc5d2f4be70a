"""ResNets of CIFAR from npz files: logits of the original class (recorded), and damaged files."""

import numpy as np
import pytest

from ffnlab.errors import FormatError
from ffnlab.formats import load_resnet
from tests.fixtures.resnet_cifar10.record import FILES, images

TOLERANCE = 1e-4  # float32 through 20 and 56 layers; logits of order 10


@pytest.mark.parametrize("name", FILES)
def test_logits_of_the_original_class(name, fixtures, data):
    file = data / "resnet_cifar10" / FILES[name]
    if not file.is_file():
        pytest.skip(f"no weights at {file}")
    want = np.load(fixtures / "resnet_cifar10" / "expected.npz", allow_pickle=False)[name]
    assert np.abs(np.asarray(load_resnet(file)(images())) - want).max() < TOLERANCE


def written(tmp_path, **changes):
    """A file of a network of one block in each stage, with other or missing arrays."""
    arrays = {"conv1.weight": np.zeros((16, 3, 3, 3), np.float32)}
    norms = {"bn1": 16}
    before = 16
    for stage, width in ((1, 16), (2, 32), (3, 64)):
        head = f"layer{stage}.0"
        arrays[f"{head}.conv1.weight"] = np.zeros((width, before, 3, 3), np.float32)
        arrays[f"{head}.conv2.weight"] = np.zeros((width, width, 3, 3), np.float32)
        norms |= {f"{head}.bn1": width, f"{head}.bn2": width}
        before = width
    for name, width in norms.items():
        for end in ("weight", "bias", "running_mean", "running_var"):
            arrays[f"{name}.{end}"] = np.ones(width, np.float32)
    arrays |= {"linear.weight": np.zeros((10, 64)), "linear.bias": np.arange(10)}
    arrays |= changes
    kept = {
        name: a if name in changes else np.asarray(a, np.float32)
        for name, a in arrays.items()
        if a is not None
    }
    np.savez(tmp_path / "net.npz", **kept)
    return tmp_path / "net.npz"


def test_a_small_file(tmp_path):
    model = load_resnet(written(tmp_path))
    assert model.config.blocks == (1, 1, 1)
    np.testing.assert_allclose(model(images()), np.arange(10)[None].repeat(2, 0), atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"linear.bias": None}, "cannot be read: .*linear.bias"),
        ({"fc.bias": np.zeros(3, np.float32)}, "fc.bias.npy is not part of the model"),
        ({"bn1.bias": np.zeros(15, np.float32)}, r"bn1.bias.npy has float32\[15\]"),
        ({"bn1.bias": np.zeros(16)}, r"bn1.bias.npy has float64\[16\]"),
        ({"bn1.bias": np.full(16, np.nan, np.float32)}, "bn1.bias holds NaN"),
        ({"layer2.0.conv1.weight": None}, r"no ResNet of three stages; it has \(1, 0, 1\)"),
        ({"bn1.bias": np.array([None] * 16)}, "bn1.bias.npy has object"),
    ],
)
def test_damaged_files(tmp_path, changes, told):
    with pytest.raises(FormatError, match=told):
        load_resnet(written(tmp_path, **changes))


def test_what_is_no_npz(tmp_path):
    (tmp_path / "net.npz").write_bytes(b"PK nothing")
    with pytest.raises(FormatError, match="cannot be read"):
        load_resnet(tmp_path / "net.npz")
    with pytest.raises(FileNotFoundError):
        load_resnet(tmp_path / "none.npz")
