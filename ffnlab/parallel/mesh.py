"""Meshes from their descriptions, and whether a step has any use for them.

A mesh axis that cuts nothing of a step makes its devices repeat the work of others, without a
word; here it is an error.
"""

import difflib
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ffnlab import compat
from ffnlab.errors import ConfigError, MeshError
from ffnlab.layers.logical import LAYOUT, Layout, using

__all__ = ["check_use", "mesh_sizes", "on", "parse_mesh"]


def parse_mesh(
    text: str, *, devices: list[jax.Device] | None = None, layout: Layout = LAYOUT
) -> Mesh:
    """A mesh from its description.

    Args:
      text: see `mesh_sizes`; -1 stands for the devices that are left.
      devices: what to build from; all devices when None.
      layout: that the mesh is for.
    Returns:
      the mesh.
    Raises:
      ConfigError: as `mesh_sizes`.
      MeshError: too few devices; a number of devices that is not divided, where a size is -1.

    >>> parse_mesh("dp=1").axis_names
    ('dp',)
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(text, layout)
    given, there = math.prod(size for size in sizes.values() if size > 0), len(devices)
    if given > there:
        raise MeshError(f"mesh={text!r} needs {given} devices; there are {there}")
    if -1 in sizes.values() and there % given:
        raise MeshError(f"mesh={text!r}: {given} does not divide the {there} devices")
    sizes = {name: there // given if size == -1 else size for name, size in sizes.items()}
    needed = math.prod(sizes.values())
    if jax.process_count() > 1 and needed < there:
        raise MeshError(
            f"mesh={text!r} takes {needed} of {there} devices; several processes use all"
        )
    return compat.make_mesh(tuple(sizes.values()), tuple(sizes), devices=devices[:needed])


def mesh_sizes(text: str, layout: Layout = LAYOUT) -> dict[str, int]:
    """Sizes of mesh axes from a description, before there are any devices.

    Args:
      text: "dp=2,fsdp=2,tp=2": sizes of mesh axes in order; one may be -1, which is left open. ""
        is one device.
      layout: whose axes they are.
    Returns:
      size, at least 1, or -1, by name.
    Raises:
      ConfigError: a malformed description, an axis that the layout lacks, a size of 0 or less, or
        two that are left open.

    >>> mesh_sizes("dp=-1,tp=2")
    {'dp': -1, 'tp': 2}
    """
    known = list(dict.fromkeys(axis for axes in layout.values() for axis in axes))
    sizes: dict[str, int] = {}
    for part in text.replace(" ", "").split(",") if text else ():
        name, _, size = part.partition("=")
        if not name.isidentifier() or not re.fullmatch("-?[0-9]+", size) or name in sizes:
            raise ConfigError(f"mesh={text!r}: {part!r} is not NAME=SIZE, each name once")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0)
            hint = f"; nearest: {near[0]!r}" if near else ""
            raise ConfigError(f"mesh={text!r}: {name!r} is not an axis of the layout {known}{hint}")
        sizes[name] = int(size)
        if sizes[name] < 1 and sizes[name] != -1:
            raise ConfigError(
                f"mesh={text!r}: {part!r} must be at least 1, or -1 for the devices that are left"
            )
    left = [name for name, size in sizes.items() if size == -1]
    if len(left) > 1:
        raise ConfigError(f"mesh={text!r}: one size may be -1, not those of {' and '.join(left)}")
    return sizes or {"dp": 1}


@contextmanager
def on(mesh: Mesh, layout: Layout = LAYOUT) -> Iterator[None]:
    """A context in which `ffnlab.layers.logical.constrain` cuts activations over a mesh."""
    with jax.set_mesh(mesh), using(layout):
        yield


def check_use(program: Any, mesh: Mesh, layout: Layout = LAYOUT) -> None:
    """Checks that every axis of a mesh cuts something in a program that was traced for it.

    The program itself is asked, not the functions that were traced: those may have been traced
    before.

    Args:
      program: a jaxpr.
      mesh: axes of size 1 need cut nothing.
      layout: for the message.
    Raises:
      MeshError: an axis that cuts none of the arrays whose placement the program fixes.
    """
    used = set(axes_in(program)) if mesh.size > 1 else set()
    idle = {name: size for name, size in mesh.shape.items() if size > 1 and name not in used}
    if not idle:
        return
    whole = ",".join(f"{name}={size}" for name, size in mesh.shape.items())
    each = [f"{axis}={size} {_wrong(axis, layout)}" for axis, size in idle.items()]
    raise MeshError(
        f"mesh={whole!r}: {'; '.join(each)}; its devices would repeat the work of others"
    )


def _wrong(axis: str, layout: Layout) -> str:
    names = [name for name, axes in layout.items() if axis in axes]
    lacking = f"has an axis {' or '.join(map(repr, names))} that it divides"
    why = f"none {lacking}" if names else "the layout does not name it"
    if "stages" in names:
        why += " (models.pipeline(model, stages=…, microbatches=…) makes a model that has)"
    return f"cuts neither a leaf of the state nor the batch nor an activation: {why}"


def axes_in(program: Any) -> Iterator[str]:
    """Names of the mesh axes along which a jaxpr, or one within it, places an array."""
    for equation in program.eqns:
        for value in jax.tree.leaves(equation.params):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from axes_in(inner)
            elif isinstance(value, NamedSharding | PartitionSpec):
                yield from axes_of(value)


def axes_of(place: NamedSharding | PartitionSpec) -> Iterator[str]:
    """Names of the mesh axes in a placement."""
    for entry in place.spec if isinstance(place, NamedSharding) else place:
        for axis in entry if isinstance(entry, tuple) else (entry,):
            if isinstance(axis, str):
                yield axis
