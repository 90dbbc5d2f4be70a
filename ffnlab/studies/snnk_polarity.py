"""Adapters on MiniLM that tell good reviews from bad: random features beside small networks."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import Array, PyTree

from ffnlab import transform, tree
from ffnlab.data import Labelled, find_folder, sentence_polarity, token_rows
from ffnlab.formats import Tokenizer, load
from ffnlab.learning import backprop
from ffnlab.losses import labelled
from ffnlab.models import Encoder, adapters
from ffnlab.models.calibration import called
from ffnlab.rule import Rule
from ffnlab.structure.snnk import snnk_adapter
from ffnlab.studies import tuning
from ffnlab.studies.classify import at_rate, paced
from ffnlab.studies.tuning import Side, Splits, Tuned
from ffnlab.transform import Transform

__all__ = ["BOTTLENECK", "FEATURES", "KERNEL", "NETWORK", "NOTHING", "is_there", "polarity"]

KERNEL, NETWORK, NOTHING = "features", "networks", "head alone"
FEATURES, BOTTLENECK = 8, 24  # 9 and 49 numbers for each channel of an adapter
TRAIN, VALIDATION, TEST, LENGTH = 1600, 400, 800, 32
BATCH, STEPS = 8, 120
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


def is_there() -> bool:
    """Whether both MiniLM and the reviews are in FFNLAB_DATA."""
    return find_folder("minilm") is not None and find_folder("sentence_polarity") is not None


def polarity(seeds: tuple[int, ...]) -> dict[str, Tuned]:
    """What each kind of adapter reaches on held-out sentences, with its head.

    Args:
      seeds: of the draws and the order of rows.
    """
    folder = find_folder("minilm")
    assert folder is not None, "asked for where `is_there`"
    encoder = load(folder)
    data = sentences(Tokenizer.load(folder), seeds[0])
    made = {
        KERNEL: lambda seed: snnk_adapter(features=FEATURES, seed=seed),
        NETWORK: lambda seed: adapters.adapter(bottleneck=BOTTLENECK, seed=seed),
        NOTHING: None,
    }
    sides = [side(name, encoder, adapter) for name, adapter in made.items()]
    return tuning.compare(sides, data, seeds, score=right)


class Sizes(NamedTuple):
    """Numbers that learn.

    Attributes:
      adapters: in all adapters.
      head: in the head.
    """

    adapters: int
    head: int


def sizes_of(model: Encoder) -> Sizes:
    """How much of a model learns."""
    count = lambda tree_: sum(x.size for x in jax.tree.leaves(tree_))  # noqa: E731
    head = count(model.head)
    has_any = any(slot.endswith(adapters.INSERTED) for b in model.blocks() for slot in b.slots)
    learned = tree.trained(model, adapters.TRAINS["adapter"])[0] if has_any else None
    return Sizes(count(learned), head)


def sentences(tokenizer: Tokenizer, seed: int) -> Splits:
    """Sentences of both classes in equal parts, in an order drawn from a seed."""
    whole = sentence_polarity()
    order = np.random.default_rng(seed).permutation(len(whole.y))
    parts, begin = [], 0
    for count in (TRAIN, VALIDATION, TEST):
        chosen = order[begin : begin + count]
        rows = token_rows([whole.texts[i] for i in chosen], tokenizer, LENGTH)
        parts.append(Labelled(rows._asdict(), whole.y[chosen]))  # type: ignore[arg-type]
        begin += count
    return Splits(*parts)


def side(name: str, encoder: Encoder, adapter: Callable[[int], Transform] | None) -> Side:
    """One way to learn: adapters and a head, or the head alone."""

    def start(seed: int) -> Encoder:
        steps = [] if adapter is None else [adapter(seed)]
        steps.append(adapters.classifier(classes=2, seed=seed))
        return transform.apply(transform.chain(*steps), encoder)[0]

    which = adapters.TRAINS["head"]
    which = which if adapter is None else which | adapters.TRAINS["adapter"]
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, STEPS // 10, STEPS)
    rule = backprop(of_texts, paced(optax.adam(schedule)), trainable=which)
    rates = tuning.grid(rate=RATES)
    return Side(name, rates, lambda s: at_rate(rule, s["rate"]), start, BATCH, STEPS)


def of_texts(model: Encoder, batch: tuple[PyTree, Array]) -> tuple[Array, dict[str, Array]]:
    """Cross-entropy of the classes of texts."""
    return labelled(lambda inputs: called(model, inputs), batch)


def right(rule: Rule, state: PyTree, data: Labelled) -> float:
    """The fraction of texts whose class has the largest score."""
    run = jax.jit(lambda model, inputs: called(model, inputs))
    model, found = rule.model(state), []
    for start in range(0, len(data.y), 100):
        found.append(run(model, jax.tree.map(lambda x, s=start: x[s : s + 100], data.x)))
    return float(np.mean(np.concatenate(found).argmax(-1) == data.y))
