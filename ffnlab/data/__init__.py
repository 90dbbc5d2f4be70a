"""Input: where tokens come from and how they become batches.

A source of batches is a function from a position (one integer, the number of the step) to a
batch, so that a run resumes exactly by remembering that integer. Corpora and windows live here;
tokenizers belong to `ffnlab.formats`, placing batches on devices to `ffnlab.parallel`.
"""

from ffnlab.data.batches.arrays import ArrayBatches
from ffnlab.data.batches.records import RecordBatches
from ffnlab.data.batches.tfds import tfds_records
from ffnlab.data.batches.zipped import Parted, Zipped
from ffnlab.data.clusters import Labelled, digits, gaussian_clusters
from ffnlab.data.domains import moons, on_photographs, read_svmlight, reviews
from ffnlab.data.feature_cache import FeatureCache
from ffnlab.data.folders import find_folder, folder
from ffnlab.data.graphs import LabelledNodes, block_model, cora
from ffnlab.data.hetero import HeteroNodes, academic, cora_words
from ffnlab.data.images.arrays import Images, as_images
from ffnlab.data.images.augment import crop, erase, flip
from ffnlab.data.images.augmented import augmented
from ffnlab.data.images.colour import colour_jitter
from ffnlab.data.images.files import ImageFolder, read_idx
from ffnlab.data.images.mixing import cutmix, mixup
from ffnlab.data.images.mnist import mnist, mnist_folder
from ffnlab.data.images.randaugment import rand_augment
from ffnlab.data.interleaved import CaptionedDigits, RuleSegments, captioned
from ffnlab.data.known_information import (
    as_uniform,
    blob_images,
    box_images,
    gaussian_pairs,
)
from ffnlab.data.links import LinkPairs, LinkSplit
from ffnlab.data.ring import Ring, ring
from ffnlab.data.scaling import Scaling, scaling_of
from ffnlab.data.sequence_maps import SequencePairs, drawn_pairs, read_pairs
from ffnlab.data.series import (
    Series,
    Windows,
    etth1,
    lagged_series,
    parts_of,
    read_series,
    time_marks,
    window_starts,
    windows,
)
from ffnlab.data.sound_rows import asked, sound_rows
from ffnlab.data.speech import Recording, SpokenDigits, fsdd, log_mel, read_wav, resampled
from ffnlab.data.splits import link_split, node_split, non_edges
from ffnlab.data.tasks import permuted, split
from ffnlab.data.text.answers import answers_of, by_article, span_layout
from ffnlab.data.text.eda import Synonyms, eda, nearest_words
from ffnlab.data.text.labelled import (
    LabelledTexts,
    TokenRows,
    labelled_texts,
    sentence_polarity,
    token_rows,
)
from ffnlab.data.text.masking import (
    MaskedBatches,
    MaskedWindows,
    Masking,
    masked_windows,
    masking_of,
)
from ffnlab.data.text.packing import Packed, PackedBatches
from ffnlab.data.text.squad import (
    Answer,
    Question,
    SpanLayout,
    SpanWindows,
    span_windows,
    squad,
)
from ffnlab.data.text.stdlib_text import (
    StdlibText,
    stdlib_text,
    text_identity,
    validation_split,
)
from ffnlab.data.text.windows import HeldOut, TextBatches, held_out_windows, read_text
from ffnlab.data.vowels import Vowels, vowels
from ffnlab.data.weather import (
    AirTemperature,
    Waves,
    air_temperature,
    drawn_waves,
    wave_fields,
)

__all__ = [
    "AirTemperature",
    "Answer",
    "ArrayBatches",
    "CaptionedDigits",
    "FeatureCache",
    "HeldOut",
    "HeteroNodes",
    "ImageFolder",
    "Images",
    "Labelled",
    "LabelledNodes",
    "LabelledTexts",
    "LinkPairs",
    "LinkSplit",
    "MaskedBatches",
    "MaskedWindows",
    "Masking",
    "Packed",
    "PackedBatches",
    "Parted",
    "Question",
    "RecordBatches",
    "Recording",
    "Ring",
    "RuleSegments",
    "Scaling",
    "SequencePairs",
    "Series",
    "SpanLayout",
    "SpanWindows",
    "SpokenDigits",
    "StdlibText",
    "Synonyms",
    "TextBatches",
    "TokenRows",
    "Vowels",
    "Waves",
    "Windows",
    "Zipped",
    "academic",
    "air_temperature",
    "answers_of",
    "as_images",
    "as_uniform",
    "asked",
    "augmented",
    "blob_images",
    "block_model",
    "box_images",
    "by_article",
    "captioned",
    "colour_jitter",
    "cora",
    "cora_words",
    "crop",
    "cutmix",
    "digits",
    "drawn_pairs",
    "drawn_waves",
    "eda",
    "erase",
    "etth1",
    "find_folder",
    "flip",
    "folder",
    "fsdd",
    "gaussian_clusters",
    "gaussian_pairs",
    "held_out_windows",
    "labelled_texts",
    "lagged_series",
    "link_split",
    "log_mel",
    "masked_windows",
    "masking_of",
    "mixup",
    "mnist",
    "mnist_folder",
    "moons",
    "nearest_words",
    "node_split",
    "non_edges",
    "on_photographs",
    "parts_of",
    "permuted",
    "rand_augment",
    "read_idx",
    "read_pairs",
    "read_series",
    "read_svmlight",
    "read_text",
    "read_wav",
    "resampled",
    "reviews",
    "ring",
    "scaling_of",
    "sentence_polarity",
    "sound_rows",
    "span_layout",
    "span_windows",
    "split",
    "squad",
    "stdlib_text",
    "text_identity",
    "tfds_records",
    "time_marks",
    "token_rows",
    "validation_split",
    "vowels",
    "wave_fields",
    "window_starts",
    "windows",
]
