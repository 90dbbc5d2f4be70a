"""Editing: changing what a language model says of a subject, and little else.

Methods that write single facts into weights belong here, with the metrics of what they changed and
what they should not have. Training on text is `ffnlab.learning`.
"""

from ffnlab.editing.pmet_core import share, update

__all__ = ["share", "update"]
