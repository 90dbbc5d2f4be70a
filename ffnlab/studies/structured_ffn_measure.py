"""What the study of structured FFNs trains: byte decoders, in several ways; and what is exact."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from ffnlab import transform
from ffnlab.data import TextBatches, stdlib_text
from ffnlab.data.text.stdlib_text import validation_split
from ffnlab.learning import backprop, from_state, members, rewritten
from ffnlab.losses import Moment, next_token
from ffnlab.models import Decoder, DecoderConfig
from ffnlab.models.account import flops_per_token
from ffnlab.parallel import LoopOptions, train
from ffnlab.rule import Rule
from ffnlab.structure.structured_ffn import (
    FORMS,
    guided,
    guides_of,
    made,
    paper_options,
    premerged,
    self_guided,
    structured,
    unguided,
)
from ffnlab.weights import Dense, Weight, cost

__all__ = ["CONFIG", "FULL", "QUICK", "WAYS", "Exact", "Run", "Sizes", "Way", "compared", "exact"]

BATCH, LENGTH, CONTEXT = 16, 64, 32
GUIDED = 0.5  # of the steps
CONFIG = DecoderConfig(
    vocab=256,
    width=64,
    hidden=256,
    layers=4,
    heads=4,
    kv_heads=4,
    head_dim=16,
    activation="gelu",
    mlp_bias=True,
    ffns=("plain",) * 4,
)


class Way(NamedTuple):
    """How a model is made and trained.

    Attributes:
      form: of its FFNs beyond the first layer; "" for dense ones.
      percent: of the dense FFNs' parameters.
      guided: whether a dense companion guides them.
      start: of `structured`.
      equal: what it has in common with the dense run: "steps", or "FLOPs".
    """

    form: str = ""
    percent: int = 32
    guided: bool = False
    start: str = "spectral"
    equal: str = "steps"


WAYS: Mapping[str, Way] = {
    "dense": Way(),
    **{f"{form} {p}": Way(form, p) for p in (63, 32) for form in FORMS},
    **{f"{form} 32, guided": Way(form, guided=True) for form in FORMS},
    "low_rank 32, gaussian": Way("low_rank", start="gaussian"),
    "low_rank 32, equal FLOPs": Way("low_rank", equal="FLOPs"),
    "low_rank 32, guided, equal FLOPs": Way("low_rank", guided=True, equal="FLOPs"),
}


class Sizes(NamedTuple):
    """How much is run.

    Attributes:
      seeds: of every way, with the rate that the first one chose.
      rates: of AdamW, that every way tries.
      steps: of the dense run.
      early: steps after which losses are measured too.
      held_out: windows to choose by, and as many to report.
      ways: which of `WAYS`.
    """

    seeds: int
    rates: tuple[float, ...]
    steps: int
    early: int
    held_out: int
    ways: tuple[str, ...]


FULL = Sizes(3, (2e-3, 4e-3, 8e-3, 1.6e-2), 700, 200, 256, tuple(WAYS))
QUICK = Sizes(
    1,
    (8e-3,),
    160,
    60,
    64,
    ("dense", "low_rank 32", "low_rank 32, guided"),
)


class Run(NamedTuple):
    """What one way reached.

    Attributes:
      rate: chosen by the validation windows with the first seed.
      tried: validation loss of each rate.
      early: held-out nats per byte after the early steps, by seed.
      nats: at the end, by seed.
      steps: in all.
      flops: of all steps, forward alone, per token of a batch.
      share: of the dense FFNs' parameters, those of the first layer left out.
      dropped: largest difference of a logit when the guides were dropped; 0 without guides.
    """

    rate: float
    tried: Mapping[float, float]
    early: Float[np.ndarray, "s"]
    nats: Float[np.ndarray, "s"]
    steps: int
    flops: float
    share: float
    dropped: float


class Texts(NamedTuple):
    """Bytes to learn from, and windows [n, LENGTH + 1] to choose by and to report."""

    train: bytes
    validation: Int[Array, "n t"]
    test: Int[Array, "n t"]


def texts(sizes: Sizes, seed: int) -> Texts:
    """Of the standard library; whole modules are held out."""
    whole = stdlib_text()
    inner = validation_split(whole)
    held = [
        jnp.asarray(TextBatches(text, sizes.held_out, LENGTH, seed)(0))
        for text in (inner.held_out, whole.held_out)
    ]
    return Texts(inner.train, *held)


def model_of(way: Way, seed: int) -> Decoder:
    """A decoder of one of the ways, without guides."""
    model = Decoder(CONFIG, key=jax.random.key(seed))
    if not way.form:
        return model
    options = paper_options(way.form, CONFIG.width, way.percent)
    changed = structured(**options, start=way.start, seed=seed)  # type: ignore[arg-type]
    return transform.apply(changed, model)[0]


def abstract(way: Way) -> Decoder:
    """The same without arrays."""
    return jax.eval_shape(lambda: model_of(way, 0))


def with_guides(model: Decoder) -> Decoder:
    """The same with a dense companion of every structured map."""
    return transform.apply(guided(), model)[0]


def plan_of(way: Way, steps: int) -> tuple[int, int, float]:
    """(steps in all, steps that are guided, operations of all steps per token).

    With equal FLOPs a guided run takes T steps more than the dense one, and as many are guided, of
    which a guide runs half:  (S + T) s + T g / 2 = S D.
    """
    model = abstract(way)
    own, dense = (float(flops_per_token(m, CONTEXT)) for m in (model, abstract(Way())))
    guide = 0.0
    if way.guided:
        whole = jax.eval_shape(with_guides, model)
        half = flops_per_token(whole, CONTEXT, zeros=dict.fromkeys(guides_of(whole), 0.5))
        guide = float(half) - own
    if way.equal == "steps":
        total, first = steps, round(GUIDED * steps) if way.guided else 0
    elif way.guided:
        first = round(steps * (dense - own) / (own + guide))
        total = steps + first
    else:
        total, first = round(steps * dense / own), 0
    return total, first, total * own + first * guide


def compared(sizes: Sizes, seed: int) -> dict[str, Run]:
    """Every way, tuned alike: the rate by the first seed, then the other seeds with that."""
    text = texts(sizes, seed)
    return {name: run_of(WAYS[name], sizes, text, seed) for name in sizes.ways}


def run_of(way: Way, sizes: Sizes, text: Texts, seed: int) -> Run:
    """One way."""
    rates = list(sizes.rates)
    first = learned(way, sizes, text, rates, [seed] * len(rates))
    best = int(np.argmin(first["validation"]))
    found = {name: value[best : best + 1] for name, value in first.items()}
    if sizes.seeds > 1:
        seeds = list(range(seed + 1, seed + sizes.seeds))
        more = learned(way, sizes, text, [rates[best]] * len(seeds), seeds)
        found = {name: np.concatenate([value, more[name]]) for name, value in found.items()}
    steps, _, flops = plan_of(way, sizes.steps)
    tried = dict(zip(rates, first["validation"].tolist(), strict=True))
    dropped = float(found["dropped"].max())
    return Run(
        rates[best], tried, found["early"], found["test"], steps, flops, share_of(way), dropped
    )


def share_of(way: Way) -> float:
    """Parameters of the FFNs beyond the first layer over those of dense ones, biases left out."""
    ffns: list[Any] = [abstract(each).blocks()[1].ffn for each in (way, Way())]
    sizes = [sum(cost.parameters(m.weight) for m in (ffn.up, ffn.down)) for ffn in ffns]
    return sizes[0] / sizes[1]


def learned(
    way: Way, sizes: Sizes, text: Texts, rates: Sequence[float], seeds: Sequence[int]
) -> dict[str, Float[np.ndarray, "s"]]:
    """Losses of runs side by side, which see the same rows: members of one run.

    The guided steps are a run of their own; then the guides are dropped, and the optimizer goes on
    with what it remembers of the rest. What is learned again at equal FLOPs is the first rows.

    Args:
      rates, seeds: of each run.
    Returns:
      "early", "validation" and "test", and "dropped", see `Run`.
    Raises:
      KeyboardInterrupt: a signal stopped it.
    """
    total, first, _ = plan_of(way, sizes.steps)
    rows = TextBatches(text.train, BATCH, LENGTH, seeds[0])
    batches = lambda position: rows(position % sizes.steps)  # noqa: E731
    each = [model_of(way, seed) for seed in seeds]
    each = [with_guides(model) for model in each] if way.guided else each
    model = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    rule, key, dropped = rule_of(rates, total, 0), jax.random.key(seeds[0]), 0.0
    found: dict[int, dict[str, float]] = {}
    if first:
        guiding = rule_of(rates, total, first)
        state, found = trained(guiding, model, batches, first, key, sizes, text)
        after = jax.vmap(lambda state: rewritten(state, unguided()))(state)
        dropped = difference(guiding.model(state), rule.model(after), text.test[:4])
        model, rule = rule.model(after), from_state(rule, after)
    rest = lambda position: batches(first + position)  # noqa: E731
    _, last = trained(rule, model, rest, total - first, key, sizes, text)
    early = (found or last)[sizes.early]
    end, range_ = last[total - first], range(len(rates))
    return {
        "early": np.array([early[f"test/{i}"] for i in range_]),
        **{name: np.array([end[f"{name}/{i}"] for i in range_]) for name in ("validation", "test")},
        "dropped": np.full(len(rates), dropped),
    }


def rule_of(rates: Sequence[float], total: int, guides: int) -> Rule:
    """AdamW at each rate as the paper has it: a tenth of warm-up, a cosine to a tenth.

    Args:
      rates: of the members.
      total: steps of the schedule.
      guides: steps that are guided, of models with guides; 0 for others.
    """
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, total // 10, total, 0.1)

    def one(rate: float | Array) -> Rule:
        adamw = optax.adamw(lambda count: rate * schedule(count), 0.9, 0.999, weight_decay=0.1)
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), adamw)
        if guides:
            return backprop(self_guided(steps=guides), optimizer, informed=True)
        return backprop(next_token, optimizer)

    return members(one, len(rates), vary={"rate": list(rates)})


@jax.jit
def scores(models: Decoder, validation: Array, test: Array) -> dict[str, Array]:
    """Nats per byte of every member."""
    nats = jax.vmap(lambda model, rows: next_token(model, rows)[0], (0, None))
    return {"validation": nats(models, validation), "test": nats(models, test)}


def trained(
    rule: Rule,
    model: PyTree,
    batches: Callable[[int], PyTree],
    steps: int,
    key: Array,
    sizes: Sizes,
    text: Texts,
) -> tuple[Any, dict[int, dict[str, float]]]:
    """The state after so many steps, and the losses early on and at the end."""

    def evaluate(state: Any) -> dict[str, float]:
        found = jax.device_get(scores(rule.model(state), text.validation, text.test))
        return {f"{name}/{i}": float(x) for name, xs in found.items() for i, x in enumerate(xs)}

    options = LoopOptions(log_every=0, evaluate_at=(sizes.early,))
    outcome = train(
        rule, model, batches, steps, key=key, evaluate=evaluate, options=options, together=10
    )
    if not outcome.finished:
        raise KeyboardInterrupt(f"stopped at step {outcome.position} of {steps}")
    return outcome.state, outcome.evaluations


def difference(a: Decoder, b: Decoder, rows: Int[Array, "n t"]) -> float:
    """Largest difference of a logit between two lists of models, each one model of members."""
    run = jax.jit(lambda models: jax.vmap(lambda model: model(rows))(models))
    return float(jnp.abs(run(a) - run(b)).max())


class Exact(NamedTuple):
    """What must hold whatever is learned.

    Attributes:
      products: largest difference of a structured product, and of its gradient, from that of the
        dense matrix, of outputs of about one.
      numbers: largest relative difference of counted parameters from the formulas.
      merged: largest difference of a model with products kept, with few rows and with many.
      guided: largest difference of a logit when guides are put beside.
      rate: fraction of guides that ran over the guided steps, drawn as in training.
    """

    products: float
    numbers: float
    merged: tuple[float, float]
    guided: float
    rate: float


def exact(steps: int, seed: int) -> Exact:
    """Of all three forms with 32 % of the parameters; of decoders before training."""
    n, m = CONFIG.width, CONFIG.hidden
    products, numbers = [], []
    for form in FORMS:
        for shape in ((n, m), (m, n)):
            options = {"rank": 1, "blocks": 1} | paper_options(form, n, 32)
            w = made(jnp.zeros(shape), jax.random.key(seed), start="spectral", **options)
            products.append(from_dense(w, seed))
            wanted = formula(form, *shape, options["rank"], options["blocks"])
            numbers.append(abs(sum(leaf.size for leaf in jax.tree.leaves(w)) / wanted - 1))
    model = model_of(WAYS["block_shuffle 32"], seed)
    rows = jax.random.randint(jax.random.key(seed), (2, LENGTH), 0, CONFIG.vocab)
    both = transform.apply(premerged(rows=LENGTH), model)[0]
    merged = [float(jnp.abs(both(x) - model(x)).max()) for x in (rows[:1, :8], rows)]
    whole = with_guides(model)
    beside = float(jnp.abs(whole(rows) - model(rows)).max())
    return Exact(max(products), max(numbers), tuple(merged), beside, rate_of(whole, steps, seed))


def formula(form: str, n: int, m: int, rank: int, blocks: int) -> float:
    """Parameters of a structured matrix, as the paper counts them."""
    if form == "low_rank":
        return (n + m) * rank
    if form == "block_dense":
        return rank * (m + n / blocks)
    return min(n, m) * (n + m) / blocks


def from_dense(w: Weight, seed: int) -> float:
    """How far a product and the gradient of its input are from those of the dense matrix."""
    x = jax.random.normal(jax.random.key(seed + 1), (8, w.shape[0]))

    def loss(x: Array, w: Weight) -> tuple[Array, Array]:
        y = w.matmul(x)
        return (y**2).mean(), y

    found = [jax.grad(loss, has_aux=True)(x, each) for each in (w, Dense(w.dense()))]
    return max(float(jnp.abs(a - b).max()) for a, b in zip(*found, strict=True))


def rate_of(model: Decoder, steps: int, seed: int) -> float:
    """The fraction of guides that run in the steps of a run, by what the loss tells."""
    loss, key = self_guided(steps=steps), jax.random.key(seed)
    batch = jnp.zeros((1, 2), jnp.int32)

    def of_step(step: Array) -> Array:
        moment = Moment(step, jax.random.fold_in(key, step))
        return loss(model, batch, moment)[1]["guides"]

    return float(jax.jit(lambda steps: jax.lax.map(of_step, steps))(jnp.arange(steps)).mean())
