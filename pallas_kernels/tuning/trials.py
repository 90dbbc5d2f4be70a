"""Each configuration that was tried, written at once: a line of JSON beside the tuned file.

What a process that died had timed is there for the next one, and what it died of is not tried
again.
"""

import json

from pallas_kernels.tuning import cache


class Trials:
    """The configurations of one call that were tried, in `path`, and those that will be.

    Attributes:
      known: microseconds, or the reason why there are none, by the configuration's numbers.
    """

    def __init__(self, path, key, again=False):
        """Reads what is known of a `cache.Key`; nothing with `again`, nor of damaged lines."""
        self.path = path.with_name(f"{path.name}.trials")
        self.key, self.known = json.loads(json.dumps(key._asdict())), {}
        if again or not self.path.exists() or self.path.stat().st_size > cache.LARGEST:
            return
        for line in self.path.read_text(errors="replace").splitlines():
            try:
                trial = json.loads(line)
                if trial["key"] == self.key and isinstance(trial["found"], float | str):
                    self.known[named(trial["config"])] = trial["found"]
            except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
                continue

    def find(self, config):
        """What is known of a configuration, its numbers by name; None for nothing."""
        return self.known.get(named(config))

    def note(self, config, found):
        """Writes down microseconds, or a reason."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"key": self.key, "config": config, "found": found})
        with self.path.open("a") as file:
            file.write(f"\n{line}\n")  # whatever a process that died left of a line


def named(config):
    """A configuration's numbers by name as one thing to look for."""
    return tuple(sorted(config.items()))
