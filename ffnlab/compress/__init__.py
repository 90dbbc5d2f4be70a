"""The main job: a model goes in, a compressed one comes out, with a report of each step.

Applying a recipe, measuring after every stage, writing and checking the result belong here. What a
recipe may say is `ffnlab.recipes`; the methods themselves are in the packages below.
"""

from ffnlab.compress.encoded import EncoderTask
from ffnlab.compress.job import compress
from ffnlab.compress.labelled import LabelledTask
from ffnlab.compress.language import TextTask
from ffnlab.compress.report import Export, Report, Rival, Row, Score, Verdict, read_report
from ffnlab.compress.rival import embedded_rival, second_texts
from ffnlab.compress.text import Text, file_text, standard_text

__all__ = [
    "EncoderTask",
    "Export",
    "LabelledTask",
    "Report",
    "Rival",
    "Row",
    "Score",
    "Text",
    "TextTask",
    "Verdict",
    "compress",
    "embedded_rival",
    "file_text",
    "read_report",
    "second_texts",
    "standard_text",
]
