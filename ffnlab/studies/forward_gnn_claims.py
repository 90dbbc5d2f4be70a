"""What is said of forward learning of graph networks: claims, lines of the table, pictures."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ffnlab.studies import tuning
from ffnlab.studies.forward_gnn_measure import Budget, Memory
from ffnlab.studies.result import Claim
from ffnlab.studies.tuning import CLOSE, Found, Tuned

__all__ = [
    "BP",
    "CORA",
    "FEATURES",
    "FF",
    "LINKS",
    "SBM",
    "SF",
    "TOLD",
    "Curves",
    "Sizes",
    "depth_claims",
    "draw_accuracy",
    "draw_memory",
    "memory_claim",
    "memory_rows",
    "named",
    "other_claims",
]

SF, BP, FEATURES = "single forward", "backprop", "features alone"
FF = {"label_appending": "FF, labels appended", "virtual_nodes": "FF, virtual nodes"}
TOLD = {"input": "told from above, input", "loss": "told from above, loss"}
SBM, CORA, LINKS = "block models", "cora", "cora, hidden edges"
FLAT = 1.05  # of memory
Curves = Mapping[str, Mapping[int, Memory]]  # way -> depth -> what a step needs


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is run.

    Attributes:
      seeds: of graphs and first weights.
      hidden: width of layers.
      depths: of networks.
      blocks, cora: budgets on either graph.
      memory: depths whose programs are compiled.
      nodes: of the graph that they are compiled for.
      is_full: whether layers told from above, other layers, virtual nodes and Cora are run.
    """

    seeds: Sequence[int]
    hidden: int
    depths: tuple[int, ...]
    blocks: Budget
    cora: Budget
    memory: tuple[int, ...]
    nodes: int
    is_full: bool


def layers(count: int) -> str:
    """How deep, in words."""
    return f"{count} layer" if count == 1 else f"{count} layers"


def named(name: str, count: int) -> str:
    """A way of learning at a depth."""
    return f"{name}, {layers(count)}"


def evidence(found: Found, sizes: Sizes, *names: str) -> str:
    """How ways were tuned, and what was chosen for each."""
    parts = []
    for case, sides in found.items():
        budget = sizes.blocks if case == SBM else sizes.cora
        rates = ", ".join(f"{rate:g}" for rate in budget.rates)
        mine = [
            f"{name} {sides[name].size}, rate {sides[name].setting['rate']:g}"
            for name in names
            if name in sides and sides[name].setting
        ]
        if mine:
            parts.append(
                f"{case}: each the best of rates {rates} by mean accuracy on validation nodes, "
                f"parameters of the best validation (every {budget.every} steps of at most "
                f"{budget.limit} a layer); {'; '.join(mine)}"
            )
    seeds = ", ".join(map(str, sizes.seeds))
    return f"{'. '.join(parts)}. Seeds {seeds} of graphs (block models) or first weights (cora)"


def claim_of(
    claim: str, paper: str, rule: str, holds: bool, found: Found, sizes: Sizes, *names: str
) -> Claim:
    """A claim about ways that were tuned."""
    how = f"{rule}. {evidence(found, sizes, *names)}"
    return Claim(claim, paper, tuning.says(found, *names), holds, how, seeds=len(sizes.seeds))


def depth_claims(found: Found, sizes: Sizes) -> list[Claim]:
    """What depth brings, and what backpropagation of equal depth does."""
    blocks = {SBM: found[SBM]}
    mean = {name: one.mean for name, one in found[SBM].items()}
    of_nodes = {case: found[case] for case in (SBM, CORA) if case in found}
    ours, theirs = ([named(side, d) for d in sizes.depths] for side in (SF, BP))
    gaps = [tuning.deficit(of_nodes, a, b) for a, b in zip(ours, theirs, strict=True)]
    two, one, three = named(SF, 2), named(SF, 1), named(BP, 3)
    return [
        claim_of(
            "layers with losses of their own learn from edges, and a second layer more",
            "prototype on such graphs: features alone .64/.63/.54, one layer .83/.73/.73, two "
            ".88/.85/.77",
            "mean test accuracy of two layers at least .10 above features alone and .03 above "
            "one layer",
            mean[two] - mean[FEATURES] >= 0.10 and mean[two] - mean[one] >= 0.03,
            blocks,
            sizes,
            two,
            one,
            FEATURES,
        ),
        claim_of(
            "two such layers come within .08 of three by backpropagation",
            "prototype on such graphs: .88/.85/.77 and .90/.87/.82",
            "mean test accuracies at most .08 apart",
            mean[three] - mean[two] <= 0.08,
            blocks,
            sizes,
            two,
            three,
        ),
        claim_of(
            f"at equal depth at most {CLOSE} below backpropagation",
            "effective on five graphs (figures not available)",
            f"test accuracy at most {CLOSE} below that of backpropagation of as many layers, at "
            "each depth, on each graph with each seed",
            max(gaps) <= CLOSE,
            of_nodes,
            sizes,
            *ours,
            *theirs,
        ),
    ]


def other_claims(found: Found, sizes: Sizes) -> list[Claim]:
    """Negative examples, signals from above, other layers, hidden edges."""
    claims = [negatives_claim(found, sizes)]
    if sizes.is_full:
        claims += [told_claim(found, sizes), kinds_claim(found, sizes)]
    return [*claims, links_claim(found, sizes)] if LINKS in found else claims


def negatives_claim(found: Found, sizes: Sizes) -> Claim:
    """Whether the rule without negative examples is as good as those with."""
    blocks, two = {SBM: found[SBM]}, named(SF, 2)
    with_negatives = [n for n in (named(name, 2) for name in FF.values()) if n in found[SBM]]
    return claim_of(
        "no negative examples are needed",
        "single forward needs none, forward-forward does",
        f"test accuracy of single forward at most {CLOSE} below each forward-forward rule of as "
        "many layers with all wrong classes as negatives, with each seed",
        tuning.deficit(blocks, two, *with_negatives) <= CLOSE,
        blocks,
        sizes,
        two,
        *with_negatives,
    )


def told_claim(found: Found, sizes: Sizes) -> Claim:
    """Whether layers that learn at once do as well."""
    blocks, two = {SBM: found[SBM]}, named(SF, 2)
    told = [named(name, 2) for name in TOLD.values()]
    return claim_of(
        "layers that are told from above learn all at once as well as one by one",
        "top-down signals without error backpropagation (figures not available)",
        f"test accuracy of each at most {CLOSE} below single forward layer by layer, with each "
        "seed",
        max(tuning.deficit(blocks, name, two) for name in told) <= CLOSE,
        blocks,
        sizes,
        two,
        *told,
    )


def kinds_claim(found: Found, sizes: Sizes) -> Claim:
    """Whether it holds for three kinds of layer."""
    pairs = [(named(SF, 2), named(BP, 2))]
    pairs += [(f"{named(SF, 2)}, {kind}", f"{named(BP, 2)}, {kind}") for kind in ("sage", "gat")]
    mean = {name: one.mean for name, one in found[SBM].items()}
    return claim_of(
        "it holds for GCN, GraphSAGE and GAT",
        "general: three convolutions (figures not available)",
        "mean test accuracy of two layers at least .10 above features alone and at most .08 below "
        "backpropagation, for each kind of layer",
        all(mean[a] - mean[FEATURES] >= 0.1 and mean[b] - mean[a] <= 0.08 for a, b in pairs),
        {SBM: found[SBM]},
        sizes,
        FEATURES,
        *(name for pair in pairs for name in pair),
    )


def links_claim(found: Found, sizes: Sizes) -> Claim:
    """Whether hidden edges are found as well."""
    links, two, through = {LINKS: found[LINKS]}, named(SF, 2), named(BP, 2)
    return claim_of(
        f"hidden edges: at most {CLOSE} of area below backpropagation",
        "effective for link prediction on five graphs (figures not available)",
        f"area under the curve of test pairs at most {CLOSE} below that of backpropagation of as "
        "many layers, with each seed",
        tuning.deficit(links, two, through) <= CLOSE,
        links,
        sizes,
        two,
        through,
    )


def memory_claim(curves: Curves, sizes: Sizes) -> Claim:
    """What a step keeps, by depth."""
    ours, theirs = ([curves[name][d].temporary for d in sizes.memory if d > 1] for name in (SF, BP))
    grows = all(b > a for a, b in zip(theirs, theirs[1:], strict=False))

    def told(name: str) -> str:
        each = (f"{m.temporary / 1024:.0f} + {m.state / 1024:.0f}" for m in curves[name].values())
        return f"{name} {', '.join(each)}"

    depths = ", ".join(map(str, sizes.memory))
    return Claim(
        "memory of a step does not grow with depth, backpropagation's does",
        "no stored activations across layers",
        f"KiB temporary + state at depths {depths}: {told(SF)}; {told(BP)}",
        max(ours) <= FLAT * min(ours) and grows,
        f"temporary memory of the compiled step, with layers alike from the second on: that of "
        f"single forward within a factor {FLAT}, that of backpropagation larger with each layer; "
        f"{sizes.nodes} nodes, width {sizes.hidden}; the state, which holds best parameters and "
        "what the learning layer reads, is told beside it",
        seeds=0,
    )


def memory_rows(curves: Curves) -> list[dict[str, object]]:
    """Lines of the table."""
    return [
        {
            "case": "memory of a step",
            "side": named(name, depth),
            "temporary KiB": m.temporary / 1024,
            "state KiB": m.state / 1024,
        }
        for name, by in curves.items()
        for depth, m in by.items()
    ]


def draw_accuracy(figure: Any, found: Found, sizes: Sizes) -> None:
    """Test accuracy by depth, one picture for each graph."""
    cases = [case for case in (SBM, CORA) if case in found]
    for axes, case in zip(figure.subplots(1, len(cases), squeeze=False)[0], cases, strict=True):
        for name, color in ((SF, "C0"), (BP, "0.5")):
            each = np.array([found[case][named(name, d)].scores for d in sizes.depths])
            axes.plot(sizes.depths, each.mean(1), "o-", color=color, label=name)
            axes.fill_between(sizes.depths, each.min(1), each.max(1), color=color, alpha=0.2)
        features = found[case][FEATURES]
        axes.axhline(features.mean, color="k", linestyle=":", label=features_label(features))
        axes.set_ylim(bottom=features.mean - 0.1)  # room for the legend
        axes.set_xticks(sizes.depths)
        axes.set_xlabel("layers")
        axes.set_ylabel(f"test accuracy, {case}")
        axes.legend(frameon=False, loc="lower right")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Layers with losses of their own, and backpropagation")


def features_label(features: Tuned) -> str:
    """What the line of features alone is."""
    return f"{FEATURES} ({features.mean:.2f})"


def draw_memory(figure: Any, curves: Curves) -> None:
    """Temporary memory of a step by depth."""
    axes = figure.subplots()
    for name, color in ((SF, "C0"), (BP, "0.5")):
        by = curves[name]
        axes.plot(
            list(by), [m.temporary / 1024 for m in by.values()], "o-", color=color, label=name
        )
        whole = [(m.temporary + m.state) / 1024 for m in by.values()]
        axes.plot(list(by), whole, "o:", color=color, label=f"{name}, with its state")
    axes.set_xticks(list(curves[SF]))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("layers")
    axes.set_ylabel("KiB of a step")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("Memory of a compiled step by depth")
