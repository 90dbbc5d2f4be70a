"""The table of kinds: every line makes a model that its own functions know."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from ffnlab import layers, models, tree
from ffnlab.errors import ConfigError, FormatError
from ffnlab.formats import KINDS
from ffnlab.formats.huggingface import encoder_families
from ffnlab.formats.huggingface.families import FAMILIES
from ffnlab.formats.kinds import Config, check_kind, check_runs, kind_of, reads_of
from ffnlab.formats.native.schema import listed
from ffnlab.testing import tiny

CONFIGS = {
    "decoder": tiny().config,
    "encoder": models.EncoderConfig(
        32, 16, 24, 2, 4, 4, types=2, pooler="tanh", head="classes", classes=3
    ),
    "audio": models.AudioEncoderConfig(5, 16, 24, 2, 4, 6),
    "vit": models.ViTConfig((8, 12), 4, 16, 24, 2, 4, classes=3),
    "resnet": models.ResNetConfig((1, 1), (4, 6), 3, image=(4, 6)),
    "uvit": models.UViTConfig((4, 6), 2, 8, 12, 2, 2, channels=1, classes=3),
    "revcol": models.RevColConfig((4, 8), (3, 5), (1, 1), 4, 3, patch=2, supervision=True),
    "mlp": models.MLPConfig((3, 5, 2), "elu", bias=False),
    "convnet": models.ConvNetConfig((1, 3, 4), 5),
    "autoencoder": models.AutoencoderConfig((2, 3)),
    "graph": models.GraphNetworkConfig((3, 4, 2), "gat", heads=2),
    "groups": models.GroupNetworkConfig(((3, 2), (1, 4)), 3, hidden=4, fuse="mean"),
    "noprop": models.NoPropConfig(3, 2, hidden=4, blocks=2),
    "hypernet": models.HypernetConfig(
        models.MLPConfig((3, 4, 2)), models.HypernetSpec(tasks=2, hidden=(5,))
    ),
    "meta": models.MetaNetworkConfig(2, 3, layers=2, width=4),
    "icgnn": models.ICGNNConfig(2, 3, edges=2, width=4),
    "physical": models.PhysicalConfig(3, 2, (4, 5), "two_bit", skip=True, slots=2),
    "sequence": models.SequenceConfig(3, 2, 4, 8, 5, heads=2, head_dim=3),
    "s_mamba": models.SMambaConfig(6, 3, 8, 5, states=2),
    "oneforecast": models.OneForecastConfig((2, 3), 2, 1, 0, (0.0, 90.0, -90.0, 90.0), 4, 3),
}
OUTPUTS = {
    "decoder": [(1, 1, 64)],
    "encoder": [(1, 3)],
    "audio": [(1, 1, 16)],
    "vit": [(1, 3)],
    "resnet": [(1, 3)],
    "uvit": [(1, 4, 6, 1)],
    "revcol": [(1, 3)],
    "mlp": [(1, 2)],
    "convnet": [(1, 5)],
    "autoencoder": [(1, 2, 2, 2)],
    "graph": [(1, 2)],
    "groups": [(1, 3)],
    "noprop": [(1, 2), (1, 2)],
    "hypernet": [(1, 2)],
    "meta": [(1, 2), (1, 3)],
    "icgnn": [(1, 1, 3)],
    "physical": [(1, 2)],
    "sequence": [(1, 3, 4)],
    "s_mamba": [(1, 3, 1)],
    "oneforecast": [(2, 3, 1)],
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind(name, key):
    kind, config = KINDS[name], CONFIGS[name]
    assert isinstance(config, kind.config) and isinstance(config, Config)
    assert dataclasses.fields(config) and hash(config) == hash(dataclasses.replace(config))
    model = jax.eval_shape(lambda key: kind.make(config, key=key, dtype=jnp.bfloat16), key)
    assert type(model) is kind.model
    trained, fixed = tree.trained(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(trained)} == {jnp.dtype(jnp.bfloat16)}
    statistics = {leaf.dtype for leaf in jax.tree.leaves(fixed)}
    assert statistics <= {jnp.dtype(jnp.float32 if name == "resnet" else jnp.bfloat16)}
    assert kind_of(model) == kind_of(config) == kind_of(kind.model) == name
    made = jax.eval_shape(kind.call, model, kind.example(model))
    assert [leaf.shape for leaf in jax.tree.leaves(made)] == OUTPUTS[name]
    classes = None if kind.classes is None else kind.classes(config)
    assert classes is None or classes == OUTPUTS[name][0][-1]
    check_runs(model, Path("here"))
    assert {kind.config.__name__, kind.model.__name__} <= listed().keys()


def test_noprop_networks_of_all_kinds(key):
    for options, outputs in (
        ({"blocks": 0, "schedule": 4, "embedding": 6}, 2),
        ({"blocks": 0, "velocity": True, "embedding": 6}, 6),
    ):
        config = models.NoPropConfig(3, 2, hidden=4, **options)
        model = jax.eval_shape(lambda key, config=config: config.make(key=key), key)
        found = jax.eval_shape(KINDS["noprop"].call, model, KINDS["noprop"].example(model))
        assert [leaf.shape for leaf in found] == [(1, outputs), (1, 2)]
        assert (model.schedule is not None) == bool(config.schedule) and model.learned
    with pytest.raises(ConfigError, match="blocks=-1 must be at least 0"):
        models.NoPropConfig(3, 2, blocks=-1)


def test_hypernetworks_read_what_their_targets_do(key):
    for name in ("mlp", "convnet", "decoder", "encoder", "vit", "resnet", "autoencoder"):
        target = CONFIGS[name]
        config = models.HypernetConfig(target, models.HypernetSpec(hidden=(2,), init="uniform"))
        model = jax.eval_shape(lambda key, config=config: config.make(key=key), key)
        assert reads_of(config) == reads_of(model) == reads_of(target) == KINDS[name].reads
        make = functools.partial(KINDS[name].make, target)
        wanted = KINDS[name].example(jax.eval_shape(lambda key, make=make: make(key=key), key))
        assert KINDS["hypernet"].example(model) == wanted
        found = jax.eval_shape(KINDS["hypernet"].call, model, wanted)
        assert [leaf.shape for leaf in jax.tree.leaves(found)] == OUTPUTS[name]
    odd = models.Hypernet(models.HypernetSpec(), nnx.List([layers.RMSNorm(3)]), key=key)
    for fn in (reads_of, KINDS["hypernet"].example):
        with pytest.raises(ConfigError, match="target of this hypernetwork is of no kind"):
            fn(odd)
    with pytest.raises(ConfigError, match="a int is no model of a kind"):
        reads_of(3)


def test_families_are_of_decoders_and_encoders():
    assert KINDS["audio"].families == ("whisper",)
    assert KINDS["vit"].families == ("vit", "deit")
    assert KINDS["decoder"].families == tuple(FAMILIES)
    assert KINDS["encoder"].families == tuple(encoder_families.FAMILIES)
    known = ("decoder", "encoder", "audio", "vit")
    assert not any(kind.families for name, kind in KINDS.items() if name not in known)
    assert all(kind.files[0] == "ffnlab_model.json" for kind in KINDS.values())


def test_configurations_refuse_what_their_models_do():
    for wrong, message in (
        (lambda: models.MLPConfig((3,)), r"sizes=\[3\] must be two or more"),
        (lambda: models.MLPConfig((3, 2), "swish"), "activation='swish' is not one of"),
        (lambda: models.ConvNetConfig((1, 0), 2), r"channels=\[1, 0\] must be two or more"),
        (lambda: models.ConvNetConfig((1, 2), 0), "classes=0, at least 1"),
        (lambda: models.AutoencoderConfig((1,)), r"channels=\[1\] must be two or more"),
    ):
        with pytest.raises(ConfigError, match=message):
            wrong()


def test_of_another_kind_or_none():
    check_kind(models.Decoder, ("mlp", "decoder"), "m")
    with pytest.raises(
        ConfigError, match="^m holds a model of kind 'convnet'; accepted here: 'mlp'"
    ):
        check_kind(models.ConvNetConfig, ("mlp",), "m")
    with pytest.raises(ConfigError, match="^m holds a List, no kind of model"):
        check_kind(nnx.List, ("mlp",), "m")
    check_runs({"not": "a model"}, Path("here"))


def test_a_model_that_lacks_a_part():
    model = tiny()
    model.norm = nnx.data(None)
    with pytest.raises(
        FormatError, match="^here: no decoder that can be run: TypeError: 'NoneType'"
    ):
        check_runs(model, Path("here"))
