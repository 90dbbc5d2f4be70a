"""Measurements and their limits: what `ffnlab bench` prints and `make bench-check` compares.

Each measure is a function that returns numbers; `limits.toml` names it and says what is accepted.
Nothing here is imported by the library, and no test is timed.
"""

__all__: list[str] = []
