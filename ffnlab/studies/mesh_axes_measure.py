"""What the study of a mesh's axes measures: the step of one decoder, compiled for each of them.

`measured` asks a process that sees as many CPU devices as the meshes have.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from ffnlab import models, parallel, tree
from ffnlab.data import TextBatches, stdlib_text
from ffnlab.layers import MoESpec
from ffnlab.layers.pipelining import Schedule
from ffnlab.learning import backprop
from ffnlab.losses import next_token, routed
from ffnlab.models import Decoder, DecoderConfig
from ffnlab.parallel.pretended import answer, ask
from ffnlab.parallel.program import read_program

__all__ = [
    "AXES",
    "DEVICES",
    "FULL",
    "MICROBATCHES",
    "MIXES",
    "QUICK",
    "Case",
    "Measured",
    "Sizes",
    "measured",
]

DEVICES = 8
MICROBATCHES = 16  # of a pipeline over all devices: two to a stage, a row in each
RATE = 1e-3
EXPERTS = 8


class Case(NamedTuple):
    """A mesh, and what it is said to cut.

    Attributes:
      mesh: of the devices; "" for one device.
      mixture: whether the FFNs are mixtures of experts.
      cut: pattern of paths whose parameters the mesh divides; "" where it divides none.
      parts: devices that such a parameter lies on.
    """

    mesh: str
    mixture: bool = False
    cut: str = ""
    parts: int = 1


AXES: Mapping[str, Case] = {
    "one device": Case(""),
    "data": Case("dp=8"),
    "FSDP": Case("fsdp=8", cut="**", parts=8),
    "tensor": Case("tp=8", cut="**", parts=8),
    "pipeline": Case("pp=8", cut="layers.**", parts=8),
    "context": Case("sp=8"),
    "one device, mixture": Case("", mixture=True),
    "expert": Case("ep=8", mixture=True, cut="**.experts.**", parts=8),
}
MIXES: Mapping[str, Case] = {
    "data, tensor, pipeline": Case("dp=2,tp=2,pp=2", cut="layers.**", parts=4),
    "data, FSDP, context": Case("dp=2,fsdp=2,sp=2", cut="**", parts=2),
    "FSDP, tensor, expert": Case("fsdp=2,tp=2,ep=2", True, cut="**.experts.**", parts=8),
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the decoder, its batches and the run.

    Attributes:
      width, layers: of the decoder; its FFNs have four times the width, its heads 16 channels.
      length: predictions in a row.
      batch: rows.
      steps: of which the losses are compared.
    """

    width: int
    layers: int
    length: int
    batch: int
    steps: int


FULL, QUICK = Sizes(128, 16, 64, 16, 20), Sizes(128, 8, 32, 16, 3)


class Measured(NamedTuple):
    """A step on one device of a mesh, and a run on all.

    Attributes:
      multiply_adds: of a step's products; of experts none, whose number follows the tokens.
      parameters: bytes.
      cut: of them, those of the case.
      whole: bytes of these on one device.
      optimizer: bytes of what the optimizer remembers.
      temporary: bytes of the step's working memory.
      sent: kind of collective -> [count, bytes] of results in a step.
      bubble: share of its time without work, by the schedule of a pipeline.
      losses: of all steps.
      rounded: on one device, losses where every parameter began a last bit away, at random.
      load: the largest share of the experts' rows that a device had, mean over steps; 0 without.
      seconds: to trace and compile.
    """

    multiply_adds: int
    parameters: int
    cut: int
    whole: int
    optimizer: int
    temporary: int
    sent: Mapping[str, tuple[int, int]]
    bubble: float
    losses: list[float]
    rounded: list[float]
    load: float
    seconds: float


def measured(sizes: Sizes, cases: Mapping[str, Case], seed: int) -> dict[str, Measured]:
    """All cases, on pretended devices.

    Args:
      sizes: of what is trained.
      cases: by name.
      seed: of the model and its text.
    """
    request = {
        "sizes": dataclasses.asdict(sizes),
        "cases": {name: list(case) for name, case in cases.items()},
        "seed": seed,
    }
    found = ask(__name__, request, DEVICES)
    return {name: Measured(**each) for name, each in found.items()}


def measure(request: dict[str, Any]) -> dict[str, dict[str, object]]:
    """What `measured` asks for."""
    sizes, found = Sizes(**request["sizes"]), {}
    for name, case in request["cases"].items():
        found[name] = on_mesh(sizes, Case(*case), request["seed"])._asdict()
        print(f"{name}: compiled in {found[name]['seconds']:.0f} s", file=sys.stderr, flush=True)
    return found


def on_mesh(sizes: Sizes, case: Case, seed: int) -> Measured:
    """One case, on the devices of this process."""
    mesh, key = parallel.parse_mesh(case.mesh or "dp=1"), jax.random.key(seed)
    schedule = schedule_of(mesh.shape)
    loss = routed(next_token) if case.mixture else next_token
    rule = backprop(loss, optimizer=optax.adam(RATE))
    state = parallel.shard(rule.init(made(sizes, case, schedule, key), key), mesh)
    text = TextBatches(stdlib_text().train, sizes.batch, sizes.length, seed)
    first, begin = parallel.place_batch(text(0), mesh), time.perf_counter()
    step = parallel.make_step(rule, mesh).trace(state, first).lower().compile()
    seconds = time.perf_counter() - begin
    program, memory = read_program(step.as_text()), step.memory_analysis()
    assert memory is not None  # CPUs tell
    cut, _ = tree.partition(state.model, tree.at(case.cut)) if case.cut else (None, None)
    sizes_of = parallel.bytes_per_device
    place = lambda position: parallel.place_batch(text(position), mesh)  # noqa: E731
    rounded = []
    if not case.mesh:
        moved = state._replace(model=a_bit_away(state.model, key))
        # A step takes its state's place.
        rounded = trained(step, jax.tree.map(jnp.copy, moved), place, sizes.steps)
    rows = trained(step, state, place, sizes.steps)
    loads = [
        max((v for k, v in row.items() if k.startswith("load.device")), default=0.0) for row in rows
    ]
    return Measured(
        program.multiply_adds,
        parameters=sizes_of(state.model),
        cut=sizes_of(cut),
        whole=tree.nbytes(cut),
        optimizer=sizes_of(state.optimizer),
        temporary=memory.temp_size_in_bytes,
        sent={kind: tuple(each) for kind, each in program.sent.items()},
        bubble=0.0 if schedule is None else schedule.bubble,
        losses=[row["loss"] for row in rows],
        rounded=[row["loss"] for row in rounded],
        load=sum(loads) / len(loads),
        seconds=seconds,
    )


def schedule_of(mesh: Mapping[str, int]) -> Schedule | None:
    """Of a mesh with stages: a row in each microbatch for every device among which rows are cut."""
    if mesh.get("pp", 1) == 1:
        return None
    return Schedule(mesh["pp"], MICROBATCHES // mesh.get("dp", 1))


def trained(
    step: Callable, state: PyTree, batch: Callable[[int], PyTree], steps: int
) -> list[dict[str, float]]:
    """The metrics of a run, step by step."""
    rows = []
    for position in range(steps):
        state, metrics = step(state, batch(position))
        rows.append({name: float(value) for name, value in metrics.items()})
    return rows


def a_bit_away(model: PyTree, key: jax.Array) -> PyTree:
    """Every parameter moved by the distance to the next number, up or down."""

    def moved(x: jax.Array) -> jax.Array:
        up = jax.random.bernoulli(key, shape=x.shape)
        there = jnp.nextafter(x, jnp.where(up, jnp.inf, -jnp.inf).astype(x.dtype))
        return jax.device_put(there, x.sharding)

    return jax.tree.map(moved, model)


def made(sizes: Sizes, case: Case, schedule: Schedule | None, key: jax.Array) -> PyTree:
    """The decoder of a case, its layers scanned or in stages; one seed gives one model."""
    heads = sizes.width // 16
    hidden = 4 * sizes.width
    config = DecoderConfig(
        vocab=256,
        width=sizes.width,
        hidden=hidden,
        layers=sizes.layers,
        heads=heads,
        kv_heads=heads,
        head_dim=16,
        mixture=MoESpec(EXPERTS, 2, hidden // 2) if case.mixture else None,
    )
    model = Decoder(config, key=key)
    if schedule is None:
        return models.stack(model)
    return models.pipeline(model, stages=schedule.stages, microbatches=schedule.microbatches)


if __name__ == "__main__":
    answer(measure)
