"""The stages in order, and what one is given."""

import json
from collections.abc import Callable
from typing import NamedTuple

from pallas_kernels.backend import lazy


class Here(NamedTuple):
    """Where a stage runs.

    Attributes:
      interpret: whether kernels run in the interpreter, on tiny shapes.
    """

    interpret: bool

    def size(self, large, tiny):
        """`large` on a GPU, `tiny` in the interpreter."""
        return tiny if self.interpret else large

    def backend(self, name):
        """The backend called `name`, or its interpreted twin."""
        return f"{name}_interpret" if self.interpret else name

    def show(self, what, **facts):
        """Prints a finding at once: a line of JSON, which `__main__` collects."""
        print(json.dumps({"what": what, **facts}), flush=True)


class Stage(NamedTuple):
    """A process of the run.

    Attributes:
      name: on the page.
      run: called with a `Here`.
      blocking: whether each launch is waited for, so that a fault is its own kernel's.
      seconds: that it may take.
    """

    name: str
    run: Callable[[Here], None]
    blocking: bool = True
    seconds: float = 60.0


def stage(name, module, function, **options):
    """A `Stage` whose module is imported by its own process."""
    return Stage(name, lazy(f"pallas_kernels.first.{module}", function), **options)


STAGES = (
    stage("machine", "machine", "machine", blocking=False),
    stage("quantize and sparse", "machine", "plain"),
    stage("w4a8: decoded weights", "products", "words"),
    stage("w4a8: integers", "products", "integers"),
    stage("w4a8: sm against tc", "products", "encodings"),
    stage("w4a8: persistent pieces", "products", "pieces"),
    stage("w4a8: repeats", "products", "repeats", blocking=False),
    stage("w4a8: blocks that share tokens", "products", "neighbours", blocking=False),
    stage("grouped", "products", "grouped"),
    stage("prefill", "attend", "prefill"),
    stage("decode", "attend", "decode"),
    stage("decode, INT4 with e4m3 scales", "attend", "int4"),
    stage("times by kernel", "times", "kernels", blocking=False),
    stage("tuning", "times", "tuning", blocking=False, seconds=600.0),  # all that is left
)
