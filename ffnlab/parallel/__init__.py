"""Running a rule: the training loop, its checkpoints and configuration.

The loop takes a `Rule` and never asks which one it is. Where arrays live (meshes and layouts) is
this package's business; what is learned is `ffnlab.learning`'s.
"""

from ffnlab.data import Parted
from ffnlab.parallel.config import from_table, read_config, to_table
from ffnlab.parallel.evaluate import (
    held_out_accuracy,
    held_out_bits,
    held_out_error,
    held_out_masked,
    held_out_noise,
    held_out_spans,
)
from ffnlab.parallel.forms import reformed
from ffnlab.parallel.goodput import Goodput
from ffnlab.parallel.guard import skip_bad_steps
from ffnlab.parallel.lock import locked
from ffnlab.parallel.loop import Outcome, mesh_of, train
from ffnlab.parallel.memory import Identity
from ffnlab.parallel.mesh import mesh_sizes, on, parse_mesh
from ffnlab.parallel.options import LoopOptions
from ffnlab.parallel.processes import agree, is_first, joined, meet
from ffnlab.parallel.rates import Work
from ffnlab.parallel.sharding import (
    MeshStep,
    abstract,
    batch_part,
    batch_shardings,
    bytes_per_device,
    check,
    create,
    make_step,
    place_batch,
    place_part,
    shard,
    shardings,
)

__all__ = [
    "Goodput",
    "Identity",
    "LoopOptions",
    "MeshStep",
    "Outcome",
    "Parted",
    "Work",
    "abstract",
    "agree",
    "batch_part",
    "batch_shardings",
    "bytes_per_device",
    "check",
    "create",
    "from_table",
    "held_out_accuracy",
    "held_out_bits",
    "held_out_error",
    "held_out_noise",
    "held_out_masked",
    "held_out_spans",
    "is_first",
    "joined",
    "locked",
    "make_step",
    "meet",
    "mesh_of",
    "mesh_sizes",
    "on",
    "parse_mesh",
    "place_batch",
    "place_part",
    "read_config",
    "reformed",
    "shard",
    "shardings",
    "skip_bad_steps",
    "to_table",
    "train",
]
