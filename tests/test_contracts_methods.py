"""The contracts of transforms and rules, held by all of them (see `contracts_methods.py`)."""

import importlib
import inspect
import json
import pkgutil
import subprocess
import sys
import typing

import jax
import numpy as np
import pytest

import ffnlab
from ffnlab import analysis, transform
from ffnlab.probe import Probe
from ffnlab.rule import Rule
from ffnlab.testing import batches, equal, tiny
from ffnlab.transform import Transform
from tests import calibrating
from tests.conftest import ROOT
from tests.contracts_methods import PROBES, RULES, TRANSFORMS
from tests.test_packaging import METHODS, SYSTEMS

# Methods, systems, and the models that rewrite themselves (adapters).
HELPERS = {"from_state", "headed", "rewriting"}  # what methods make theirs with, or go on with
SEARCHED = sorted(((METHODS | SYSTEMS) & set(ffnlab.__all__)) | {"models"})


def factories(kind: type) -> set[str]:
    """Public functions of these packages that are annotated to return a `kind`."""
    found = set()
    for package in SEARCHED:
        home = importlib.import_module(f"ffnlab.{package}")
        for module in pkgutil.walk_packages(home.__path__, f"ffnlab.{package}."):
            for name, member in vars(importlib.import_module(module.name)).items():
                if inspect.isfunction(member) and member.__module__ == module.name:
                    returned = inspect.signature(member).return_annotation
                    is_public = name[0] != "_" and name not in HELPERS
                    if kind in (returned, typing.get_origin(returned)) and is_public:
                        found.add(name)
    return found


def test_every_method_is_under_contract():
    for kind, table in ((Transform, TRANSFORMS), (Rule, RULES), (Probe, PROBES)):
        assert factories(kind) == {name.split("-")[0] for name in table}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transform(name):
    TRANSFORMS[name].check()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident memory from /proc")
def test_calibration_takes_no_more_memory_for_four_times_the_tokens():
    command = [sys.executable, "-m", "tests.calibrating"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    grown = json.loads(done.stdout)
    # Half of what keeping one activation of each further batch would take.
    bound = 3 * calibrating.BATCHES * calibrating.ACTIVATION / 2
    assert grown.pop("holding") > bound, "the measure sees what is held"
    assert max(grown.values()) < bound, grown


@pytest.mark.parametrize(
    "order", ["finercut chess fireq", "fireq finercut chess", "chess fireq cats"]
)
def test_any_order_composes(order):
    steps = [TRANSFORMS[name].make() for name in order.split()]
    by_hand = tiny()
    for step in steps:
        by_hand, _ = transform.apply(step, by_hand, batches())
    chained, _ = transform.apply(transform.chain(*steps), tiny(), batches())
    assert equal(chained, by_hand)
    assert np.all(np.isfinite(jax.jit(lambda m, t: m(t))(chained, batches()[0])))


@pytest.mark.parametrize("name", RULES)
def test_rule(name):
    RULES[name].hold()


@pytest.mark.parametrize("name", PROBES)
def test_probe(name):
    PROBES[name].check()


def test_the_command_line_names_every_probe():
    assert set(analysis.PROBES) == factories(Probe)
    for name, target in analysis.PROBES.items():
        assert target.endswith(f".{name}:{name}"), target
