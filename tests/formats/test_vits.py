"""ViT and DeiT in files: against what `transformers` made of them (recorded), out and in."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import models, quantization, transform
from ffnlab.data.images.files import ImageFolder
from ffnlab.errors import ConfigError, FormatError
from ffnlab.formats import KINDS, load, save
from ffnlab.formats.huggingface.dialects import read_config, write_config
from ffnlab.formats.huggingface.vit_families import read_processor, write_processor
from ffnlab.formats.opening import config_of, kind_at
from ffnlab.formats.safetensors import entry, open_directory, write_directory
from ffnlab.models import ImageInput, ViT, ViTConfig
from ffnlab.testing import equal

VARIANTS = ["vit", "vit_classes", "deit", "deit_classes", "deit_teacher"]
TOLERANCE = 2e-5  # float32 on other kernels; outputs of order 3
BASE = {"model_type": "vit", "image_size": 8, "patch_size": 4, "hidden_size": 16}
BASE |= {"intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
run = jax.jit(lambda model, images: model(images))


@functools.cache  # no test changes a model
def loaded(folder):
    return load(folder)


def expected(folder):
    with np.load(folder / "expected.npz", allow_pickle=False) as saved:
        return dict(saved)


def stored(folder):
    checkpoint = open_directory(folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def difference(a, b):
    return np.abs(np.asarray(a) - b).max()


def on_pixels(model):
    """The model without what it does to pixel values."""
    new = jax.tree.map(lambda leaf: leaf, model)
    new.config = dataclasses.replace(model.config, preprocess=ImageInput())
    return new


@pytest.mark.parametrize("name", VARIANTS)
def test_outputs_of_every_class(fixtures, name):
    folder = fixtures / "vits" / name
    want, model = expected(folder), loaded(folder)
    assert isinstance(model, ViT) and isinstance(model, KINDS["vit"].model)
    assert kind_at(folder) == "vit" and config_of(folder, ("vit",)) == model.config
    bare = on_pixels(model)
    found = run(bare, jnp.asarray(want["pixels"]))
    assert difference(found, want["out"]) < TOLERANCE
    if "pooled" in want:
        assert difference(bare.pooled(found), want["pooled"]) < TOLERANCE
    if "larger" in want:
        larger = models.resized(bare, want["larger_pixels"].shape[1:3])
        assert (
            difference(run(larger, jnp.asarray(want["larger_pixels"])), want["larger"]) < TOLERANCE
        )


@pytest.mark.parametrize("name", VARIANTS)
def test_image_files_become_what_the_processor_makes_of_them(fixtures, tmp_path, name):
    pil = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    folder = fixtures / "vits" / name
    want, model = expected(folder), loaded(folder)
    (tmp_path / "class").mkdir()
    for i, image in enumerate(want["images"]):
        pil.fromarray(image).save(tmp_path / "class" / f"{i}.png")
    how = model.config.preprocess
    files = ImageFolder(
        tmp_path, model.config.image, resize=how.resize or None, resample=how.resample
    )
    images = np.stack([files[i]["image"] for i in range(2)])
    assert images.dtype == np.uint8 and images.shape[1:3] == model.config.image
    mean, std = (np.float32(v) for v in (how.mean, how.std))
    assert difference((images / np.float32(255) - mean) / std, want["pixels"]) < 1e-5
    assert difference(run(model, images), want["out"]) < TOLERANCE, "bytes"
    values = jnp.asarray(images / np.float32(255))
    assert difference(run(model, values), want["out"]) < TOLERANCE, "values in [0, 1]"


@pytest.mark.parametrize("name", VARIANTS)
def test_what_was_loaded_is_saved_as_it_was(fixtures, tmp_path, name):
    folder = fixtures / "vits" / name
    model = loaded(folder)
    assert save(model, tmp_path / "again", max_shard_bytes=4_000) == ()
    want, found = stored(folder), stored(tmp_path / "again")
    assert want.keys() == found.keys() and len(want) > 20
    assert all(np.array_equal(want[key], found[key]) for key in want)
    again = load(tmp_path / "again")
    assert again.config == model.config and equal(again, model)
    save(models.stack(model), tmp_path / "native", format="ffnlab")
    assert equal(models.unstack(load(tmp_path / "native", kinds=("vit",))), model)


def test_kernels_and_positions_are_read_in_pieces_and_onto_a_mesh(fixtures, monkeypatch):
    folder = fixtures / "vits" / "deit"
    monkeypatch.setattr("ffnlab.formats.stream.PIECE", 16)
    assert equal(load(folder), loaded(folder))
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    cut = lambda path, axes, shape: jax.sharding.NamedSharding(  # noqa: E731
        mesh,
        jax.sharding.PartitionSpec("a", "b")
        if path == "patches.w"
        else jax.sharding.PartitionSpec(None, "b")
        if path == "positions"
        else jax.sharding.PartitionSpec(),
    )
    assert equal(load(folder, sharding=cut), loaded(folder))


def test_cut_and_quantized_models_are_written(fixtures, tmp_path):
    folder = fixtures / "vits" / "deit_teacher"
    model, images = loaded(folder), jnp.asarray(expected(folder)["pixels"])
    small, _ = transform.apply(
        quantization.fireq(group=8, kv=None), models.remove(model, [2]), [np.asarray(images)]
    )
    save(small, tmp_path / "dense")
    again = load(tmp_path / "dense")
    assert models.removed(again) == [2]
    assert difference(run(again, images), run(small, images)) < 1e-4  # scales in another order
    save(small, tmp_path / "packed", format="compressed-tensors")
    packed = load(tmp_path / "packed")
    assert difference(run(packed, images), run(small, images)) < 1e-4
    assert equal(packed.patches, small.patches), "convolutions are not packed"


def test_no_processor_of_another_model_is_left(fixtures, tmp_path):
    save(loaded(fixtures / "vits" / "deit"), tmp_path)
    save(on_pixels(loaded(fixtures / "vits" / "vit")), tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()
    assert load(tmp_path).config.preprocess == ImageInput()


def test_configs_go_back_and_forth():
    config = read_config(BASE | {"num_labels": 7, "architectures": ["ViTForImageClassification"]})
    assert (config.classes, config.eps, config.pooler, config.pool) == (7, 1e-12, None, "token")
    assert read_config(write_config(config)) == config
    assert read_config(BASE).pooler == "tanh"
    wide = read_config(BASE | {"image_size": {"height": 8, "width": 12}})
    assert wide.image == (8, 12) and write_config(wide)["image_size"] == [8, 12]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"patch_size": 3}, r"patch=3 every 3 pixels does not divide image=\[8, 8\]"),
        ({"patch_size": 0, "image_size": "8"}, "(?s)patch_size=0.*image_size='8'"),
        ({"num_attention_heads": 3}, "width=16 must be a multiple of heads=3"),
        ({"architectures": ["ViTForMaskedImageModeling"]}, "known: ViTModel, ViTForImageClass"),
        ({"pooler_output_size": 8}, "pooler_output_size=8"),
        ({"hidden_act": "mish"}, "hidden_act='mish'"),
    ],
)
def test_configs_that_are_refused(change, told):
    with pytest.raises(ConfigError, match=told):
        read_config(BASE | change)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"pool": "mean", "pooler": None}, "pool='mean' .it would be 'token'"),
        ({"distillation": "token"}, "distillation='token'"),
        ({"stride": 2}, "stride=2"),
        ({"activation": "softplus"}, "activation='softplus'"),
    ],
)
def test_what_a_directory_cannot_say_is_named(change, told):
    with pytest.raises(ConfigError, match=told):
        write_config(dataclasses.replace(read_config(BASE), **change))


SQUARE = ViTConfig((8, 8), 4, 16, 24, 2, 4)


def test_processors_go_back_and_forth():
    assert write_processor(SQUARE) is None
    for given in (
        ImageInput((0.5,) * 3, (0.25,) * 3),
        ImageInput((0.5,) * 3, (0.25,) * 3, (10, 12), "bicubic"),
        ImageInput(resample="bicubic"),
    ):
        written = write_processor(dataclasses.replace(SQUARE, preprocess=given))
        assert read_processor(json.loads(json.dumps(written)), SQUARE) == given
    bare = read_processor({"do_normalize": False, "do_rescale": False}, SQUARE)
    assert bare == ImageInput((0.0,) * 3, (1 / 255,) * 3)


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        ({"size": 9}, r"images of \[9, 9\]; config.json has image_size=\(8, 8\)|images of"),
        ({"size": {"shortest_edge": 8}}, "size=.*a side, or a height and a width"),
        ({"size": 8, "resample": 0}, "resample=0"),
        ({"image_mean": [0.5], "image_std": [0.5] * 3}, "image_mean=.*a list of 3 numbers"),
        ({"image_mean": [0.5] * 3, "image_std": [0.0] * 3}, "image_std="),
    ],
)
def test_processors_that_are_refused(fixtures, tmp_path, raw, told):
    with pytest.raises(ConfigError, match=told):
        read_processor(raw, SQUARE)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda t: t | {"embeddings.position_embeddings": t["embeddings.cls_token"]},
            r"\[1, 1, 16\], config.json asks for \[1, 10, 16\]",
        ),
        (
            lambda t: {k: v for k, v in t.items() if "projection.w" not in k},
            "projection.weight' is missing",
        ),
        (lambda t: t | {"vit.layernorm.bias": t["layernorm.bias"]}, "are the same tensor"),
        (lambda t: t | {"head": t["layernorm.bias"]}, "'head' is not part"),
        (lambda t: t | {"embeddings.cls_token": t["embeddings.cls_token"] * np.nan}, "NaN"),
        (
            lambda t: (
                t | {name: t[name] * 2e38 for name in ("encoder.layer.0.output.dense.weight",)}
            ),
            r"layers\[0\] gives",
        ),
    ],
)
def test_damaged_directories(fixtures, tmp_path, change, told):
    source = fixtures / "vits" / "vit"
    shutil.copy(source / "config.json", tmp_path)
    tensors = {name: entry(array) for name, array in change(stored(source)).items()}
    write_directory(tmp_path, tensors)
    with pytest.raises(FormatError, match=told):
        load(tmp_path)
