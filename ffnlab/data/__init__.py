"""Input: where tokens come from and how they become batches.

A source of batches is a function from a position (one integer, the number of the step) to a
batch, so that a run resumes exactly by remembering that integer. Corpora and windows live here;
tokenizers belong to `ffnlab.models`, placing batches on devices to `ffnlab.parallel`.
"""

from ffnlab.data.arrays import ArrayBatches
from ffnlab.data.clusters import Labelled, digits, gaussian_clusters
from ffnlab.data.images import ImageFolder, read_idx
from ffnlab.data.mnist import mnist, mnist_folder
from ffnlab.data.packing import Packed, PackedBatches
from ffnlab.data.records import RecordBatches
from ffnlab.data.stdlib_text import StdlibText, stdlib_text, text_identity, validation_split
from ffnlab.data.text import HeldOut, TextBatches, held_out_windows, read_text
from ffnlab.data.tfds import tfds_records

__all__ = [
    "ArrayBatches",
    "HeldOut",
    "ImageFolder",
    "Labelled",
    "Packed",
    "PackedBatches",
    "RecordBatches",
    "StdlibText",
    "TextBatches",
    "digits",
    "gaussian_clusters",
    "held_out_windows",
    "mnist",
    "mnist_folder",
    "read_idx",
    "read_text",
    "stdlib_text",
    "text_identity",
    "tfds_records",
    "validation_split",
]
