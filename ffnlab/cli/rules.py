"""The learning rules that a training file may name, and what each accepts."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

import jax
import optax
from jaxtyping import PyTree

from ffnlab.cli.inputs.data_kinds import (
    AnyData,
    DataConfig,
    DomainsConfig,
    ImagesConfig,
    PermutationConfig,
    RecordsConfig,
)
from ffnlab.cli.inputs.reading import inputs_of
from ffnlab.errors import ConfigError
from ffnlab.learning import (
    ForwardGNNOptions,
    GraphBatch,
    MapLoss,
    NoPropOptions,
    PairLoss,
    counter_current,
    dann,
    digital_twin,
    domain_classifier,
    forward_gnn,
    noprop,
    physical_ff,
)
from ffnlab.learning.counter_current.rule import mirrored
from ffnlab.losses import Loss
from ffnlab.models import ConvAutoencoder, ConvMirror
from ffnlab.outside import Methods
from ffnlab.pruning import TASOptions, tas
from ffnlab.pruning.tas.core import RATIOS
from ffnlab.rule import Rule

__all__ = ["HALVED", "RULES", "check_accepted", "check_domains", "check_halves"]

# What counter-current learning compares layers by, and its second network, by kind of model.
PAIRS = {
    "mlp": (PairLoss(), mirrored),
    "convnet": (PairLoss("cosine", scale=1.0), ConvMirror),
    "autoencoder": (MapLoss(), ConvAutoencoder.mirror),
}


OF_TWO = ("backprop", "dann")  # what learns from two domains, the former from the source alone
HALVED = ("tas",)  # what learns one thing from half of the data, another from the rest


class Own(NamedTuple):
    """A rule of ours.

    Attributes:
      factory: "module:factory".
      kinds: of models that it trains.
    """

    factory: str
    kinds: tuple[str, ...]


# One line per rule. What a rule from outside accepts, it says itself when it meets a model.
OWN: Mapping[str, Own] = MappingProxyType(
    {
        "backprop": Own(
            "ffnlab.learning.backprop:backprop",
            (
                *("decoder", "encoder", "vit", "resnet", "uvit", "revcol", "mlp", "convnet"),
                *("graph", "groups", "hypernet", "sequence", "meta", "icgnn", "oneforecast"),
                "s_mamba",
            ),
        ),
        "counter_current": Own(
            "ffnlab.cli.rules:by_counter_current", ("mlp", "convnet", "autoencoder")
        ),
        "dann": Own("ffnlab.cli.rules:by_dann", ("vit", "resnet", "mlp", "convnet")),
        "forward_gnn": Own("ffnlab.cli.rules:by_forward_gnn", ("graph",)),
        "noprop": Own("ffnlab.cli.rules:by_noprop", ("noprop",)),
        # An MLP learns by it too, but a saved one does not say what its layers are judged by.
        "physical_ff": Own("ffnlab.cli.rules:by_physical_ff", ("physical",)),
        "digital_twin": Own("ffnlab.cli.rules:by_digital_twin", ("physical",)),
        "tas": Own("ffnlab.cli.rules:by_tas", ("decoder", "vit", "resnet", "mlp", "convnet")),
    }
)
# A factory is given these where it has a parameter of that name; the rest are options.
RULES = Methods(
    "rule",
    "ffnlab.rules",
    Rule,
    MappingProxyType({name: own.factory for name, own in OWN.items()}),
    given=frozenset(
        {
            *("loss", "informed", "trainable", "optimizer", "microbatches"),
            *("model_kind", "like", "steps"),
        }
    ),
)


def check_accepted(rule: str, kind: str) -> None:
    """Raises ConfigError where a rule of ours does not train a kind of model."""
    if rule in OWN and kind not in OWN[rule].kinds:
        accepted = ", ".join(map(repr, OWN[rule].kinds))
        others = ", ".join(repr(name) for name, own in OWN.items() if kind in own.kinds)
        raise ConfigError(
            f"rule {rule!r} does not train a model of kind {kind!r}; it takes {accepted}"
            + (f" ({others} would)" if others else "")
        )


def check_domains(rule: str, options: Mapping[str, object], data: AnyData) -> None:
    """Raises ConfigError where a rule of ours is of other data than a run's, one domain or two."""
    has_two = isinstance(data, DomainsConfig)
    if isinstance(data, PermutationConfig) and rule in OWN and rule != "backprop":
        raise ConfigError(f"rule {rule!r} learns classes; a permutation is learned by 'backprop'")
    if has_two and rule in OWN and rule not in OF_TWO:
        accepted = " and ".join(map(repr, OF_TWO))
        raise ConfigError(f"rule {rule!r} learns from one domain; of two {accepted} do")
    if rule == "dann" and not has_two and options.get("strength") != 0:
        raise ConfigError(
            "rule 'dann' learns from two domains: set kind = \"domains\" in [data], or strength = "
            "0 in [rule_options] to learn from one"
        )


def check_halves(rule: str, data: AnyData) -> None:
    """Raises ConfigError where a rule of ours takes two halves of data that has none."""
    if rule in HALVED and not isinstance(data, DataConfig | ImagesConfig | RecordsConfig):
        raise ConfigError(
            f"rule {rule!r} learns from two halves of text, images or records; [data] is of "
            "another kind"
        )


def by_counter_current(
    *, model_kind: str, optimizer: optax.GradientTransformation | None = None
) -> Rule:
    """Two networks run against each other, each layer learning from the one that meets it.

    Args:
      model_kind: of the model.
      optimizer: of both networks.
    """
    pair, mirror = PAIRS[model_kind]
    return counter_current(pair, optimizer, mirror=mirror)


def by_dann(
    *,
    optimizer: optax.GradientTransformation | None = None,
    microbatches: int = 1,
    strength: float = 1.0,
    ramp: int = 0,
    scaled: Literal["features", "everything"] = "features",
    hidden: int = 100,
) -> Rule:
    """Features that tell the classes of a source and do not tell it from a target.

    Args:
      optimizer: of the network and of what tells the domains.
      microbatches: parts of a batch.
      strength: of the reversed gradient, lambda.
      ramp: steps over which it rises from 0; 0 for a constant one.
      scaled: what lambda scales: what comes back to the features, or the loss of the domains too.
      hidden: width of what tells the domains; 0 for a logistic regression.
    """
    parts = {"domain": domain_classifier(hidden), "microbatches": microbatches}
    return dann(optimizer, strength=strength, ramp=ramp, scaled=scaled, **parts)


def by_forward_gnn(
    *,
    like: GraphBatch,
    optimizer: optax.GradientTransformation | None = None,
    objective: Literal["single_forward", "label_appending", "virtual_nodes"] = "single_forward",
    top_down: Literal["none", "input", "loss"] = "none",
    temperature: float = 1.0,
    threshold: float = 2.0,
    negatives: int = 0,
    both_ways: bool = True,
    every: int = 2,
    patience: int = 100,
    limit: int = 1000,
    alternating: bool = True,
) -> Rule:
    """Layers of a graph network that each have a loss of their own.

    Args:
      like: a batch of the run.
      optimizer: of every layer by itself, which counts its own steps.
      objective: "single_forward", or with negative examples "label_appending", "virtual_nodes".
      top_down: what layers are told of those above: "none" (they learn one by one), "input" (of a
        network of form "top_down") or "loss".
      temperature: of the similarities of "single_forward".
      threshold: of the goodness of the other objectives.
      negatives: wrong classes that these write to a node; 0 for all.
      both_ways: virtual nodes and nodes read each other.
      every: steps between validations.
      patience: validations without a new best one after which a layer ends; 0 for none.
      limit: steps of a layer at most, or of all at once.
      alternating: of top_down="input": even layers take a step before odd ones.
    """
    more = objective, top_down, temperature, threshold, negatives, both_ways, every, patience, limit
    return forward_gnn(like, ForwardGNNOptions(*more, alternating), optimizer)


def by_noprop(
    *,
    optimizer: optax.GradientTransformation | None = None,
    kind: Literal["discrete", "continuous", "flow"] = "discrete",
    eta: float = 0.1,
    integration: int = 100,
    noisy: bool = False,
) -> Rule:
    """Blocks that denoise a class, each learning alone.

    Args:
      optimizer: of all blocks.
      kind: "discrete" for a stack of denoisers, "continuous" or "flow" for one.
      eta: weight of the denoising loss.
      integration: steps of inference of one denoiser.
      noisy: inference of a stack adds the posterior's noise.
    """
    return noprop(NoPropOptions(kind, eta, None, integration, noisy), optimizer)


def by_physical_ff(
    *,
    optimizer: optax.GradientTransformation | None = None,
    inner: int = 10,
    theta: float = 4.0,
) -> Rule:
    """Layers behind physical systems that learn alone, from right and wrong classes.

    Args:
      optimizer: of each layer's map, with a state of its own.
      inner: steps of the optimizer that a layer takes on a batch.
      theta: by which differences of goodness are multiplied.
    """
    return physical_ff(optimizer, inner=inner, theta=theta)


def by_digital_twin(
    *,
    optimizer: optax.GradientTransformation | None = None,
    theta: float = 4.0,
    forward: Literal["twin", "system"] = "twin",
    twin_rate: float = 1e-4,
    measured: int = 0,
) -> Rule:
    """Backpropagation through networks that learn to answer as the physical systems do.

    Args:
      optimizer: of the maps.
      theta: by which differences of goodness are multiplied.
      forward: "twin" simulates the network, "system" asks the systems on the way forward.
      twin_rate: of the twins' Adam.
      measured: steps in which systems are measured and twins learn; 0 for all.
    """
    of_twins = optax.adam(twin_rate)
    return digital_twin(
        optimizer, of_twins, theta=theta, forward=forward, measured=measured or None
    )


def by_tas(
    *,
    like: tuple[PyTree, PyTree],
    loss: Loss,
    steps: int,
    optimizer: optax.GradientTransformation | None = None,
    target: float = 0.5,
    slack: float = 0.05,
    strength: float = 2.0,
    ratios: tuple[float, ...] = RATIOS,
    depth: bool = True,
    tied: bool = True,
    rate: float = 1e-3,
    decay: float = 1e-3,
    high: float = 5.0,
    low: float = 0.1,
) -> Rule:
    """A search for a smaller network, which is what the run writes.

    Args:
      like: a batch of the run.
      loss: of the weights and of the sizes.
      steps: of the run.
      optimizer: of the weights.
      target: multiply-adds of the network that is looked for, over those of the whole one.
      slack: how far below the target they may be.
      strength: weight of the term that steers to the target.
      ratios: of a layer's channels that may be kept.
      depth: blocks may be left out too, the last ones of a stage.
      tied: convolutions of a ResNet that a sum joins keep as many channels; else each its own.
      rate: of the Adam that learns the sizes.
      decay: its weight decay.
      high: temperature at which sizes are drawn first.
      low: temperature at the end.
    """
    rows = inputs_of(like[0])
    shape = rows.shape[1:]
    if not jax.numpy.issubdtype(rows.dtype, jax.numpy.floating):
        shape = (shape[0] - 1,)  # of tokens, the last one is predicted alone
    example = jax.ShapeDtypeStruct((1, *shape), rows.dtype)
    sizes = {"target": target, "slack": slack, "strength": strength, "ratios": ratios}
    pace = {"rate": rate, "decay": decay, "high": high, "low": low}
    options = TASOptions(depth=depth, tied=tied, **sizes, **pace)
    return tas(loss, optimizer, example=example, steps=steps, options=options)
