"""`ffnlab edit`: changes what a language model says of some subjects."""

import contextlib
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

__all__ = ["edit"]


def edit(
    model: Path | None = None,
    /,
    *,
    facts: Path,
    out: Path = Path("edited"),
    layers: tuple[int, ...] = (),
    text: tuple[Path, ...] = (),
    prefixes: tuple[str, ...] = (),
    vectors: Literal["both", "ffn"] = "both",
    spread: Literal["root", "linear"] = "root",
    preserve: float = 6000.0,
    rate: float = 0.2,
    steps: int = 30,
    clamp: float = 0.75,
    kl: float = 1.0,
    decay: float = 0.5,
    tokens: int = 16384,
    window: int = 256,
    fluency: int = 0,
    seed: int = 0,
) -> None:
    """Writes facts into the FFNs of a language model (PMET); prints what it says before and after.

    Writes OUT/model (a Hugging Face directory where a family can say the model, else ffnlab's own
    format), OUT/deltas.safetensors (what was added to which matrix) and OUT/report. For example
    `ffnlab edit embedded --facts facts.toml --layers 2 3 4 --preserve 30`.

    A fact is a table of the file, [[fact]] with subject = "json", prompt = "import {}",
    new = " as ", and perhaps old = "\\n", paraphrases = ["..."] and neighbours = ["..."].

    Args:
      model: a model directory, or a model that comes with ffnlab, "embedded" or
        "embedded_small"; "embedded" without one.
      facts: a TOML or JSON file of facts.
      out: folder for the results.
      layers: that are edited; without any as far up as the paper's of GPT-J, 3 to 8 of 28.
      text: UTF-8 files of what is to stay as it is; the last tenth of every document is held out to
        measure it. Without any, the standard library of this Python.
      prefixes: texts that prompts are put behind too; without any, five of the model's own.
      vectors: "ffn" without the vector beside the attention, as in MEMIT.
      spread: "linear" as in MEMIT.
      preserve: how many tokens of the text weigh as much as one fact.
      rate: of Adam, which finds the vectors.
      steps: of it at most.
      clamp: largest norm of a vector, over that of what it is added to.
      kl: weight of what "SUBJECT is a" means.
      decay: weight of the norms of vectors.
      tokens: of the text, both to calibrate and to measure on.
      window: tokens in one sample of it.
      fluency: tokens that both models go on with behind each prompt; 0: fluency is not measured.
      seed: of prefixes and of what is measured of fluency.
    """
    from ffnlab import weights
    from ffnlab.cli.compress import origin_of, text_for
    from ffnlab.cli.show import show
    from ffnlab.compress.text import calibration, held_out
    from ffnlab.editing import check_questions, compare_edit, pmet, read_facts, save_deltas
    from ffnlab.editing.deltas import converted
    from ffnlab.formats import open_model
    from ffnlab.recipes import Calibration, Evaluation
    from ffnlab.transform import calibrate

    with said_in_a_line():
        check_folder(out)
        listed = read_facts(facts)
        decoder, tokenizer = open_model(model)
        window = min(window, decoder.config.max_positions)
        made = pmet(
            str(facts),
            tokenizer,
            layers=layers or None,
            prefixes=prefixes or None,
            vectors=vectors,
            spread=spread,
            preserve=preserve,
            rate=rate,
            steps=steps,
            clamp=clamp,
            kl=kl,
            decay=decay,
            seed=seed,
        )
        made.init(decoder)
        check_numbers(fluency, window, tokens)
        check_questions(decoder, tokenizer, listed, length=max(fluency, 1))
        words = text_for(text)
        origin = origin_of(model, words, text)
        settings = Calibration(tokens=tokens, window=window, batch=min(8, tokens // window))
        batches = calibration(words, tokenizer, settings, decoder.config.vocab)
        measured = Evaluation(tokens=tokens, window=window)
        samples = held_out(words, tokenizer, measured, decoder.config.vocab)
        prepared = weights.prepare(decoder)
        stats = calibrate(made, prepared, batches)
        new = made.rewrite(decoder, stats)
    both = (prepared, "before"), (weights.prepare(new), "after")
    report = compare_edit(
        decoder,
        new,
        tokenizer,
        listed,
        dense=converted(decoder, stats.deltas),
        bits=tuple(bits_of(each, samples, measured.batch, label) for each, label in both),
        length=fluency,
        seed=seed,
    )
    write_model(out / "model", new, tokenizer, origin)
    save_deltas(out / "deltas.safetensors", stats.deltas)
    about = {"facts": str(facts), "layers": sorted(stats.deltas), "text": words.as_json()}
    report.write(out / "report", about=about)
    show(report)
    print(f"{out}: model, deltas.safetensors, report")


def bits_of(model: Any, samples: Any, batch: int, label: str) -> float:
    """Bits per byte of text, behind a bar with a label."""
    from ffnlab.compress.measure import quality

    return quality(model, samples, batch, label=label, progress=True).bits_per_byte


def write_model(folder: Path, model: Any, tokenizer: Any, origin: Mapping[str, Any] | None) -> None:
    """Writes a model, its tokenizer, and what it was trained on where that is known."""
    from ffnlab.formats import save
    from ffnlab.formats.opening import format_of
    from ffnlab.storage.files import write_json

    save(model, folder, format=format_of(model))
    tokenizer.save(folder)
    if origin:
        write_json(folder / "training.json", origin)


def check_numbers(fluency: int, window: int, tokens: int) -> None:
    """Raises ConfigError where nothing can be measured with them."""
    from ffnlab.errors import at_least

    at_least(0, fluency=fluency)
    at_least(2, window=window)
    at_least(window, tokens=tokens)


def check_folder(out: Path) -> None:
    """Raises ConfigError where no folder for results can be."""
    from ffnlab.errors import ConfigError

    taken = [place for place in (out, *out.parents) if place.exists() and not place.is_dir()]
    if taken:
        raise ConfigError(f"--out {out}: {taken[0]} is no folder")


@contextlib.contextmanager
def said_in_a_line() -> Iterator[None]:
    """Prints warnings as lines on standard error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            yield
        finally:
            for message in dict.fromkeys(str(warning.message) for warning in caught):
                print(f"ffnlab edit: warning: {message}", file=sys.stderr)
