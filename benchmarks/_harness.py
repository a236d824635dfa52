"""Compiling, timing and recording, the same for every benchmark and on every platform.

Timings are taken round by round, each variant once a round in an order that changes, so that a
machine that slows down for a while slows down all of them. What is reported is the median and
the quartiles, over the rounds, of the ratio to the bare optimizer of the same round.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import optax_guard as og
from benchmarks import _hlo, _topologies


class Measures(NamedTuple):
    """What the compiler says about a program.

    Attributes:
      hot_bytes: bytes read and written by a healthy step.
      all_bytes: XLA's ``bytes accessed``, the dearest branch of every conditional included.
      num_kernels: of a healthy step.
      num_conditionals: in the whole program.
      num_waits: conditionals that a healthy step comes to.
      num_large_copies: of a healthy step; arrays as large as a parameter.
      num_host_transfers: of a healthy step.
      temp_bytes: memory that the step takes besides arguments and results.
      trace_seconds: from Python to the program that the compiler gets, wall-clock.
      trace_cpu_seconds: the same as processor time, which a busy machine disturbs less.
      compile_seconds: wall-clock.
      compile_cpu_seconds: processor time of all threads.
    """

    hot_bytes: float
    all_bytes: float
    num_kernels: int
    num_conditionals: int
    num_waits: int
    num_large_copies: int
    num_host_transfers: int
    temp_bytes: int
    trace_seconds: float
    trace_cpu_seconds: float
    compile_seconds: float
    compile_cpu_seconds: float


class _Clocks(NamedTuple):
    wall: float
    cpu: float

    @classmethod
    def read(cls) -> _Clocks:
        return cls(time.perf_counter(), time.process_time())


def compile_step(
    step: Callable[[Any, Any], Any],
    carry: Any,
    constants: Any,
    *,
    large: int,
    is_hot: bool,
    chips: _topologies.Chips | None = None,
) -> tuple[Any, Measures]:
    """Compiles ``step(carry, constants) -> carry`` with a donated carry.

    Args:
      step: to be jitted.
      carry: what it is compiled for, abstract or not.
      constants: likewise.
      large: number of elements from which on an array counts as large.
      is_hot: whether a healthy step takes the cheapest branch of every conditional, not the
        dearest one.
      chips: what it is compiled for; None for the devices that are there.
    """
    start = _Clocks.read()
    if chips is None:
        lowered = jax.jit(step, donate_argnums=0).lower(carry, constants)
    else:
        lowered = chips.lower(step, carry, constants, donate_argnums=0)
    traced = _Clocks.read()
    compiled = lowered.compile() if chips is None else chips.finish(lowered)
    done = _Clocks.read()
    program = _hlo.analyze(compiled)
    healthy = program.hot if is_hot else program.dear
    memory = compiled.memory_analysis()
    return compiled, Measures(
        hot_bytes=healthy.num_bytes,
        all_bytes=_bytes_accessed(compiled),
        num_kernels=healthy.num_kernels,
        num_conditionals=program.num_conditionals,
        num_waits=healthy.num_conditionals,
        num_large_copies=sum(size >= large for size in healthy.copies),
        num_host_transfers=healthy.num_host_transfers,
        temp_bytes=getattr(memory, "temp_size_in_bytes", 0),
        trace_seconds=traced.wall - start.wall,
        trace_cpu_seconds=traced.cpu - start.cpu,
        compile_seconds=done.wall - traced.wall,
        compile_cpu_seconds=done.cpu - traced.cpu,
    )


def _bytes_accessed(compiled: Any) -> float:
    costs = compiled.cost_analysis() or {}
    costs = costs[0] if isinstance(costs, list) else costs
    return float(costs.get("bytes accessed", np.nan))


def warm_up_compiler() -> None:
    """So that the first variant does not pay for starting the compiler."""
    jax.jit(lambda x: jnp.tanh(x) @ x).lower(jnp.ones((64, 64))).compile()


class Stepper:
    """A compiled step whose carry is donated from call to call."""

    def __init__(self, step: Callable[..., Any], carry: Any, constants: Any):
        self._step, self._carry, self._constants = step, carry, constants

    def seconds(self, num_steps: int) -> float:
        """Time for a number of steps, until their results are there."""
        began = time.perf_counter()
        for _ in range(num_steps):
            self._carry = self._step(self._carry, self._constants)
        jax.block_until_ready(self._carry)
        return time.perf_counter() - began


class Timing(NamedTuple):
    """Seconds a step, and ratios to the baseline of the same round."""

    seconds: list[float]
    ratios: list[float]

    def per(self, number: int) -> Timing:
        """The same, of calls that take ``number`` steps each."""
        return self._replace(seconds=[seconds / number for seconds in self.seconds])

    def summary(self) -> dict[str, float]:
        low, middle, high = quartiles(self.ratios)
        return {
            "step_seconds": statistics.median(self.seconds),
            "ratio": middle,
            "ratio_low": low,
            "ratio_high": high,
            "num_rounds": len(self.ratios),
        }


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    low, middle, high = np.percentile(values, [25, 50, 75]).tolist()
    return low, middle, high


def interleave(
    steppers: dict[str, Stepper],
    baseline: str,
    *,
    rounds: int,
    slice_seconds: float,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
    """Times all steppers, one after the other in every round, after a warm-up."""
    for stepper in steppers.values():
        stepper.seconds(2)
    num_steps = max(1, round(slice_seconds / steppers[baseline].seconds(3) * 3))
    for stepper in steppers.values():
        stepper.seconds(min(num_steps, 10))
    order = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {name: [] for name in steppers}
    for _ in range(rounds):
        for name in order.permutation(list(steppers)).tolist():
            seconds[name].append(steppers[name].seconds(num_steps) / num_steps)
            tick()
    return {
        name: Timing(own, [a / b for a, b in zip(own, seconds[baseline], strict=True)])
        for name, own in seconds.items()
    }


def groups_within(budget: float, sizes: dict[str, float], baseline: str) -> list[list[str]]:
    """Splits variants into groups that fit in memory together, the baseline in each of them."""
    groups: list[list[str]] = []
    left = 0.0
    for name in sizes:
        if name == baseline:
            continue
        if not groups or sizes[name] > left:
            groups.append([baseline])
            left = budget - sizes[baseline]
        groups[-1].append(name)
        left -= sizes[name]
    return groups or [[baseline]]


def memory_budget() -> float:
    """Bytes that the variants of one group may take: half of what the device or host has free."""
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return (stats["bytes_limit"] - stats.get("bytes_in_use", 0)) / 2
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2
    except (AttributeError, ValueError, OSError):
        return 4e9


def random_like(tree: Any, scale: float, seed: int = 0) -> Any:
    """Normal numbers of the shapes and dtypes of an abstract tree."""
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), max(1, len(leaves)))
    draw = jax.jit(
        lambda key, shape, dtype: scale * jax.random.normal(key, shape, dtype),
        static_argnums=(1, 2),
    )
    drawn = [draw(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=False)]
    return jax.tree.unflatten(treedef, drawn)


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[str], None]]:
    """A bar on the standard error stream; call what it yields with the name of what comes next."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task(title, total=total)

        def advance(name: str) -> None:
            bar.update(task, advance=1, description=f"{title}: {name}")

        yield advance


def environment() -> dict[str, Any]:
    """Versions, device and date, for the record."""
    device = jax.devices()[0]
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "optax", "numpy")}
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {
            "python": platform.python_version(),
            "optax_guard": og.__version__,
            **versions,
        },
        "device": {
            "platform": device.platform,
            "kind": _processor() if device.platform == "cpu" else device.device_kind,
            "count": len(jax.devices()),
            "host_cores": os.cpu_count(),
        },
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


OUTPUTS = ("json", "plot")


def add_output_arguments(parser: argparse.ArgumentParser, name: str, *, plot: bool = True) -> None:
    """``--json`` and ``--plot``, with defaults in a folder that git ignores."""
    folder = Path(__file__).parent / "outputs"
    parser.add_argument("--json", type=Path, default=folder / f"{name}.json", metavar="FILE")
    if plot:
        parser.add_argument("--plot", type=Path, default=folder / f"{name}.png", metavar="FILE")


def save_json(
    path: Path,
    benchmark: str,
    arguments: argparse.Namespace,
    rows: Sequence[dict[str, Any]],
    *,
    key: str = "rows",
) -> Path:
    """Writes rows, under ``key``, with all that is needed to repeat and to judge them."""
    options = {name: value for name, value in vars(arguments).items() if name not in OUTPUTS}
    record = {"benchmark": benchmark, **environment(), "arguments": options, key: list(rows)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path
