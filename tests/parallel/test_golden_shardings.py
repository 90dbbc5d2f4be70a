"""How six training states are cut, parameter by parameter, beside what was written down.

`python -m tests.parallel.test_golden_shardings` writes it down anew; the difference is to be read.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import optax
import pytest
from flax import nnx

from ffnlab import models, transform, tree
from ffnlab.layers import Linear, MoESpec
from ffnlab.learning import backprop
from ffnlab.models import Decoder, DecoderConfig, Encoder, EncoderConfig, ViT, ViTConfig
from ffnlab.parallel import parse_mesh, shardings
from ffnlab.quantization import nearest
from ffnlab.rule import Rule
from ffnlab.weights import LoRA

FOLDER = Path(__file__).resolve().parents[1] / "fixtures" / "shardings"
SIZES = {"vocab": 64, "width": 32, "hidden": 64, "heads": 4, "layers": 8}
CONFIG = DecoderConfig(**SIZES, kv_heads=2, head_dim=8)
MIXTURE = dataclasses.replace(
    CONFIG, mixture=MoESpec(8, 2, 16, shared=16), ffns=("gated", "mixture") * 4
)
VIT = ViTConfig(image=(8, 8), patch=4, width=32, hidden=64, layers=2, heads=4, classes=10)
ENCODER = EncoderConfig(**{**SIZES, "layers": 2}, head_dim=8, max_positions=16)


def key() -> jax.Array:
    return jax.random.key(0)


def low_rank() -> nnx.Module:
    """INT4 matrices, with an update of rank 2 at those of the FFNs."""
    model, _ = transform.apply(nearest(format="int4", group=8), Decoder(CONFIG, key=key()))

    def wrap(linear: Linear) -> Linear:
        return linear.replace(LoRA.init(linear.weight, 2, key()))

    return models.stack(tree.map_at(model, tree.at("layers[*].ffn.*") & tree.of_type(Linear), wrap))


# Name -> mesh, model and rule.
GOLDEN: dict[str, tuple[str, Callable[[], nnx.Module], Callable[[], Rule]]] = {
    "decoder": (
        "dp=2,fsdp=2,tp=2",
        lambda: models.stack(Decoder(CONFIG, key=key())),
        lambda: backprop(optimizer=optax.adamw(1e-3)),
    ),
    "pipeline": (
        "fsdp=2,tp=2,pp=2",
        lambda: models.pipeline(Decoder(CONFIG, key=key()), stages=4, microbatches=4, repeats=2),
        lambda: backprop(optimizer=optax.adam(1e-3)),
    ),
    "mixture": (
        "fsdp=2,tp=2,ep=2",
        lambda: models.stack(Decoder(MIXTURE, key=key())),
        lambda: backprop(optimizer=optax.adam(1e-3)),
    ),
    "low_rank": ("fsdp=2,sp=2,tp=2", low_rank, lambda: backprop(optimizer=optax.adam(1e-3))),
    "encoder": (
        "dp=2,tp=4",
        lambda: Encoder(ENCODER, key=key()),
        lambda: backprop(optimizer=optax.sgd(1e-3, momentum=0.9)),
    ),
    "vit": (
        "fsdp=4,tp=2",
        lambda: ViT(VIT, key=key()),
        lambda: backprop(optimizer=optax.adam(1e-3)),
    ),
}


def cuts(name: str) -> dict[str, str]:
    """Path of every array of a state -> dtype, shape and the mesh axes of each dimension."""
    mesh, make, rule = GOLDEN[name]
    state = jax.eval_shape(lambda: rule().init(make(), key()))
    places = jax.tree.leaves(shardings(state, parse_mesh(mesh)))
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    found = {"mesh": mesh}
    for (path, leaf), place in zip(leaves, places, strict=True):
        axes = [
            str(a) if a is None else "+".join((a,) if isinstance(a, str) else a) for a in place.spec
        ]
        where = jax.tree_util.keystr(path, simple=True, separator=".")
        found[where] = f"{leaf.dtype} {list(leaf.shape)} {' '.join(axes) or 'whole'}"
    return found


def differences(golden: dict[str, str], found: dict[str, str]) -> Iterator[str]:
    """What differs, a line for each parameter."""
    for path in sorted(golden.keys() | found.keys()):
        was, now = golden.get(path, "not there"), found.get(path, "not there")
        if was != now:
            yield f"{path}: was {was}, is {now}"


@pytest.mark.parametrize("name", GOLDEN)
def test_every_parameter_is_cut_as_it_was(name):
    golden = json.loads((FOLDER / f"{name}.json").read_text())
    found = list(differences(golden, cuts(name)))
    assert not found, "\n".join(found)


def test_a_difference_names_the_parameter():
    golden = json.loads((FOLDER / "encoder.json").read_text())
    (path,) = [
        path
        for path in golden
        if path.startswith("model") and path.endswith("layers.0.ffn.up.w.value.w")
    ]
    other = {**golden, path: "float32 [32, 64] None None"}
    assert list(differences(golden, other)) == [
        f"{path}: was float32 [32, 64] None tp, is float32 [32, 64] None None"
    ]
    assert list(differences({}, {"a": "b"})) == ["a: was not there, is b"]


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    for each in GOLDEN:
        text = json.dumps(cuts(each), indent=1) + "\n"
        (FOLDER / f"{each}.json").write_text(text)
