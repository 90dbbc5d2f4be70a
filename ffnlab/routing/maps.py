"""Who chose what: the share of each expert, layer by layer and class by class, as a picture."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from ffnlab.errors import ConfigError
from ffnlab.layers.routers import Routing
from ffnlab.report import Report

__all__ = ["RoutingMap", "maps"]

EVERY = ("all",)


@dataclasses.dataclass(frozen=True)
class RoutingMap(Report):
    """Where tokens went.

    Attributes:
      kept: [n, c, e] choices that experts took, by layer and class of token.
      dropped: [n, c] choices that no expert had room for.
      unrouted: [n, c] tokens that chose nothing.
      classes: names of the c classes.
      experts: names of the e experts.
    """

    kept: Int[np.ndarray, "n c e"]
    dropped: Int[np.ndarray, "n c"]
    unrouted: Int[np.ndarray, "n c"]
    classes: tuple[str, ...]
    experts: tuple[str, ...]

    @property
    def shares(self) -> Float[np.ndarray, "n c e"]:
        """Of the choices that were taken; 0 where a class has none."""
        return self.kept / np.maximum(self.kept.sum(-1, keepdims=True), 1)

    def rows(self) -> list[dict[str, object]]:
        """A row for each layer and class."""
        found: list[dict[str, object]] = []
        for i, j in np.ndindex(self.dropped.shape):
            row: dict[str, object] = {"layer": i, "class": self.classes[j]}
            row |= dict(zip(self.experts, map(float, self.shares[i, j]), strict=True))
            row |= {"dropped": int(self.dropped[i, j]), "unrouted": int(self.unrouted[i, j])}
            found.append(row)
        return found

    def figures(self) -> dict[str, float]:
        """The largest share of an expert in each layer, and what share of choices was dropped."""
        whole = self.kept.sum(1)
        largest = (whole / np.maximum(whole.sum(-1, keepdims=True), 1)).max(-1)
        lost, taken = self.dropped.sum(), self.kept.sum()
        found = {f"largest share/layer {i}": float(share) for i, share in enumerate(largest)}
        return found | {"dropped": float(lost / max(lost + taken, 1))}

    def draw(self, figure: Any) -> None:
        """A heat map for each class: layers upwards, experts across."""
        n, c, e = self.kept.shape
        figure.set_size_inches(1.6 + c * max(2.0, 0.4 * e), 1.6 + 0.3 * n)
        axes = figure.subplots(1, c, squeeze=False, sharey=True)[0]
        for j, one in enumerate(axes):
            image = one.imshow(
                self.shares[:, j], cmap="viridis", vmin=0, vmax=1, origin="lower", aspect="auto"
            )
            one.set_title(self.classes[j], fontsize=10)
            turned = 90 if e > 4 and max(map(len, self.experts)) > 2 else 0
            one.set_xticks(range(e), self.experts, fontsize=8, rotation=turned)
            one.set_yticks(range(n), [str(i) for i in range(n)], fontsize=8)
            one.set_xlabel("expert")
        axes[0].set_ylabel("layer")
        figure.colorbar(image, ax=list(axes), label="share of choices")


def maps(
    routing: Routing,
    classes: Int[Array, "b t"] | None = None,
    *,
    names: Sequence[str] | None = None,
    experts: Sequence[str] | None = None,
) -> RoutingMap:
    """The map of a routing, whatever system made it.

    Args:
      routing: of a model, shapes [n, b, t, ...] (`outputs.reports["ffn"]` of `model.run`), or of
        one layer, [b, t, ...].
      classes: of each token (its modality, whether it is hard); all are of one when None.
      names: of the classes; numbers when None.
      experts: names of the experts; numbers when None.
    Raises:
      ConfigError: classes of another shape or out of range, or another number of names.

    >>> import jax.numpy as jnp
    >>> from ffnlab.routing import fixed
    >>> print(maps(fixed(jnp.array([[0, 1, 1, 1]]), 2), experts=["small", "big"]).rows())
    [{'layer': 0, 'class': 'all', 'small': 0.25, 'big': 0.75, 'dropped': 0, 'unrouted': 0}]
    """
    if routing.valid.ndim == 2:
        routing = jax.tree.map(lambda leaf: leaf[None], routing)
    if routing.valid.ndim != 3:
        raise ConfigError(
            f"routing is of tokens {routing.valid.shape}; [n, b, t] or [b, t] is accepted"
        )
    found = np.zeros(routing.valid.shape[1:], int) if classes is None else np.asarray(classes)
    names = _names(names, EVERY if classes is None else range(int(found.max(initial=0)) + 1))
    experts = _names(experts, range(routing.experts))
    if found.shape != routing.valid.shape[1:]:
        raise ConfigError(f"classes has shape {found.shape}, tokens {routing.valid.shape[1:]}")
    if found.min(initial=0) < 0 or found.max(initial=0) >= len(names):
        raise ConfigError(f"classes reach {found.max()}; there are {len(names)} names")
    if len(experts) != routing.experts:
        raise ConfigError(f"experts={list(experts)} for {routing.experts} experts")
    valid, chosen, kept = map(np.asarray, (routing.valid, routing.chosen, routing.kept))
    of_class = found == np.arange(len(names))[:, None, None]  # [c, b, t]
    asked = chosen[..., None] == np.arange(routing.experts)  # [n, b, t, k, e]
    count = lambda what: np.einsum("cbt,nbt->nc", of_class, what.astype(int))  # noqa: E731
    taken = (asked & kept[..., None]).sum(-2)
    table = np.einsum("cbt,nbte->nce", of_class, taken)
    asks = asked.any(-1)
    return RoutingMap(
        table,
        count((asks & ~kept).sum(-1)),
        count(valid & ~asks.any(-1)),
        names,
        experts,
    )


def _names(given: Sequence[str] | None, numbers: Sequence[object]) -> tuple[str, ...]:
    return tuple(map(str, numbers if given is None else given))
