"""What a GPU is asked first: `python -m pallas_kernels.first`, `make gpu-first`.

Nine minutes in stages, each a process of its own that ends after a minute, what is likeliest to
work first: the machine, kernels without tensor copies, one tile of INT4 products (how weights are
decoded), integers, persistent pieces repeated, attention, then times. A page says what was found,
and JSON keeps it; `--interpret` runs all of it in Pallas' interpreter at tiny sizes.
"""

from pallas_kernels.first.stages import STAGES, Here, Stage

__all__ = ["STAGES", "Here", "Stage"]
