"""What each axis of a mesh costs: one decoder on eight devices, cut in one way after the other.

The step is compiled for each mesh, and read: what a device multiplies, holds, needs meanwhile and
sends. Then it is run, beside one device. Devices are pretended ones: nothing here is a time.
"""

import time
from collections.abc import Mapping

from ffnlab.storage.files import StrPath
from ffnlab.studies import STUDIES
from ffnlab.studies.mesh_axes_measure import (
    AXES,
    DEVICES,
    FULL,
    MICROBATCHES,
    MIXES,
    QUICK,
    Case,
    Measured,
    Sizes,
    measured,
)
from ffnlab.studies.result import Claim, Result

__all__ = ["run"]

FEW = ("one device", "FSDP", "pipeline", "one device, mixture", "expert")  # of the quick form
ROOM = 1.1  # of an even share
EQUAL = 1e-5  # nats
MIB = 2**20

Found = Mapping[str, Measured]


def run(*, out: StrPath | None = None, quick: bool = False, seed: int = 0) -> Result:
    """The study; arguments as for `ffnlab.studies.run.run_study`."""
    begin = time.perf_counter()
    sizes, cases = (QUICK, {n: AXES[n] for n in FEW}) if quick else (FULL, {**AXES, **MIXES})
    found = measured(sizes, cases, seed)
    return Result(
        slug="mesh-axes",
        title=STUDIES["mesh-axes"].title,
        settings={
            "model": f"decoder, width {sizes.width}, {sizes.layers} layers of 8 heads; mixtures: "
            "8 experts, 2 a token",
            "batch": f"{sizes.batch} rows of {sizes.length} bytes of the standard library",
            "microbatches": MICROBATCHES,
            "steps": sizes.steps,
            "rule": "backprop, Adam",
        },
        seed=seed,
        quick=quick,
        seconds=time.perf_counter() - begin,
        claims=claims_of(sizes, cases, found),
        table=[row_of(name, cases, found) for name in cases],
        pictures={"axes": lambda figure: axes_picture(figure, cases, found)},
    ).write(out)


def alone(cases: Mapping[str, Case], found: Found, name: str) -> Measured:
    """The same model on one device."""
    mixture = cases[name].mixture
    return next(found[n] for n, case in cases.items() if not case.mesh and case.mixture == mixture)


def wanted(found: Measured) -> float:
    """The share of one device's products that a device should have: its part, and its bubble's."""
    return 1 / DEVICES / (1 - found.bubble)


def differs(one: Measured, other: Measured) -> float:
    """The largest difference of two runs' losses, nats."""
    return max(abs(a - b) for a, b in zip(one.losses, other.losses, strict=True))


def claims_of(sizes: Sizes, cases: Mapping[str, Case], found: Found) -> list[Claim]:
    """All claims; each is decided over all meshes."""
    meshes = {name: case for name, case in cases.items() if case.mesh}
    one = {name: alone(cases, found, name) for name in meshes}
    products = {name: found[name].multiply_adds / one[name].multiply_adds for name in meshes}
    held = {name: found[name].cut / found[name].whole for name in meshes if cases[name].cut}
    memory = {name: found[name].temporary / one[name].temporary for name in meshes}
    gathers = {n: found[n].sent.get("all-gather", (0, 0))[1] / 2**10 for n in meshes}
    activation = sizes.batch * sizes.length * sizes.width * 4 / DEVICES
    others = {n: size for n, size in gathers.items() if "fsdp" not in cases[n].mesh}
    return [
        Claim(
            "each device does its part of the products, and a pipeline's that of its bubble",
            "1 / devices; (M + S - 1) / (M S) of a pipeline",
            said(products, ".3f"),
            all(share <= ROOM * wanted(found[name]) for name, share in products.items()),
            "multiply-adds of the compiled step over those on one device, at most 1.1 of that; "
            "without those of experts, whose number follows the tokens",
            seeds=0,
        ),
        Claim(
            "each device holds its part of what its axis cuts",
            "1 / devices",
            said(held, ".3f"),
            all(share <= ROOM / cases[name].parts for name, share in held.items()),
            "bytes of parameters on a device over all, at most 1.1 of the part: all parameters, of "
            "a pipeline those of its layers, of experts theirs",
            seeds=0,
        ),
        Claim(
            "each axis halves the working memory of a device, or better",
            "-",
            said(memory, ".3f"),
            all(share <= 0.5 for share in memory.values()),
            "bytes that the compiled step needs beside its state, over those on one device; CPUs",
            seeds=0,
        ),
        Claim(
            "only FSDP gathers",
            "activations are sent, parameters stay",
            f"KiB of all-gathers in a step: {said(gathers, '.1f')}",
            all(size < activation / 2**10 for size in others.values()),
            "results of all-gathers of the compiled step on meshes without fsdp, together less "
            f"than a device's part of one activation, {activation / 2**10:.0f} KiB",
            seeds=0,
        ),
        *equal_claims(cases, found),
    ]


def equal_claims(cases: Mapping[str, Case], found: Found) -> list[Claim]:
    """Whether runs are that of one device, without and with experts.

    Which experts a token takes can turn on a last bit, and then the losses of two devices differ as
    those of one that began a last bit away.
    """
    apart = {n: differs(found[n], alone(cases, found, n)) for n, case in cases.items() if case.mesh}
    dense = {name: each for name, each in apart.items() if not cases[name].mixture}
    mixed = {name: each for name, each in apart.items() if cases[name].mixture}
    one = alone(cases, found, next(iter(mixed)))
    rounding = differs(one._replace(losses=one.rounded), one)
    return [
        Claim(
            "a run on any of them is that on one device",
            "-",
            f"largest difference {said(dense, '.1e')} nats",
            all(each <= EQUAL for each in dense.values()),
            f"losses of {len(one.losses)} steps, all within 1e-5; models without experts",
            seeds=1,
        ),
        Claim(
            "and with experts, as near as choices between them can be",
            "-",
            f"largest difference {said(mixed, '.1e')} nats; on one device from parameters a last "
            f"bit away {rounding:.1e}",
            all(each <= max(EQUAL, 2 * rounding) for each in mixed.values()),
            "likewise, within 1e-5 or twice what a last bit of every parameter makes",
            seeds=1,
        ),
    ]


def said(values: Mapping[str, float], form: str) -> str:
    """Figures by name."""
    return ", ".join(f"{name} {value:{form}}" for name, value in values.items())


def row_of(name: str, cases: Mapping[str, Case], found: Found) -> dict[str, object]:
    """A row of the table: shares are of one device with the same model."""
    each, one = found[name], alone(cases, found, name)
    sent = [f"{kind} {count} x, {size / MIB:.2f} MiB" for kind, (count, size) in each.sent.items()]
    return {
        "axis": name,
        "mesh": cases[name].mesh or "-",
        "products": round(each.multiply_adds / one.multiply_adds, 4),
        "parameters": round(each.parameters / one.parameters, 4),
        "optimizer": round(each.optimizer / one.optimizer, 4),
        "temporary": round(each.temporary / one.temporary, 4),
        "sent a step": "; ".join(sorted(sent)) or "-",
        "bubble": round(each.bubble, 4),
        "loss differs by": float(f"{differs(each, one):.2g}"),
        "largest load": round(each.load, 4),
        "MiB of parameters": round(each.parameters / MIB, 3),
        "MiB temporary": round(each.temporary / MIB, 3),
        "compiled in s": round(each.seconds, 1),
    }


def axes_picture(figure, cases: Mapping[str, Case], found: Found) -> None:
    """What a device has of one device's work, parameters and memory, and what it sends."""
    figure.set_size_inches(8, 4.2)
    shares, sending = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    names = [name for name, case in cases.items() if case.mesh]
    places = range(len(names))
    for i, (part, color) in enumerate(
        (("multiply_adds", "C0"), ("parameters", "C1"), ("temporary", "C7"))
    ):
        values = [getattr(found[n], part) / getattr(alone(cases, found, n), part) for n in names]
        label = {"multiply_adds": "products", "temporary": "working memory"}.get(part, part)
        at = [place + 0.27 * (i - 1) for place in places]
        shares.barh(at, values, height=0.25, color=color, label=label)
    shares.axvline(1 / DEVICES, color="black", linestyle="--", linewidth=0.8)
    shares.set_xlabel("of one device; dashed: 1 / 8")
    shares.set_yticks(places, names)
    shares.invert_yaxis()
    shares.legend(frameon=False, fontsize=8)
    left = [0.0] * len(names)
    for i, kind in enumerate(sorted({kind for n in names for kind in found[n].sent})):
        sizes = [found[n].sent.get(kind, (0, 0))[1] / MIB for n in names]
        sending.barh(places, sizes, left=left, height=0.6, color=f"C{i + 2}", label=kind)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    sending.set_xlabel("MiB of results a device and step")
    sending.legend(frameon=False, fontsize=8)
    for axes in (shares, sending):
        axes.spines[["top", "right"]].set_visible(False)
