"""ResNets of CIFAR from npz files with the names of torch's parameters, nothing unpickled.

The names are those of the networks of n basic blocks in three stages (ResNet-20, 32, 44, 56, 110)
that `akamaster/pytorch_resnet_cifar10` trained: `conv1.weight` [out, in, 3, 3], `bn1.*`,
`layer{1,2,3}.{i}.{conv,bn}{1,2}.*`, `linear.*`.
"""

import re
import zipfile
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ffnlab import tree
from ffnlab.errors import FormatError, first_line
from ffnlab.layers import BatchNorm, Conv, Linear
from ffnlab.models.resnet import ResNet, ResNetConfig
from ffnlab.models.vit_config import ImageInput
from ffnlab.storage.files import StrPath
from ffnlab.storage.npz import READ_ERRORS, read_member
from ffnlab.weights import Dense

__all__ = ["load_resnet"]

BLOCK = re.compile(r"layer([123])\.(\d{1,3})\.conv1\.weight\.npy")
WIDTHS = (16, 32, 64)
CIFAR = ImageInput((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
STATISTICS = {"scale": "weight", "bias": "bias", "mean": "running_mean", "variance": "running_var"}


def load_resnet(file: StrPath, *, classes: int = 10) -> ResNet:
    """Loads a ResNet of CIFAR; it takes values in [0, 1] or bytes and does the rest itself.

    Args:
      file: npz of float32 arrays by the names of torch's parameters.
      classes: how many scores.
    Raises:
      FormatError: damaged, not all of a ResNet of three stages, or more than that; arrays of
        another shape or dtype, or that are not finite.
      FileNotFoundError: there is no such file.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = set(archive.namelist())
            model = jax.eval_shape(
                lambda key: ResNet(config_of(members, file, classes), key=key), jax.random.key(0)
            )
            wanted = dict(names(model))
            unknown = sorted(members - {f"{name}.npy" for name, _ in wanted.values()})
            if unknown:
                raise FormatError(f"{file}: {unknown[0]} is not part of the model")
            read = {
                path: parameter(archive, name, variable)
                for path, (name, variable) in wanted.items()
            }
    except READ_ERRORS as error:
        if isinstance(error, FormatError | FileNotFoundError):
            raise
        raise FormatError(f"{file} cannot be read: {first_line(error)}") from None
    return tree.replace(model, read)


def config_of(members: set[str], file: StrPath, classes: int) -> ResNetConfig:
    """What the names in a file say of its blocks."""
    found = [BLOCK.fullmatch(name) for name in members]
    pairs = [(int(m[1]), int(m[2])) for m in found if m is not None]
    counts = tuple(sum(stage == s for stage, _ in pairs) for s in (1, 2, 3))
    if 0 in counts:
        raise FormatError(f"{file}: no ResNet of three stages; it has {counts} blocks in them")
    return ResNetConfig(counts, WIDTHS, classes, preprocess=CIFAR)


def names(model: ResNet) -> Iterator[tuple[str, tuple[str, nnx.Variable]]]:
    """(path, (name in the file, variable)) of every parameter and statistic."""
    for path, node in tree.walk(model):
        if isinstance(node, Conv):
            yield f"{path}.w", (f"{name_of(path, model)}.weight", node.w)
        elif isinstance(node, BatchNorm):
            for own, theirs in STATISTICS.items():
                yield f"{path}.{own}", (f"{name_of(path, model)}.{theirs}", getattr(node, own))
        elif isinstance(node, Linear):
            yield "head.w", ("linear.weight", node.w)
            if node.b is not None:
                yield "head.b", ("linear.bias", node.b)


def name_of(path: str, model: ResNet) -> str:
    """What torch calls the convolution or norm at a path."""
    kind = "conv" if path.endswith("conv") else "bn"
    block = re.match(r"residuals\[(\d+)\]\.(spatial|expand)", path)
    if block is None:
        return f"{kind}1"
    number, stage = int(block[1]), 0
    while number >= model.config.blocks[stage]:
        number, stage = number - model.config.blocks[stage], stage + 1
    return f"layer{stage + 1}.{number}.{kind}{1 if block[2] == 'spatial' else 2}"


def parameter(archive: zipfile.ZipFile, name: str, variable: nnx.Variable) -> nnx.Variable:
    """A variable with the values of a file; a kernel [out, in, 3, 3] becomes [9 in, out]."""
    value = variable.get_value()
    shape = tuple(value.shape)
    is_kernel, is_matrix = name.split(".")[-2].startswith("conv"), len(shape) == 2
    stored = (shape[1], shape[0] // 9, 3, 3) if is_kernel else shape[::-1]
    array = read_member(archive, name, stored, np.dtype(np.float32))
    if not np.isfinite(array).all():
        raise FormatError(f"{archive.filename}: {name} holds NaN or infinity")
    if is_kernel:
        array = array.transpose(2, 3, 1, 0).reshape(shape)
    elif is_matrix:
        array = array.T
    placed = jnp.asarray(array)
    return variable.replace(Dense(placed) if is_matrix else placed)
