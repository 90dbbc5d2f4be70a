"""Images: folders with one subfolder per class, and the IDX files of MNIST and its relatives."""

import gzip
import io
import math
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from ffnlab.errors import FFNLabError, FormatError, require

__all__ = ["ImageFolder", "read_idx"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
MOST_PIXELS = 2**26  # of an image file, 8192 x 8192: a small file may unpack to gigabytes
MOST_UNPACKED = 2**32  # bytes of a gzipped IDX file
MOST_AXES = 8
IDX_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


class ImageFolder:
    """Records {"image", "label"} of the image files in a folder's subfolders, one per class.

    Attributes:
      classes: names of the subfolders, sorted; a label is an index into them.
      files: (path, label) of every image, sorted.
      size: (height, width) of the images as returned.
      mode: "RGB" or "L".
      resize: (height, width) that files are resized to.
      resample: "bilinear" or "bicubic".
    """

    def __init__(
        self,
        folder: str | Path,
        size: tuple[int, int],
        *,
        mode: str = "RGB",
        resize: tuple[int, int] | None = None,
        resample: str = "bilinear",
    ):
        """Lists the files; none is opened.

        Args:
          folder: holds one subfolder per class.
          size: (height, width) of the images.
          mode: "RGB" for three channels, "L" for one.
          resize: (height, width) that images are resized to (antialiased), of which the middle is
            cut out; `size` when None.
          resample: "bilinear" or "bicubic".
        Raises:
          FFNLabError: no such folder, no images in it, or a bad size, mode or resampling.
          MissingExtraError: Pillow is not installed.
        """
        require("PIL.Image", extra="data")
        if mode not in ("RGB", "L") or min(size) < 1:
            raise FFNLabError(f"mode={mode!r} must be 'RGB' or 'L', size={size} at least (1, 1)")
        resize = size if resize is None else resize
        if resample not in ("bilinear", "bicubic") or min(np.subtract(resize, size)) < 0:
            raise FFNLabError(
                f"resize={resize} must not be smaller than size={size}, resample={resample!r} one "
                "of 'bilinear', 'bicubic'"
            )
        root = Path(folder)
        found = sorted(p for p in root.glob("*/**/*") if p.suffix.lower() in SUFFIXES)
        if not found:
            raise FFNLabError(f"{root} has no images ({', '.join(SUFFIXES)}) in subfolders")
        self.classes = sorted({path.relative_to(root).parts[0] for path in found})
        labels = {name: i for i, name in enumerate(self.classes)}
        self.files = [(path, labels[path.relative_to(root).parts[0]]) for path in found]
        self.size, self.mode = size, mode
        self.resize, self.resample = resize, resample

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """{"image": [h, w, 3 or 1] uint8, "label": [] int32}.

        Raises:
          FormatError: the file is damaged, no image or no regular file, or has more than
            `MOST_PIXELS` pixels; it is named.
        """
        pil = require("PIL.Image", extra="data")
        bombs = pil.DecompressionBombError, pil.DecompressionBombWarning
        path, label = self.files[index]
        check_regular(path)
        try:
            with pil.open(path) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise OSError(f"{image.width} x {image.height} pixels; {MOST_PIXELS} are read")
                height, width = self.resize
                pixels = image.convert(self.mode)
                if pixels.size != (width, height):
                    how = getattr(pil.Resampling, self.resample.upper())
                    pixels = pixels.resize((width, height), how)
                array = middle(np.asarray(pixels).reshape(height, width, -1), self.size)
        except (OSError, SyntaxError, *bombs) as error:
            raise FormatError(f"{path}: {error}") from error
        return {"image": array, "label": np.int32(label)}


def middle(image: Shaped[np.ndarray, "h w c"], size: tuple[int, int]) -> np.ndarray:
    """The middle of an image, (height, width) `size`."""
    top, left = ((n - m) // 2 for n, m in zip(image.shape[:2], size, strict=True))
    return image[top : top + size[0], left : left + size[1]]


def check_regular(path: Path) -> None:
    """Raises FormatError unless a path is a regular file: a pipe or a device may never end."""
    if not path.is_file():
        raise FormatError(f"{path}: there is no such regular file")


def read_idx(path: str | Path) -> Shaped[np.ndarray, "..."]:
    """Reads an IDX file, the format of MNIST, plain or gzipped.

    Args:
      path: the file, for instance train-images-idx3-ubyte.gz.
    Returns:
      the array, of its own shape, in native byte order.
    Raises:
      FormatError: not a regular file, not an IDX file, damaged, of another length than it says, of
        more than `MOST_AXES` axes, or gzipped and of more than `MOST_UNPACKED` bytes.
    """
    path = Path(path)
    check_regular(path)
    with open(path, "rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        if not packed:
            return _idx(path, raw, path.stat().st_size)
        try:
            with gzip.open(raw) as unpacked:
                return _idx(path, unpacked, MOST_UNPACKED)
        except (OSError, EOFError, zlib.error) as error:
            raise FormatError(f"{path}: damaged gzip file: {error}") from error


def _idx(path: Path, file: io.BufferedIOBase, limit: int) -> Shaped[np.ndarray, "..."]:
    """The array in an open file of which at most `limit` bytes are read."""
    head = file.read(4)
    if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in IDX_DTYPES:
        raise FormatError(f"{path} is no IDX file: it begins with {head.hex() or 'nothing'}")
    dtype, rank = np.dtype(IDX_DTYPES[head[2]]), head[3]
    if rank > MOST_AXES:
        raise FormatError(f"{path} has {rank} axes; at most {MOST_AXES} are read")
    sides = file.read(4 * rank)
    if len(sides) < 4 * rank:
        raise FormatError(f"{path} ends within its header")
    shape = tuple(int(n) for n in np.frombuffer(sides, ">u4"))
    said = math.prod(shape) * dtype.itemsize
    most = limit - 4 - 4 * rank
    body = file.read(min(said, most) + 1)
    if len(body) != said:
        held = f"more than {min(said, most)}" if len(body) > min(said, most) else len(body)
        raise FormatError(
            f"{path} says {shape} of {dtype.itemsize} bytes each and holds {held} bytes"
        )
    return np.frombuffer(body, dtype).reshape(shape).astype(dtype.newbyteorder("="))
