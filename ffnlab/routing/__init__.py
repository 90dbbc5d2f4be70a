"""Routing: which FFNs a token passes, and which tokens pass any.

Pure functions and transforms on a model that `models.load` gives; layers that route belong in
`ffnlab.layers`.
"""

from ffnlab.routing import pal
from ffnlab.routing.pal import Sounds

__all__ = ["Sounds", "pal"]
