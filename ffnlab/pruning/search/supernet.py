"""The networks inside a model of FFN blocks: widths, number of blocks, weight format of each block.

A `Supernet` names them as a `Space`, gives each one in two forms, and measures it. `formed` is the
whole model with masks, gates and rounded weights in one program for all; `cut` is the network as a
model of its own, by `models.narrow`, `models.remove` and the formats of `ffnlab.weights`. Both
compute the same. Training by `ffnlab.pruning.elastic` makes one set of weights serve all of them.

Any model whose layers are blocks, each with an FFN, is one: a Decoder, an Encoder, a ViT (without
its attentions, `models.remove`, a plain stack of residual FFNs). Blocks go from the end.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from ffnlab import tree
from ffnlab.errors import ConfigError
from ffnlab.layers.feed_forward.ffn import is_plain
from ffnlab.losses import InformedLoss, Loss, Moment, labelled
from ffnlab.models.groups import groups
from ffnlab.models.stack import layers_of, unstack
from ffnlab.pruning.elastic import Net, cut, elastic, formed
from ffnlab.pruning.search.loop import Measure
from ffnlab.pruning.search.measure import macs, meter
from ffnlab.pruning.search.space import Config, Space, Variable
from ffnlab.weights import Dense, Float8, Int8, Weight

__all__ = ["FORMATS", "Supernet", "elastic_ffns", "measuring", "supernet"]

M = TypeVar("M")
MAPS = ("gate", "up", "down")
# FP8 is stored everywhere; a backend without products of it converts the codes at every call.
FORMATS: Mapping[str, type[Dense] | type[Int8] | type[Float8]] = MappingProxyType(
    {"float": Dense, "int8": Int8, "float8": Float8}
)


class Chosen(NamedTuple):
    """A configuration as numbers, which may be traced.

    Attributes:
      net: widths and depth.
      formats: of each block, its number among the formats of the space.
    """

    net: Net
    formats: Int[Array, "blocks"]


@dataclasses.dataclass(frozen=True)
class Supernet:
    """All networks of a model; see `supernet`.

    Attributes:
      space: variables "depth" (one entry), "width" and "format" (of each block).
      ffns: names of the groups of FFN channels, of each block.
    """

    space: Space
    ffns: tuple[tuple[str, ...], ...]

    @property
    def widths(self) -> dict[str, tuple[int, ...]]:
        """What `elastic` chooses widths from."""
        own = self._values("width")
        return {name: own for block in self.ffns for name in block}

    @property
    def depths(self) -> tuple[int, ...]:
        """What `elastic` chooses depths from."""
        return self._values("depth")

    def _values(self, name: str) -> tuple[Any, ...]:
        return next(v.values for v in self.space.variables if v.name == name)

    def net(self, config: Config) -> Net:
        """Widths and depth of a configuration.

        Raises:
          ConfigError: it is none of the space.
        """
        self.space.encode(config)
        pairs = zip(self.ffns, config["width"], strict=True)
        return Net({name: w for block, w in pairs for name in block}, config["depth"][0])

    def numbers(self, config: Config) -> Chosen:
        """A configuration as arrays, for `formed`.

        Raises:
          ConfigError: it is none of the space.
        """
        known = self._values("format")
        formats = jnp.array([known.index(name) for name in config["format"]], jnp.int32)
        return Chosen(jax.tree.map(jnp.asarray, self.net(config)), formats)

    def formed(self, model: Any, chosen: Chosen) -> Any:
        """The model that computes what one network does; `chosen` may be traced.

        Args:
          model: the one that the super-network is of, trained or not.
          chosen: as `numbers` gives it.
        """
        # Rounded after the masks: a scale is of the rows that are left.
        masked = formed(unstack(model), Net(chosen.net.widths))
        known = [FORMATS[name] for name in self._values("format")]

        def rounded(weight: Weight, block: int) -> Dense:
            dense = weight.dense()
            forms = [dense if form is Dense else form.quantize(dense).dense() for form in known]
            # Codes times scales are float32, which a product rounds to what it is given.
            forms = [each.astype(dense.dtype) for each in forms]
            return Dense(jax.lax.select_n(chosen.formats[block], *forms) if known[1:] else forms[0])

        return formed(self._with_weights(masked, rounded), Net({}, chosen.net.depth))

    def cut(self, model: Any, config: Config) -> Any:
        """One network as a model of its own, which `formats.save` writes as format "ffnlab".

        Args:
          model: the one that the super-network is of, trained or not.
          config: a configuration of the space.
        Raises:
          ConfigError: it is none of the space.
        """
        net = self.net(config)
        forms = [FORMATS[str(name)] for name in config["format"]]

        def stored(weight: Weight, block: int) -> Weight:
            form = forms[block]
            return weight if form is Dense else form.quantize(weight.dense())

        return self._with_weights(cut(unstack(model), net), stored)

    def _with_weights(self, model: M, change: Callable[[Weight, int], Weight]) -> M:
        """The model with each weight of an FFN replaced by a function of it and of its block."""
        new = tree.copy(model)
        nodes = dict(tree.walk(new))
        for block, names in enumerate(self.ffns):
            for ffn in (nodes[name] for name in names if nodes.get(name) is not None):
                for name in MAPS:
                    if hasattr(ffn, name):
                        linear = getattr(ffn, name)
                        setattr(ffn, name, linear.replace(change(linear.weight, block)))
        return new


def supernet(
    model: Any,
    widths: Sequence[int],
    *,
    depths: Sequence[int] = (),
    formats: Sequence[str] = ("float",),
) -> Supernet:
    """The super-network of a model.

    Args:
      model: whose layers are blocks, each with an FFN; stacked or not, leaves may be abstract.
      widths: how many channels an FFN may have.
      depths: how many blocks may stay, from the first; all when empty.
      formats: of the weights of a block's FFN, keys of `FORMATS`.
    Raises:
      ConfigError: another model or a block without an FFN, an FFN whose weights are no plain
        `Dense`, widths below 1 or above an FFN's channels, depths below 1 or above the number of
        blocks, an unknown format; or values that are missing or twice.

    >>> from ffnlab.testing import tiny
    >>> net = supernet(tiny(), (8, 16, 32), depths=(2, 3), formats=("float", "int8"))
    >>> net.space.networks, net.ffns[0]
    (252, ('layers[0].ffn',))
    """
    blocks = layers_of(model)
    flat = jax.eval_shape(unstack, model)
    nodes = dict(tree.walk(flat))
    found = {group.name: group.size for group in groups(flat)}
    ffns = tuple(
        tuple(n for n in found if n.startswith(f"layers[{i}].") and is_plain(nodes[n]))
        for i in range(blocks)
    )
    if not all(ffns):
        raise ConfigError(f"block {ffns.index(())} has no FFN; each block of a super-network has")
    for name in (name for names in ffns for name in names):
        check_dense(name, nodes[name])
    most = min(found[name] for names in ffns for name in names)
    check("widths", widths, most)
    check("depths", depths or (blocks,), blocks)
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise ConfigError(f"formats={list(formats)}: some of {list(FORMATS)} are accepted")
    variables = (
        Variable("depth", tuple(depths) or (blocks,)),
        Variable("width", tuple(widths), blocks, "depth"),
        Variable("format", tuple(formats), blocks, "depth"),
    )
    return Supernet(Space(variables), ffns)


def check(name: str, values: Sequence[int], most: int) -> None:
    """Raises ConfigError unless there are values, from 1 to a largest one."""
    if not values or min(values) < 1 or max(values) > most:
        raise ConfigError(f"{name}={list(values)}: one or more from 1 to {most} are accepted")


def check_dense(path: str, ffn: Any) -> None:
    """Raises ConfigError for an FFN that masks cannot narrow: packed, or with rounded inputs."""
    for name in (name for name in MAPS if hasattr(ffn, name)):
        weight = getattr(ffn, name).weight
        if not isinstance(weight, Dense) or weight.act is not None:
            raise ConfigError(
                f"{path}.{name}.w is a {type(weight).__name__} that is quantized, or whose inputs "
                "are; a plain Dense is accepted: search the model as it was before"
            )


def elastic_ffns(
    loss: Loss, *, widths: tuple[int, ...], depths: tuple[int, ...] = (), drawn: int = 2
) -> InformedLoss:
    """The loss by which a super-network learns: `elastic` over the FFNs of whatever model it meets.

    Args:
      loss: of any of its networks and a batch.
      widths: how many channels an FFN may have.
      depths: how many blocks may stay, from the first; all when empty.
      drawn: networks drawn for each step, beside the largest and the smallest.
    Returns:
      (model, batch, moment) -> as `elastic`. It raises what `supernet` does, before any compute.
    """

    def of_networks(model: Any, batch: PyTree, moment: Moment) -> tuple:
        net = supernet(model, widths, depths=depths)
        own = elastic(loss, net.widths, depths=net.depths, drawn=drawn)
        return own(unstack(model), batch, moment)

    return of_networks


def measuring(
    net: Supernet,
    model: Any,
    batch: PyTree,
    *,
    loss: Loss = labelled,
    inputs: PyTree | None = None,
    turns: int | None = 21,
) -> Measure:
    """What a search asks: the loss and the costs of a configuration.

    The loss is computed by masks, in one program for all configurations. Costs are those of the
    network cut out: its shapes decide them, so they are counted without its values and timed with
    zeros.

    Args:
      net: the super-network.
      model: its trained weights.
      batch: validation rows.
      loss: of the batch; its metrics are given too.
      inputs: what the model is called with to be counted and timed, rows on the first axis; the
        first part of the batch when None.
      turns: that a network and the whole model take to be timed; None for no latency.
    Returns:
      config -> {"loss", "macs" (of one row), "bytes", "latency" (time of the rows over that of the
      whole model as it is, in turns), and the metrics of the loss}. Only what a network fails by is
      raised (`ffnlab.pruning.search.search`).
    """
    inputs = batch[0] if inputs is None else inputs
    timed = None if turns is None else meter(model, inputs, turns=turns)
    evaluate = evaluator(net, loss)

    def measure(config: Config) -> dict[str, float]:
        value, metrics = evaluate(model, batch, net.numbers(config))
        shapes = jax.eval_shape(functools.partial(net.cut, config=config), model)
        found = {"loss": value, **metrics, "macs": macs(shapes, inputs)}
        found["bytes"] = tree.nbytes(shapes)
        if timed is not None:
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            found["latency"] = timed(zeros).ratio.median
        return {name: float(number) for name, number in found.items()}

    return measure


@functools.cache
def evaluator(net: Supernet, loss: Loss) -> Callable[..., tuple]:
    """The compiled loss of any configuration, which all models of one kind share."""

    @jax.jit
    def evaluate(model: Any, batch: PyTree, chosen: Chosen) -> tuple:
        return loss(net.formed(model, chosen), batch)[:2]

    return evaluate
