"""What the study of PMET measures on the embedded model: what it continues after an import line.

After "import json" it begins a new line. It is to go on with " as ", ", " or "." instead, for ten
modules at once, and to do as before after eighteen others. What that costs is seen on modules of
the standard library that were held out.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ffnlab import transform
from ffnlab.data import StdlibText, TextBatches
from ffnlab.data.text.documents import around
from ffnlab.editing import EditReport, Fact, compare_edit, pmet
from ffnlab.formats import Tokenizer
from ffnlab.models import Decoder
from ffnlab.text import generate, perplexity

__all__ = ["LAYERS", "TEST", "VALIDATION", "Edited", "Names", "edited", "facts_of"]

PROMPT, OLD = "import {}", "\n"
NEWS = (".", ", ", " as ")
PARAPHRASES = ("import sys\nimport {}", "    import {}")
PREFIXES = ("import sys\n", "# The module.\n")


class Names(NamedTuple):
    """Modules that an edit is judged by.

    Attributes:
      changed: whose import is to go on otherwise.
      others: behind which the model is to go on as before.
    """

    changed: Sequence[str]
    others: Sequence[str]


TEST = Names(
    "os json collections functools itertools math logging random typing socket".split(),
    "abc ast csv heapq pickle queue shutil signal ssl struct sys time re threading types uuid "
    "warnings zlib".split(),
)
VALIDATION = Names(
    "io string copy glob email stat enum select inspect operator".split(),
    "array base64 bisect calendar codecs code contextlib datetime decimal dis errno getpass gzip "
    "hashlib locale pprint tempfile traceback".split(),
)
LAYERS = (2, 3, 4)
# Of step 1: the authors' of Llama.
NUMBERS: Mapping[str, Any] = {"rate": 0.5, "clamp": 1.0, "kl": 0.0625}
WINDOW, LINE = 256, 2  # of held-out text; tokens of a line's end that are to stay


class Edited(NamedTuple):
    """An edit of the model.

    Attributes:
      report: scores before and after, of which specificity is the share of other modules behind
        which it goes on as before; and bits per byte of held-out text.
      said: share of the modules behind which it says the new text.
    """

    report: EditReport
    said: float

    @property
    def worse(self) -> float:
        """By how many bits per byte held-out text became harder to predict."""
        before, after = self.report.bits or (float("nan"), float("nan"))
        return after - before


def facts_of(modules: Sequence[str]) -> list[Fact]:
    """What is to follow the import of each."""
    return [
        Fact(module, PROMPT, NEWS[i % len(NEWS)], OLD, PARAPHRASES)
        for i, module in enumerate(modules)
    ]


def edited(
    model: Decoder,
    tokenizer: Tokenizer,
    text: StdlibText,
    changed: Sequence[str],
    others: Sequence[str],
    setting: Mapping[str, Any],
    held_out: int,
) -> Edited:
    """Changes what follows the import of some modules.

    Args:
      model, tokenizer: the embedded one.
      text: of which the training part calibrates.
      changed, others: see `Names`.
      setting: options of `pmet`.
      held_out: bytes of the held-out part that are scored; 0: none.
    """
    facts = facts_of(changed)
    batches = [TextBatches(text.train, 8, 128, 1)(i)[:, :-1] for i in range(16)]
    options = {"layers": LAYERS, "prefixes": PREFIXES, **NUMBERS, **setting}
    new, _ = transform.apply(pmet(facts, tokenizer, **options), model, batches, progress=False)
    bits = None
    if held_out:
        bits = (bits_of(model, text, held_out), bits_of(new, text, held_out))
    report = compare_edit(model, new, tokenizer, facts, bits=bits)
    before, now = (lines(each, tokenizer, others) for each in (model, new))
    kept = [a == b for a, b in zip(before, now, strict=True)]
    after = dataclasses.replace(report.after, specificity=float(np.mean(kept)))
    said = [each.after.startswith(each.new) for each in report.said]
    return Edited(dataclasses.replace(report, after=after), float(np.mean(said)))


def bits_of(model: Decoder, text: StdlibText, size: int) -> float:
    """Bits per byte of the first bytes of the held-out modules, each window by itself."""
    part = text.held_out[:size]
    options = {"window": WINDOW, "stride": WINDOW, "batch": 8}
    return float(perplexity(model, part, nbytes=len(part) - 1, **options).bits_per_byte)


def lines(model: Decoder, tokenizer: Tokenizer, others: Sequence[str]) -> list[list[int]]:
    """What follows the import of each of some modules."""
    begin = around(tokenizer)[0]
    prompts = [[*begin, *tokenizer.encode(PROMPT.replace("{}", module))] for module in others]
    return generate(model, prompts, max_tokens=LINE).lists()
