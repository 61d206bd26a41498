"""What every test shares: 8 fake CPU devices, strict broadcasting, fixed seeds, and the folders beside the tests."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

# Before jax is imported. Child processes inherit both.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import hypothesis
import jax
import numpy as np
import pytest

pytest_plugins = ["launching", "interruptions", "parity", "bucket"]  # fixtures that several files share

ROOT = Path(__file__).resolve().parent.parent
# Real task data: never committed, so absent from most clones.
SHARED = Path(os.environ.get("MORA_JAX_SHARED_DATA", ROOT.parent / "shared" / "data"))
SEED = 0

jax.config.update("jax_numpy_rank_promotion", "raise")

# No deadline: the first example of a property compiles. Derandomised: the same examples on every machine.
hypothesis.settings.register_profile("mora_jax", deadline=None, derandomize=True)
hypothesis.settings.load_profile("mora_jax")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow (minutes each)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips slow tests unless --slow is given or -m speaks of them; keeps on one worker what shares expensive runs."""
    for item in items:
        together = "interruptions" if "world" in item.fixturenames else item.path.name
        item.add_marker(pytest.mark.xdist_group(together))
    if config.getoption("--slow") or "slow" in config.getoption("markexpr"):
        return
    skip = pytest.mark.skip(reason="slow: run with --slow or -m slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """No test depends on the one before it through a global random state."""
    random.seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002 - third-party code may still draw from it
    if "torch" in sys.modules:  # importing it takes seconds, and few tests need it
        sys.modules["torch"].manual_seed(SEED)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(SEED)


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(SEED)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real task data (trace/, standard_cl/)."""
    if not SHARED.is_dir():
        pytest.skip(f"no real task data at {SHARED}; set MORA_JAX_SHARED_DATA to its folder")
    return SHARED
