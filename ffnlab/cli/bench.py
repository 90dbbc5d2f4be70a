"""`ffnlab bench [WHAT]`: speed and memory, beside other libraries where they do the same."""

from pathlib import Path
from typing import Literal

__all__ = [
    "analysis",
    "bottleneck",
    "columns",
    "editing",
    "elastic",
    "folding",
    "graphs",
    "kernels",
    "learning",
    "loading",
    "loop",
    "metanetwork",
    "model",
    "routing",
    "sparse",
    "structured",
    "train",
]


def model(
    directory: Path | None = None,
    /,
    *,
    vs: Literal["transformers", "qwix"] = "transformers",
    prompt: int = 64,
    new: int = 128,
    prefill: int = 512,
    window: int = 512,
    windows: int = 8,
    turns: int = 9,
) -> None:
    """Measures a language model in turns with another library on the same weights.

    With transformers: prefill, greedy decoding and evaluation. It runs in its own process: by the
    interpreter that FFNLAB_PARITY_PYTHON names, else by this one where torch is installed. With
    qwix: quantized matrix products, [1, width] and [64, width] times [width, hidden].

    Other benches: `ffnlab bench sparse` (skipping inactive channels of a large FFN), `ffnlab bench
    loading` (memory while a checkpoint is loaded), `ffnlab bench routing` (a mixture of experts
    beside a dense layer), `ffnlab bench bottleneck` (a block of images by its spatial step),
    `ffnlab bench folding` (an FFN with idle channels, folded), `ffnlab bench elastic` (steps that
    train networks of all widths), `ffnlab bench columns` (memory and time of reversible columns),
    `ffnlab bench structured` (FFNs of thin products and of blocks, beside dense ones), `ffnlab
    bench editing` (facts found together, beside one alone), `ffnlab bench train` (training steps,
    beside torch), `ffnlab bench learning` (steps of an LSTM and of a small network, beside torch),
    `ffnlab bench graphs` (sparse products and a layer, beside torch and PyTorch Geometric), `ffnlab
    bench loop` (what the training loop adds), `ffnlab bench metanetwork` (meta-training beside
    training), `ffnlab bench analysis` (inner loops of probes, beside NumPy, scikit-learn, Jacobians
    and torch), and `ffnlab bench kernels` (those for GPUs, beside XLA). `ffnlab bench model DIR` is
    this one in full.

    Args:
      directory: a model directory; without one, the model that comes with ffnlab (with qwix,
        width 2048 and hidden 5632).
      vs: the other library.
      prompt: tokens of the prompt of decoding.
      new: tokens decoded.
      prefill: tokens of the prefill.
      window: predictions in a window of the evaluation.
      windows: how many windows are evaluated.
      turns: times that both sides do each task.
    """
    from ffnlab.cli.show import show

    if vs == "qwix":
        from ffnlab.bench import quantized

        show(quantized.compare(quantized.settings_for(directory, turns), progress=True))
        return
    from ffnlab.bench.versus import Settings, compare, embedded_model
    from ffnlab.formats.opening import for_others

    settings = Settings(prompt, new, prefill, window, windows, turns)
    with embedded_model() if directory is None else for_others(directory) as folder:
        show(compare(folder, settings, progress=True))


def sparse(*, width: int = 2048, hidden: int = 5632, turns: int = 41) -> None:
    """Measures a decoding step of one sparse FFN beside the fastest dense form of the same layer.

    Args:
      width: of the model.
      hidden: channels of the FFN.
      turns: times that every form runs.
    """
    from ffnlab.bench.sparse import Settings, compare
    from ffnlab.cli.show import show

    show(compare(Settings(width, hidden, turns=turns), progress=True))


def routing(
    *,
    tokens: int = 4096,
    width: int = 256,
    hidden: int = 512,
    experts: int = 8,
    k: int = 2,
    turns: int = 15,
) -> None:
    """Measures a mixture of experts beside the dense FFN of equal active size, and its products.

    Then decoding where each token takes a small or a big FFN, and an oracle over such choices, of
    sizes of their own.

    Args:
      tokens: rows of a call.
      width: of tokens.
      hidden: channels of an expert.
      experts: how many.
      k: experts of a token.
      turns: times that every side runs.
    """
    from ffnlab.bench import choosing
    from ffnlab.bench.routing import Settings, compare
    from ffnlab.cli.show import show

    show(compare(Settings(tokens, width, hidden, experts, k, turns), progress=True))
    show(choosing.compare(choosing.Settings(turns=turns), progress=True))


def bottleneck(*, images: int = 8, side: int = 28, width: int = 64, turns: int = 15) -> None:
    """Measures a residual bottleneck with a convolution, a depthwise one, and a maximum.

    Args:
      images: of a call.
      side: of their grids.
      width: channels inside; four times as many outside.
      turns: times that every op runs.
    """
    from ffnlab.bench.bottleneck import Settings, compare
    from ffnlab.cli.show import show

    show(compare(Settings(images, side, width, turns), progress=True))


def loading() -> None:
    """Measures how far memory rises while a checkpoint of a gigabyte is loaded as float32."""
    from ffnlab.bench.loading import peaks

    for dtype, peak in peaks().items():
        print(f"from {dtype}: {peak:.2f} times the size of the loaded model")


def editing(
    *, width: int = 128, layers: int = 6, facts: int = 10, steps: int = 5, turns: int = 9
) -> None:
    """Measures step 1 of PMET for several facts at once, beside one alone.

    Args:
      width: of the model.
      layers: of it.
      facts: that go through it together.
      steps: evaluations of the loss.
      turns: times that both run.
    """
    from ffnlab.bench.editing import Settings, compare
    from ffnlab.cli.show import show

    show(compare(Settings(width, layers, facts, steps, turns)))


def loop(*, milliseconds: int = 100, steps: int = 200) -> None:
    """Measures what the training loop adds to steps of a given time.

    Args:
      milliseconds: of a step.
      steps: of the run; the state, of the embedded model's size, is saved once.
    """
    from ffnlab.bench.loop import overhead
    from ffnlab.errors import at_least

    at_least(1, milliseconds=milliseconds)
    at_least(2, steps=steps)
    ratio = overhead(milliseconds / 1000, steps)
    print(f"the loop adds {100 * (ratio - 1):.2f} % to steps of {milliseconds} ms")


def train(
    directory: Path | None = None, /, *, batch: int = 8, length: int = 256, turns: int = 15
) -> None:
    """Measures training steps in turns with torch and transformers, both float32 with AdamW.

    The peer takes the faster of eager and `torch.compile`, in its own process (see `ffnlab bench`).

    Args:
      directory: a model directory; without one, the model that comes with ffnlab.
      batch: rows of a batch.
      length: predictions in a row.
      turns: steps that both sides take.
    """
    from ffnlab.bench.training import Settings, compare
    from ffnlab.bench.versus import embedded_model
    from ffnlab.cli.show import show
    from ffnlab.formats.opening import for_others

    with embedded_model() if directory is None else for_others(directory) as folder:
        show(compare(folder, Settings(batch, length, turns), progress=True))


def folding(
    *, widths: tuple[int, ...] = (192, 384, 768), idle: float = 0.75, turns: int = 15
) -> None:
    """Measures an FFN with idle channels before and after its fold, beside the plain FFN.

    Args:
      widths: of the stream; hidden layers are four times as wide.
      idle: share of idle channels, in [0, 1].
      turns: of all three forms.
    """
    from ffnlab.bench.folding import Settings, compare
    from ffnlab.cli.show import show

    show(compare(Settings(widths=widths, idle=idle, turns=turns), progress=True))


def structured(*, width: int = 768, tokens: int = 1024, turns: int = 15) -> None:
    """Measures FFNs of structured matrices beside dense ones, and factors beside their product.

    The last column is the number of rows of a call from which on factors are no slower than their
    product: what `premerged` takes where it is not told.

    Args:
      width: of the stream, divisible by 8; hidden layers are four times as wide.
      tokens: rows of an FFN's call.
      turns: times that every form runs.
    """
    from ffnlab.bench.structured import Settings, compare
    from ffnlab.cli.show import show

    show(compare(Settings(width, tokens, turns=turns), progress=True))


def columns(
    *, columns: tuple[int, ...] = (4, 8, 16, 32), images: int = 8, side: int = 32, turns: int = 9
) -> None:
    """Measures memory and steps of reversible columns: plain, checkpointed, rebuilt.

    Args:
      columns: numbers of them, rising; steps of the most are timed.
      images: of a step.
      side: pixels of an image, along a side.
      turns: times that every form runs; 0 for memory alone.
    """
    from ffnlab.bench.columns import Settings, compare
    from ffnlab.cli.show import show

    show(compare(Settings(columns, images, side, turns=turns), progress=True))


def elastic(*, width: int = 256, rows: int = 256, drawn: int = 2, turns: int = 15) -> None:
    """Measures steps that train networks of several widths and depths, beside a plain step.

    Of FFN blocks and of an MLP; the ratio is of a step's time for each network in it.

    Args:
      width: of the blocks' stream; they have four times as many channels.
      rows: of a batch.
      drawn: networks of a step beside the largest and the smallest.
      turns: of both steps.
    """
    from ffnlab.bench.elastic import Settings, compare
    from ffnlab.cli.show import show

    show(compare(Settings(width, rows, drawn, turns), progress=True))


def graphs(*, width: int = 64, inputs: int = 128, turns: int = 15) -> None:
    """Measures sparse products and a GCN layer's step in turns with torch and PyTorch Geometric.

    On graphs of 3,000 nodes and 30,000 edges, and of 100,000 and 1,000,000. The peer takes the
    fastest of its forms, in its own process (see `ffnlab bench`). Then a training step of a small
    OneForecast beside plain torch, precoders of 1,000 channels by a homogeneous network beside
    WMMSE in NumPy, and summaries of a graph of several kinds of nodes (RpHGNN) beside SciPy, with
    the memory that they take.

    Args:
      width: channels of the products, out of the layer, and of summaries.
      inputs: channels into the layer, more than out.
      turns: times that both sides do each task.
    """
    from ffnlab.bench import graphs, precoding, summaries
    from ffnlab.cli.show import show

    settings = graphs.Settings(width=width, inputs=inputs, turns=turns)
    show(graphs.compare(settings, progress=True))
    show(precoding.compare(precoding.Settings(turns=turns)))
    show(summaries.compare(summaries.Settings(width=width, turns=turns), progress=True))


def metanetwork(
    *, rows: int = 1024, images: int = 64, layers: int = 3, width: int = 16, turns: int = 15
) -> None:
    """Measures a step of meta-training beside a step of the network that it corrects.

    Of an MLP of 64-48-48-10 on rows, and of a ResNet-20 on images of 32 x 32.

    Args:
      rows: of the MLP's step.
      images: of the ResNet's.
      layers: rounds of the metanetwork.
      width: of it.
      turns: times that every step runs.
    """
    from ffnlab.bench.metanetwork import Settings, compare
    from ffnlab.cli.show import show

    show(compare(Settings(rows, images, layers, width, turns=turns), progress=True))


def analysis(*, boxes: int = 64, turns: int = 15) -> None:
    """Measures inner loops of probes in turns with other ways to the same numbers.

    Entropy of joint states beside NumPy, information by neighbours beside scikit-learn, affine maps
    of a network beside its Jacobian, and intervals of a network beside torch in its own process
    (see `ffnlab bench`).

    Args:
      boxes: that a network is bounded over at once.
      turns: times that both sides do each task.
    """
    from ffnlab.bench.analysis import Settings, compare
    from ffnlab.cli.show import show

    show(compare(Settings(boxes=boxes, turns=turns), progress=True))


def learning(*, together: int = 100, turns: int = 15) -> None:
    """Measures steps of an LSTM and of a small network in turns with torch, both float32 with SGD.

    The LSTM reads 32 rows of 64 steps, 128 channels to 256; the small network is 64-32-10 and takes
    500 steps a turn in `parallel.train`, the peer in a plain loop: by backpropagation, and with
    layers that learn alone from right and wrong classes (physical_ff). The peer takes the fastest
    of its forms, in its own process (see `ffnlab bench`); peak memory is of both processes.

    Args:
      together: steps of the small network in one compiled loop.
      turns: times that both sides do each task.
    """
    from ffnlab.bench.learning import Settings, compare
    from ffnlab.cli.show import show

    show(compare(Settings(together=together, turns=turns), progress=True))


def kernels(*, only: str = "", names: bool = False, json: Path | None = None) -> int:
    """Times INT4 x FP8, grouped and sparse products and attention beside XLA and torch on a GPU.

    Without a GPU the rows of XLA for few tokens run, and the rest is said to need one.

    Args:
      only: rows whose task or name contains this.
      names: print the names of the rows instead.
      json: also write the figures to this file.
    """
    from pallas_kernels.bench.__main__ import main

    options = ["--list"] if names else []
    return main(["--only", only, *options, *(["--json", str(json)] if json else [])])
