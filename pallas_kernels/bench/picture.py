"""`python -m pallas_kernels.bench.picture OUT`: a layer's time by tokens, against its floors.

The lines are floors, which bytes, operations and a chip's rates set: no kernel can be faster. With
`--json`, figures that `python -m pallas_kernels.bench --json` wrote are added as points. Needs
matplotlib.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from pallas_kernels.bench.measure import RATES, Work, floor
from pallas_kernels.bench.rows import LAYERS, TOKENS, cost, layer

# By whom a layer is computed: its row's name, bits of a weight, bytes of a scale, FP8, its line.
FORMS = (
    ("bfloat16 XLA", 16, 0, False, "--", "tab:gray"),
    ("FP8 XLA", 8, 0, True, "--", "tab:blue"),
    ("w4a8", 4, 2, True, ":", "tab:orange"),
)
GRID = [2 ** (i / 4) for i in range(53)]  # tokens: 1 to 8192


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.bench.picture")
    parser.add_argument("out", type=Path, help="the picture, .png or .svg")
    parser.add_argument("--json", type=Path, help="figures of `python -m pallas_kernels.bench`")
    parser.add_argument("--device", default="H200", choices=tuple(RATES), help="without figures")
    options = parser.parse_args(arguments)
    facts = json.loads(options.json.read_text()) if options.json else {}
    pyplot = importlib.import_module("matplotlib.pyplot")
    figure = pyplot.figure(layout="constrained")
    try:
        draw(figure, facts.get("device", options.device), facts.get("rows", ()))
        figure.savefig(options.out, dpi=100)
    except ValueError as error:
        print(f"picture: error: {error}", file=sys.stderr)
        return 2
    finally:
        pyplot.close(figure)
    return 0


def draw(figure, device, measured=()):
    """Draws a panel per layer.

    Args:
      figure: an empty figure of matplotlib; it is resized.
      device: a GPU's name whose rates are known.
      measured: rows as `bench.__main__.table` gives them.
    Raises:
      ValueError: rates of the device are not known.
    """
    figure.set_size_inches(9, 3.8)
    points = {(row["task"], row["name"]): row["us"] for row in measured if row.get("us")}
    panels = figure.subplots(1, len(LAYERS), sharey=True)
    for axes, (name, sizes) in zip(panels, LAYERS.items(), strict=True):
        for by, bits, scale, fp8, style, color in FORMS:
            least = [floors(device, m, sizes, bits, scale, fp8) for m in GRID]
            form = by.removesuffix(" XLA")
            axes.plot(GRID, least, style, lw=2, color=color, label=f"{form}: floor")
            own = [
                (m, points[layer(name, m), by]) for m in TOKENS if (layer(name, m), by) in points
            ]
            if own:
                axes.plot(*zip(*own, strict=True), "o", color=color, label=f"{by}: measured")
        axes.set(
            xscale="log", yscale="log", xlabel="tokens", title=f"{name}, {sizes[0]} x {sizes[1]}"
        )
        named = [m for m in TOKENS if m != 4096]  # its number would lie over the last one's
        axes.set_xticks(named, [str(m) for m in named])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("µs for gate, up and down")
    panels[0].legend()
    known = "floors and what was measured" if points else "floors; nothing was measured"
    figure.suptitle(f"{device}: {known}", fontsize=12)


def floors(device, m, sizes, bits, scale, fp8):
    """Microseconds that a layer of m tokens takes at least."""
    nbytes, flops = cost(m, sizes[0], sizes[1], bits, scale)
    work = Work(lambda: None, None, lambda: None, nbytes, flops, fp8)
    seconds = floor(work, device)
    if seconds is None:
        raise ValueError(f"device={device!r} has no known rates; there are: {', '.join(RATES)}")
    return 1e6 * seconds


if __name__ == "__main__":
    sys.exit(main())
