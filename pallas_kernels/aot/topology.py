"""Descriptions of chips, and how to compile or lower for one that is not there.

Three traps: Mosaic GPU reads the architecture off the default device, not off the sharding; XLA
wants an explicit `target_config`; and JAX_PLATFORMS must be "cpu", or jax looks for a GPU.
"""

from typing import NamedTuple

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding


class Chip(NamedTuple):
    """A chip as the compiler sees it.

    Attributes:
      platform: "gpu" or "tpu".
      kind: the device's name, as the driver gives it.
      capability: compute capability of a GPU.
      cores: streaming multiprocessors of a GPU.
      shared: bytes of shared memory that one block of a GPU may ask for.
      topology: name of a TPU topology.
    """

    platform: str
    kind: str
    capability: tuple[int, int] = (0, 0)
    cores: int = 1
    shared: int = 0
    topology: str = ""


CHIPS = {
    "h200": Chip("gpu", "NVIDIA H200", (9, 0), 132, 232448),
    "a100": Chip("gpu", "NVIDIA A100-SXM4-40GB", (8, 0), 108, 166912),
    "l4": Chip("gpu", "NVIDIA L4", (8, 9), 58, 101376),
    "t4": Chip("gpu", "Tesla T4", (7, 5), 40, 65536),
    "v5e": Chip("tpu", "TPU v5 lite", topology="v5e:2x2"),
    "v6e": Chip("tpu", "TPU v6 lite", topology="v6e:2x2"),
}


def describe(name, devices=1):
    """The topology of `devices` chips called `name` (a key of CHIPS), as jax compiles for it."""
    from jax.experimental import topologies

    chip = find(name)
    if chip.platform == "tpu":
        return topologies.get_topology_desc(chip.topology, "tpu")
    return topologies.get_topology_desc(
        platform="cuda", topology=f"1x1x{devices}", target_config=target(chip)
    )


def target(chip):
    """XLA's description of a GPU; bandwidth, caches and clock only guide its own planning."""
    major, minor = chip.capability
    extension = " feature_extension: ACCELERATED_FEATURES" if major == 9 else ""
    return f"""gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {chip.shared + 1024}
  shared_memory_per_block_optin: {chip.shared} core_count: {chip.cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.8
  device_memory_size: 80000000000
  cuda_compute_capability {{ major: {major} minor: {minor}{extension} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  device_vendor: "NVIDIA Corporation" device_address_bits: 64 name: "{chip.kind}"
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0" }}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{chip.kind}" """


def compile_for(f, args, name):
    """Compiles f for one chip.

    Args:
      f: a function of arrays.
      args: a tuple of trees of `jax.ShapeDtypeStruct` (or arrays).
      name: a key of CHIPS.
    Returns:
      `jax.stages.Compiled`. An error inside LLVM ends the process instead.
    Raises:
      ValueError: unknown chip.
    """
    first = describe(name).devices[0]
    place = SingleDeviceSharding(first)
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), args)
    with jax.default_device(first):
        return jax.jit(f).trace(*args).lower().compile()


def lower_for(f, args, name):
    """Lowers f for one chip; needs no package but jax.

    Args:
      f, args, name: see `compile_for`.
    Returns:
      the lowered module as text; a Pallas kernel is a custom call in it ("mosaic_gpu" on a GPU,
      "tpu_custom_call" on a TPU).
    Raises:
      ValueError: unknown chip.
    """
    with abstract_mesh(name, 1, "x"):
        traced = jax.jit(f).trace(*args)
        return traced.lower(lowering_platforms=(lowering_platform(name),)).as_text()


def abstract_mesh(name, devices, axis):
    """A context in which tracing sees a mesh of `devices` chips along one axis.

    Args:
      name: a key of CHIPS.
      devices: size of the axis.
      axis: its name.
    Returns:
      a context manager that gives the mesh, for `jax.shard_map`.
    """
    chip = find(name)
    kind = AbstractDevice(device_kind=chip.kind, num_cores=chip.cores, platform=chip.platform)
    mesh = AbstractMesh((devices,), (axis,), (AxisType.Auto,), abstract_device=kind)
    return jax.sharding.use_abstract_mesh(mesh)


def lowering_platform(name):
    """What jax calls the platform of a chip when it lowers."""
    return "cuda" if find(name).platform == "gpu" else "tpu"


def find(name):
    """The chip called `name`.

    Raises:
      ValueError: unknown chip.
    """
    if name not in CHIPS:
        raise ValueError(f"chip={name!r} is unknown; accepted: {', '.join(map(repr, CHIPS))}")
    return CHIPS[name]
