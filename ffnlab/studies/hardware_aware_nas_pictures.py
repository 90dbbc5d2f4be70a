"""Pictures of the study of hardware-aware NAS."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from ffnlab.pruning.search import front, measured
from ffnlab.studies.hardware_aware_nas_known import COUNTS, TACTICS
from ffnlab.studies.hardware_aware_nas_measure import TIMED, Found, volumes

__all__ = ["fronts", "latencies", "lines"]


def fronts(figure, found: Found) -> None:
    """The fronts of the first seed, loss against each cost."""
    panels = {pair: {t: logs[0] for t, logs in own.items()} for pair, own in found.counted.items()}
    panels[TIMED] = dict(found.timed)
    figure.set_size_inches(12, 4)
    for axes, (objectives, logs) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for i, (tactic, log) in enumerate(logs.items()):
            points = measured(log)[1][:, ::-1]
            best = points[front(points)]
            label = f"{tactic}: {volumes(objectives, [log])[0]:.3f}"
            axes.plot(*points.T, ".", color=f"C{i}", alpha=0.3, ms=4)
            axes.step(*best.T, where="post", color=f"C{i}", label=label)
        axes.set_xlabel(objectives[1] + " / the whole network's" * (objectives == TIMED))
        axes.legend(frameon=False, title="hypervolume", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("validation loss, nats")


def lines(figure, found: Mapping[str, Float[np.ndarray, "seeds counts"]]) -> None:
    """Hypervolume by the number of measurements: means and ranges over seeds."""
    axes = figure.subplots()
    for i, (tactic, values) in enumerate(found.items()):
        axes.plot(COUNTS, values.mean(axis=0), "o-", color=f"C{i}", label=tactic)
        axes.fill_between(COUNTS, values.min(axis=0), values.max(axis=0), color=f"C{i}", alpha=0.15)
    axes.set_xlabel("networks measured")
    axes.set_ylabel("hypervolume")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def latencies(figure, found: Found) -> None:
    """What predictors said before networks were measured, and what was measured."""
    axes, log = figure.subplots(), found.timed[TACTICS[0]]
    said, wanted = log.expected[:, 1], log.values[:, 1]
    axes.plot(said, wanted, ".", label="networks that LINAS measured")
    again = found.chosen.again
    ends = [[again.median - again.low], [again.high - again.median]]
    axes.errorbar(
        found.chosen.said, again.median, ends, fmt="o", color="C1", label="chosen, loaded"
    )
    ends = [0.0, float(np.nanmax([np.nanmax(said), np.nanmax(wanted)]))]
    axes.plot(ends, ends, "--", color="0.7")
    axes.set_xlabel("latency / the whole network's, as predicted")
    axes.set_ylabel("as measured")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
