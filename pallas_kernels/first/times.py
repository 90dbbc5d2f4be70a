"""Times: every launch of the Llama layers by name, then configurations."""

import functools
import os
import statistics
import tempfile
from pathlib import Path

import jax

from pallas_kernels import backend
from pallas_kernels.bench import attention
from pallas_kernels.bench.measure import floor, key, measure
from pallas_kernels.bench.rows import LAYERS, int4
from pallas_kernels.tuning import search, w4a8
from pallas_kernels.w4a8 import plan

TOKENS, TURNS = (1, 16, 1024), 5
KEPT = "PALLAS_KERNELS_FIRST"  # the folder for what is tuned


def works(here):
    """What is timed, by name."""
    layers = here.size(LAYERS, {"tiny FFN": (128, 256)})
    for name, (width, hidden) in layers.items():
        for m in here.size(TOKENS, (1,)):
            yield f"{name}, {m} tokens", functools.partial(int4, m, width, hidden)
    if not here.interpret:
        for s in attention.CACHES:
            for form in ("half", "int4"):
                yield f"decode, {s} keys, {form}", functools.partial(attention.step, form, s)
        yield "prefill, 4096 tokens, FP8", functools.partial(attention.int4, 4096)


def kernels(here):
    """Microseconds of every launch, by CUPTI; in the interpreter of the whole, by the clock."""
    for name, make in works(here):
        work = make()
        least = floor(work, backend.device_kind())
        facts = {"floor_us": least and 1e6 * least}
        if here.interpret:
            facts["us"] = 1e6 * measure(work, sets=2, turns=2)
        else:
            launches = profiled(work)
            facts |= {"us": sum(us for _, us in launches), "launches": launches}
        here.show(name, **facts)


def profiled(work):
    """(kernel, microseconds) of one product's launches in order, medians of TURNS."""
    from jax.experimental.mosaic.gpu import profiler

    run = profiler.measure(jax.jit(work.run), aggregate=False, iterations=TURNS)
    _, turns = run(work.common, jax.jit(work.weights)(key(0)))
    if turns is None:
        raise RuntimeError("CUPTI saw no kernel")
    return [
        (same[0][0], 1e3 * statistics.median(ms for _, ms in same))
        for same in zip(*turns, strict=True)
    ]


def tuning(here):
    """Configurations of the Llama layers for few tokens; what was timed is written at once."""
    folder = Path(os.environ.get(KEPT) or tempfile.mkdtemp(prefix="first-"))
    shapes = here.size(
        [(m, *sizes) for m in (16, 64) for sizes in LAYERS.values()], [(8, 128, 256)]
    )
    makers = []
    for m, width, hidden in shapes:
        for op, n, k in (("glu", 2 * hidden, width), ("matmul", width, hidden)):
            call = plan.Call(op, "sm90", m, n, k)
            interpret = {"interpret": here.interpret}
            makers.append(functools.partial(w4a8.task, call, backend.cores(), **interpret))
    time = (lambda work: 1e-6) if here.interpret else measure
    done = search.run(makers, path=folder / "tuning.json", measure=time)
    here.show("tuned", tasks=done, of=len(makers), folder=str(folder))
