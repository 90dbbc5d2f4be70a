"""Many runs of one rule at once: the seeds of a study, and settings that differ by a number.

A small network's step costs more to start than to compute. n of them side by side are one program,
compiled once, in which every member has a model, a key and numbers of its own.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from ffnlab.errors import ConfigError, at_least
from ffnlab.rule import Metrics, Rule

__all__ = ["members"]


def members(
    make: Callable[..., Rule],
    n: int,
    *,
    vary: Mapping[str, Sequence[float]] = MappingProxyType({}),
    chunk: int | None = None,
    shared_batch: bool = True,
) -> Rule:
    """The rule that runs n members of another one side by side.

    Its model is n models in one, each leaf [n, …]: `jax.vmap(make_model)(keys)`, or
    `jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)`. Its state is n states in one, and so
    is what `model` gives. Member i draws by `fold_in(key, i)`, however many there are.

    Args:
      make: the rule of a member; it is called with the names of `vary`, each a number that is
        traced: it may be computed with, not asked for its value (`ffnlab.errors.is_known`).
      n: how many members.
      vary: a number for each member, by the names of parameters of `make`.
      chunk: members that run at once; the others wait, which bounds memory. All when None. Alone
        (1), a member computes no branch that it does not take; several at once compute all.
      shared_batch: every member takes the same batch, and `predict` the same inputs; else those
        are [n, …], one for each.
    Returns:
      a Rule. Its metrics are means over members, and "worst", the largest "loss" of a member, where
      the rule has that; outputs of `predict` are [n, …]. `step` donates its state.
    Raises:
      ConfigError: n or chunk below 1, names that `make` does not take, other than n numbers, or
        what `make` says to one of them; from `init`, a model that is not of n members.

    >>> import optax
    >>> from ffnlab.layers import MLP
    >>> from ffnlab.learning import backprop, labelled
    >>> keys = jax.random.split(jax.random.key(0), 3)
    >>> rule = members(
    ...     lambda rate: backprop(labelled, optax.sgd(rate)), 3, vary={"rate": [0.1, 0.2, 0.4]}
    ... )
    >>> state = rule.init(jax.vmap(lambda key: MLP((4, 2), key=key))(keys), keys[0])
    >>> rule.predict(state, jnp.ones((5, 4))).shape
    (3, 5, 2)
    """
    at_least(1, n=n, chunk=chunk)
    check_names(make, vary)
    numbers = numbers_of(vary, n)
    # Made of each member's own numbers, so that their ranges are checked while they are known.
    first, *_ = [make(**{name: vary[name][i] for name in vary}) for i in range(n)]
    over_members = functools.partial(each, chunk=chunk)
    batch_axis = None if shared_batch else 0

    def init(model: PyTree, key: Array) -> PyTree:
        check_members(model, n)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(n))
        one = lambda model, key, given: make(**given).init(model, key)  # noqa: E731
        return over_members(one, (0, 0, 0))(model, keys, numbers)

    def step(state: PyTree, batch: PyTree) -> tuple[PyTree, Metrics]:
        one = lambda state, batch, given: make(**given).step(state, batch)  # noqa: E731
        state, metrics = over_members(one, (0, batch_axis, 0))(state, batch, numbers)
        means = {name: jnp.mean(values) for name, values in metrics.items()}
        return state, means | ({"worst": jnp.max(metrics["loss"])} if "loss" in metrics else {})

    def predict(state: PyTree, inputs: PyTree) -> PyTree:
        one = lambda state, inputs, given: make(**given).predict(state, inputs)  # noqa: E731
        return over_members(one, (0, batch_axis, 0))(state, inputs, numbers)

    def check(state: PyTree, batch: PyTree) -> None:
        # Shapes alone, without tracing: this is asked of every batch.
        shaped = lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)  # noqa: E731
        one = jax.tree.map(shaped, state)
        for i in range(1 if shared_batch else n):
            first.check(one, batch if shared_batch else member(batch, i))

    name = f"{n} x {first.name}"
    step, predict = jax.jit(step, donate_argnums=0), jax.jit(predict)
    return Rule(name, init, step, predict, jax.vmap(first.model), check)


def each(
    one: Callable[..., PyTree], axes: tuple[int | None, ...], *, chunk: int | None
) -> Callable[..., PyTree]:
    """A function of one member, over all of them: `jax.vmap`, of `chunk` of them at a time."""
    if chunk is None:
        return jax.vmap(one, axes)

    def over(*given: PyTree) -> PyTree:
        own = [value for value, axis in zip(given, axes, strict=True) if axis == 0]

        def of_member(own: list[PyTree]) -> PyTree:
            rest = iter(own)
            pairs = zip(given, axes, strict=True)
            return one(*(next(rest) if axis == 0 else value for value, axis in pairs))

        return jax.lax.map(of_member, own, batch_size=None if chunk == 1 else chunk)

    return over


def member(tree: PyTree, i: int) -> PyTree:
    """What of a tree [n, …] is of one member."""
    return jax.tree.map(lambda leaf: leaf[i], tree)


def check_names(make: Callable[..., Rule], vary: Mapping[str, Sequence[float]]) -> None:
    """Raises ConfigError where `make` is not called with just these names."""
    try:
        inspect.signature(make).bind(**vary)
    except TypeError as error:
        raise ConfigError(f"vary={sorted(vary)}: make is not called with these: {error}") from None


def numbers_of(vary: Mapping[str, Sequence[float]], n: int) -> dict[str, Array]:
    """The numbers of all members, [n] each.

    Raises:
      ConfigError: not n numbers.
    """
    for name, values in vary.items():
        if np.shape(values) != (n,):
            raise ConfigError(
                f"vary[{name!r}] has shape {np.shape(values)}; each of {n} members takes one number"
            )
    return {name: jnp.asarray(values) for name, values in vary.items()}


def check_members(model: PyTree, n: int) -> None:
    """Raises ConfigError where a leaf of a model is not [n, …]."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        if np.shape(leaf)[:1] != (n,):
            where = jax.tree_util.keystr(path).lstrip(".")
            raise ConfigError(
                f"model: {where} has shape {np.shape(leaf)}; a model of {n} members has leaves "
                f"[{n}, …]: jax.vmap(make_model)(jax.random.split(key, {n}))"
            )
