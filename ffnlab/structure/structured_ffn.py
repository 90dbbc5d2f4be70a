"""Building on Efficient Foundations: Effectively Training LLMs with Structured Feedforward Layers
(2024, arXiv 2406.16450).

The matrices of FFNs are structured: thin products, or blocks (`ffnlab.weights`). A model that there
is already is factorized; one that trains from scratch begins with factors that are drawn well, and
a dense companion of each guides it through the first steps. For few rows the factors may be
multiplied out again.

    y = alpha(t) x W + (1 - alpha(t)) x V,   alpha(t) = (1 + cos(pi t / T)) / 2 until T, then 0

Symbols. N, M: inputs and outputs of a map; R: rank; B: blocks; V: the structured matrix; W: its
guide, V at first; T: steps that are guided.

What differs from the authors' code: step s is guided by alpha(s), the first one by alpha(0) = 1
(they count before they ask, and begin at alpha(1)). The guide of a BlockShuffle begins as the true
product, with the shuffle; theirs leaves the shuffle out, so that W is another matrix than V. Of
maps whose guide does not run in a step by chance nothing is computed for it, as in theirs, but
under `jax.vmap`.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from ffnlab import tree
from ffnlab.errors import ConfigError, at_least, is_known
from ffnlab.layers import GroupedLinear, Guided, Linear
from ffnlab.layers.linear import Map
from ffnlab.losses import InformedLoss, Loss, Moment, next_token
from ffnlab.models.rewriting import key_of, rewriting, routers
from ffnlab.transform import Transform
from ffnlab.tree import Selector
from ffnlab.weights import (
    BlockDense,
    BlockDiagonal,
    BlockShuffle,
    Dense,
    LowRank,
    Merged,
    Weight,
)
from ffnlab.weights.block_diagonal import polar

__all__ = [
    "CROSSOVER",
    "FORMS",
    "guided",
    "paper_options",
    "premerged",
    "self_guided",
    "share_of_guide",
    "structured",
    "unguided",
]

FORMS = ("low_rank", "block_dense", "block_shuffle")
STARTS = ("weights", "spectral", "gaussian")
SCHEDULES = ("cosine", "linear")
STD = 0.02  # of what is drawn, as the authors' configuration has it
# Rows from which on factors are no slower than their product, as `ffnlab bench structured` finds.
CROSSOVER: Mapping[type, int] = {LowRank: 1, BlockDense: 1, BlockDiagonal: 1, BlockShuffle: 8}

Form = Literal["low_rank", "block_dense", "block_shuffle"]
Start = Literal["weights", "spectral", "gaussian"]

in_ffns = tree.at("layers[*].ffn.**") & tree.of_type(Linear, GroupedLinear) & ~routers
in_first = tree.at("layers[0].**")
factorized_maps = Selector(
    "structured maps", lambda _, node: isinstance(node, Map) and type(node.weight) in CROSSOVER
)


def structured(
    *,
    form: Form = "low_rank",
    rank: int | None = None,
    blocks: int | None = None,
    start: Start = "weights",
    first: bool = False,
    seed: int = 0,
) -> Transform[Any, tuple[()]]:
    """The transform that gives the maps of a model's FFNs structured matrices.

    Args:
      form: "low_rank", "block_dense" or "block_shuffle" (`ffnlab.weights`).
      rank: R of the first two, in 1..min(N, M); half of the smaller side when None. The paper takes
        half of the width of the stream and a quarter of it, for 63 and 32 % of the parameters.
      blocks: B of the last two, 2 when None. It divides N, and R or M.
      start: "weights" factorizes what is there, as near as can be in Frobenius norm; "spectral"
        draws anew, as the paper begins: factors of the SVD of a Gaussian matrix, or blocks that are
        orthonormal; "gaussian" draws plain factors, deviation 0.02.
      first: whether the first layer's FFN is changed too; the paper leaves it dense.
      seed: of what is drawn.
    Returns:
      a Transform that observes nothing, of any model whose layers have FFNs: gated or not, mixtures
      (each expert for itself), in float32 or bfloat16. Biases stay.
    Raises:
      ConfigError: options out of range, or that the form does not take; from the transform, maps
        that it cannot change, each with what is accepted.

    >>> structured(form="block_shuffle", blocks=4).name
    'structured-block_shuffle'
    """
    check_options(form, start, rank, blocks)

    def make(w: Float[Array, "n m"], key: Key[Array, ""]) -> Weight:
        r, b = (min(w.shape) // 2 if rank is None else rank), (2 if blocks is None else blocks)
        return made(w, key, form, start, r, b)

    def of_map(path: str, node: Map) -> Map:
        key = key_of(seed, path)
        w = node.weight.dense()
        if isinstance(node, GroupedLinear):
            return node.replace(jax.vmap(make)(w, jax.random.split(key, len(w))))
        return node.replace(make(w, key))

    def problems(model: Any) -> list[str]:
        found = [f"{path}: {text}" for path, m in maps(model).items() if (text := unfit(m, make))]
        where = "the model" if first else "beyond the first layer (first=True takes it too) it"
        return found if maps(model) else [f"{where} has no FFN of linear maps"]

    def maps(model: Any) -> dict[str, Map]:
        return {
            path: cast(Map, node)
            for path, node in tree.walk(model)
            if in_ffns(path, node)
            and not routers(path, node)
            and (first or not in_first(path, node))
        }

    def change(model: Any) -> Any:
        return tree.replace(model, {path: of_map(path, m) for path, m in maps(model).items()})

    return rewriting(f"structured-{form}", problems, change)


def check_options(form: str, start: str, rank: int | None, blocks: int | None) -> None:
    """Raises ConfigError for options of `structured` that there are not, or do not go along."""
    for name, value, known in (("form", form, FORMS), ("start", start, STARTS)):
        if value not in known:
            raise ConfigError(f"{name}={value!r} is not one of {list(known)}")
    if rank is not None and form == "block_shuffle":
        raise ConfigError(f"rank={rank}: a block_shuffle has none; its size is set by blocks")
    if blocks is not None and form == "low_rank":
        raise ConfigError(f"blocks={blocks}: a low_rank matrix has none; its size is set by rank")
    at_least(1, rank=rank, blocks=blocks)


def paper_options(form: str, width: int, percent: int) -> dict[str, Any]:
    """Options of `structured` for as many parameters as the paper's FFNs have, whose hidden layers
    are four times as wide as the stream.

    Args:
      form: one of `FORMS`.
      width: of the stream, divisible by 4.
      percent: of a dense FFN's parameters, 63 or 32.
    Raises:
      ConfigError: another form or percentage, or another width.

    >>> paper_options("block_dense", 768, 63)
    {'form': 'block_dense', 'rank': 512, 'blocks': 2}
    """
    if form not in FORMS or percent not in (63, 32) or width % 4:
        raise ConfigError(
            f"form={form!r}, percent={percent}, width={width}: one of {list(FORMS)}, 63 or 32, and "
            "a width divisible by 4 are accepted"
        )
    part = 2 if percent == 63 else 4
    own = {
        "low_rank": {"rank": width // part},
        "block_dense": {"rank": 2 * round(2 * width / (3 * part)), "blocks": 2},
        "block_shuffle": {"blocks": part},
    }
    return {"form": form, **own[form]}


def unfit(node: Map, make: Callable[..., Weight]) -> str:
    """Why a map cannot be factorized; empty where it can."""
    weight = node.weight
    if type(weight) is not Dense or weight.act is not None:
        what = "Dense with rounded inputs" if type(weight) is Dense else type(weight).__name__
        return f"its weight is a {what}; factorize before changing the weights"
    one = jax.ShapeDtypeStruct(weight.shape, weight.dtype)
    try:
        jax.eval_shape(make, one, jax.eval_shape(lambda: jax.random.key(0)))
    except ValueError as error:
        return str(error)
    return ""


def made(
    w: Float[Array, "n m"], key: Key[Array, ""], form: str, start: str, rank: int, blocks: int
) -> Weight:
    """A structured matrix: near w, or drawn in its place."""

    def near(w: Float[Array, "n m"]) -> Weight:
        if form == "low_rank":
            return LowRank.truncate(w, rank)
        if form == "block_dense":
            return BlockDense.project(w, rank, blocks)
        return BlockShuffle.project(w, blocks)

    if start == "weights":
        return near(w)
    if start == "spectral" and form == "low_rank":
        return near((STD * jax.random.normal(key, w.shape)).astype(w.dtype))
    leaves, structure = jax.tree.flatten(jax.eval_shape(near, w))
    keys = jax.random.split(key, len(leaves))
    drawn = [STD * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    drawn = [polar(each) for each in drawn] if start == "spectral" else drawn
    return jax.tree.unflatten(structure, [each.astype(w.dtype) for each in drawn])


def guided() -> Transform[Any, tuple[()]]:
    """The transform that puts a dense companion beside each structured map: `ffnlab.layers.Guided`.

    The function stays: a guide begins as what its map stands for, with all of the share. Train it
    by `self_guided`, then `unguided`.

    Returns:
      a Transform that observes nothing, of models with structured maps of one group.
    Raises:
      ConfigError: from the transform, a model without such maps, or with guides already.

    >>> guided().name
    'guided'
    """

    def alone(model: Any) -> dict[str, Linear]:
        return {
            path: cast(Linear, node)
            for path, node in tree.walk(model)
            if isinstance(node, Linear) and factorized_maps(path, node)
        }

    def problems(model: Any) -> list[str]:
        if guides_of(model):
            return ["the model has guides already; unguided drops them"]
        return [] if alone(model) else ["the model has no structured map; structured makes them"]

    def change(model: Any) -> Any:
        return tree.replace(model, {path: Guided(m) for path, m in alone(model).items()})

    return rewriting("guided", problems, change)


def unguided(*, force: bool = False) -> Transform[Any, tuple[()]]:
    """The transform that drops the guides; where their share is 0 outputs stay, bit for bit.

    Args:
      force: drop guides that still have a share, too.
    Returns:
      a Transform that observes nothing; `ffnlab.learning.rewritten` applies it to the state of a
      run, optimizer included.
    Raises:
      ConfigError: from the transform, a model without guides, or guides with a share.

    >>> unguided().name
    'unguided'
    """

    def problems(model: Any) -> list[str]:
        found = guides_of(model)
        if not found:
            return ["the model has no guides"]
        shares = {path: node.alpha.get_value() for path, node in found.items()}
        left = [path for path, share in shares.items() if not force and is_left(share)]
        return [f"{path}: its guide has a share; force=True drops it" for path in left]

    def change(model: Any) -> Any:
        return tree.replace(model, {path: node.linear for path, node in guides_of(model).items()})

    return rewriting("unguided", problems, change)


def is_left(share: Array) -> bool:
    """Whether a guide's share is above 0; not of one that is abstract."""
    is_abstract = isinstance(share, jax.ShapeDtypeStruct) or not is_known(share)
    return not is_abstract and bool(jnp.any(share > 0))


def guides_of(model: Any) -> dict[str, Guided]:
    """The guided maps of a model by path."""
    return {path: node for path, node in tree.walk(model) if isinstance(node, Guided)}


def share_of_guide(
    step: int | Int[Array, ""], *, steps: int, schedule: str = "cosine"
) -> Float[Array, ""]:
    """alpha of a step: 1 at first, exactly 0 from `steps` on.

    Args:
      step: steps taken before.
      steps: T, at least 1.
      schedule: "cosine" or "linear".
    Raises:
      ConfigError: steps below 1, or another schedule.

    >>> [round(float(share_of_guide(t, steps=4)), 3) for t in (0, 1, 2, 4, 9)]
    [1.0, 0.854, 0.5, 0.0, 0.0]
    """
    at_least(1, steps=steps)
    if schedule not in SCHEDULES:
        raise ConfigError(f"schedule={schedule!r} is not one of {list(SCHEDULES)}")
    t = jnp.asarray(step, jnp.float32) / steps
    share = 1 - t if schedule == "linear" else 0.5 * (1 + jnp.cos(jnp.pi * t))
    return jnp.where(t < 1, share, 0.0)


def self_guided(
    loss: Loss = next_token,
    *,
    steps: int,
    schedule: Literal["cosine", "linear"] = "cosine",
    reduce: bool = True,
) -> InformedLoss:
    """A loss whose model is guided by the share of its step.

    Args:
      loss: of the model and a batch, as without guides.
      steps: T, at least 1; the paper guides half of the steps. The loss of later ones is `loss`.
      schedule: of the share, "cosine" or "linear".
      reduce: each guide runs only if a number drawn for the step and the map, uniform in [0, 1), is
        below its share: half as often over T steps. Else all run until T.
    Returns:
      an informed loss; its metrics gain "alpha" and "guides", the fraction of guides that run. Its
      third item sets every guide's share to that of the next step, so that after T steps it is 0.
    Raises:
      ConfigError: as `share_of_guide`; from the loss, a model without guides.
    Source:
      self-guided training of arXiv 2406.16450; `reduce` is its code's `reduce_flop`.
    """
    share_of_guide(0, steps=steps, schedule=schedule)  # checks

    def whole(model: PyTree, batch: PyTree, moment: Moment) -> tuple:
        found = guides_of(model)
        if not found:
            raise ConfigError("the model has no guides; structure.guided makes them")
        alpha, following = (
            share_of_guide(moment.step + i, steps=steps, schedule=schedule) for i in (0, 1)
        )
        new, later, running = {}, {}, []
        for i, (path, node) in enumerate(found.items()):
            shape = node.alpha.shape  # [] or, of a stack, [layers]
            draw = jax.random.uniform(jax.random.fold_in(moment.key, i), shape)
            runs = (draw < alpha) if reduce else jnp.broadcast_to(alpha > 0, shape)
            running.append(runs.astype(jnp.float32).mean())
            new[path] = node.told(jnp.broadcast_to(alpha, shape), runs)
            later[f"{path}.alpha"] = jnp.broadcast_to(following, shape)
        mean, metrics, *more = loss(tree.replace(model, new), batch)
        told = {"alpha": alpha, "guides": jnp.stack(running).mean()}
        return mean, {**metrics, **told}, {**(more[0] if more else {}), **later}

    return whole


def premerged(*, rows: int | None = None) -> Transform[Any, tuple[()]]:
    """The transform that keeps the product of structured maps beside their factors, for few rows.

    Args:
      rows: of a call, from which on the factors are used, at least 0; when None the number that
        `ffnlab bench structured` found for the format on a CPU of two cores (`CROSSOVER`), which is
        1 where factors are never slower. It depends on the machine.
    Returns:
      a Transform that observes nothing, of models with structured maps, which train no more.
    Raises:
      ConfigError: rows below 0; from the transform, a model without structured maps.

    >>> premerged(rows=16).name
    'premerged'
    """
    at_least(0, rows=rows)

    def problems(model: Any) -> list[str]:
        is_there = any(factorized_maps(path, node) for path, node in tree.walk(model))
        return [] if is_there else ["the model has no structured map; structured makes them"]

    def merge(node: Any) -> Map:
        weight = node.weight
        return node.replace(Merged.of(weight, CROSSOVER[type(weight)] if rows is None else rows))

    return rewriting(
        "premerged", problems, lambda model: tree.map_at(model, factorized_maps, merge)
    )
