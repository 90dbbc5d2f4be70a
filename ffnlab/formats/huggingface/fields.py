"""Typed reading of a `config.json` that may say anything: all problems are found, then told."""

from collections.abc import Mapping, Sequence

from ffnlab.errors import ConfigError
from ffnlab.formats.untrusted import quoted

SIZE_LIMITS = {
    "vocab_size": 2**24,
    "hidden_size": 2**18,
    "intermediate_size": 2**20,
    "num_hidden_layers": 2**10,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "head_dim": 2**12,
    "max_position_embeddings": 2**31 - 1,
    "sliding_window": 2**31 - 1,
    "type_vocab_size": 2**16,
    "num_labels": 2**20,
    "num_experts": 2**14,
    "num_local_experts": 2**14,
    "num_experts_per_tok": 2**14,
    "moe_intermediate_size": 2**20,
    "decoder_sparse_step": 2**10,
    "dim": 2**18,  # DistilBERT has names of its own
    "hidden_dim": 2**20,
    "n_layers": 2**10,
    "n_heads": 2**12,
    "num_mel_bins": 2**12,  # and Whisper
    "d_model": 2**18,
    "encoder_ffn_dim": 2**20,
    "encoder_layers": 2**10,
    "encoder_attention_heads": 2**12,
    "max_source_positions": 2**24,
    "num_channels": 2**12,
    "patch_size": 2**12,
}


class Fields:
    """The entries of a JSON object, read by kind; `finish` raises what was wrong.

    A getter that finds something wrong notes it and returns a stand-in, so that reading goes on.
    """

    def __init__(
        self,
        values: Mapping[str, object],
        defaults: Mapping[str, object],
        *,
        where: str,
        problems: list[str] | None = None,
    ):
        """Reads `values`; an absent key falls back to `defaults`. `where` begins the message."""
        self.values = values
        self.defaults = defaults
        self.where = where
        self.problems: list[str] = [] if problems is None else problems

    def get(self, name: str) -> object:
        """The raw value, or the default; None when neither is there."""
        return self.values.get(name, self.defaults.get(name))

    def wrong(self, name: str, accepted: str) -> None:
        """Notes that an entry is not acceptable."""
        self.note(f"{name}={quoted(self.get(name))}: {accepted} is accepted")

    def note(self, problem: str) -> None:
        """Notes a problem, once."""
        if problem not in self.problems:
            self.problems.append(problem)

    def size(self, name: str) -> int:
        """A positive integer up to its limit."""
        value, limit = self.get(name), SIZE_LIMITS[name]
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
            self.wrong(name, f"an integer from 1 to {limit}")
            return 1
        return value

    def optional_size(self, name: str) -> int | None:
        """As `size`; None where the entry is absent or null."""
        return None if self.get(name) is None else self.size(name)

    def number(self, name: str, *, low: float = 0.0, high: float = 1e12) -> float:
        """A finite number in (low, high]."""
        value = self.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.wrong(name, "a number")
        elif not low < value <= high:
            self.wrong(name, f"a number in ({low:g}, {high:g}]")
        else:
            return float(value)
        return min(low + 1.0, high)

    def optional_number(self, name: str, *, low: float = 0.0, high: float = 1e12) -> float | None:
        """As `number`; None where the entry is absent or null."""
        return None if self.get(name) is None else self.number(name, low=low, high=high)

    def numbers(self, name: str, *, low: float, high: float) -> tuple[float, ...]:
        """A list of finite numbers in (low, high], no longer than a head has channels."""
        value = self.get(name)
        if not isinstance(value, list) or len(value) > SIZE_LIMITS["head_dim"]:
            self.wrong(name, "a list of numbers, one per rotating pair,")
            return ()
        plain = all(isinstance(v, int | float) and not isinstance(v, bool) for v in value)
        if not plain or not all(low < v <= high for v in value):
            self.wrong(name, f"a list of numbers in ({low:g}, {high:g}]")
            return ()
        return tuple(float(v) for v in value)

    def flag(self, name: str) -> bool:
        """True or false; null and absent count as false."""
        value = self.get(name)
        if value is not None and not isinstance(value, bool):
            self.wrong(name, "true or false")
        return value is True

    def choice(self, name: str, accepted: Mapping[str, str]) -> str:
        """One of the keys of `accepted`; returns what it stands for."""
        value = self.get(name)
        if not isinstance(value, str) or value not in accepted:
            self.wrong(name, "one of " + ", ".join(accepted))
            return next(iter(accepted.values()))
        return accepted[value]

    def ids(self, name: str, vocab: int) -> tuple[int, ...]:
        """Token ids below `vocab`: none, one, or a list."""
        value = self.get(name)
        found = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in found):
            self.wrong(name, "a token id or a list of them")
            return ()
        # Published configs name ids past the vocabulary, or -1 for none; they never occur.
        return tuple(i for i in found if 0 <= i < vocab)

    def strings(self, name: str, accepted: Sequence[str], length: int) -> list[str] | None:
        """A list of `length` strings out of `accepted`; None when absent or null."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != length:
            self.wrong(name, f"a list of {length} entries")
        elif not all(isinstance(item, str) and item in accepted for item in value):
            self.wrong(name, f"a list out of {', '.join(accepted)}")
        else:
            return value
        return None

    def entries(self, name: str) -> Mapping[str, object]:
        """A JSON object; absent and null count as an empty one."""
        value = self.get(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.wrong(name, "an object")
            return {}
        return value

    def inner(self, values: Mapping[str, object], defaults: Mapping[str, object]) -> "Fields":
        """Fields of an object inside this one; its problems join these."""
        return Fields(values, defaults, where=self.where, problems=self.problems)

    def finish(self) -> None:
        """Raises ConfigError with every problem noted so far, if there is any."""
        if self.problems:
            raise ConfigError(f"{self.where}: " + "; ".join(self.problems))
