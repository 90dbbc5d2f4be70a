"""Kernels: the ground floor of ffnlab, which knows arrays and nothing of ffnlab.

Each kernel is a folder. `reference.py` is its meaning in plain jnp and float32, there is one file
per backend, and `api.py` holds the one public function: it checks, pads, picks the backend
(`pallas_kernels.backend`) and differentiates. Only jax and numpy are imported here. Weights,
layers and models live in `ffnlab`.
"""

__all__: list[str] = []
