"""Editing: changing what a language model says of a subject, and little else.

Methods that write single facts into weights belong here, with the figures of what they changed and
what they should not have. Learning from text is `ffnlab.learning`.
"""

from ffnlab.editing.deltas import (
    load_deltas,
    originals,
    save_deltas,
    with_deltas,
    without_deltas,
)
from ffnlab.editing.facts import Fact, parse_facts, read_facts
from ffnlab.editing.pmet import PmetStats, pmet, usual_layers
from ffnlab.editing.report import EditReport, Said, compare_edit
from ffnlab.editing.scores import (
    EditScores,
    Likelihood,
    check_questions,
    edit_scores,
    fluency,
    likelihood,
    ngram_entropy,
)

__all__ = [
    "EditReport",
    "EditScores",
    "Fact",
    "Likelihood",
    "PmetStats",
    "Said",
    "check_questions",
    "compare_edit",
    "edit_scores",
    "fluency",
    "likelihood",
    "load_deltas",
    "ngram_entropy",
    "originals",
    "parse_facts",
    "pmet",
    "read_facts",
    "save_deltas",
    "usual_layers",
    "with_deltas",
    "without_deltas",
]
