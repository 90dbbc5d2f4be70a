"""What the best choice of a branch for each token would be, by trying all (Duo-LLM).

A pattern says which branch each layer takes, for all tokens of a row alike. The loss of every token
is measured with every pattern, and the oracle takes the best of each token, among all patterns or
among those with a given number of big branches. It reads the labels: it says what choosing could
gain, and is no model.

Patterns with a common beginning are computed once: attention once for each prefix, each branch once
for each prefix and choice.

Source: Duo-LLM (arXiv 2410.10846), section 3.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from scipy import stats

from ffnlab import tree
from ffnlab.errors import ConfigError, at_least, check_seed
from ffnlab.layers import Block, ByChoice, Context
from ffnlab.models import Decoder, trunk
from ffnlab.models.calibration import check_tokens
from ffnlab.models.stack import Stacked, unstack
from ffnlab.probe import Probe, rows
from ffnlab.report import Report
from ffnlab.routing.duo import BIG, choice_count, choices_of

__all__ = ["OracleReport", "MOST_PATTERNS", "oracle", "pattern_losses", "patterns"]

MOST_PATTERNS = 2**16
MEMORY = 2**28  # bytes of logits at once
DRAWS = 20  # of the control with as many patterns for each budget


def oracle(*, memory: int = MEMORY) -> Probe:
    """A probe of the loss of every token with every pattern of choices.

    Its batches are tokens [b, t + 1]. For L layers of c choices it computes attention
    (c^L - 1) / (c - 1) times and branches c times as often, and keeps c^(L / 2) hidden states.

    Args:
      memory: bytes that the logits of patterns may take at once, >= 1; one pattern's in any case.
    Returns:
      a probe with an `OracleReport`.
    Raises:
      ConfigError: memory < 1; from the probe, a model without choices, or with more than
        `MOST_PATTERNS` patterns, or batches that are no tokens of its vocabulary, two in a row.
    """
    at_least(1, memory=memory)

    def init(model: Any) -> None:
        if not isinstance(model, Decoder):
            raise ConfigError(f"model is a {type(model).__name__}; a Decoder is accepted")
        patterns(model)

    def measure(model: Decoder, batch: Int[Array, "b t1"]) -> Float[Array, "b t p"]:
        return pattern_losses(model, batch, memory=memory)

    def report(model: Decoder, losses: np.ndarray) -> OracleReport:
        return OracleReport(losses, patterns(model))

    probe = rows("oracle", measure, report, init=init)
    unchecked = probe.observe
    assert unchecked is not None

    def observe(stats: tuple, model: Decoder, batch: object) -> tuple:
        return unchecked(stats, model, check_tokens(batch, model.config.vocab, least=2))

    return dataclasses.replace(probe, observe=observe)


def patterns(model: Decoder) -> np.ndarray:
    """All patterns [c^L, L]: the choice in each layer that has one, the last varying fastest.

    Raises:
      ConfigError: the model has no choices, or more than `MOST_PATTERNS` patterns.
    """
    count, found = choice_count(model), choices_of(model)
    layers = len(found) * (model.layers.repeats if isinstance(model.layers, Stacked) else 1)
    if count**layers > MOST_PATTERNS:
        raise ConfigError(
            f"{layers} layers of {count} choices have {count**layers} patterns; at most "
            f"{MOST_PATTERNS} can be tried"
        )
    return np.indices((count,) * layers).reshape(layers, -1).T


def pattern_losses(
    model: Decoder, tokens: Int[Array, "b t1"], *, memory: int = MEMORY
) -> Float[Array, "b t p"]:
    """Cross-entropy of every next token with each of the `patterns`, nats.

    Args:
      model: with choices, in a list or stacked.
      tokens: [b, t + 1].
      memory: bytes of logits at once.
    """
    model = unstack(model) if isinstance(model.layers, Stacked) else model
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    b, t = inputs.shape
    angles = trunk.angles(model.layers, jnp.arange(t)[None])
    if model.modalities is not None:
        raise ConfigError("the model has copies by modality; the oracle tries choices of one copy")
    context = Context(angles, dict.fromkeys(spec.window for spec in trunk.specs(model.layers)))
    blocks, count = model.blocks(), choice_count(model)
    cut = halfway(blocks)

    def loss(h: Float[Array, "b t d"]) -> Float[Array, "b t"]:
        logits = model.logits(h)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets)

    def below(h: Float[Array, "b t d"]) -> Float[Array, "q b t"]:
        leaves = grown(blocks[cut:], h[None], context, count)
        at_once = max(1, memory // (b * t * model.config.vocab * 4))
        return jax.lax.map(loss, leaves, batch_size=min(at_once, len(leaves)))

    found = jax.lax.map(
        below, grown(blocks[:cut], model.embed_tokens(inputs)[None], context, count)
    )
    return jnp.moveaxis(found.reshape(-1, b, t), 0, -1)


def halfway(blocks: Sequence[Block]) -> int:
    """Where to cut a list of blocks so that half of the choices lie in each part."""
    chosen = [any(isinstance(n, ByChoice) for _, n in tree.walk(block)) for block in blocks]
    return next(i for i in range(len(blocks) + 1) if sum(chosen[:i]) >= sum(chosen) // 2)


def grown(
    blocks: Sequence[Block], states: Float[Array, "p b t d"], context: Context, count: int
) -> Float[Array, "q b t d"]:
    """The states of all patterns of some layers, from states before them; those of one state stand
    together."""
    for block in blocks:
        name = chosen_slot(block)
        if name is None:
            states = through(block, states, context)
            continue
        i = block.slots.index(name)
        before, after = (
            functools.reduce(without, names, block) for names in (block.slots[i:], block.slots[:i])
        )
        states = through(before, states, context)
        layer = getattr(block, name)
        grown_by = [through(taking(after, name, layer, c), states, context) for c in range(count)]
        states = jnp.stack(grown_by, 1).reshape(-1, *states.shape[1:])
    return states


def through(
    block: Block, states: Float[Array, "p b t d"], context: Context
) -> Float[Array, "p b t d"]:
    """A block of all states as one batch."""
    p, b = states.shape[:2]
    h, _, _ = block(states.reshape(p * b, *states.shape[2:]), context)
    return h.reshape(p, b, *h.shape[1:])


def chosen_slot(block: Block) -> str | None:
    """The sublayer in which tokens choose."""
    found = [name for name in block.slots if isinstance(getattr(block, name), ByChoice)]
    if len(found) > 1:
        raise ConfigError(f"a block has choices in {found}; one is accepted")
    return found[0] if found else None


def without(block: Block, name: str) -> Block:
    """A block without a sublayer, which it may have lost already."""
    return block if getattr(block, name) is None else block.without(name)


def taking(block: Block, name: str, layer: ByChoice, choice: int) -> Block:
    """A block in which all tokens make one choice."""
    if choice >= len(layer.branches):
        return block.without(name)
    new = jax.tree.map(lambda leaf: leaf, block)
    setattr(new, name, layer.branches[choice])
    return new


@dataclasses.dataclass(frozen=True)
class OracleReport(Report):
    """Losses of all tokens with all patterns, and what follows from them.

    Attributes:
      losses: [n, t, p] float32, nats of each token of n rows with each pattern.
      patterns: [p, L], the choice of each pattern in each layer; 0 is the big branch.
      seed: of the patterns that controls draw.
    """

    losses: np.ndarray
    patterns: np.ndarray
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.losses.ndim != 3 or self.losses.shape[2] != len(self.patterns):
            raise ConfigError(
                f"losses has shape {self.losses.shape}; [n, t, {len(self.patterns)}] is accepted"
            )

    @property
    def layers(self) -> int:
        """Layers with a choice."""
        return self.patterns.shape[1]

    @functools.cached_property
    def bigs(self) -> np.ndarray:
        """Big branches of each pattern, [p]."""
        return (self.patterns == BIG).sum(1)

    def feasible(self, budget: int | None) -> np.ndarray:
        """Numbers of the patterns with so many big branches; of all when None.

        Raises:
          ConfigError: a budget that no pattern has.
        """
        if budget is not None and not 0 <= budget <= self.layers:
            raise ConfigError(f"budget={budget}; 0 to {self.layers} big branches are accepted")
        return np.arange(len(self.bigs)) if budget is None else np.nonzero(self.bigs == budget)[0]

    def of(self, pattern: Sequence[int]) -> np.ndarray:
        """Losses of all tokens with one pattern, [n, t].

        Raises:
          ConfigError: there is no such pattern.
        """
        found = np.nonzero((self.patterns == np.asarray(pattern)).all(1))[0]
        if not len(found):
            raise ConfigError(f"pattern={pattern} is none of those of {self.layers} layers")
        return self.losses[..., found[0]]

    def best(self, budget: int | None = None) -> np.ndarray:
        """The oracle's pattern of each token, its number in `patterns`, [n, t]."""
        among = self.feasible(budget)
        return among[self.losses[..., among].argmin(-1)]

    def oracle(self, budget: int | None = None) -> float:
        """Mean loss where every token takes its best pattern."""
        return float(self.losses[..., self.feasible(budget)].min(-1).mean(dtype=np.float64))

    def fixed(self, budget: int | None = None) -> float:
        """Mean loss of the one pattern that is best for all tokens together."""
        return float(self.means[self.feasible(budget)].min())

    def mean(self, budget: int | None = None) -> float:
        """Mean loss over tokens and patterns: of a pattern drawn at random."""
        return float(self.means[self.feasible(budget)].mean())

    def random(self, n: int, budget: int | None = None) -> float:
        """Mean loss of the best for all tokens among n patterns drawn with replacement."""
        at_least(1, n=n)
        draws = np.random.default_rng(self.seed).choice(self.feasible(budget), n)
        return float(self.means[draws].min())

    def sampled(self, n: int, budget: int | None = None) -> float:
        """The oracle among n patterns drawn without replacement, averaged over `DRAWS` draws.

        Budgets differ in how many patterns there are to choose from; of equal numbers they can be
        compared.

        Raises:
          ConfigError: there are fewer.
        """
        among = self.feasible(budget)
        if not 1 <= n <= len(among):
            raise ConfigError(f"n={n}; 1 to {len(among)} patterns of this budget are accepted")
        random = np.random.default_rng(self.seed)
        draws = [random.choice(among, n, replace=False) for _ in range(DRAWS)]
        found = [self.losses[..., draw].min(-1).mean(dtype=np.float64) for draw in draws]
        return float(np.mean(found))

    @functools.cached_property
    def means(self) -> np.ndarray:
        """Mean loss of each pattern, [p]."""
        return self.losses.mean((0, 1), dtype=np.float64)

    def gap(self) -> np.ndarray:
        """Difficulty of each token: how far its loss with small branches alone can still fall."""
        return self.of([BIG + 1] * self.layers) - self.losses.min(-1)

    def correlation(self) -> float:
        """Spearman's, of the loss with small branches and the `gap`; 0 where one is flat."""
        small, gap = self.of([BIG + 1] * self.layers).ravel(), self.gap().ravel()
        if np.ptp(small) == 0 or np.ptp(gap) == 0:
            return 0.0
        return float(stats.spearmanr(small, gap).statistic)

    def shares(self, budget: int | None = None, *, choice: int = BIG) -> np.ndarray:
        """Share of tokens whose best pattern makes a choice, by layer and position, [L, t]."""
        taken = self.patterns[self.best(budget)] == choice
        return taken.mean(0).T

    def rows(self) -> list[dict[str, object]]:
        """A row for each number of big branches; the control where as many patterns are there."""
        rows: list[dict[str, object]] = []
        for budget in range(self.layers + 1):
            count = len(self.feasible(budget))
            row: dict[str, object] = {
                "big": budget,
                "patterns": count,
                "oracle": self.oracle(budget),
            }
            if count >= self.layers:
                row[f"oracle of {self.layers}"] = self.sampled(self.layers, budget)
            rows.append(row | {"best fixed": self.fixed(budget), "mean": self.mean(budget)})
        return rows

    def figures(self) -> Mapping[str, float]:
        """The oracle among all patterns and by budget, all-small, all-big, difficulty."""
        by_budget = {f"oracle/{b}": self.oracle(b) for b in range(self.layers + 1)}
        return {
            "oracle": self.oracle(),
            **by_budget,
            "small": float(self.of([BIG + 1] * self.layers).mean()),
            "big": float(self.of([BIG] * self.layers).mean()),
            "gap": float(self.gap().mean()),
            "correlation": self.correlation(),
        }

    def draw(self, figure: Any) -> None:
        """Losses by budget, and in which layers the oracle takes the big branch."""
        figure.set_size_inches(10, 4)
        left, right = figure.subplots(1, 2)
        budgets = range(self.layers + 1)
        for name in ("oracle", "fixed", "mean"):
            left.plot(budgets, [getattr(self, name)(b) for b in budgets], marker="o", label=name)
        left.axhline(self.oracle(), color="0.6", linestyle="--", label="oracle, any number")
        left.set_xlabel("big branches of a token")
        left.set_ylabel("nats per token")
        left.legend(frameon=False, fontsize=8)
        left.spines[["top", "right"]].set_visible(False)
        shares = np.stack([self.shares(b).mean(1) for b in budgets])
        image = right.imshow(shares, vmin=0, vmax=1, aspect="auto", origin="lower")
        right.set_xlabel("layer")
        right.set_ylabel("big branches of a token")
        right.set_title("share of tokens whose oracle takes the big branch", fontsize=9)
        figure.colorbar(image, ax=right)
