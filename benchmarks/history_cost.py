"""What recording a run adds to its steps.

    python -m benchmarks.history_cost            # 1 minute on 2 cores
    python -m benchmarks.history_cost --quick

A residual network of 37 dense layers (74 arrays, a training step of some 5 ms on 2 CPU cores) with
AdamW inside ``og.stabilize``; parameters and state are donated, as in a real loop. Compared with
the loop that records nothing: a guard that calls a function of the host at every skip
(``notify=``), of which there is none; ``og.History`` in memory and to a file, every 10 steps and
every step; and for contrast a loop that fetches each number with ``float``. It prints the time
relative to the loop without a record (median and quartiles of the ratio in the same round), and
the processor time that the loop's own thread spends on recording. Expected every 10 steps: 1.2 % of
a step, with a file 1.5 %, by the second measure, less than the noise of a busy machine by the
first; with ``notify=`` 1.4 times the step, since XLA:CPU runs a program that holds a call of the
host in the thread that asks for it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_guard as og
from benchmarks import _harness, _report

BARE = "no record"
NOTIFIED = "notify=, no skip"
NUM_LAYERS, WIDTH, BATCH_SIZE = 37, 128, 64


def make_params(num_layers: int) -> dict[str, dict[str, jax.Array]]:
    keys = jax.random.split(jax.random.key(0), num_layers)
    return {
        f"dense{number:02}": {
            "bias": jnp.zeros(WIDTH),
            "kernel": jax.random.normal(key, (WIDTH, WIDTH)) * (2 / WIDTH) ** 0.5,
        }
        for number, key in enumerate(keys)
    }


def loss_fn(params: Any, x: jax.Array) -> jax.Array:
    target = jnp.roll(x, 1, axis=-1)
    for layer in params.values():
        x = x + 0.1 * jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return jnp.mean((x - target) ** 2)


def make_step(tx: optax.GradientTransformationExtraArgs) -> Callable[[Any, Any], Any]:
    """``(params, state, loss), batch -> (params, state, loss)``."""

    def step(carry, batch):
        params, state, _ = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state, loss

    return step


class Recorder:
    """A training loop that calls ``record(step, state, loss)`` after every step."""

    def __init__(self, step: Callable[..., Any], carry: Any, batch: Any, record: Any):
        self._step, self._carry, self._batch, self._record = step, carry, batch, record
        self._number = 0
        self.record_seconds: list[float] = []

    def seconds(self, num_steps: int) -> float:
        """Time for a number of steps, until their results are there."""
        in_record = 0.0
        began = time.perf_counter()
        for _ in range(num_steps):
            self._carry = self._step(self._carry, self._batch)
            self._number += 1
            called = time.thread_time()
            self._record(self._number, self._carry[1], self._carry[2])
            in_record += time.thread_time() - called
        jax.block_until_ready(self._carry)
        self.record_seconds.append(in_record / num_steps)
        return time.perf_counter() - began


def float_everything(step: int, state: Any, loss: jax.Array) -> dict[str, float]:
    """What many loops do: it waits for the step, and for one transfer after the other."""
    return {name: float(value) for name, value in og.metrics(state).items()} | {
        "step": step,
        "loss": float(loss),
    }


def make_records(folder: Path, params: Any) -> dict[str, Any]:
    """What is called after every step, by the name of the variant."""

    def with_history(name: str | None, every: int) -> Any:
        path = None if name is None else folder / name
        history = og.History(path, every=every, params=params)
        return lambda step, state, loss: history.append(step, state, loss=loss)

    return {
        BARE: lambda step, state, loss: None,
        NOTIFIED: lambda step, state, loss: None,
        "og.History, memory, every 10": with_history(None, 10),
        "og.History, file, every 10": with_history("ten.jsonl", 10),
        "og.History, file, every step": with_history("one.jsonl", 1),
        "float(...) of all, every 10": lambda step, state, loss: (
            float_everything(step, state, loss) if step % 10 == 0 else None
        ),
        "float(...) of all, every step": float_everything,
    }


def compare(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """One row for each variant."""
    batch = jax.random.normal(jax.random.key(1), (BATCH_SIZE, WIDTH))
    optimizer = optax.adamw(1e-3)
    plain = og.stabilize(optimizer)
    notified = og.stabilize(optimizer, notify=lambda step, reason, names: print(step, names))

    def start():
        params = make_params(arguments.layers)
        return params, jax.jit(plain.init)(params), jnp.zeros(())

    steps = {tx: jax.jit(make_step(tx), donate_argnums=0) for tx in (plain, notified)}
    loops = {
        name: Recorder(steps[notified if name == NOTIFIED else plain], start(), batch, record)
        for name, record in make_records(folder, make_params(arguments.layers)).items()
    }
    total = arguments.rounds * len(loops)
    with _harness.progress("history", total) as advance:
        timings = _harness.interleave(
            loops,
            BARE,
            rounds=arguments.rounds,
            slice_seconds=arguments.slice_seconds,
            tick=lambda: advance("timing"),
        )
    return [
        {
            "variant": name,
            "is_ours": name.startswith("og.") or name == NOTIFIED,
            "num_arrays": 2 * arguments.layers,
            "record_seconds": statistics.median(loops[name].record_seconds[-arguments.rounds :]),
            **timing.summary(),
        }
        for name, timing in timings.items()
    ]


def to_markdown(rows: Sequence[dict[str, Any]]) -> str:
    return _report.markdown_table(
        rows,
        {
            "loop": lambda row: row["variant"],
            "time / no record": _report.ratio_cell,
            "step": lambda row: _report.time_cell(row["step_seconds"]),
            "host, a step": lambda row: f"{row['record_seconds'] * 1e6:.1f} µs",
            "of the step": lambda row: f"{row['record_seconds'] / row['step_seconds']:.2%}",
        },
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="seconds instead of a minute")
    parser.add_argument("--layers", type=int, help=f"default {NUM_LAYERS}")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--slice-seconds", type=float, help="of one variant in a round")
    _harness.add_output_arguments(parser, "history_cost")
    arguments = parser.parse_args(argv)
    quick = arguments.quick
    if arguments.layers is None:
        arguments.layers = 3 if quick else NUM_LAYERS
    if arguments.rounds is None:
        arguments.rounds = 3 if quick else 30
    if arguments.slice_seconds is None:
        arguments.slice_seconds = 0.01 if quick else 0.3
    return arguments


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    arguments = parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(arguments, Path(folder))
    print(to_markdown(rows))
    _harness.save_json(arguments.json, "history_cost", arguments, rows)
    panels = {f"{rows[0]['num_arrays']} arrays, AdamW": rows}
    _report.bar_chart(
        panels, arguments.plot, x_label="time of a step / a loop that records nothing"
    )
    return rows


if __name__ == "__main__":
    main()
