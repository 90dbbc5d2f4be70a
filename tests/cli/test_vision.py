"""`ffnlab` on vision transformers and residual networks: trained, resumed, sharded, compressed."""

import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import models, tree
from ffnlab.cli.inputs.labelled import load_labelled
from ffnlab.cli.main import main
from ffnlab.cli.train import run
from ffnlab.cli.training import TrainConfig, fresh, read_training, rule_of
from ffnlab.data import ArrayBatches
from ffnlab.errors import ConfigError
from ffnlab.formats import load
from ffnlab.layers import BatchNorm, EffLayer, FoldedFFN, measured
from ffnlab.losses import distillation
from ffnlab.parallel import from_table
from ffnlab.parallel.config import presets
from ffnlab.testing import equal

RUN = {"steps": 4, "log_every": 1, "checkpoint_every": 2, "dtype": "float32"}
DIGITS = {"kind": "images", "batch": 8}
# Adam would make whole steps of the last bits of gradients that are zero but for rounding.
SGD = {"name": "sgd", "rate": 0.1, "warmup": 0}
VIT = {"kind": "vit", "image": [8, 8], "patch": 4, "channels": 1, "classes": 10}
VIT |= {"width": 8, "hidden": 16, "layers": 2, "heads": 2}
RESNET = {"kind": "resnet", "image": [8, 8], "channels": 1, "classes": 10}
RESNET |= {"blocks": [1, 1], "widths": [4, 8]}
REVCOL = {"kind": "revcol", "image": [8, 8], "channels": 1, "classes": 10, "patch": 2}
REVCOL |= {"widths": [4, 6], "blocks": [1, 1], "columns": 3}
MODELS = {"vit": VIT, "resnet": RESNET, "revcol": REVCOL}


def settings(model, *, transform=(), **options):
    """A run of a few steps."""
    table = {"model": model, "data": DIGITS, "run": RUN | options, "optimizer": SGD}
    return from_table(table | ({"transform": list(transform)} if transform else {}), TrainConfig)


def slow_but(first, kinds):
    """One kind by default, the others by `make test-slow`."""
    return [k if k == first else pytest.param(k, marks=pytest.mark.slow) for k in kinds]


@pytest.mark.parametrize("kind", slow_but("resnet", MODELS))
def test_stopped_resumed_and_on_a_mesh(kind, tmp_path, monkeypatch):
    whole = settings(MODELS[kind])
    record = run(whole, tmp_path / "whole")
    assert record["held_out_error"] == 1 - record["held_out_accuracy"]
    usual = ArrayBatches.__call__

    def stopped(batches, position):
        if position == 2:
            signal.raise_signal(signal.SIGTERM)
        return usual(batches, position)

    monkeypatch.setattr(ArrayBatches, "__call__", stopped)
    assert not run(whole, tmp_path / "cut")["finished"]
    monkeypatch.undo()
    run(whole, tmp_path / "cut", resume=True)
    a, b = (load(tmp_path / name / "model") for name in ("whole", "cut"))
    assert equal(a, b) and type(a).__name__.lower() == kind
    run(settings(MODELS[kind], mesh="dp=2,tp=2"), tmp_path / "mesh")
    c = load(tmp_path / "mesh" / "model")
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(c), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)  # sums in another order


def test_batch_norms_move_by_the_batch_once_whatever_its_parts():
    """The running mean after a step is a tenth of the batch's; weights alone are trained."""
    of = settings(RESNET)
    model = fresh(of, jax.random.key(0))
    x, y = jax.random.uniform(jax.random.key(1), (8, 8, 8, 1)), jnp.arange(8) % 10
    found = {}
    for parts in (1, 2):
        rule = rule_of(settings(RESNET, microbatches=parts))
        state, metrics = rule.step(rule.init(model, jax.random.key(0)), (x, y))
        found[parts] = rule.model(state).stem.norm
        assert np.isfinite(metrics["loss"])
    seen = model.stem.conv(x)
    for parts, norm in found.items():
        np.testing.assert_allclose(norm.mean[...], 0.1 * seen.mean((0, 1, 2)), atol=1e-6)
        wanted = 0.9 + 0.1 * np.asarray(seen).reshape(-1, 4).var(0, ddof=1)
        np.testing.assert_allclose(norm.variance[...], wanted, atol=1e-6, err_msg=str(parts))
    trained, _ = tree.trained(model)
    names = [path for path, _ in jax.tree_util.tree_leaves_with_path(trained)]
    assert names and not any("mean" in str(n) or "variance" in str(n) for n in names)
    assert len(tree.select(model, tree.of_type(BatchNorm))) == 5


def test_a_transformer_is_scanned_rematerialized_and_given_other_layers(tmp_path):
    of = settings(VIT, transform=[{"name": "pflayer", "every": 1, "first": 0}], scan=True)
    record = run(of, tmp_path / "run")
    assert 0 <= record["held_out_accuracy"] <= 1
    found = load(tmp_path / "run" / "model")
    assert all(isinstance(block.attn, EffLayer) for block in found.blocks())
    plain = settings(VIT, remat="nothing")
    assert fresh(plain, jax.random.key(0)).remat == "nothing"


@pytest.mark.slow
def test_idle_channels_are_trained_folded_and_quantized_by_commands(tmp_path, capsys):
    """RePaViT by files alone: a training file, then a recipe."""
    idle = [{"name": "repa", "idle": 0.5}]
    record = run(settings(VIT, transform=idle), tmp_path / "run")
    learned = load(tmp_path / "run" / "model")
    assert 0 <= record["held_out_accuracy"] <= 1 and learned.layers[0].ffn.active == 8
    norms = tree.select(learned, tree.of_type(BatchNorm))
    assert len(norms) == 4 and all(norm.mean[...].any() for norm in norms.values())
    recipe = tmp_path / "fold.toml"
    stages = ('transform = "repa-fold"', 'transform = "nearest"\nformat = "int8"')
    few = "[calibration]\nsamples = 16\nbatch = 8\n[evaluation]\nsamples = 16\n"
    recipe.write_text(few + "".join(f"[[stage]]\n{stage}\n" for stage in stages))
    options = ["--images", "digits", "--recipe", str(recipe), "--out", str(tmp_path / "small")]
    assert main(["compress", str(tmp_path / "run" / "model"), *options]) == 0
    assert "repa-fold" in capsys.readouterr().out
    small = load(tmp_path / "small" / "model")
    assert all(isinstance(block.ffn, FoldedFFN) for block in small.layers)
    assert small.layers[0].ffn.straight.weight.codes.dtype == jnp.int8
    with pytest.raises(ConfigError, match=r"scanned stack cannot be measured.*scan = false"):
        run(settings(VIT, transform=idle, scan=True), tmp_path / "scanned")
    assert not (tmp_path / "scanned" / "model").exists()


@pytest.mark.slow
def test_shared_stages_are_trained_expanded_and_trained_on(tmp_path):
    """Learngene by files alone."""
    run(settings(VIT, transform=[{"name": "share", "repeats": [2]}]), tmp_path / "aux")
    shared = load(tmp_path / "aux" / "model")
    assert isinstance(shared.layers, models.Shared) and len(shared.layers.stages) == 1
    file = tmp_path / "deep.toml"
    start = json.dumps(str(tmp_path / "aux" / "model"))
    data = '[data]\nkind = "images"\nbatch = 8\n[run]\nsteps = 2\ndtype = "float32"\n'
    file.write_text(f'start = {start}\n[[transform]]\nname = "expand"\nlayers = 3\n{data}')
    run(read_training(file), tmp_path / "deep")
    found = load(tmp_path / "deep" / "model")
    assert found.config.layers == len(found.layers) == 3
    weights = [np.asarray(block.ffn.up.weight.dense()) for block in found.layers]
    assert np.abs(weights[0] - weights[2]).max() > 0, "each learns by itself"


@pytest.mark.slow
def test_a_teacher_is_learned_from_and_images_are_augmented(tmp_path, capsys):
    """A step is that of `distilled` on the teacher's logits; a student with batch norms moves."""
    teacher = fresh(settings(VIT), jax.random.key(5))
    models.save(teacher, tmp_path / "teacher", format="ffnlab")
    data = DIGITS | {"teacher": str(tmp_path / "teacher")}
    table = {"model": RESNET, "data": data, "run": RUN, "optimizer": SGD}
    how = {"loss": "distilled", "loss_options": {"temperature": 4.0, "weight": 0.9}}
    of = from_table(table | how, TrainConfig)
    batch = load_labelled(of).batches(of)(3)
    np.testing.assert_allclose(batch.logits, teacher(batch.inputs), rtol=1e-5, atol=1e-6)
    student = fresh(of, jax.random.key(0))
    rule = rule_of(of)
    state, metrics = rule.step(rule.init(student, jax.random.key(0)), batch)
    wanted, _ = measured(student, batch.inputs)
    far = distillation(wanted, batch.logits, temperature=4.0)
    np.testing.assert_allclose(metrics["teacher"], far, rtol=1e-5)
    assert not equal(rule.model(state).stem.norm.mean, student.stem.norm.mean)
    one = run(of, tmp_path / "one")
    assert len(one["data"]["teacher_sha256"]) == 64
    run(from_table(table | how | {"run": RUN | {"mesh": "dp=2"}}, TrainConfig), tmp_path / "two")
    a, b = (load(tmp_path / name / "model") for name in ("one", "two"))
    for leaf, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(leaf, other, atol=1e-5)  # sums in another order
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "one" / "model"), "--images", "digits"]) == 0
    said = f"accuracy {one['held_out_accuracy']:.4f} (360 images)"
    assert said in capsys.readouterr().out


@pytest.mark.slow
def test_augmented_images_are_learned_from(tmp_path):
    how = {"loss": "augmented", "loss_options": {"crop": 1, "mixup": 0.2}}
    table = {"model": RESNET, "data": DIGITS, "run": RUN | {"steps": 2}, "optimizer": SGD}
    run(from_table(table | how, TrainConfig), tmp_path / "one")
    run(from_table(table, TrainConfig), tmp_path / "plain")
    a, b = (load(tmp_path / name / "model") for name in ("one", "plain"))
    assert not equal(a, b) and not equal(a.stem.norm.mean, jnp.zeros(4))


def test_what_a_teacher_cannot_be(tmp_path):
    table = {"model": VIT, "data": DIGITS | {"teacher": str(tmp_path)}, "run": RUN}
    with pytest.raises(ConfigError, match="loss='augmented' does not take"):
        from_table(table | {"loss": "augmented"}, TrainConfig)
    with pytest.raises(ConfigError, match="set one in .data."):
        from_table({**table, "data": DIGITS, "loss": "distilled"}, TrainConfig)
    with pytest.raises(ConfigError, match="takes no loss"):
        mlp = {"kind": "mlp", "sizes": [64, 10]}
        rule_of(from_table(table | {"model": mlp, "rule": "counter_current"}, TrainConfig))
    for wrong, message in (
        (RESNET | {"classes": 9}, "the model has 10 classes"),
        (RESNET | {"channels": 3}, r"does not take inputs of shape \[8, 8, 1\]"),
    ):
        models.save(fresh(settings(wrong), jax.random.key(0)), tmp_path / "t", format="ffnlab")
        data = DIGITS | {"teacher": str(tmp_path / "t")}
        with pytest.raises(ConfigError, match=message):
            load_labelled(from_table(table | {"data": data}, TrainConfig))


def test_presets_are_read_and_fit_their_data():
    names = {"vit_mnist", "resnet_digits", "revcol_digits"}
    assert names <= set(presets())
    for name in names:
        of = read_training(name)
        shape = (*of.data.size, 1)
        model = jax.eval_shape(lambda key, of=of: fresh(of, key), jax.random.key(0))
        image = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
        assert jax.eval_shape(lambda model, x: model(x), model, image).shape == (2, 10)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "reached"), [("resnet_digits", 0.98), ("revcol_digits", 0.9)])
def test_the_presets_of_digits_reach_what_they_say(name, reached, tmp_path):
    record = run(read_training(name), tmp_path / "run")
    assert record["held_out_accuracy"] > reached


@pytest.mark.slow
def test_alphas_of_columns_are_held_by_the_optimizer_of_a_training_file():
    """The projection ends the chain: a step that would cross zero ends a thousandth from it."""
    table = {"model": REVCOL, "data": DIGITS, "run": RUN, "loss": "supervised"}
    of = from_table(table | {"optimizer": SGD | {"rate": 1e3, "clip": 0.0}}, TrainConfig)
    rule = rule_of(of)
    state = rule.init(fresh(of, jax.random.key(0)), jax.random.key(0))
    state, _ = rule.step(state, (np.ones((2, 8, 8, 1), np.float32), np.array([0, 1])))
    alphas = [np.abs(a[...]) for c in rule.model(state).layers for a in c.alphas]
    assert min(a.min() for a in alphas) >= np.float32(1e-3)
    assert max(a.max() for a in alphas) > 0.6, "and it was a large step"


COLUMNS = pytest.param("revcol", marks=pytest.mark.slow)  # many convolutions to compile
RECIPES = {
    "vit": """
[[stage]]
transform = "finercut"
remove = 1
[[stage]]
transform = "nearest"
format = "int8"
""",
    "revcol": """
[[stage]]
transform = "nearest"
format = "int8"
""",
    "resnet": """
[[stage]]
transform = "nearest"
format = "int4"
group = 4
""",
}


@pytest.mark.parametrize(
    "kind", [*slow_but("resnet", [k for k in MODELS if k != "revcol"]), COLUMNS]
)
def test_compressed_shown_and_planned(kind, tmp_path, capsys):
    model = fresh(settings(MODELS[kind]), jax.random.key(0))
    models.save(model, tmp_path / "m", format="ffnlab")
    few = "[calibration]\nsamples = 16\nbatch = 8\n[evaluation]\nsamples = 16\n"
    (tmp_path / "recipe.toml").write_text(few + RECIPES[kind])
    arguments = ["compress", str(tmp_path / "m"), "--images", "digits"]
    arguments += ["--recipe", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["item"] == "image" and {"nats", "accuracy"} <= report["rows"][-1]["scores"].keys()
    small = load(tmp_path / "out" / "model")
    assert small(jnp.zeros((1, 8, 8, 1))).shape == (1, 10)
    if kind == "vit":
        assert len(models.removed(small)) == 1
    capsys.readouterr()
    file = tmp_path / "run.toml"
    lines = [f"{k} = {json.dumps(v)}" for k, v in MODELS[kind].items()]
    data = '[data]\nkind = "images"\nbatch = 8\n[run]\nsteps = 1\n'
    file.write_text("\n".join(["[model]", *lines]) + "\n" + data)
    assert main(["plan", str(file), "--mesh", "dp=2"]) == 0
    assert "parameters on dp=2" in capsys.readouterr().out


def test_what_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"gives inputs of shape \[8, 8, 1\], which a vit"):
        run(settings(VIT | {"image": [12, 8]}), tmp_path / "run")
    with pytest.raises(ConfigError, match="with classes=None has no kind of .data."):
        settings({k: v for k, v in VIT.items() if k != "classes"})
    with pytest.raises(ConfigError, match="which a resnet"):
        run(settings(RESNET | {"channels": 3}), tmp_path / "run")
    with pytest.raises(ConfigError, match="rule 'noprop' does not train a model of kind 'vit'"):
        from_table({"model": VIT, "data": DIGITS, "run": RUN, "rule": "noprop"}, TrainConfig)
