"""What a guard adds to a whole training step: loss, gradients, update.

    python -m benchmarks.end_to_end                         # 4 minutes on 2 cores
    python -m benchmarks.end_to_end --steps-per-call 50     # steps inside one lax.scan
    python -m benchmarks.end_to_end --quick

Two multi-layer perceptrons, a simple RNN, a GRU, an LSTM and a small transformer, with AdamW (or
``--optimizer``): bare, with the means that Optax has, and with ours. One jitted call a step, with
parameters and state donated; ``--steps-per-call`` takes the cost of calling out of the picture.
It prints the time relative to the bare optimizer (median and quartiles of the ratio in the same
round) and the microseconds that are added. Expected on two cores: the smallest network, whose step
takes 0.05 ms, more than twice as long (why, is told in ``benchmarks.call_overhead``), the next 1.1
times, and no more than 1.04 times for everything else.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks import _harness, _report, _setups
from benchmarks._models import MODELS, Model
from benchmarks._setups import BARE, Optimizer

DEFAULT_VARIANTS = (
    BARE,
    "clip_by_global_norm",
    "apply_if_finite(clip)",
    "og.guard",
    "og.stabilize",
    "og.guard, zscore",
    "og.guard, zscore by leaf",
)
QUICK_VARIANTS = (BARE, "apply_if_finite(clip)", "og.stabilize")


def make_step(model: Model, tx: Optimizer, steps_per_call: int) -> Callable[[Any, Any], Any]:
    """``(params, state, loss), batch -> (params, state, loss)``."""

    def step(carry, batch):
        params, state, _ = carry
        loss, gradients = jax.value_and_grad(model.loss)(params, *batch)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    def steps(carry, batch):
        return jax.lax.scan(lambda c, _: (step(c, batch), None), carry, length=steps_per_call)[0]

    return step if steps_per_call == 1 else steps


def compare(
    model_name: str, arguments: argparse.Namespace, advance: Callable[[str], None]
) -> list[dict[str, Any]]:
    """One row for each variant."""
    model, batch = MODELS[model_name](), MODELS[model_name]().batch()
    optimizer = _setups.OPTIMIZERS[arguments.optimizer]()
    rows, steppers = {}, {}
    for name in arguments.variants:
        variant = _setups.VARIANTS[name]
        tx = variant.make(optimizer)
        params = model.init()
        carry = (params, jax.jit(tx.init)(params), jnp.zeros(()))
        step = make_step(model, tx, arguments.steps_per_call)
        compiled, measures = _harness.compile_step(
            step, carry, batch, large=1024, is_hot=variant.is_hot
        )
        steppers[name] = _harness.Stepper(compiled, carry, batch)
        rows[name] = {
            "model": model_name,
            "optimizer": arguments.optimizer,
            "variant": name,
            "is_ours": variant.is_ours,
            "num_params": sum(leaf.size for leaf in params.values()),
            **measures._asdict(),
        }
        advance(f"{model_name}, compiled {name}")
    timings = _harness.interleave(
        steppers, BARE, rounds=arguments.rounds, slice_seconds=arguments.slice_seconds
    )
    for name, timing in timings.items():
        rows[name] |= timing.per(arguments.steps_per_call).summary()
    advance(f"{model_name}, timed")
    return list(rows.values())


def to_markdown(rows: Sequence[dict[str, Any]]) -> str:
    bare = {row["model"]: row for row in rows if row["variant"] == BARE}

    def added(row):
        difference = (row["ratio"] - 1) * bare[row["model"]]["step_seconds"]
        return f"{difference * 1e6:+.1f}"

    return _report.markdown_table(
        rows,
        {
            "model": lambda row: row["model"],
            "pipeline": lambda row: row["variant"],
            "time / bare": _report.ratio_cell,
            "step": lambda row: _report.time_cell(row["step_seconds"]),
            "added µs": added,
            "kernels": lambda row: str(row["num_kernels"]),
            "compile s": lambda row: f"{row['compile_seconds']:.2f}",
        },
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--models", nargs="+", choices=list(MODELS))
    parser.add_argument("--variants", nargs="+", choices=list(_setups.VARIANTS))
    parser.add_argument("--optimizer", choices=list(_setups.OPTIMIZERS), default="adamw")
    parser.add_argument("--steps-per-call", type=int, default=1)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--slice-seconds", type=float, help="of one variant in a round")
    _harness.add_output_arguments(parser, "end_to_end")
    arguments = parser.parse_args(argv)
    quick = arguments.quick
    if arguments.models is None:
        arguments.models = ["mlp 64-64-10", "gru"] if quick else list(MODELS)
    if arguments.variants is None:
        arguments.variants = list(QUICK_VARIANTS if quick else DEFAULT_VARIANTS)
    arguments.variants = [BARE, *(name for name in arguments.variants if name != BARE)]
    if arguments.rounds is None:
        arguments.rounds = 3 if quick else 30
    if arguments.slice_seconds is None:
        arguments.slice_seconds = 0.002 if quick else 0.1
    return arguments


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    arguments = parse(argv)
    _harness.warm_up_compiler()
    rows: list[dict[str, Any]] = []
    total = len(arguments.models) * (len(arguments.variants) + 1)
    with _harness.progress("end to end", total) as advance:
        for name in arguments.models:
            rows += compare(name, arguments, advance)
    print(to_markdown(rows))
    _harness.save_json(arguments.json, "end_to_end", arguments, rows)
    panels = {name: [row for row in rows if row["model"] == name] for name in arguments.models}
    _report.bar_chart(panels, arguments.plot, x_label="time of a training step / bare optimizer")
    return rows


if __name__ == "__main__":
    main()
