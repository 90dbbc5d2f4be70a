"""Compiling for a GPU or TPU on a machine that has none: `python -m pallas_kernels.aot`.

Every kernel folder lists what it ships in `cases.py`; each entry is compiled to machine code for
its chips and checked for spilled registers and for the instructions it is there for; where the
rules of its backend say that this jax cannot, that reason is its line of the table. Needs the
packages of `constraints/aot-jax*.txt` beside jax; `make aot` installs them.
"""

from pallas_kernels.aot.cases import Case, collect, named
from pallas_kernels.aot.topology import CHIPS, compile_for, lower_for

__all__ = ["CHIPS", "Case", "collect", "compile_for", "lower_for", "named"]
