"""Weights of the official S-Mamba, by the names of their parameters.

`wzhwzhwzh0921/S-D-Mamba` keeps its state as torch does; saved as safetensors (`safetensors.torch
.save_file(model.state_dict(), …)`), its parameters have the names below. Each of its layers holds
two more Mamba layers and one of attention that nothing runs through; they are passed over.
"""

import jax

from ffnlab.formats.named_tensors import Named, Source, filled, matrix, of_linear, opened
from ffnlab.models.s_mamba import SMamba, SMambaConfig
from ffnlab.storage.files import StrPath

__all__ = ["load_s_mamba"]

MAMBAS = {"forward": "attention", "reverse": "attention_r"}
NORMS = {"mixing_norm": "norm1", "time_norm": "norm2"}
UNUSED = ("man", "man2", "a")


def load_s_mamba(file: StrPath, config: SMambaConfig) -> SMamba:
    """Loads official weights.

    Args:
      file: safetensors of float32.
      config: of the model; the authors have taps 2 and expand 1.
    Raises:
      FormatError: no such file, a damaged one, or not all of the model, or more than that.
    """
    source = opened(file)
    model = jax.eval_shape(lambda key: SMamba(config, key=key), jax.random.key(0))
    model = filled(model, of_all(source, model))
    layers = range(config.layers)
    unused = [f"encoder.attn_layers.{i}.{part}." for i in layers for part in UNUSED]
    source.check_all_taken([n for n in source.arrays if n.startswith(tuple(unused))])
    return model


def of_all(source: Source, model: SMamba) -> Named:
    """(path, value) of every parameter."""
    config = model.config
    length, width, hidden, horizon = config.length, config.width, config.hidden, config.horizon
    yield from of_linear(source, "embed", "enc_embedding.value_embedding", (length, width))
    for i in range(config.layers):
        path, name = f"layers[{i}]", f"encoder.attn_layers.{i}"
        for ours, theirs in MAMBAS.items():
            yield from of_mamba(source, model, f"{path}.{ours}", f"{name}.{theirs}")
        for ours, theirs in NORMS.items():
            yield from of_norm(source, width, f"{path}.{ours}", f"{name}.{theirs}")
        for ours, theirs, shape in (
            ("up", "conv1", (width, hidden)),
            ("down", "conv2", (hidden, width)),
        ):
            kernel = source.take(f"{name}.{theirs}.weight", (*shape[::-1], 1))
            yield f"{path}.{ours}.w", matrix(kernel[..., 0])
            yield f"{path}.{ours}.b", source.take(f"{name}.{theirs}.bias", shape[1:])
    yield from of_norm(source, width, "norm", "encoder.norm")
    yield from of_linear(source, "output", "projector", (width, horizon))


def of_mamba(source: Source, model: SMamba, path: str, name: str) -> Named:
    """(path, value) of a Mamba."""
    like = model.layers[0].forward
    (width, two), (e, n) = like.input.weight.shape, like.log_rate.shape
    taps, rank = like.conv.window.size[0], like.step.weight.shape[0]
    yield f"{path}.input.w", matrix(source.take(f"{name}.in_proj.weight", (two, width)))
    kernel = source.take(f"{name}.conv1d.weight", (e, 1, taps))
    yield f"{path}.conv.w", matrix(kernel[:, 0])
    yield f"{path}.conv.b", source.take(f"{name}.conv1d.bias", (e,))
    yield f"{path}.select.w", matrix(source.take(f"{name}.x_proj.weight", (rank + 2 * n, e)))
    yield from of_linear(source, f"{path}.step", f"{name}.dt_proj", (rank, e))
    yield f"{path}.log_rate", source.take(f"{name}.A_log", (e, n))
    yield f"{path}.skip", source.take(f"{name}.D", (e,))
    yield f"{path}.output.w", matrix(source.take(f"{name}.out_proj.weight", (width, e)))


def of_norm(source: Source, width: int, path: str, name: str) -> Named:
    """(path, value) of a norm."""
    yield f"{path}.scale", source.take(f"{name}.weight", (width,))
    yield f"{path}.bias", source.take(f"{name}.bias", (width,))
