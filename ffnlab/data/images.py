"""Images: folders with one subfolder per class, and the IDX files of MNIST and its relatives."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from ffnlab.errors import FFNLabError, FormatError, require

__all__ = ["ImageFolder", "read_idx"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
IDX_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


class ImageFolder:
    """Records {"image", "label"} of the image files in a folder's subfolders, one per class.

    Attributes:
      classes: names of the subfolders, sorted; a label is an index into them.
      files: (path, label) of every image, sorted.
      size: (height, width) of the images as returned.
      mode: "RGB" or "L".
    """

    def __init__(self, folder: str | Path, size: tuple[int, int], *, mode: str = "RGB"):
        """Lists the files; none is opened.

        Args:
          folder: holds one subfolder per class.
          size: (height, width) that images are resized to (bilinear, antialiased).
          mode: "RGB" for three channels, "L" for one.
        Raises:
          FFNLabError: no such folder, no images in it, or a bad size or mode.
          MissingExtraError: Pillow is not installed.
        """
        require("PIL.Image", extra="data")
        if mode not in ("RGB", "L") or min(size) < 1:
            raise FFNLabError(f"mode={mode!r} must be 'RGB' or 'L', size={size} at least (1, 1)")
        root = Path(folder)
        found = sorted(p for p in root.glob("*/**/*") if p.suffix.lower() in SUFFIXES)
        if not found:
            raise FFNLabError(f"{root} has no images ({', '.join(SUFFIXES)}) in subfolders")
        self.classes = sorted({path.relative_to(root).parts[0] for path in found})
        labels = {name: i for i, name in enumerate(self.classes)}
        self.files = [(path, labels[path.relative_to(root).parts[0]]) for path in found]
        self.size, self.mode = size, mode

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """{"image": [h, w, 3 or 1] uint8, "label": [] int32}.

        Raises:
          FormatError: the file is damaged or no image; it is named.
        """
        pil = require("PIL.Image", extra="data")
        path, label = self.files[index]
        try:
            with pil.open(path) as image:
                height, width = self.size
                pixels = image.convert(self.mode)
                if pixels.size != (width, height):
                    pixels = pixels.resize((width, height), pil.Resampling.BILINEAR)
                array = np.asarray(pixels).reshape(height, width, -1)
        except (OSError, SyntaxError, pil.DecompressionBombError) as error:
            raise FormatError(f"{path}: {error}") from error
        return {"image": array, "label": np.int32(label)}


def read_idx(path: str | Path) -> Shaped[np.ndarray, "..."]:
    """Reads an IDX file, the format of MNIST, plain or gzipped.

    Args:
      path: the file, for instance train-images-idx3-ubyte.gz.
    Returns:
      the array, of its own shape, in native byte order.
    Raises:
      FormatError: not an IDX file, damaged, or of another length than it says.
    """
    raw = Path(path).read_bytes()
    try:
        data = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise FormatError(f"{path}: damaged gzip file: {error}") from error
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in IDX_DTYPES:
        raise FormatError(f"{path} is no IDX file: it begins with {data[:4].hex() or 'nothing'}")
    dtype, rank = np.dtype(IDX_DTYPES[data[2]]), data[3]
    if len(data) < 4 + 4 * rank:
        raise FormatError(f"{path} ends within its header")
    shape = tuple(int(n) for n in np.frombuffer(data, ">u4", rank, 4))
    body = len(data) - 4 - 4 * rank
    if body != math.prod(shape) * dtype.itemsize:
        raise FormatError(
            f"{path} says {shape} of {dtype.itemsize} bytes each and holds {body} bytes"
        )
    array = np.frombuffer(data, dtype, offset=4 + 4 * rank).reshape(shape)
    return array.astype(dtype.newbyteorder("="))
