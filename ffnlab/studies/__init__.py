"""One study per paper: the smallest honest experiment that shows the paper's claims.

A study module has `run(*, out=None, quick=False, seed=0) -> Result` and is built from the public
API only, so that it is also the worked example of its method. Methods, models and losses do not
belong here. The table below is the list that `ffnlab list` prints; modules are imported by `load`.
"""

import dataclasses
import difflib
import importlib
from collections.abc import Mapping
from types import MappingProxyType, ModuleType

from ffnlab.errors import SelectionError
from ffnlab.studies.status import last_status

__all__ = ["STUDIES", "Study", "last_status", "load"]


@dataclasses.dataclass(frozen=True)
class Study:
    """A row of the list of studies.

    Attributes:
      slug: name on the command line.
      title: one line.
      package: sub-package that holds the method.
    """

    slug: str
    title: str
    package: str

    @property
    def module(self) -> str:
        """Dotted name of the module with `run`."""
        return f"{__name__}.{self.slug.replace('-', '_')}"


STUDIES: Mapping[str, Study] = MappingProxyType(
    {
        study.slug: study
        for study in (
            Study("chess", "Activation thresholds per channel, and rows skipped", "sparsity"),
            Study("finercut", "Greedy removal of attention and FFN sublayers", "pruning"),
            Study("fireq", "INT4 weights and KV cache, FP8 activations", "quantization"),
            Study("counter-current", "Two networks against each other, local losses", "learning"),
            Study("gradient-noise", "Annealed noise on gradients of deep networks", "learning"),
            Study("lamb", "Updates as long as their weights, for large batches", "learning"),
            Study("learning-rules", "Rules side by side: accuracy, memory, direction", "learning"),
            Study("noprop", "Blocks that denoise a class, each trained alone", "learning"),
        )
    }
)


def load(slug: str) -> ModuleType:
    """Imports the module of a study.

    Args:
      slug: a key of `STUDIES`.
    Returns:
      the module; `load(slug).run(quick=True)` runs it.
    Raises:
      SelectionError: no such study; the message lists them, the nearest name first.

    >>> load("finercut").__name__
    'ffnlab.studies.finercut'
    """
    if slug not in STUDIES:
        near = difflib.get_close_matches(slug, STUDIES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise SelectionError(f"no study {slug!r}; {hint}there are: {', '.join(STUDIES)}")
    return importlib.import_module(STUDIES[slug].module)
