"""What the study of meta pruning measures on the real ResNets of CIFAR-10, without its images.

Nets are taught and judged by what their own originals say of patches of photographs: how often both
name the same class. A metanetwork learns from the smaller net alone and corrects both, the larger
of which it never saw. Two sides: group norm at once, then distillation; and correction,
distillation, group norm, distillation, the same number of steps in all. Neither side's settings are
tuned. What is taken out is a mask that each batch brings, so that one program serves all of a net.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from ffnlab.data.folders import find_folder
from ffnlab.errors import require
from ffnlab.formats import load_resnet
from ffnlab.learning import backprop
from ffnlab.losses import distillation
from ffnlab.models import MetaNetwork, MetaNetworkConfig, ResNet, groups, masked, narrow
from ffnlab.parallel import LoopOptions, train
from ffnlab.pruning import corrected, lesson, meta_loss, removal_steps, to_budget
from ffnlab.pruning.group_norm import Kept, products
from ffnlab.pruning.meta import Lessons
from ffnlab.rule import Rule
from ffnlab.studies.result import Claim

__all__ = ["Pruned", "Sizes", "pruned_resnets", "resnets_are_there"]

FOLDER = "resnet_cifar10"
FILES = {"ResNet-20": "resnet20-12fca82f.npz", "ResNet-56": "resnet56-4bfd9763.npz"}
TAUGHT = "ResNet-20"  # what the metanetwork learns from
SIDE, WIDE = 32, 448  # of a patch; columns of a photograph that are learned from
META = MetaNetworkConfig(nodes=8, edges=9, layers=3, width=16, ratio=0.05)
META_RATE, REG, DECAY, RATE = 3e-3, 1e-3, 5e-4, 1e-3
SPEED_UPS = (1.5, 2.0, 3.0)
NEAR = 0.01  # of agreement

Images = Float[np.ndarray, "n h w c"]
Masks = Mapping[str, Float[Array | np.ndarray, "_"]]


class Sizes(NamedTuple):
    """How much is run.

    Attributes:
      patches: learned from, and judged on.
      meta_steps, meta_batch: of the metanetwork.
      steps, batch: of distillation before and after pruning.
    """

    patches: tuple[int, int] = (1024, 512)
    meta_steps: int = 40
    meta_batch: int = 128
    steps: int = 40
    batch: int = 32


FULL = Sizes()


class Pruned(NamedTuple):
    """A net, pruned by both sides.

    Attributes:
      name: of the net.
      common: share of the class that the original names most.
      whole: agreement after the correction, and after distillation.
      raw, tuned: agreement when pruned, and after distillation, by speed-up: (corrected, plain).
      cut: the most that scores of a corrected net that was cut are from the masked one's, relative
        to the largest, and the work asked for over the work that is left.
    """

    name: str
    common: float
    whole: tuple[float, float]
    raw: Mapping[float, tuple[float, float]]
    tuned: Mapping[float, tuple[float, float]]
    cut: tuple[float, float]

    def claims(self) -> list[Claim]:
        """What was found of the net."""
        seen = "that the metanetwork learned from" if self.name == TAUGHT else "it never saw"
        about = (
            f"share of held-out patches of photographs that net and original name alike, the "
            f"original's commonest class being {self.common:.2f} of them; net {seen}; one setting "
            "for both sides, as many steps"
        )
        found = []
        for values, when in ((self.raw, "when it is cut"), (self.tuned, "after distillation")):
            text = "; ".join(
                f"{s:g} times: {ours:.3f} against {theirs:.3f}"
                for s, (ours, theirs) in values.items()
            )
            found.append(
                Claim(
                    f"{self.name}: {when}, it agrees with the original as often as group norm's",
                    "-",
                    text,
                    all(ours >= theirs - NEAR for ours, theirs in values.values()),
                    f"{about}; at most {NEAR:.0%} less at every speed-up",
                    seeds=1,
                )
            )
        far, share = self.cut
        return [
            *found,
            Claim(
                f"{self.name}: what is left is a smaller network of the work that was asked for",
                "-",
                f"scores within {far:.0e} of the masked one's; {share:.3f} of the work asked for",
                far <= 1e-3 and share >= 1,
                f"the corrected net at {SPEED_UPS[0]:g} times, cut, multiplications counted",
                seeds=0,
            ),
        ]

    def row(self) -> dict[str, object]:
        """A line of the study's table."""
        found: dict[str, object] = {"side": self.name, "before": self.whole[1]}
        for speed_up in SPEED_UPS:
            for name, values in (("raw", self.raw), ("trained on", self.tuned)):
                ours, theirs = values[speed_up]
                found[f"{name}, {speed_up:g} times"] = f"{ours:.3f} / {theirs:.3f}"
        return found


def resnets_are_there() -> bool:
    """Whether the weights are in FFNLAB_DATA."""
    where = find_folder(FOLDER)
    return where is not None and all((where / file).is_file() for file in FILES.values())


def patches(count: int, seed: int, *, held_out: bool) -> Images:
    """Patches of scikit-learn's two photographs, mirrored or not; held-out ones are of columns that
    no other reaches."""
    load = require("sklearn.datasets", extra="run").load_sample_images
    photographs = np.stack(load().images).astype(np.float32) / 255
    random = np.random.default_rng((seed, held_out))
    first, end = (WIDE, photographs.shape[2]) if held_out else (0, WIDE)
    found = []
    for _ in range(count):
        which, row = random.integers(2), random.integers(photographs.shape[1] - SIDE + 1)
        column = random.integers(first, end - SIDE + 1)
        patch = photographs[which, row : row + SIDE, column : column + SIDE]
        found.append(patch[:, :: random.choice((-1, 1))])
    return np.stack(found)


def apart(model: ResNet, x: Array, masks: Masks) -> Array:
    """Scores of a net whose units count as masks say."""
    return masked(model, masks)(x)


scores_of = jax.jit(apart)


def scores(model: ResNet, x: Images, masks: Masks, *, batch: int = 256) -> np.ndarray:
    """The same of many images."""
    batch = min(batch, len(x))
    parts = [scores_of(model, x[i : i + batch], masks) for i in range(0, len(x), batch)]
    return np.concatenate([np.asarray(part) for part in parts])


def agreement(model: ResNet, x: Images, masks: Masks, teacher: np.ndarray) -> float:
    """Share of images that the net and the original name alike."""
    return float(np.mean(scores(model, x, masks).argmax(1) == teacher.argmax(1)))


def taught(model: ResNet, rows: tuple) -> tuple[Array, dict[str, Array]]:
    """How far a net is from its original's scores."""
    found = model(rows[0])
    same = jnp.mean(found.argmax(-1) == rows[1].argmax(-1))
    return distillation(found, rows[1]), {"agreement": same}


def distilling() -> Rule:
    """The rule that teaches a net with masks, its batch norms as they are."""
    loss = lambda model, batch: taught(masked(model, batch[2]), batch[:2])  # noqa: E731
    return backprop(loss, optax.adam(RATE))


def learned(rule: Rule, model: object, batches, steps: int, seed: int) -> object:
    """The model of a rule after so many steps.

    Raises:
      KeyboardInterrupt: a signal stopped it.
    """
    options = LoopOptions(log_every=0)
    outcome = train(rule, model, batches, steps, key=jax.random.key(seed), options=options)
    if not outcome.finished:
        raise KeyboardInterrupt(f"stopped at step {outcome.position} of {steps}")
    return rule.model(outcome.state)


def pruned_resnets(seed: int, sizes: Sizes = FULL) -> list[Pruned]:
    """Both nets, corrected by a metanetwork that learned from the smaller one, and pruned."""
    where = find_folder(FOLDER)
    assert where is not None  # `resnets_are_there` was asked
    nets = {name: load_resnet(where / file) for name, file in FILES.items()}
    learn, held = (patches(count, seed, held_out=i == 1) for i, count in enumerate(sizes.patches))
    meta = meta_of(nets[TAUGHT], learn, sizes, seed)
    return [pruned(name, net, meta, learn, held, sizes, seed) for name, net in nets.items()]


def meta_of(net: ResNet, learn: Images, sizes: Sizes, seed: int) -> MetaNetwork:
    """A metanetwork that learned from one net."""
    rows = learn, scores(net, learn, whole(net))
    size = sizes.meta_batch
    parts = [tuple(part[i : i + size] for part in rows) for i in range(0, len(learn), size)]
    lessons = Lessons([lesson(net, part) for part in parts])
    rule = backprop(meta_loss(taught, reg=REG), optax.adamw(META_RATE, weight_decay=DECAY))
    start = META.make(key=jax.random.key(seed))
    return learned(rule, start, lessons, sizes.meta_steps, seed)


def whole(net: ResNet) -> dict[str, np.ndarray]:
    """Masks of all units."""
    return {group.name: np.ones(group.size, np.float32) for group in groups(net)}


def numbers(kept: Kept) -> dict[str, np.ndarray]:
    """Masks of what is kept."""
    return {name: stays.astype(np.float32) for name, stays in kept.items()}


def pruned(
    name: str,
    net: ResNet,
    meta: MetaNetwork,
    learn: Images,
    held: Images,
    sizes: Sizes,
    seed: int,
) -> Pruned:
    """A net pruned by both sides to every speed-up."""
    every, rule = whole(net), distilling()
    teacher, of_held = (scores(net, x, every) for x in (learn, held))

    def distilled(model: ResNet, masks: Masks, steps: int) -> ResNet:
        def batch(position: int) -> tuple:
            ids = np.random.default_rng((seed, position)).integers(len(learn), size=sizes.batch)
            return learn[ids], teacher[ids], masks

        return learned(rule, model, batch, steps, seed)

    fixed = corrected(meta, net)
    trained = distilled(fixed, every, sizes.steps)
    raw, tuned, cut = {}, {}, (0.0, 0.0)
    starts = ((trained, sizes.steps), (net, 2 * sizes.steps))
    orders = [removal_steps(model) for model, _ in starts]
    for speed_up in SPEED_UPS:
        before, after = [], []
        for (model, steps), order in zip(starts, orders, strict=True):
            kept = to_budget(model, order, speed_up)
            before.append(agreement(model, held, numbers(kept), of_held))
            last = distilled(model, numbers(kept), steps)
            after.append(agreement(last, held, numbers(kept), of_held))
            if model is trained and speed_up == SPEED_UPS[0]:
                cut = cut_of(last, kept, held[:64], speed_up)
        raw[speed_up], tuned[speed_up] = tuple(before), tuple(after)
    common = float(np.bincount(of_held.argmax(1)).max() / len(held))
    wholes = tuple(agreement(model, held, every, of_held) for model in (fixed, trained))
    return Pruned(name, common, wholes, raw, tuned, cut)


def cut_of(model: ResNet, kept: Kept, x: Images, speed_up: float) -> tuple[float, float]:
    """See `Pruned.cut`."""
    small = narrow(model, kept)
    known = scores(model, x, numbers(kept))
    far = np.abs(np.asarray(jax.jit(lambda m, x: m(x))(small, x)) - known).max()
    share = products(model) / products(small) / speed_up
    return float(far / np.abs(known).max()), float(share)
