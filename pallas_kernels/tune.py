"""`python -m pallas_kernels.tune`: times the kernels' configurations on the GPU at hand.

The fastest of each call whose numbers agree with the reference is kept in the user's file, and the
kernels take it from then on. Without shapes it does the layers of Llama-2-7B and Llama-3-8B and two
mixtures of experts: some hundred configurations, each of which is compiled. What is finished is
kept, and the same command goes on; so it does where a configuration takes the device with it.
"""

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels import backend
from pallas_kernels.bench.measure import measure
from pallas_kernels.bench.rows import EXPERTS, LAYERS, TOKENS
from pallas_kernels.tuning import cache, search, sparse, w4a8
from pallas_kernels.w4a8 import backends, checks, packed, plan

OPERATIONS = ("w4a8.matmul", "w4a8.glu", "w4a8.grouped", "sparse.matvec", "sparse.glu")
MIXED = (512, 4096)  # tokens over the experts


class Place(NamedTuple):
    """Where configurations are timed.

    Attributes:
      w4a8: the INT4 x FP8 kernel that runs there, None for none.
      sparse: whether the sparse kernels run there.
      cores: multiprocessors.
      interpret: whether kernels run in the interpreter, for tests.
    """

    w4a8: str | None
    sparse: bool
    cores: int = 132
    interpret: bool = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = parser().parse_args(arguments)
    try:
        place = here()
        tasks = collect(options, place)
        path = options.file or cache.user_file()
        print(f"{len(tasks)} tasks on {backend.device_kind()}; kept in {path}\n", flush=True)
        done = search.run(tasks, path=path, measure=measure, again=options.again)
    except (ValueError, OSError) as error:
        print(f"tune: error: {error}", file=sys.stderr)
        return 2
    except search.DeviceLost as error:
        print(f"\ntune: the device is lost after {error}", file=sys.stderr)
        print("what was timed is kept; the same command goes on with the next", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ntune: interrupted; what was finished is kept, and the same command goes on")
        return 130
    return 0 if done == len(tasks) else 1


def parser():
    """The options of the command line."""
    made = argparse.ArgumentParser(prog="python -m pallas_kernels.tune", description=__doc__)
    made.add_argument("operations", nargs="*", metavar="OP", help=f"of {', '.join(OPERATIONS)}")
    made.add_argument(
        "--shape",
        action="append",
        type=sizes,
        metavar="M,K,N",
        help="tokens, rows and columns of a matrix (of a GLU's gate); repeatable; sparse: M is 1",
    )
    made.add_argument("--experts", type=int, default=8, help="matrices of w4a8.grouped")
    made.add_argument("--encoding", default="sm", choices=packed.ENCODINGS, help="of INT4 codes")
    made.add_argument("--treatment", default="promote", choices=checks.TREATMENTS, help="of scales")
    made.add_argument(
        "--scales",
        default="bfloat16",
        choices=[jnp.dtype(d).name for d in checks.SCALE_DTYPES],
        help="their dtype",
    )
    made.add_argument("--out", default="bfloat16", choices=tuple(w4a8.BOUNDS), help="result dtype")
    made.add_argument("--again", action="store_true", help="time what the file holds once more")
    made.add_argument("--file", type=Path, help=f"instead of the user's ({cache.VARIABLE})")
    return made


def sizes(text):
    """Three numbers from "M,K,N"."""
    numbers = [int(word) for word in text.split(",")]
    if len(numbers) != 3 or min(numbers) < 1:
        raise ValueError(text)
    return tuple(numbers)


def here():
    """The `Place` that the default device is.

    Raises:
      ValueError: it is no GPU, or one that no kernel with a configuration runs on.
    """
    platform, capability = backend.device()
    if platform != "gpu":
        raise ValueError(
            f"no GPU here (jax finds {backend.device_kind()}): configurations are timed on the GPU "
            "that will use them"
        )
    fit = functools.partial(backend.unfit, platform=platform, capability=capability)
    from pallas_kernels.sparse import api

    int4 = [b for b in backends.table("matmul", print, print) if b.name in plan.LIMITS]
    mosaic = [b for b in api.BACKENDS["matvec"] if b.name == "mosaic"]
    kernel = next((b.name for b in int4 if fit(b) is None), None)
    skips = any(fit(b) is None for b in mosaic)
    if kernel is None and not skips:
        reasons = "; ".join(f"{b.name}: {fit(b)}" for b in (*int4, *mosaic))
        raise ValueError(f"no kernel with a configuration runs here: {reasons}")
    return Place(kernel, skips, backend.cores())


def collect(options, place):
    """Functions that make the tasks asked for.

    Args:
      options: of `parser`.
      place: a `Place`; without operations what cannot run there is left out.
    Raises:
      ValueError: an unknown operation, one that cannot run there, or a shape that does not fit.
    """
    able = [op for op in OPERATIONS if (place.sparse if op[0] == "s" else place.w4a8)]
    for op in options.operations:
        if op not in able:
            raise ValueError(f"operation={op!r}; accepted here: {', '.join(able)}")
    found = []
    for op in options.operations or able:
        kind, _, name = op.partition(".")
        of_kind = int4 if kind == "w4a8" else skipping
        found += of_kind(name, options, place)
    return found


def int4(op, options, place):
    """Makers of the INT4 x FP8 tasks of an operation."""
    if options.shape:
        shapes = [(m, k, n, options.experts) for m, k, n in options.shape]
    elif op == "grouped":
        shapes = [(m, k, n, e) for e, (k, n) in EXPERTS.items() for m in MIXED]
    else:
        pairs = [(k, n) if op == "glu" else (n, k) for k, n in LAYERS.values()]
        shapes = [(m, k, n, 1) for k, n in pairs for m in TOKENS]
    variant = options.encoding, options.treatment, options.scales, options.out
    makers = []
    for m, k, n, experts in shapes:
        if k % packed.TILE_ROWS:
            raise ValueError(f"K={k} of {op} must be a multiple of {packed.TILE_ROWS}")
        columns = -(-n // packed.PAIR) * packed.PAIR * (2 if op == "glu" else 1)
        experts = experts if op == "grouped" else 1
        call = plan.Call(op, place.w4a8, m, columns, k, experts, *variant)
        reason = plan.refuse(plan.heuristic(call, place.cores), call)
        if reason is not None:
            raise ValueError(f"{w4a8.title(call)}: {reason}")
        makers.append(functools.partial(w4a8.task, call, place.cores, interpret=place.interpret))
    return makers


def skipping(name, options, place):
    """Makers of the sparse tasks of an operation, of one token each."""
    shapes = [(k, n) for _, k, n in options.shape or ()]
    if not shapes:
        shapes = [(n, k) if name == "matvec" else (k, n) for k, n in LAYERS.values()]
    suffix = "_interpret" if place.interpret else ""
    task = functools.partial(sparse.task, backend=f"mosaic{suffix}")
    return [functools.partial(task, name, *s, int4) for s in shapes for int4 in (False, True)]


if __name__ == "__main__":
    sys.exit(main())
