"""The scenarios that come with dmpy go as they expect, whatever the seed."""

from __future__ import annotations

import dataclasses
import os

import pytest

from dmpy.lab import Lab, find, run, shipped
from tests import needs


@pytest.mark.parametrize("name", shipped())
def test_one_variant_goes_as_expected(name):
    """In this process, and faster than a reader of timelines would like."""
    scenario = find(name)
    workload = dataclasses.replace(scenario.workload, over="direct", rate=3000.0)
    scenario = dataclasses.replace(scenario, workload=workload)
    seed = int.from_bytes(os.urandom(2), "little")
    variant = scenario.variants[seed % len(scenario.variants)]
    record = Lab(scenario, variant, seed=seed).run()
    assert record.ok, (seed, variant.title, record.complaints, record.events)


@pytest.mark.nightly
@pytest.mark.nbd
@pytest.mark.parametrize("name", shipped())
def test_every_variant_goes_as_expected_over_nbd(name):
    needs.nbdkit_plugin("python")
    seed = int.from_bytes(os.urandom(2), "little")
    wrong = [(record.variant, record.complaints)
             for record in run(find(name), seed=seed) if not record.ok]
    assert not wrong, seed
