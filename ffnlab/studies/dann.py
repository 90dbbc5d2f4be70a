"""Domain-adversarial training: classes that carry over to a domain that has none.

Moons and the same ones turned, by the authors' shallow algorithm and by the deep rule, in full in
both conventions of lambda, at the authors' lambda and at settings that are chosen; shifted normals;
digits on photographs and all six pairs of three domains of reviews, where these are there. Where
settings are tried, each side has as many and the best by a rule that asks for no class of the
target: the bound of `dann_moons`, and on pairs training back. Whether features hide the domain is
asked of fresh probes on frozen features too: a domain's part that gave up proves nothing.
"""

import itertools
import time
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ffnlab.data import find_folder, moons
from ffnlab.storage.files import StrPath
from ffnlab.studies import STUDIES, tuning
from ffnlab.studies.classify import grouped_bars
from ffnlab.studies.dann_measure import (
    DOMAINS,
    SCORED,
    Apart,
    convnet,
    distances,
    on_normals,
    pairs,
    photographs,
    reader,
    review_pair,
    sides,
)
from ffnlab.studies.dann_moons import (
    ALONE,
    BOTH,
    MOONS,
    MOONS_HIDDEN,
    RATE,
    Carried,
    as_published,
    deep,
    least_bound,
    shallow,
)
from ffnlab.studies.result import Claim, Result
from ffnlab.studies.side_by_side import spread
from ffnlab.studies.tuning import Found

__all__ = ["run"]

SHALLOW, FEATURES, EVERYTHING = "shallow", "features", "everything"
FORMS = {
    SHALLOW: "the shallow algorithm",
    FEATURES: "the deep rule, lambda on the features alone",
    EVERYTHING: "the deep rule, lambda on everything",
}
CHOSEN = {form: f"{form}, chosen" for form in (FEATURES, EVERYTHING)}
FORMS |= {CHOSEN[form]: f"{FORMS[form]}, settings chosen" for form in CHOSEN}
PASSES, STEPS, QUICK_STEPS = 500, 40_000, 6_000
NORMAL_STEPS = 5_000
PHOTOGRAPHS = "digits to photographs"
Moons = Mapping[str, Mapping[str, Carried]]  # form -> side -> figures
Distances = Mapping[str, Mapping[str, Sequence[float]]]  # pair -> side -> one for each seed


def run(*, out: StrPath | None = None, quick: bool = False, seed: int = 0) -> Result:
    """The study; arguments as for `ffnlab.studies.run.run_study`."""
    begin = time.perf_counter()
    seeds = [seed] if quick else [seed, seed + 1, seed + 2]
    forms = [FEATURES] if quick else [FEATURES, EVERYTHING]
    steps = QUICK_STEPS if quick else STEPS
    on = on_moons(seeds, forms, steps=steps, quick=quick)
    apart = on_normals(seeds, steps=NORMAL_STEPS)
    found, far = tuned(seeds, quick)
    return Result(
        slug="dann",
        title=STUDIES["dann"].title,
        settings={
            "moons": f"150 + 150 points, 35 degrees, hidden {MOONS_HIDDEN}, lambda {MOONS:g}",
            "shallow": f"{PASSES} passes at rate .05",
            "deep": f"{steps} steps of 8 + 8 rows, SGD at {RATE:g} unless it is chosen; settings "
            "by error on unseen rows of the source and half the proxy A-distance, the first seed's",
            "moons, bounds": {
                f: {n: c.tried for n, c in of.items()} for f, of in on.items() if of[BOTH].tried
            },
            "normals": f"200 + 200 rows of width 4, lambda 3, {NORMAL_STEPS} steps of 16 + 16 rows",
            "pairs": "Adam; lambda rises over the run; settings by training back",
            "validation": tuning.trials(found),
            "seeds": seeds,
        },
        seed=seed,
        quick=quick,
        seconds=time.perf_counter() - begin,
        claims=[*moons_claims(on), normals_claim(apart), *tuned_claims(found, far)],
        table=rows_of(on, apart, found, far),
        pictures={
            "moons": lambda figure: regions(figure, on[FEATURES], seed),
            "target": lambda figure: bars(figure, found),
        },
    ).write(out)


def on_moons(seeds: Sequence[int], forms: Sequence[str], *, steps: int, quick: bool) -> Moons:
    """Moons with and without a reversed gradient; without one the deep rule is the same in both
    conventions. In full with settings that are chosen too.
    """
    found = {SHALLOW: shallow(seeds, passes=PASSES)}
    options = {"steps": steps, "quick": quick}
    alone = deep(seeds, FEATURES, ALONE, **options)
    for form in forms:
        tried = {ALONE: alone, BOTH: deep(seeds, form, BOTH, **options)}
        found[form] = {side: as_published(each, side) for side, each in tried.items()}
        if not quick:
            found[CHOSEN[form]] = {side: least_bound(each) for side, each in tried.items()}
    return found


def tuned(seeds: Sequence[int], quick: bool) -> tuple[Found, Distances]:
    """Both sides on digits and photographs, and on reviews where they are there."""
    steps = 150 if quick else 600
    rates = (1e-3, 3e-3) if quick else (1e-3, 3e-3, 1e-2)
    compared = sides(convnet, rates, batch=64, steps=steps, hidden=100, quick=quick)
    source, target = photographs(seeds[0])
    found = {PHOTOGRAPHS: pairs(source, target, compared, seeds)}
    far = {PHOTOGRAPHS: distances(found[PHOTOGRAPHS], source[1], target[1])}
    if quick or find_folder("amazon_reviews") is None:
        return found, far
    compared = sides(reader, (3e-5, 1e-4, 3e-4), batch=64, steps=300, hidden=0, quick=quick)
    for one, other in itertools.permutations(DOMAINS, 2):
        name, (source, target) = f"{one} to {other}", review_pair(one, other)
        found[name] = pairs(source, target, compared, seeds)
        far[name] = distances(found[name], source[1], target[1])
    return found, far


def moons_claims(on: Moons) -> list[Claim]:
    """Whether classes carry over to the turned moons, and whether features hide the domain."""
    bars = "target at least .90 and .05 above the same networks at lambda 0, source at least .98"
    prototype = "target .91 to .95, .83 to .84 without (a prototype of the deep rule, 3 seeds)"
    papers = {
        SHALLOW: "target .93 to .97, .82 to .83 without (the authors' code, 3 seeds of one draw of "
        "moons)",
        EVERYTHING: prototype,
        FEATURES: f"lambda is for the features only; {prototype}",
    }
    claims = [
        Claim(
            f"classes carry over to turned moons: {FORMS[form]}",
            papers.get(form, "not said how settings are found"),
            f"target {said(both.target)}, {said(alone.target)} without; source {said(both.source)}",
            bool(
                (both.target >= 0.9).all()
                and (both.target >= alone.target + 0.05).all()
                and (both.source >= 0.98).all()
            ),
            f"{bars}, for every seed of moons, networks and draws; {chosen_text(alone, both)}",
            seeds=len(both.target),
        )
        for form, (alone, both) in parts(on).items()
    ]
    told = np.concatenate([both.told for _, both in parts(on).values()])
    claims.append(
        Claim(
            "the domain's own part is near chance on moons",
            "a domain classifier cannot tell",
            f"accuracy {said(told)}",
            bool((told <= 0.62).all()),
            f"accuracy on all rows at most .62, for {of_forms(on)}, every seed",
            seeds=len(told) // len(on),
        )
    )
    for what, name in (("linear", "a fresh logistic regression"), ("fresh", "a fresh perceptron")):
        gaps = np.concatenate(
            [getattr(alone, what) - getattr(both, what) for alone, both in parts(on).values()]
        )
        text = "; ".join(
            f"{form}: {said(getattr(both, what))}, {said(getattr(alone, what))} without"
            for form, (alone, both) in parts(on).items()
        )
        claims.append(
            Claim(
                f"{name} tells domains less well by features learned against it",
                "features cannot discriminate between the domains",
                text,
                bool((gaps > 0).all()),
                "accuracy on rows that it has not seen, below that on features of networks that "
                f"learned at lambda 0, for {of_forms(on)}, every seed",
                seeds=len(gaps) // len(on),
            )
        )
    return claims


def chosen_text(alone: Carried, both: Carried) -> str:
    """How the settings of both sides came about."""
    if not both.tried:
        return f"the authors' lambda of {MOONS:g}, all else the same on both sides"
    return (
        f"each side the best of {len(both.tried)} settings by error on unseen rows of the source "
        "and half the proxy A-distance of frozen features, chosen with the first seed, without a "
        f"class of the target; tried {'; '.join([*alone.tried, *both.tried])}; chosen "
        f"{alone.setting}, and {both.setting}"
    )


def said(values: Sequence[float] | np.ndarray) -> str:
    """One value, or a mean with its range."""
    return spread([float(value) for value in values])


def parts(on: Moons) -> dict[str, tuple[Carried, Carried]]:
    """(without, with lambda) by form."""
    return {form: (sides[ALONE], sides[BOTH]) for form, sides in on.items()}


def of_forms(on: Moons) -> str:
    """The forms in words."""
    return " and ".join(FORMS[form] for form in on)


def normals_claim(apart: Apart) -> Claim:
    """Whether shifted normals come nearer."""
    right = f"accuracy on the target {said(apart.target[1])}, {said(apart.target[0])} without"
    return Claim(
        "features of shifted normals are nearer",
        "the proxy A-distance of DANN's features is smaller; 1.04, 1.66 without, 1.56 of inputs, "
        "target .905 (a prototype)",
        f"A-distance {said(apart.both)}, {said(apart.alone)} without, {said(apart.inputs)} "
        f"of inputs; {right}",
        bool((apart.both <= apart.alone - 0.3).all()),
        "proxy A-distance by a fresh logistic regression at least .3 below that of the same "
        "network at lambda 0, every seed; the class is the sign of an axis that is not shifted",
        seeds=len(apart.both),
    )


def tuned_claims(found: Found, far: Distances) -> list[Claim]:
    """Whether tuned networks carry over better, and whether their features are nearer."""
    claims = []
    kinds = {"digits on photographs": [PHOTOGRAPHS]}
    if len(found) > 1:
        kinds["reviews"] = [name for name in found if name != PHOTOGRAPHS]
    for kind, names in kinds.items():
        part = {name: found[name] for name in names}
        deficit = tuning.deficit(part, BOTH, ALONE)
        claims.append(
            tuning.tuned_claim(
                f"{kind}: more of the target is right than without",
                "state of the art on sentiment and on digits (abstract)",
                "accuracy on the target's test rows above that of the source alone, each pair and "
                "seed; settings chosen by training back, without a class of the target",
                deficit < 0 and not any(equal(part[name]) for name in names),
                part,
                ALONE,
                BOTH,
            )
        )
        gaps = [
            a - b for name in names for a, b in zip(far[name][ALONE], far[name][BOTH], strict=True)
        ]
        text = "; ".join(
            f"{name}: {said(far[name][BOTH])}, {said(far[name][ALONE])} without" for name in names
        )
        claims.append(
            Claim(
                f"{kind}: features of both domains are nearer",
                "the proxy A-distance of DANN's features is smaller",
                f"A-distance {text}",
                min(gaps) > 0,
                f"proxy A-distance of up to {SCORED} test rows of either, by a fresh logistic "
                "regression, below that of the tuned network of the source alone, each pair and "
                "seed",
                seeds=len(far[names[0]][BOTH]),
            )
        )
    return claims


def equal(sides: Mapping[str, tuning.Tuned]) -> bool:
    """Whether a seed has no more with lambda than without."""
    pairs = zip(sides[BOTH].scores, sides[ALONE].scores, strict=True)
    return any(a <= b for a, b in pairs)


def rows_of(on: Moons, apart: Apart, found: Found, far: Distances) -> list[dict[str, object]]:
    """Lines of the table."""
    rows = [
        {
            "case": f"moons, {form}",
            "side": side,
            "accuracy": float(f.target.mean()),
            "lowest": float(f.target.min()),
            "highest": float(f.target.max()),
            "source": float(f.source.mean()),
            "chosen": f.setting,
            "domain told": float(f.told.mean()),
            "fresh linear": float(f.linear.mean()),
            "fresh perceptron": float(f.fresh.mean()),
        }
        for form, by_side in on.items()
        for side, f in by_side.items()
    ]
    rows += [
        {
            "case": "normals",
            "side": side,
            "accuracy": float(right.mean()),
            "lowest": float(right.min()),
            "highest": float(right.max()),
            "A-distance": float(value.mean()),
        }
        for side, value, right in zip(
            (ALONE, BOTH), (apart.alone, apart.both), apart.target, strict=True
        )
    ]
    for row in tuning.table(found):
        rows.append(row | {"A-distance": float(np.mean(far[row["case"]][row["side"]]))})
    return rows


def regions(figure, sides: Mapping[str, Carried], seed: int) -> None:
    """What the networks of the first seed call the plane, beside both domains."""
    figure.set_size_inches(8, 3.6)
    source, target = moons(seed)
    axis = np.linspace(-4, 4, 120, dtype=np.float32)
    plane = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    for axes, (name, f) in zip(figure.subplots(1, 2), sides.items(), strict=True):
        model = jax.tree.map(lambda leaf: leaf[0], f.models)
        classes = np.asarray(model(jnp.asarray(plane))).argmax(-1).reshape(120, 120)
        axes.contourf(axis, axis, classes, levels=[-0.5, 0.5, 1.5], colors=["#f3d9d3", "#d5e3f3"])
        for value, color in ((0, "C3"), (1, "C0")):
            axes.plot(*source.x[source.y == value].T, "+", color=color, markersize=5)
        axes.plot(*target.x.T, ".", color="black", markersize=3)
        axes.set_title(f"{name}: {f.target[0]:.2f} of the target", fontsize=10)
        axes.set_aspect("equal")
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("+ source, coloured by class; dots are the target", fontsize=9)


def bars(figure, found: Found) -> None:
    """Accuracy on the target by pair."""
    figure.set_size_inches(3 + 1.2 * len(found), 4)
    axes = figure.subplots()
    grouped_bars(axes, tuning.values({n.replace(" to ", ", to "): t for n, t in found.items()}))
    axes.set_ylim(0, 1.15)
    axes.set_ylabel("accuracy on the target's test rows")
