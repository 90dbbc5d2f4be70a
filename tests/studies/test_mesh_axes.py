"""The study of a mesh's axes: what its claims are decided by, and a small step measured."""

import numpy as np
import pytest

from ffnlab.studies.mesh_axes import claims_of, differs, row_of, wanted
from ffnlab.studies.mesh_axes_measure import AXES, MIXES, Measured, Sizes, measured

CASES = {**AXES, **MIXES}
SIZES = Sizes(width=16, layers=8, length=8, batch=16, steps=3)  # 1,024 bytes of an activation
LOSSES = [5.5, 4.0, 3.5]


def one(*, mixture: bool) -> Measured:
    return Measured(
        multiply_adds=80_000,
        parameters=16_000,
        cut=0,
        whole=0,
        optimizer=32_000,
        temporary=8_000,
        sent={},
        bubble=0.0,
        losses=LOSSES,
        rounded=[loss + (2e-5 if mixture else 1e-6) for loss in LOSSES],
        load=0.0,
        seconds=1.0,
    )


def cut(name: str, **changes) -> Measured:
    """A mesh on which everything is as it should be, but for some changes."""
    bubble = 0.25 if "pp" in CASES[name].mesh else 0.0
    gathers = {"all-gather": (3, 2**20)} if "fsdp" in CASES[name].mesh else {}
    parts = CASES[name].parts
    found = one(mixture=CASES[name].mixture)._replace(
        multiply_adds=round(10_000 / (1 - bubble)),
        cut=16_000 // parts if CASES[name].cut else 0,
        whole=16_000 if CASES[name].cut else 0,
        temporary=2_000,
        sent={"all-reduce": (2, 2**21), **gathers},
        bubble=bubble,
        rounded=[],
    )
    return found._replace(**changes)


def holds(**changed) -> list[bool]:
    """Which claims hold where some meshes measure something else; names with "_" for ", "."""
    found = {n: cut(n) if case.mesh else one(mixture=case.mixture) for n, case in CASES.items()}
    found |= {name.replace("_", ", "): each for name, each in changed.items()}
    return [claim.holds for claim in claims_of(SIZES, CASES, found)]


def test_all_hold_where_everything_is_as_it_should_be():
    assert holds() == [True] * 6


@pytest.mark.parametrize(
    ("changed", "wrong"),
    [
        ({"data": cut("data", multiply_adds=11_001)}, 0),
        ({"pipeline": cut("pipeline", multiply_adds=14_700)}, 0),
        ({"tensor": cut("tensor", cut=2_201)}, 1),
        ({"FSDP_tensor_expert": cut("FSDP, tensor, expert", cut=2_201)}, 1),
        ({"context": cut("context", temporary=4_001)}, 2),
        ({"tensor": cut("tensor", sent={"all-gather": (1, 1024)})}, 3),
        ({"expert": cut("expert", losses=[5.5, 4.0, 3.500041])}, 5),
        ({"data_tensor_pipeline": cut("data, tensor, pipeline", losses=[5.5, 4.00002, 3.5])}, 4),
        ({"data": cut("data", losses=[5.49998, 4.0, 3.5])}, 4),
    ],
)
def test_one_mesh_that_fails_is_enough(changed, wrong):
    assert holds(**changed) == [i != wrong for i in range(6)]


def test_within_the_room_everything_holds():
    assert (
        holds(
            data=cut("data", multiply_adds=10_999),
            expert=cut("expert", cut=2_199, losses=[5.50003, 4.0, 3.5]),
        )
        == [True] * 6
    )


def test_figures_are_of_the_same_model_on_one_device():
    found = {"one device": one(mixture=False), "pipeline": cut("pipeline", losses=[5.4, 4.2, 3.5])}
    assert wanted(found["pipeline"]) == pytest.approx(1 / 6)
    assert differs(*found.values()) == pytest.approx(0.2)
    row = row_of("pipeline", AXES, found)
    assert (row["products"], row["temporary"], row["bubble"]) == (0.1667, 0.25, 0.25)
    assert row["sent a step"] == "all-reduce 2 x, 2.00 MiB" and row["loss differs by"] == 0.2
    expert = {**found, "one device, mixture": one(mixture=True)._replace(parameters=32_000)}
    assert row_of("expert", AXES, {**expert, "expert": cut("expert")})["parameters"] == 0.5


@pytest.mark.slow
def test_a_small_step_is_measured():
    names = ("one device", "pipeline", "one device, mixture", "expert")
    sizes = Sizes(width=32, layers=8, length=16, batch=16, steps=2)
    found = measured(sizes, {name: AXES[name] for name in names}, seed=1)
    alone, pipeline, mixture, expert = (found[name] for name in names)
    assert pipeline.bubble == pytest.approx(7 / 23) and pipeline.whole == 8 * pipeline.cut
    assert pipeline.multiply_adds < 1.1 * alone.multiply_adds * wanted(pipeline)
    assert expert.multiply_adds * 8 == mixture.multiply_adds and expert.whole == 8 * expert.cut
    assert set(expert.sent) == {"all-to-all", "all-reduce"} and 1 / 8 < expert.load <= 1
    np.testing.assert_allclose(pipeline.losses, alone.losses, atol=1e-5)
    np.testing.assert_allclose(expert.losses, mixture.losses, atol=1e-5)
    assert 0 < differs(alone._replace(losses=alone.rounded), alone) < 1e-4
