"""Measured configurations: found by the kernels when a call is traced, filled by the command tune.

`cache` holds the files and the look-up, which imports no kernel. What is tried and how it is timed
is in `search` and in a file per kernel.
"""

from pallas_kernels.tuning.cache import find, reload, user_file

__all__ = ["find", "reload", "user_file"]
