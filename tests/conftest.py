"""Test-wide set-up: eight virtual CPU devices, no display, reproducible property tests."""

from __future__ import annotations

import os

# The flags below are read when JAX starts, so they come before its first import.
_DEVICES = "--xla_force_host_platform_device_count"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}=8".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")

from collections.abc import Iterator  # noqa: E402

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

# Every setting is named, because hypothesis picks other defaults where it sees CI. Compiling is
# slow and leaves nothing behind in a fixture, so those two health checks would only mislead.
hypothesis.settings.register_profile(
    "default_suite",
    max_examples=25,
    derandomize=True,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.function_scoped_fixture,
    ],
)
hypothesis.settings.register_profile(
    "thorough",
    parent=hypothesis.settings.get_profile("default_suite"),
    max_examples=500,
    derandomize=False,
)
hypothesis.settings.load_profile("default_suite")


def _group(item: pytest.Item) -> str:
    row = getattr(item, "callspec", None) and item.callspec.params.get("row")
    return f"{item.path.name}::{row.name}" if hasattr(row, "name") else item.path.name


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds ``--one-in N``."""
    help_text = "run every N-th of the selected tests only, beginning with the first"
    parser.addoption("--one-in", type=int, default=1, metavar="N", help=help_text)


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps together what shares compiled functions: a row of the registry, or a file."""
    every = config.getoption("one_in")
    left_out = [item for place, item in enumerate(items) if place % every]
    if left_out:
        items[:] = items[::every]
        config.hook.pytest_deselected(items=left_out)
    groups = {group: number for number, group in enumerate(dict.fromkeys(map(_group, items)))}
    items.sort(key=lambda item: groups[_group(item)])


_num_tests = 0


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Drops compiled programs that no later test shares, from time to time.

    Each makes the next C++ exception dearer, since the unwinder walks through them all, and JAX
    catches such an exception for each argument of whatever it compiles.
    """
    global _num_tests
    _num_tests += 1
    if nextitem is not None and _group(item) != _group(nextitem) and _num_tests >= 50:
        jax.clear_caches()
        _num_tests = 0


@pytest.fixture
def x64() -> Iterator[None]:
    """Runs the test with float64 enabled."""
    with jax.enable_x64(True):
        yield
