"""Structure: methods that change what a block is made of.

What stands in the slots of a loaded model is replaced, folded or grown; the layers that come in are
in `ffnlab.layers`, and the result is a model that is saved and loaded like any other.
"""

from ffnlab.structure.pflayer import pflayer

__all__ = ["pflayer"]
