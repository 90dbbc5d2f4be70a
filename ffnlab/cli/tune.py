"""`ffnlab tune`: times the GPU kernels' configurations and keeps the fastest."""

from pathlib import Path
from typing import Literal

__all__ = ["tune"]


def tune(
    operations: tuple[str, ...] = (),
    /,
    *,
    shape: tuple[str, ...] = (),
    experts: int = 8,
    encoding: Literal["sm", "tc"] = "sm",
    treatment: Literal["promote", "table"] = "promote",
    scales: Literal["float32", "bfloat16", "float8_e4m3fn"] = "bfloat16",
    out: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    again: bool = False,
    file: Path | None = None,
) -> int:
    """Times how the kernels can cut their work on the GPU at hand, and keeps what was fastest.

    A configuration counts only if its numbers agree with the reference. The kernels take it from
    then on, in new processes. What is finished is kept: the same command goes on where it was
    interrupted. `python -m pallas_kernels.tune` is the same command without ffnlab.

    Args:
      operations: w4a8.matmul, w4a8.glu, w4a8.grouped, sparse.matvec, sparse.glu; all without one.
      shape: tokens, rows and columns of a matrix (of a GLU's gate), such as 16,4096,14336; without
        one, the layers of Llama-2-7B and Llama-3-8B and two mixtures of experts.
      experts: matrices of w4a8.grouped.
      encoding: of INT4 codes.
      treatment: of scales.
      scales: their dtype.
      out: dtype of the result.
      again: time also what the file holds already.
      file: instead of the user's own (PALLAS_KERNELS_TUNING, else in the cache folder).
    """
    from pallas_kernels.tune import main

    words = {"experts": experts, "encoding": encoding, "treatment": treatment}
    words |= {"scales": scales, "out": out} | ({} if file is None else {"file": file})
    named = [f"--{name}={value}" for name, value in words.items()]
    shapes = [f"--shape={text}" for text in shape]
    return main([*operations, *shapes, *named, *(["--again"] if again else [])])
