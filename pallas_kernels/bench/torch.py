"""The same work by torch where it is installed, timed the same way in the same run.

Weights rotate as in `measure`, and the program of all sets is one CUDA graph, as XLA's is one
program: neither pays for launches from Python. torch is not compiled here, so what surrounds its
products are kernels of their own.
"""

import functools
import importlib
import importlib.util

from pallas_kernels.bench.measure import SETS, TURNS, Absent, Work, alone, counts

DEVICE = "cuda"


def library():
    """torch.

    Raises:
      Absent: it is not installed, or finds no such device.
    """
    if importlib.util.find_spec("torch") is None:
        raise Absent("torch is not installed")
    found = importlib.import_module("torch")
    if DEVICE == "cuda" and not found.cuda.is_available():
        raise Absent("torch finds no GPU")
    return found


def dense(m, width, hidden, cost):
    """The feed-forward layer in bfloat16.

    Args:
      m, width, hidden: tokens and sizes.
      cost: bytes and operations.
    """
    torch = library()

    def run(x, weights):
        gate, up, down = weights
        return (torch.nn.functional.silu(x @ gate) * (x @ up)) @ down

    weights = functools.partial(matrices, [(width, hidden), (width, hidden), (hidden, width)])
    return Work(run, normal((m, width), 99), weights, *cost, fp8=False)


def fp8(m, width, hidden, cost):
    """The layer by `torch._scaled_mm` with scales of 1, which leaves out the search for a scale.

    Args:
      m, width, hidden, cost: see `dense`.
    """
    torch = library()
    if not hasattr(torch, "_scaled_mm"):
        raise Absent(f"torch {torch.__version__} has no _scaled_mm")
    narrow, one = torch.float8_e4m3fn, torch.ones((), device=DEVICE)

    def product(x, w):
        return torch._scaled_mm(x.to(narrow), w, one, one, out_dtype=torch.bfloat16)

    def run(x, weights):
        gate, up, down = weights
        codes = x.to(narrow)
        inner = torch.nn.functional.silu(product(codes, gate)) * product(codes, up)
        return product(inner, down)

    def weights(seed):
        shapes = [(hidden, width), (hidden, width), (width, hidden)]
        return [w.to(narrow).T for w in matrices(shapes, seed)]  # columns contiguous

    return Work(run, normal((m, width), 99), weights, *cost, fp8=True)


def prefill(t, heads, kv_heads, d, cost):
    """Causal attention over one prompt by `scaled_dot_product_attention`, whichever form it picks.

    Args:
      t, heads, kv_heads, d: tokens, heads of queries and of keys, channels.
      cost: bytes and operations.
    """
    attend = library().nn.functional.scaled_dot_product_attention

    def run(q, cache):
        return attend(q, *cache, is_causal=True, enable_gqa=True)

    def weights(seed):
        return [normal((1, kv_heads, t, d), 2 * seed + i) for i in range(2)]

    return Work(run, normal((1, heads, t, d), 99), weights, *cost, fp8=False)


def normal(shape, seed):
    """Random bfloat16 numbers."""
    torch = library()
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.bfloat16)


def matrices(shapes, seed):
    """Random bfloat16 matrices of small numbers."""
    return [0.02 * normal(shape, 10 * seed + i) for i, shape in enumerate(shapes)]


def measure(work, *, sets=SETS, turns=TURNS):
    """Seconds of one product; see `bench.measure`."""
    torch = library()
    with torch.inference_mode():
        held = [work.weights(0)]
        kept = [work.common, work.run(work.common, held[0])]
        kept = sum(x.numel() * x.element_size() for x in kept)
        product = kept + sum(w.numel() * w.element_size() for w in held[0])
        sets, rounds = counts(product, kept, sets)
        held += [work.weights(i) for i in range(1, sets)]
        own = [
            (torch.roll(work.common, i, -1), held[i % sets]) for i in range(sets * rounds)
        ]  # tokens of its own for every product, as in `bench.measure`
        few, many = (
            program(torch, lambda own=some: [work.run(*pair) for pair in own])
            for some in (own[:sets], own)
        )
        return alone(few, many, sets, sets * rounds, turns, lambda done: done)


def program(torch, run):
    """A function that runs `run` and waits for it: on a GPU as a CUDA graph."""
    if DEVICE != "cuda":
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # a library picks its kernels outside of the capture
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def turn():
        graph.replay()
        torch.cuda.synchronize()
        return kept

    return turn
