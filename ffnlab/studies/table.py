"""The table of studies, read from `studies.toml`. A new study joins by one entry there."""

import dataclasses
import tomllib
from collections.abc import Mapping
from importlib import resources
from types import MappingProxyType
from typing import NamedTuple

__all__ = ["STUDIES", "Paper", "Study"]


class Paper(NamedTuple):
    """What a study is about.

    Attributes:
      title: of the paper.
      year: in which it first appeared.
      link: where it can be read.
    """

    title: str
    year: int
    link: str


@dataclasses.dataclass(frozen=True)
class Study:
    """An entry of the table.

    Attributes:
      slug: name on the command line.
      name: of the system.
      package: sub-package that holds the method.
      title: what it does, in one line.
      paper: None of a study that compares systems.
    """

    slug: str
    name: str
    package: str
    title: str
    paper: Paper | None

    @property
    def module(self) -> str:
        """Dotted name of the module with `run`."""
        return f"ffnlab.studies.{self.slug.replace('-', '_')}"


def read() -> dict[str, Study]:
    """The entries of `studies.toml`, in order."""
    text = (resources.files("ffnlab.studies") / "studies.toml").read_text(encoding="utf-8")
    found = {}
    for slug, entry in tomllib.loads(text).items():
        about = (entry.pop("paper", None), entry.pop("year", None), entry.pop("link", None))
        found[slug] = Study(slug, paper=None if about[0] is None else Paper(*about), **entry)
    return found


STUDIES: Mapping[str, Study] = MappingProxyType(read())
