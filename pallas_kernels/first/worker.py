"""One stage in this process: `python -m pallas_kernels.first.worker NUMBER [interpret]`."""

import sys

import jax

from pallas_kernels import backend
from pallas_kernels.first.stages import STAGES, Here

NO_GPU = 3  # exit status


def main(number, interpret=None):
    """Runs a stage; returns the exit status."""
    if not interpret and backend.device()[0] != "gpu":
        print(f"no NVIDIA GPU here: jax finds {jax.devices()[0].device_kind}", file=sys.stderr)
        return NO_GPU
    STAGES[int(number)].run(Here(bool(interpret)))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
