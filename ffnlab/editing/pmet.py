"""PMET: Precise Model Editing in a Transformer (2023).

What a model says of a subject is changed in the down-projections of a few FFNs. Step 1 finds, for
each fact, what the FFN of the last of these layers would have to give at the subject for the model
to say the new answer, while a second vector beside the attention takes up what does not belong
there (`vectors.py`). Step 2 writes it, layer by layer, by regularised least squares
(`pmet_core.py`), with keys and residuals taken anew after each layer.

Symbols are those of the two modules; z: targets of step 1, [n, d]; L: the last edited layer.

What differs from the authors' code, and why:
- A subject's last token is found by the characters that tokens stand for, rows are padded on the
  left, and an answer follows its prompt as it is written: no space is added.
- All facts go through step 1 together; nothing passes between them.
- The answers of the prompts behind prefixes are tokenized with their prompts, not decoded and
  encoded again.
- Second moments are measured on the batches that one calibrates on, not on Wikipedia.
- MEMIT is here by two options, its spread and its one vector. What it adds to the output of a
  layer is added to that of its FFN here, and what is missing is measured there too, while MEMIT
  measures it in the residual stream, where the changes of lower layers are seen as well.
"""

import dataclasses
import functools
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ffnlab.editing import vectors as step1
from ffnlab.editing.deltas import converted, with_deltas
from ffnlab.editing.facts import Fact, checked, read_facts
from ffnlab.editing.pmet_core import Spread
from ffnlab.editing.requests import prefix_tokens, requests, sampled_prefixes
from ffnlab.editing.vectors import Found, Steps
from ffnlab.editing.writing import in_chunks, moments_of, moved, written
from ffnlab.errors import ConfigError, NumericalError, at_least, check_seed
from ffnlab.formats.tokenizer.tokenizer import Tokenizer
from ffnlab.layers import FFN, Attention, GatedFFN, JoinedGatedFFN, Linear
from ffnlab.models.calibration import given
from ffnlab.models.decoder import Decoder
from ffnlab.models.stack import layers_of, period_of, unstack
from ffnlab.transform import Transform

__all__ = ["PmetStats", "pmet", "usual_layers"]

USUAL = (3 / 28, 8 / 28)  # the authors' layers of GPT-J, 3 to 8 of 28
BYTES = "bytes"
FFNS = (FFN, GatedFFN, JoinedGatedFFN)


class PmetStats(NamedTuple):
    """What was measured and decided, with n facts and the edited layers by their paths.

    Attributes:
      moments: C, mean of k k^T over the tokens of the calibration batches, [h, h] float32 each.
      tokens: [] int64, how many there were.
      before: a and m of each fact, [n, d] float32.
      vectors: delta_a and delta_m of each fact, [n, d] float32.
      nats: [n] float32, -log p(new) behind the prompt with the vectors in place, after step 1.
      kl: [n] float32, divergence of the text that is to mean the same.
      steps: [n] int32, how often the vectors were moved.
      deltas: what is added to each down-projection, [h, d] float32.
      done: [] bool, whether all of it but moments and tokens is known.
    """

    moments: Mapping[str, Float[Array | np.ndarray, "h h"]]
    tokens: Int[np.ndarray | np.generic, ""]
    before: step1.Vectors
    vectors: step1.Vectors
    nats: Float[np.ndarray, "n"]
    kl: Float[np.ndarray, "n"]
    steps: Int[np.ndarray, "n"]
    deltas: Mapping[str, Float[np.ndarray, "h d"]]
    done: Bool[np.ndarray | np.generic, ""]

    @property
    def targets(self) -> Float[np.ndarray, "n d"]:
        """z, what the FFN of the last layer is to give at each subject."""
        return np.asarray(self.before.ffn) + np.asarray(self.vectors.ffn)


@dataclasses.dataclass(frozen=True)
class Options:
    """The arguments of `pmet`, whose docstring says what each is.

    Raises:
      ConfigError: an option out of range.
    """

    facts: tuple[Fact, ...]
    tokenizer: Tokenizer
    layers: tuple[int, ...] | None
    prefixes: tuple[str, ...] | None
    steps: Steps
    spread: Spread
    preserve: float
    chunk: int | None
    seed: int

    def __post_init__(self) -> None:
        layers = self.layers
        if layers is not None and (not layers or list(layers) != sorted(set(layers))):
            raise ConfigError(f"layers={list(layers)} must be one or more rising numbers")
        if self.spread not in ("root", "linear"):
            raise ConfigError(f"spread={self.spread!r} is not 'root' or 'linear'")
        if not (np.isfinite(self.preserve) and self.preserve >= 0):
            raise ConfigError(f"preserve={self.preserve} must be a finite number >= 0")
        at_least(1, chunk=self.chunk)
        check_seed(self.seed)

    def places(self, model: Any) -> tuple[int, ...]:
        """The layers of a model that are edited."""
        n = layers_of(model)
        layers = usual_layers(n) if self.layers is None else self.layers
        if layers[0] < 0 or layers[-1] >= n:
            raise ConfigError(f"layers={list(layers)}; the model has layers 0..{n - 1}")
        return layers


def pmet(
    facts: str | Sequence[Fact],
    tokenizer: str | Tokenizer = BYTES,
    *,
    layers: Sequence[int] | None = None,
    prefixes: Sequence[str] | None = None,
    vectors: Literal["both", "ffn"] = "both",
    spread: Spread = "root",
    preserve: float = 6000.0,
    rate: float = 0.2,
    steps: int = 30,
    clamp: float = 0.75,
    kl: float = 1.0,
    decay: float = 0.5,
    chunk: int | None = None,
    seed: int = 0,
) -> Transform[Decoder, PmetStats]:
    """The transform that writes facts into the FFNs of a language model.

    Batches are text of the kind that is to stay as it is: tokens [b, t], or a mapping by names
    (`ffnlab.models.calibration.given`); the authors take 100,000 texts. Defaults are theirs for
    GPT-J; of smaller models `preserve` is to be smaller, as their inputs are.

    Args:
      facts: what is to be said, or a TOML or JSON file of it (`ffnlab.editing.facts`).
      tokenizer: of the model, or a folder with its tokenizer.json; "bytes" where tokens are bytes.
      layers: that are edited, rising; without them as far up as the authors' are (`usual_layers`).
      prefixes: texts that the prompt is put behind too, as written; five that the model itself
        begins ("The …. ", "Therefore …. ") without them, none where the list is empty.
      vectors: "both", or "ffn" without the one beside the attention, as MEMIT has it.
      spread: how much of what is missing a layer takes: "root" (PMET) or "linear" (MEMIT).
      preserve: lambda, how many tokens of other text weigh as much as one fact.
      rate: of Adam in step 1.
      steps: of it at most.
      clamp: largest norm of a vector, over that of what it is added to.
      kl: weight of the divergence of "SUBJECT is a" in its loss.
      decay: weight of the norms in its loss.
      chunk: facts that go through the model together; all of them without it.
      seed: of the prefixes.
    Returns:
      a transform of decoders, stacked or not, whose FFNs in those layers are plain or gated. A
      matrix that is quantized becomes dense where it is edited, which is warned of.
    Raises:
      ConfigError: an option out of range, facts that are none or contradict each other; at `init`,
        layers that the model does not have or that cannot be edited, or texts whose tokens cross
        the end of a subject.
      FormatError: no such file, or a damaged one.
      NumericalError: at the end of the pass, activations or answers that are not finite, or
        preserve = 0 and fewer independent keys than channels.
    Source: arXiv 2308.08742; defaults from the authors' repository.

    >>> pmet([Fact("Ada", "{} was born in", " Rome")]).name
    'pmet'
    """
    listed = read_facts(facts) if isinstance(facts, str) else checked(facts)
    reads = isinstance(tokenizer, str)
    options = Options(
        listed,
        opened(str(tokenizer)) if reads else tokenizer,  # type: ignore[arg-type]
        None if layers is None else tuple(layers),
        None if prefixes is None else tuple(prefixes),
        Steps(vectors, rate, steps, clamp, kl, decay),
        spread,
        preserve,
        chunk,
        seed,
    )

    def rewrite(model: Decoder, stats: PmetStats) -> Decoder:
        if not stats.done:
            raise ConfigError("pmet has decided nothing yet; calibrate until done")
        if dense := converted(model, stats.deltas):
            said = ", ".join(dense)
            warnings.warn(f"dense from here on, as they were edited: {said}", stacklevel=2)
        return with_deltas(model, stats.deltas)

    return Transform(
        name="pmet",
        init=functools.partial(start, options),
        observe=functools.partial(observed, options),
        advance=functools.partial(decided, options),
        rewrite=rewrite,
    )


def opened(tokenizer: str) -> Tokenizer:
    """The tokenizer that a file names."""
    return Tokenizer.bytes() if tokenizer == BYTES else Tokenizer.load(Path(tokenizer))


def usual_layers(n: int) -> tuple[int, ...]:
    """The layers of a model of n that lie where the authors edit GPT-J, 3 to 8 of 28.

    >>> usual_layers(28), usual_layers(8), usual_layers(1)
    ((3, 4, 5, 6, 7, 8), (1, 2), (0,))
    """
    first, last = (min(round(part * n), n - 1) for part in USUAL)
    return tuple(range(first, last + 1))


def start(options: Options, model: Any) -> PmetStats:
    """Stats before anything was observed; ConfigError where a model cannot be edited."""
    if not isinstance(model, Decoder) or model.modalities is not None:
        kind = type(model).__name__
        raise ConfigError(f"model is a {kind}; a Decoder of one modality is accepted")
    layers = options.places(model)
    sizes = {path: down.weight.shape for path, down in downs(options, model, layers).items()}
    rows = requests(options.facts, options.tokenizer, model, options.prefixes or ())
    if options.prefixes is None:
        check_room(rows.tokens.shape[-1], options.tokenizer, model)
    n, d = len(options.facts), model.config.width
    pair = step1.Vectors(*(np.zeros((n, d), np.float32) for _ in range(2)))
    none = np.zeros(n, np.float32)
    return PmetStats(
        moments={path: np.zeros((h, h), np.float32) for path, (h, _) in sizes.items()},
        tokens=np.int64(0),
        before=pair,
        vectors=pair,
        nats=none,
        kl=none,
        steps=np.zeros(n, np.int32),
        deltas={path: np.zeros(shape, np.float32) for path, shape in sizes.items()},
        done=np.bool_(False),
    )


def check_room(longest: int, tokenizer: Tokenizer, model: Decoder) -> None:
    """Raises ConfigError where prompts do not fit behind the prefixes of the model's own."""
    room, more = model.config.max_positions, prefix_tokens(tokenizer)
    if longest + more > room:
        raise ConfigError(
            f"a fact has {longest} tokens, and the model's own prefixes have {more}; the model has "
            f"a context of {room}: shorter ones, or none, can be given as prefixes"
        )


def path_of(layer: int) -> str:
    """The down-projection of a layer."""
    return f"layers[{layer}].ffn.down"


def downs(options: Options, model: Decoder, layers: Sequence[int]) -> dict[str, Linear]:
    """The down-projections of some layers by path; ConfigError where one is no plain matrix."""
    blocks, found, problems = period_of(unstack(model).layers), {}, []
    for layer in layers:
        ffn = getattr(blocks[layer], "ffn", None)
        down = getattr(ffn, "down", None)
        if isinstance(ffn, FFNS) and isinstance(down, Linear):
            found[path_of(layer)] = down
        else:
            problems.append(f"layer {layer} has {type(ffn).__name__} for its FFN")
    attn = getattr(blocks[layers[-1]], "attn", None)
    plain = isinstance(attn, Attention) and isinstance(attn.o, Linear)
    if options.steps.vectors == "both" and not plain:
        problems.append(
            f"layer {layers[-1]} has no attention for the second vector; vectors='ffn' takes one"
        )
    if problems:
        raise ConfigError(
            "; ".join(problems) + ". FFNs that are plain or gated, of linear maps, are edited: "
            "edit before other parts stand in their place, or name other layers"
        )
    return found


def observed(options: Options, stats: PmetStats, model: Decoder, batch: Any) -> PmetStats:
    """Stats after one batch more: the mean of k k^T moves towards that of the batch."""
    given_batch = given(batch, model)
    paths = tuple(stats.moments)
    fresh, count = moments_of(model, given_batch, paths)
    total = np.int64(int(stats.tokens) + int(count))
    part = np.float32(count / max(total, 1))
    moments = {path: moved(stats.moments[path], fresh[path], part) for path in paths}
    return stats._replace(moments=moments, tokens=total)


def decided(options: Options, model: Decoder, stats: PmetStats) -> tuple[PmetStats, bool]:
    """Both steps, after the pass over the text."""
    if not stats.tokens:
        raise ConfigError("no token of the calibration batches is valid; give some text")
    prefixes = options.prefixes
    if prefixes is None:
        prefixes = sampled_prefixes(model, options.tokenizer, options.seed)
    rows = requests(options.facts, options.tokenizer, model, prefixes)
    layers = options.places(model)
    # In the order of the layers: a tree that was kept in a file has its names sorted as texts.
    moments = {path: stats.moments[path] for path in map(path_of, layers)}
    find = functools.partial(step1.find, model, layer=layers[-1], options=options.steps)
    found: Found = jax.tree.map(np.asarray, in_chunks(find, rows, options.chunk))
    if not np.isfinite(found.targets).all():
        raise NumericalError("the answers' losses are not finite; check the model's weights")
    stats = stats._replace(
        before=found.before,
        vectors=found.vectors,
        nats=np.asarray(found.terms.nats),
        kl=np.asarray(found.terms.kl),
        steps=np.asarray(found.steps),
        done=np.bool_(True),
    )
    deltas = written(
        model,
        rows,
        stats.targets,
        moments,
        options.spread,
        options.preserve,
        options.chunk,
    )
    return stats._replace(deltas=deltas), True
