"""The inner search of LINAS: an evolution on predictors, and the best networks not yet measured."""

import numpy as np
from jaxtyping import Float, Int

from ffnlab.pruning.search.nsga2 import Algorithm, domain, evolution
from ffnlab.pruning.search.predictor import fit, predict
from ffnlab.pruning.search.settings import SearchOptions
from ffnlab.pruning.search.space import Space

__all__ = ["predicted_best"]


def predicted_best(
    space: Space,
    options: SearchOptions,
    of: Algorithm,
    first: Int[np.ndarray, "p n"],
    vectors: Int[np.ndarray, "k n"],
    values: Float[np.ndarray, "k m"],
    count: int,
    known: frozenset[bytes],
    rng: np.random.Generator,
) -> tuple[Int[np.ndarray, "c n"], Float[np.ndarray, "c m"]]:
    """What an evolution on predictors finds best among networks that are not known.

    The evolution sees known networks too, for what is bred from them; beside it an archive keeps
    the best of all that it tried and that is not known, by the same rule of survival.

    Args:
      space: of networks.
      options: of the search.
      of: the algorithm for m objectives.
      first: what the evolution begins with, canonical and all different.
      vectors: measured, canonical, k >= 1.
      values: their objectives, finite.
      count: how many are wanted.
      known: `tobytes()` of vectors that are not wanted.
      rng: drawn from.
    Returns:
      (canonical vectors, objectives predicted); fewer than `count` where the evolution tried fewer.
    """
    features = space.one_hot(vectors)
    predictors = [fit(features, labels, grid=options.grid) for labels in values.T]

    def evaluate(candidates: np.ndarray) -> np.ndarray:
        shown = space.one_hot(candidates)
        return np.stack([predict(p, shown) for p in predictors], axis=1)

    kept, points = first[:0], values[:0]
    generations = evolution(evaluate, first, domain(space), of, rng)
    for _ in range(options.inner // options.population):
        generation = next(generations)
        taken = known | {row.tobytes() for row in kept}
        names = [row.tobytes() for row in generation.tried]
        is_new = [n not in taken and n not in names[:i] for i, n in enumerate(names)]
        kept = np.concatenate([kept, generation.tried[is_new]])
        points = np.concatenate([points, generation.tried_points[is_new]])
        best = of.survive(points, count, rng).rows
        kept, points = kept[best], points[best]
    return kept, points
