"""ffnlab: a library and a lab for feed-forward networks, in language models and alone, in JAX.

A model is a pytree; every method is a pure function from pytree to pytree. Sub-packages are the
namespaces (`ffnlab.quantization.fireq`) and are imported when first used, so that `import ffnlab`
touches neither jax, a GPU, the network nor any optional package.
"""

import importlib
from types import ModuleType

__version__ = "0.1.0"

# Sub-packages and modules, imported on first use; a test compares this list with the folder.
__all__ = [
    "analysis",
    "bench",
    "cli",
    "clock",
    "compat",
    "compress",
    "data",
    "docstrings",
    "editing",
    "errors",
    "layers",
    "formats",
    "graph",
    "graphs",
    "learning",
    "losses",
    "models",
    "options",
    "outside",
    "parallel",
    "probe",
    "progress",
    "pruning",
    "quantization",
    "recipes",
    "report",
    "routing",
    "rule",
    "scores",
    "sequences",
    "sparsity",
    "storage",
    "structure",
    "studies",
    "testing",
    "text",
    "transform",
    "tree",
    "weights",
]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
