"""The transforms and rules that the contract tests run over. A new one joins by one line.

They take `contracts.tiny()` and `contracts.batches()`. `test_contracts_methods.py` fails when a
factory of a method package is missing here.
"""

from collections.abc import Callable

from ffnlab import learning, pruning, quantization, sparsity
from ffnlab.rule import Rule
from ffnlab.transform import Transform

TRANSFORMS: dict[str, Callable[[], Transform]] = {
    "cats": lambda: sparsity.cats(sparsity=0.5),
    "chess": lambda: sparsity.chess(sparsity=0.5),
    "chess-abs-attention": lambda: sparsity.chess(sparsity=0.5, importance="abs", attention=True),
    "finercut": lambda: pruning.finercut(remove=1),
    "fireq": lambda: quantization.fireq(group=8, top_k=1),
    "fireq-weights": lambda: quantization.fireq(
        group=8, kv=None, query=None, channel=False, pre_rope=False, post_rope=False
    ),
    "nearest": lambda: quantization.nearest(format="int4", group=8),
    "nearest-float8": lambda: quantization.nearest(format="float8", activations="e4m3"),
}

RULES: dict[str, Callable[[], Rule]] = {
    "backprop": learning.backprop,
}
