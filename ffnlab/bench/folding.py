"""An FFN with idle channels before and after its fold, beside the plain FFN, at three widths.

    plain      h + down(gelu(up(layer norm(h))))
    unfolded   h + down(batch norm([gelu(u[:A]), u[A:]])),  u = up(batch norm(h))
    folded     down(gelu(up(h))) + straight(h)

Forms run in turns; each is compiled as a whole, as XLA fuses it best.
"""

import dataclasses
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import Array, Float
from rich.table import Table

from ffnlab import transform
from ffnlab.bench.sparse import bound, timed
from ffnlab.errors import at_least
from ffnlab.layers import Block, Context
from ffnlab.models import ViT, ViTConfig
from ffnlab.progress import track
from ffnlab.structure import repa, repa_fold

__all__ = ["Folding", "Settings", "compare", "ratios"]

FORMS = ("plain", "unfolded", "folded")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
      widths: of the stream; hidden layers are four times as wide.
      idle: share of idle channels.
      images, tokens: rows of a call, and tokens of each.
      turns: of all forms, after one to warm up.
    """

    widths: tuple[int, ...] = (192, 384, 768)
    idle: float = 0.75
    images: int = 4
    tokens: int = 196
    turns: int = 15

    def __post_init__(self) -> None:
        at_least(1, images=self.images, tokens=self.tokens, turns=self.turns)
        at_least(1, widths=min(self.widths, default=0))


@dataclasses.dataclass(frozen=True)
class Folding:
    """Times.

    Attributes:
      seconds: by width and form, medians.
      ratios: by width, folded over "unfolded" and over "plain", medians over turns.
      about: what they are of; one line.
    """

    seconds: Mapping[int, Mapping[str, float]]
    ratios: Mapping[int, Mapping[str, float]]
    about: str

    def __rich__(self) -> Table:
        names = ("width", *(f"{form} ms" for form in FORMS), "/ unfolded", "/ plain")
        table = Table(*names, title="FFNs with idle channels, folded", caption=self.about)
        for width, times in self.seconds.items():
            over = self.ratios[width]
            cells = [f"{1e3 * times[form]:.2f}" for form in FORMS]
            cells += [f"{over[form]:.2f}" for form in ("unfolded", "plain")]
            table.add_row(str(width), *cells)
        return table


def compare(settings: Settings = Settings(), *, progress: bool = False) -> Folding:
    """Measures all widths.

    Args:
      settings: sizes and turns.
      progress: show a bar.
    """
    s, seconds, ratios = settings, {}, {}
    for width in track(s.widths, "bench", enabled=progress):
        calls = forms(s, width)
        for call in calls.values():
            jax.block_until_ready(call())
        turns = [{name: timed(call) for name, call in calls.items()} for _ in range(s.turns)]
        seconds[width] = {name: statistics.median(turn[name] for turn in turns) for name in FORMS}
        ratios[width] = {
            name: statistics.median(turn["folded"] / turn[name] for turn in turns)
            for name in ("unfolded", "plain")
        }
    about = (
        f"float32, jax {jax.__version__}, {jax.devices()[0].platform}; {s.images} x {s.tokens} "
        f"tokens, {s.idle:g} of the channels idle"
    )
    return Folding(seconds, ratios, about)


def forms(settings: Settings, width: int) -> dict[str, Callable[[], Any]]:
    """The three forms at a width, as calls without arguments."""
    s = settings
    config = ViTConfig((2, 2), 2, width, 4 * width, 1, 1, channels=1, classes=2, pool="mean")
    plain = ViT(config, key=jax.random.key(0))
    unfolded, _ = transform.apply(repa(idle=s.idle), plain)
    folded, _ = transform.apply(repa_fold(force=True), unfolded)
    h = jax.random.normal(jax.random.key(1), (s.images, s.tokens, width))
    models = zip(FORMS, (plain, unfolded, folded), strict=True)
    return {name: bound(slot, h, model.blocks()[0].without("attn")) for name, model in models}


def slot(h: Float[Array, "b t d"], block: Block) -> Float[Array, "b t d"]:
    """What a block without attention makes of the stream."""
    return block(h, Context({}, {}))[0]


def ratios() -> dict[str, float]:
    """Time of the folded form over "unfolded" and "plain" at width 768."""
    found = compare(Settings(widths=(768,)))
    return dict(found.ratios[768])
