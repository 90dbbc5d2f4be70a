"""The dense model that the compressed embedded model is compared with.

It comes with the package ("embedded_small"): its files are as large as those of the compressed
model, it was trained on as many tokens of the same text, and its learning rate was chosen on
training text left aside for it (`training.json` beside it). It is measured in every job. What both
reach on a second text was recorded once, by the default recipe:

    ffnlab compress --also wikitext2/valid.txt --out out
    python -m ffnlab.compress.rival out/report.json > ffnlab/embedded/equal_bytes.json
"""

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from pathlib import Path

from ffnlab import tree, weights
from ffnlab.compress import measure
from ffnlab.compress.export import PROVENANCE
from ffnlab.compress.report import Rival, Row, Verdict, build, read_report
from ffnlab.compress.text import Samples, Text, held_out
from ffnlab.data import read_text
from ffnlab.errors import FormatError
from ffnlab.formats import embedded
from ffnlab.models import Decoder
from ffnlab.recipes import Recipe
from ffnlab.storage.files import StrPath, read_json

__all__ = ["embedded_rival", "record", "second_texts"]

NAME = "embedded_small"
RECORD = "equal_bytes.json"
NOTE = "trained on as many tokens; its rate chosen on training text, one seed"


def embedded_rival(
    text: Text, recipe: Recipe, also: Sequence[Text] = ()
) -> Callable[[Decoder, Row], Rival]:
    """Readies the dense model that comes with the package to be measured beside a compressed one.

    Args:
      text: the job's.
      recipe: of the job; it says how much is measured.
      also: other texts to measure both on; without any, what the default recipe reached on a second
        text stands beside, if the job is that one.
    Returns:
      a function of the compressed model (of bytes, not prepared) and its figures on the job's text.
    Raises:
      FormatError: the installation lacks the dense model, or the record is damaged.
      ConfigError: a text is too short to measure on.
    """
    dense, tokenizer = embedded(NAME)
    settings = recipe.evaluation
    texts = [(t, held_out(t, tokenizer, settings, dense.config.vocab)) for t in (text, *also)]
    known = [] if also else recorded(text, recipe)

    def bits(model: Decoder, samples: Samples) -> float:
        return measure.quality(model, samples, settings.batch).bits_per_byte

    def beside(model: Decoder, row: Row) -> Rival:
        large, small, verdicts = weights.prepare(dense), weights.prepare(model), []
        for words, samples in texts:
            ours = row.scores["bits_per_byte"] if words is text else bits(small, samples)
            verdicts.append(verdict(words, ours, bits(large, samples)))
        return Rival(tree.nbytes(dense), files_of_rival(), (*verdicts, *known), NOTE)

    return beside


def verdict(text: Text, compressed: float, dense: float) -> Verdict:
    """What was measured on a text."""
    digest = str(text.as_json()["held_out_sha256"])
    return Verdict(text.source, digest, compressed, dense, dense < compressed, "measured now")


def second_texts(paths: Iterable[StrPath]) -> tuple[Text, ...]:
    """Texts that nothing was trained on, each to be measured as a whole.

    Args:
      paths: UTF-8 files; the last two parts of a path name the text.
    Raises:
      FFNLabError: a file that cannot be read, is empty or not UTF-8.
    """
    return tuple(
        Text(b"", read_text([path])[1:-1], "/".join(Path(path).parts[-2:]), "the whole file")
        for path in paths
    )


def files_of_rival() -> int:
    """Bytes of the files that the dense model is loaded from."""
    with resources.as_file(resources.files("ffnlab") / NAME) as folder:
        return sum(f.stat().st_size for f in folder.iterdir() if f.name != PROVENANCE)


def recorded(text: Text, recipe: Recipe) -> list[Verdict]:
    """The verdicts of the committed record on second texts, where this job is the recorded one."""
    file = resources.files("ffnlab") / "embedded" / RECORD
    with resources.as_file(file) as path:
        found = read_json(path)
    try:
        same = found["recipe"] == json.loads(json.dumps(recipe.as_json()))
        same &= found["text"]["split"] == text.split
        return [build(Verdict, v, f"{file}: verdicts") for v in found["verdicts"][1:] if same]
    except (KeyError, TypeError) as error:
        raise FormatError(f"{file}: not a record of `{__name__}`: {error!r}") from None


def record(path: StrPath) -> dict[str, object]:
    """What `equal_bytes.json` holds, from the report of a job with `--also`.

    Args:
      path: report.json.
    Raises:
      FormatError: not a report, or one without a second text.
    """
    report = read_report(path)
    if report.rival is None or len(report.rival.verdicts) < 2:
        raise FormatError(f"{path}: no second text was measured; run with --also FILE")
    rival, written = report.rival, report.exports[0]
    note = f"recorded with Python {report.versions['python']}, jax {report.versions['jax']}"
    return {
        "recipe": report.recipe,
        "text": report.data,
        "compressed": {"nbytes": report.rows[-1].nbytes, "file_bytes": written.nbytes},
        "dense": {"model": NAME, "nbytes": rival.nbytes, "file_bytes": rival.file_bytes},
        "verdicts": [vars(v) | {"note": note} for v in rival.verdicts],
        "versions": report.versions,
        "device": report.device,
    }


if __name__ == "__main__":
    json.dump(record(sys.argv[1]), sys.stdout, indent=1)
    print()
