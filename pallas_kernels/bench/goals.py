"""What the figures should reach, and whether they do."""

from typing import NamedTuple

from pallas_kernels.bench import attention
from pallas_kernels.bench.rows import (
    EXPERT_TOKENS,
    EXPERTS,
    FEW,
    LAYERS,
    TOKENS,
    layer,
    mixture,
    skipped,
)

MANY = 1024  # tokens from which arithmetic takes the time
HEADER = "| goal | at least | the worst (measured) | of | |\n|---|---|---|---|---|"


class Goal(NamedTuple):
    """A ratio that a set of pairs should reach.

    Attributes:
      name: what is compared.
      at_least: the ratio.
      pairs: ((task, name), (task, name)): what must be fast, and what it is compared with; None
        for its floor.
    """

    name: str
    at_least: float
    pairs: list[tuple[tuple[str, str], tuple[str, str] | None]]


def goals():
    """All goals, a list of `Goal`."""

    def layers(fitting, other):
        tasks = [layer(name, m) for name in LAYERS for m in TOKENS if fitting(m)]
        return [((task, "w4a8"), other and (task, other)) for task in tasks]

    few, many = (lambda m: m <= FEW), (lambda m: m >= MANY)
    experts = [mixture(e, m) for e in EXPERTS for m in EXPERT_TOKENS]
    prompts = [attention.prompt_task(t) for t in attention.PROMPTS]
    dense = layer("Llama-3-8B FFN", 1), "w4a8"
    return [
        Goal(f"w4a8 FFN up to {FEW} tokens, share of the floor", 0.8, layers(few, None)),
        Goal(
            f"w4a8 FFN up to {FEW} tokens, speed over bfloat16 XLA",
            3.0,
            layers(few, "bfloat16 XLA"),
        ),
        Goal(
            f"w4a8 FFN from {MANY} tokens, speed over bfloat16 XLA",
            1.5,
            layers(many, "bfloat16 XLA"),
        ),
        Goal(f"w4a8 FFN from {MANY} tokens, speed over FP8 XLA", 0.9, layers(many, "FP8 XLA")),
        Goal(
            "INT4 FFN 70 % sparse, speed over dense w4a8",
            1.3,
            [((skipped(0.3), "sparse int4"), dense)],
        ),
        Goal(
            "grouped, speed over ragged_dot",
            1.5,
            [((t, "grouped"), (t, "ragged_dot")) for t in experts],
        ),
        Goal(
            "prefill in FP8, speed over bfloat16 cuDNN",
            1.0,
            [((task, "attention FP8"), (task, "bfloat16 cuDNN")) for task in prompts],
        ),
    ]


def judge(found):
    """The goals that figures reach.

    Args:
      found: rows as `bench.__main__.table` gives them.
    Returns:
      a list of {"goal", "at_least", "worst", "task", "met"}; worst and met are None where a row of
      the goal was not measured.
    """
    by_name = {(row["task"], row["name"]): row for row in found if row.get("us")}
    judged = []
    for goal in goals():
        ratios = {ours[0]: ratio(by_name, ours, other) for ours, other in goal.pairs}
        known = {task: value for task, value in ratios.items() if value is not None}
        task, worst = min(known.items(), key=lambda pair: pair[1], default=(None, None))
        whole = len(known) == len(ratios)
        missed = worst is not None and worst < goal.at_least
        met = False if missed else True if whole else None
        line = {"goal": goal.name, "at_least": goal.at_least, "worst": worst, "task": task}
        judged.append(line | {"met": met})
    return judged


def ratio(by_name, ours, other):
    """How many times as fast as another row, or as its floor allows, one is; None: not measured."""
    row = by_name.get(ours)
    if row is None:
        return None
    base = row["floor_us"] if other is None else by_name.get(other, {}).get("us")
    return base / row["us"] if base else None


def describe(goal):
    """A judged goal as a line of the table."""
    worst = "-" if goal["worst"] is None else f"{goal['worst']:.2f}"
    said = {True: "met", False: "missed", None: "not all measured"}[goal["met"]]
    return f"| {goal['goal']} | {goal['at_least']:.2f} | {worst} | {goal['task'] or '-'} | {said} |"
