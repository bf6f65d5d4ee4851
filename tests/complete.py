"""A mark for tests that `make test-complete` runs and `make test`, which should take ten minutes on two cores, does not."""

import os

import pytest

COMPLETE = bool(os.environ.get("STONEY_RL_COMPLETE"))
only_complete = pytest.mark.skipif(not COMPLETE, reason="takes long: make test-complete runs it")


def also_complete(*values: object) -> object:
    """``pytest.param`` for a case of a parametrised test that only the complete suite runs."""
    return pytest.param(*values, marks=only_complete)
