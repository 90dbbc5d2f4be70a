"""Channel groups: what there is in each kind of model, and the index maps of its parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import models, tree
from ffnlab.errors import ConfigError
from ffnlab.layers import MLP, Linear
from ffnlab.models import ConvNet, ResNet, ResNetConfig, groups
from ffnlab.testing import tiny, tiny_encoder

KEY = jax.random.key(0)


def abstract(make, *args, **options):
    return jax.eval_shape(lambda key: make(*args, key=key, **options), KEY)


def named(model):
    return {group.name: group for group in groups(model)}


def index(group, path, axis):
    (part,) = (p for p in group.parts if (p.path, p.axis) == (path, axis))
    return part.index.tolist()


def test_of_an_mlp_outputs_of_every_map_but_the_last():
    found = named(abstract(MLP, (4, 3, 5, 2)))
    assert {name: g.size for name, g in found.items()} == {"maps[0]": 3, "maps[1]": 5}
    paths = [(p.path, p.axis) for p in found["maps[0]"].parts]
    assert paths == [("maps[0].w", -1), ("maps[0].b", -1), ("maps[1].w", -2)]
    assert index(found["maps[1]"], "maps[2].w", -2) == [[0], [1], [2], [3], [4]]


def test_kernels_have_rows_for_every_tap_and_flattened_pixels_repeat_channels():
    model = abstract(ConvNet, (2, 3, 4), 5)
    found = named(model)
    assert {name: g.size for name, g in found.items()} == {"convs[0]": 3, "convs[1]": 4}
    assert index(found["convs[0]"], "convs[1].w", -2)[1] == [1 + 3 * tap for tap in range(9)]
    model.head = abstract(Linear, 4 * 6, 5, axes=("embed", "mlp"))
    assert index(named(model)["convs[1]"], "head.w", -2)[3] == [3, 7, 11, 15, 19, 23]
    model.head = abstract(Linear, 4 * 6 + 1, 5, axes=("embed", "mlp"))
    with pytest.raises(ConfigError, match="head reads 4 channels with 25 rows in 1 groups"):
        groups(model)


def test_sums_of_a_resnet_go_from_one_change_of_channels_to_the_next():
    """Option A puts 16 channels into 32 from the eighth on, 32 into 64 from the sixteenth."""
    found = named(abstract(ResNet, ResNetConfig((2, 2, 1), (16, 32, 64), 10)))
    sums = {name: g for name, g in found.items() if name == "stem" or name.endswith("expand")}
    sizes = {"stem": 16, "residuals[2].expand": 32, "residuals[4].expand": 64}
    assert {name: g.size for name, g in sums.items()} == sizes
    inner = {f"residuals[{i}].spatial": w for i, w in enumerate((16, 16, 32, 32, 64))}
    assert {name: g.size for name, g in found.items()} == sizes | inner
    assert index(found["stem"], "residuals[2]", -2) == [[8 + i] for i in range(16)]
    middle = found["residuals[2].expand"]
    assert index(middle, "residuals[2]", -1) == [[i] for i in range(32)]
    assert index(middle, "residuals[4]", -2) == [[16 + i] for i in range(32)]
    read = {p.path for p in found["stem"].parts if p.axis == -2}
    firsts = {f"residuals[{i}].spatial.conv.w" for i in range(3)}
    assert read == firsts | {"residuals[2]"}
    written = {p.path for p in middle.parts if p.axis == -1}
    norm = {"scale", "bias", "mean", "variance"}
    own = [f"residuals[{i}].expand" for i in (2, 3)]
    want = {f"{path}.norm.{name}" for path in own for name in norm}
    assert written == want | {f"{path}.conv.w" for path in own} | {"residuals[2]"}
    assert index(found["residuals[4].expand"], "head.w", -2) == [[i] for i in range(64)]


def test_bottlenecks_have_learned_shortcuts_and_groups_of_their_op():
    for op, more in (
        ("conv", {"reduce": (2, 3), "spatial": (2, 3)}),
        ("depthwise", {"reduce": (2, 3)}),
        ("max", {"reduce": (2, 3)}),
    ):
        config = ResNetConfig((1, 1), (2, 3), 5, block="bottleneck", op=op, stem_width=3)
        found = named(abstract(ResNet, config))
        inner = {f"residuals[{i}].{k}": v[i] for k, v in more.items() for i in (0, 1)}
        sums = {"stem": 3, "residuals[0].expand": 8, "residuals[1].expand": 12}
        assert {name: g.size for name, g in found.items()} == sums | inner, op
    reads = {p.path for p in found["residuals[0].expand"].parts if p.axis == -2}
    assert reads == {"residuals[1].reduce.conv.w", "residuals[1].shortcut.conv.w"}


def test_heads_go_with_the_keys_that_they_share():
    found = named(tiny())
    assert [g.size for g in found.values()] == [16, *(2, 32) * 3]
    head = found["layers[1].attn"]
    assert index(head, "layers[1].attn.q.w", -1) == [list(range(8)), list(range(8, 16))]
    assert index(head, "layers[1].attn.k.w", -1) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert index(head, "layers[1].attn.o.w", -2)[1] == list(range(8, 16))


def test_streams_form_a_group_only_where_rms_norms_read_them():
    assert "embed" in named(tiny())
    encoder = named(abstract(tiny_encoder))
    assert set(encoder) == {f"layers[{i}].{s}" for i in range(3) for s in ("attn", "ffn")}
    model = tiny()
    model.norm = abstract(tiny_encoder).embed_norm
    assert "embed" not in named(model)


def test_stacked_models_have_the_groups_of_their_list_form():
    model = tiny()
    alone, stacked = groups(model), groups(models.stack(model))
    for a, b in zip(alone, stacked, strict=True):
        assert (a.name, a.size) == (b.name, b.size)
        for one, other in zip(a.parts, b.parts, strict=True):
            assert one[:2] == other[:2]
            np.testing.assert_array_equal(one.index, other.index)


def test_every_entry_of_a_part_is_there_and_of_one_unit():
    config = ResNetConfig((1, 1), (4, 6), 3, block="bottleneck", op="depthwise")
    for model in (abstract(ResNet, config), tiny(), abstract(MLP, (3, 4, 2))):
        nodes, seen = dict(tree.walk(model)), set()
        for group in groups(model):
            for part in group.parts:
                assert part.index.shape[0] == group.size
                assert (part.path, part.axis) not in seen
                seen.add((part.path, part.axis))
                entries = nodes[part.path].get_value().shape[part.axis]
                assert sorted(part.index.reshape(-1)) == list(range(entries))


def test_what_is_no_model_or_not_understood_is_named():
    with pytest.raises(ConfigError, match="model is a Linear; an MLP, a ConvNet"):
        groups(abstract(Linear, 2, 3, axes=("embed", "mlp")))
    strange = abstract(ResNet, ResNetConfig((1,), (4,), 3))
    strange.stem.norm = strange.stem.conv
    with pytest.raises(ConfigError, match="stem: a Conv; a ConvNorm with BatchNorm"):
        groups(strange)
    model = tiny()
    model.layers[1] = model.norm
    with pytest.raises(ConfigError, match=r"layers\[1\] is a RMSNorm; only a Block"):
        groups(model)


def test_masks_that_fit_no_group_are_refused():
    model = MLP((4, 3, 2), key=KEY)
    with pytest.raises(ConfigError, match=r"'maps\[1\]' is no group of this model; it has maps"):
        models.masked(model, {"maps[1]": jnp.ones(2)})
    with pytest.raises(ConfigError, match=r"has shape \(2,\), not one number for each of the 3"):
        models.masked(model, {"maps[0]": jnp.ones(2)})
