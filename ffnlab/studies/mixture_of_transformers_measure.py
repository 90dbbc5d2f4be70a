"""What the study of Mixture-of-Transformers trains: ways to untie, two tasks, one loop."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from ffnlab import models, transform
from ffnlab.data import CaptionedDigits, Labelled, RuleSegments, captioned, digits
from ffnlab.layers import Blocks, EveryCopy, TokenFacts
from ffnlab.learning import backprop, members
from ffnlab.losses import Loss, PackedRows, next_token, packed_next_token
from ffnlab.models import Decoder, DecoderConfig
from ffnlab.models.account import flops_per_token, parameters
from ffnlab.models.cost import multiply_adds
from ffnlab.parallel import LoopOptions, train
from ffnlab.routing.mixture_of_transformers import PARTS, untie
from ffnlab.rule import Rule

__all__ = ["FULL", "QUICK", "WAYS", "Exact", "Run", "Sizes", "Task", "compared", "exact", "tasks"]

WIDTH, HIDDEN, LAYERS, HEADS = 64, 128, 2, 4
KINDS = ("first", "second")  # of tokens: the families of rules, or text and image
# Parts that have copies, by what the way is called.
WAYS: Mapping[str, tuple[str, ...]] = {
    "dense": (),
    "FFN": ("ffn",),
    "attention": ("attn_qkv", "attn_o"),
    "norms": ("norms",),
    "all": PARTS,
}


class Sizes(NamedTuple):
    """How much is run.

    Attributes:
      seeds: of every way, with the rate that the first one chose.
      rates: of AdamW, that every way tries.
      steps: of each task.
      batch: rows of each task.
      held_out: rows of each task to choose by, and as many to report.
      ways: which of `WAYS`.
    """

    seeds: int
    rates: tuple[float, ...]
    steps: tuple[int, int]
    batch: tuple[int, int]
    held_out: int
    ways: tuple[str, ...]


FULL = Sizes(3, (1e-3, 2e-3, 4e-3, 8e-3), (400, 300), (32, 16), 200, tuple(WAYS))
QUICK = Sizes(1, (2e-3,), (100, 60), (16, 8), 60, ("dense", "FFN", "all"))


class Task(NamedTuple):
    """What is learned.

    Attributes:
      name: in the results.
      config: of the decoder.
      start: first id of the second kind of token.
      steps: of training.
      loss: of a batch.
      batches: seed -> batches by position.
      validation, test: held-out rows.
    """

    name: str
    config: DecoderConfig
    start: int
    steps: int
    loss: Loss
    batches: Callable[[int], Callable[[int], PyTree]]
    validation: PyTree
    test: PyTree

    @property
    def marks(self) -> tuple[int, int, int]:
        """Steps after which losses are measured: half, three quarters, all."""
        return self.steps // 2, self.steps * 3 // 4, self.steps


class Run(NamedTuple):
    """What one way reached on one task.

    Attributes:
      rate: chosen by the validation rows with the first seed.
      tried: validation loss of each rate.
      nats: held-out nats per token after each mark, by seed, [marks, seeds].
      kinds: at the end, of tokens of either kind, [2, seeds].
      parameters: of the model.
    """

    rate: float
    tried: Mapping[float, float]
    nats: Float[np.ndarray, "m s"]
    kinds: Float[np.ndarray, "2 s"]
    parameters: int


def config_of(vocab: int) -> DecoderConfig:
    """The decoder of a vocabulary."""
    return DecoderConfig(
        vocab=vocab,
        width=WIDTH,
        hidden=HIDDEN,
        layers=LAYERS,
        heads=HEADS,
        kv_heads=HEADS,
        head_dim=WIDTH // HEADS,
    )


def tasks(sizes: Sizes, seed: int) -> list[Task]:
    """Rules of two families, and digits between captions."""
    held = [RuleSegments(sizes.held_out, 65, seed=seed + 1000 + i)(0) for i in range(2)]
    rules = RuleSegments(sizes.batch[0], 65)
    learn, rest = digits(seed)
    split = len(learn.y) - len(rest.y)
    parts = slice(split), slice(split, None)
    learn, chosen = (Labelled(learn.x[part], learn.y[part]) for part in parts)
    told = np.arange(sizes.held_out) % 2 == 0
    shown = [captioned(Labelled(d.x[: len(told)], d.y[: len(told)]), told) for d in (chosen, rest)]
    return [
        Task(
            "rules",
            config_of(2 * rules.tokens),
            *rules.starts,
            sizes.steps[0],
            next_token,
            lambda seed: RuleSegments(sizes.batch[0], 65, seed=seed),
            *held,
        ),
        Task(
            "text and images",
            config_of(CaptionedDigits.vocab),
            *CaptionedDigits.starts,
            sizes.steps[1],
            packed_next_token,
            lambda seed: CaptionedDigits(learn, sizes.batch[1], seed),
            *shown,
        ),
    ]


def decoder(task: Task, way: str, seed: int) -> Decoder:
    """A decoder in one of the ways: copies of the dense one of its seed, alike at first."""
    model = Decoder(task.config, key=jax.random.key(seed))
    if WAYS[way]:
        untied = untie(starts=(task.start,), parts=WAYS[way])
        model, _ = transform.apply(untied, model)
    return models.stack(model)


def compared(task: Task, sizes: Sizes, seed: int) -> dict[str, Run]:
    """Every way, tuned alike: the rate by the first seed, then the other seeds with that."""
    return {way: run_of(task, way, sizes, seed) for way in sizes.ways}


def run_of(task: Task, way: str, sizes: Sizes, seed: int) -> Run:
    """One way on one task."""
    rates = list(sizes.rates)
    first = learned(task, way, rates, [seed] * len(rates))
    tried = dict(zip(rates, first["validation"][-1].tolist(), strict=True))
    best = int(np.argmin(first["validation"][-1]))
    found = {name: value[:, best : best + 1] for name, value in first.items()}
    if sizes.seeds > 1:
        seeds = list(range(seed + 1, seed + sizes.seeds))
        more = learned(task, way, [rates[best]] * len(seeds), seeds)
        found = {name: np.concatenate([value, more[name]], 1) for name, value in found.items()}
    kinds = np.stack([found[kind][-1] for kind in KINDS])
    size = parameters(decoder(task, way, seed))
    return Run(rates[best], tried, found["test"], kinds, size)


def learned(
    task: Task, way: str, rates: Sequence[float], seeds: Sequence[int]
) -> dict[str, Float[np.ndarray, "m s"]]:
    """Losses after each mark of runs side by side, which see the same rows.

    Args:
      rates, seeds: of each run.
    Returns:
      "validation", "test" and, of the test rows, the kinds of tokens.
    Raises:
      KeyboardInterrupt: a signal stopped it.
    """

    def one(rate: float | Array) -> Rule:
        return backprop(task.loss, optax.adamw(rate))

    rule = members(one, len(rates), vary={"rate": list(rates)})
    each = [decoder(task, way, seed) for seed in seeds]
    model = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)

    @jax.jit
    def scores(models: Decoder, validation: PyTree, test: PyTree) -> dict[str, Array]:
        nats = jax.vmap(lambda model, rows: by_kind(model, rows, task.start), (0, None))
        seen, held = nats(models, validation), nats(models, test)
        return {"validation": seen["all"], "test": held.pop("all"), **held}

    def evaluate(state: Any) -> dict[str, float]:
        found = jax.device_get(scores(rule.model(state), task.validation, task.test))
        return {f"{name}/{i}": float(x) for name, xs in found.items() for i, x in enumerate(xs)}

    options = LoopOptions(log_every=0, evaluate_at=task.marks)
    key, batches = jax.random.key(seeds[0]), task.batches(seeds[0])
    outcome = train(
        rule, model, batches, task.steps, key=key, evaluate=evaluate, options=options, together=10
    )
    if not outcome.finished:
        raise KeyboardInterrupt(f"stopped at step {outcome.position} of {task.steps}")
    rows = [outcome.evaluations[mark] for mark in task.marks]
    return {
        name: np.array([[row[f"{name}/{i}"] for i in range(len(rates))] for row in rows])
        for name in ("validation", "test", *KINDS)
    }


def by_kind(model: Decoder, rows: PyTree, start: int) -> dict[str, Float[Array, ""]]:
    """Nats per token, of all and of those of each kind."""
    if isinstance(rows, PackedRows):
        tokens, segments = rows.tokens, rows.segments
        given = {"segments": segments[:, :-1], "positions": rows.positions[:, :-1]}
        counted = segments[:, 1:] > 0
    else:
        tokens, given, counted = rows, {}, jnp.ones(rows[:, 1:].shape, bool)
    logits = model(tokens[:, :-1], **given)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    second = tokens[:, 1:] >= start
    parts = {"all": counted, "first": counted & ~second, "second": counted & second}
    return {name: jnp.sum(nats * mask) / jnp.sum(mask) for name, mask in parts.items()}


class Exact(NamedTuple):
    """What must hold whatever is learned.

    Attributes:
      tied: largest difference of a logit between tied copies and the dense model.
      ways: largest difference of a logit, and of a gradient over its largest, between the three
        ways of drawn copies.
      work: matrix products of the grouped way over the dense model's, counted.
      closed: the same in closed form, per token.
      size: parameters outside embedding and final norm over the dense model's.
    """

    tied: float
    ways: tuple[float, float]
    work: float
    closed: float
    size: float


def exact(task: Task, seed: int) -> Exact:
    """Of a decoder with copies of all parts, on rows whose halves are of one kind each."""
    dense = Decoder(task.config, key=jax.random.key(seed))
    make = lambda **how: transform.apply(untie(starts=(task.start,), **how), dense)[0]  # noqa: E731
    tied, drawn = make(), make(copies="drawn", norm="output", seed=seed)
    draw = np.random.default_rng(seed)
    low, high = draw.integers(task.start, size=(4, 16)), draw.integers(task.start, size=(4, 16))
    last = task.config.vocab - 1
    rows = jnp.asarray(np.concatenate([low, np.minimum(high + task.start, last)], 1), jnp.int32)

    def loss(model: Decoder, order: PyTree) -> tuple[Array, Array]:
        logits = model.logits(model.run(rows, facts=TokenFacts(order=order))[0])
        return jnp.mean(logits**2), logits

    found = []
    for order in (None, EveryCopy(), Blocks(((0, 16), (1, 16)))):
        run = jax.jit(jax.grad(loss, has_aux=True, allow_int=True))
        gradients, logits = run(drawn, order)
        found.append((logits, [g for g in jax.tree.leaves(gradients) if g.dtype == jnp.float32]))
    (first, slopes), *others = found
    largest = lambda a, b: float(jnp.abs(a - b).max())  # noqa: E731
    pairs = [pair for _, other in others for pair in zip(slopes, other, strict=True)]
    ends = parameters(dense.embed) + parameters(dense.norm)
    size = [parameters(model) - ends for model in (tied, dense)]
    return Exact(
        largest(tied(rows), dense(rows)),
        (
            max(largest(first, logits) for logits, _ in others),
            max(largest(a, b) / max(float(jnp.abs(a).max()), 1e-12) for a, b in pairs),
        ),
        multiply_adds(lambda m: m(rows), tied) / multiply_adds(lambda m: m(rows), dense),
        flops_per_token(tied, 32) / flops_per_token(dense, 32),
        size[0] / size[1],
    )
