"""Which layers of a family have the sliding window, as its `config.json` says."""

from collections.abc import Callable

from ffnlab.formats.huggingface.fields import Fields

LAYER_TYPES = ("full_attention", "sliding_attention")
Windows = Callable[[Fields, int], list[bool]]


def nowhere(fields: Fields, layers: int) -> list[bool]:
    """No layer."""
    return [False] * layers


def everywhere(fields: Fields, layers: int) -> list[bool]:
    """Every layer, where there is a window at all."""
    return [fields.get("sliding_window") is not None] * layers


def by_type(fallback: Windows) -> Windows:
    """Windows where `layer_types` says so, else as older configs imply."""

    def windowed(fields: Fields, layers: int) -> list[bool]:
        types = fields.strings("layer_types", LAYER_TYPES, layers)
        if types is None:
            return fallback(fields, layers)
        return [kind == "sliding_attention" for kind in types]

    return windowed


def late_layers(fields: Fields, layers: int) -> list[bool]:
    """Those from `max_window_layers` on."""
    first = fields.get("max_window_layers")
    if not isinstance(first, int) or isinstance(first, bool) or first < 0:
        fields.wrong("max_window_layers", "a number of layers")
        return [False] * layers
    return [i >= first for i in range(layers)]


def if_used(windowed: Windows) -> Windows:
    """Windows where `use_sliding_window` is true."""
    return lambda fields, layers: (
        windowed(fields, layers) if fields.flag("use_sliding_window") else [False] * layers
    )


def every(name: str, fallback: int) -> Windows:
    """All layers but each n-th, n from the key `name`."""

    def windowed(fields: Fields, layers: int) -> list[bool]:
        period = fields.get(name)
        period = fallback if period is None else period
        if not isinstance(period, int) or isinstance(period, bool) or period < 1:
            fields.wrong(name, "a number of layers")
            period = fallback
        return [bool((i + 1) % period) for i in range(layers)]

    return windowed
