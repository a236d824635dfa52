"""What a training step costs with a guard, beside the bare optimizer and beside plain Optax.

    python -m benchmarks.step_cost                                    # 3 minutes on 2 cores
    python -m benchmarks.step_cost --peer                             # all of Optax's own means
    python -m benchmarks.step_cost --optimizers all --rounds 0        # compile only
    python -m benchmarks.step_cost --quick

A step is ``update`` and ``apply_updates``, jitted, with parameters and state donated. For every
tree of parameters, optimizer and pipeline it prints the time relative to the bare optimizer
(median and quartiles of the ratio in the same round), the bytes that a healthy step reads and
writes in units of the gradients' bytes, XLA's own count of them (which includes the dearest branch
of every conditional, taken or not), kernels, conditionals, copies of arrays as large as a
parameter, memory besides arguments and results, and the compiler's time. Expected: the guards
within 1.05 of the gradients' bytes above the bare optimizer, no copies, and 1.0 to 1.2 in time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from benchmarks import _harness, _report, _setups
from benchmarks._setups import BARE, Optimizer, Tree

QUICK_VARIANTS = (BARE, "clip_by_global_norm", "og.guard", "og.stabilize")
DEFAULT_TREES = ("transformer", "one array", "tiny", "bf16 gradients")


def make_step(tx: Optimizer):
    """``(params, state), gradients -> (params, state)``."""

    def step(carry, gradients):
        params, state = carry
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


def measure(tree: Tree, tx: Optimizer, *, is_hot: bool) -> tuple[Any, dict[str, Any]]:
    """The compiled step, and what is known of it without running it."""
    carry = (tree.params, jax.eval_shape(tx.init, tree.params))
    compiled, measures = _harness.compile_step(
        make_step(tx), carry, tree.gradients, large=tree.large, is_hot=is_hot
    )
    return compiled, {"state_bytes": _setups.num_bytes(carry[1]), **measures._asdict()}


def compare(
    tree_name: str, optimizer_name: str, arguments: argparse.Namespace, advance: Any
) -> list[dict[str, Any]]:
    """One row for each variant."""
    tree, optimizer = _setups.TREES[tree_name](), _setups.OPTIMIZERS[optimizer_name]()
    rows, compiled, pipelines = {}, {}, {}
    for name in arguments.variants:
        variant = _setups.VARIANTS[name]
        rows[name] = {
            "tree": tree_name,
            "optimizer": optimizer_name,
            "variant": name,
            "is_ours": variant.is_ours,
            "gradient_bytes": tree.gradient_bytes,
            "params_bytes": tree.params_bytes,
        }
        try:
            pipelines[name] = variant.make(optimizer)
            compiled[name], measures = measure(tree, pipelines[name], is_hot=variant.is_hot)
        except (TypeError, ValueError) as error:  # apply_if_finite with mixed dtypes
            rows[name]["error"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        else:
            rows[name] |= measures
        advance(f"{tree_name}, {optimizer_name}, compiled {name}")
    bare = rows[BARE]
    for row in rows.values():
        if "error" not in row:
            row["extra_reads"] = (row["hot_bytes"] - bare["hot_bytes"]) / tree.gradient_bytes
    if arguments.rounds:
        for name, timing in _time(tree, pipelines, compiled, rows, arguments).items():
            rows[name] |= timing.summary()
    advance(f"{tree_name}, {optimizer_name}, timed")
    return list(rows.values())


def _time(
    tree: Tree,
    pipelines: dict[str, Optimizer],
    compiled: dict[str, Any],
    rows: dict[str, dict[str, Any]],
    arguments: argparse.Namespace,
) -> dict[str, _harness.Timing]:
    gradients = _harness.random_like(tree.gradients, 1e-3)
    sizes = {
        name: rows[name]["state_bytes"] + rows[name]["temp_bytes"] + tree.params_bytes
        for name in compiled
    }
    timings = {}
    for group in _harness.groups_within(_harness.memory_budget(), sizes, BARE):
        steppers = {}
        for name in group:
            params = _harness.random_like(tree.params, 0.02, seed=1)
            carry = (params, jax.jit(pipelines[name].init)(params))
            steppers[name] = _harness.Stepper(compiled[name], carry, gradients)
        timings |= _harness.interleave(
            steppers, BARE, rounds=arguments.rounds, slice_seconds=arguments.slice_seconds
        )
    return timings


def number(key: str, form: str, scale: float | None = None) -> Callable[[dict[str, Any]], str]:
    """How to write a cell; a dash where the pipeline does not run."""

    def write(row):
        if key not in row:
            return "-"
        return form.format(row[key] if scale is None else row[key] / scale)

    return write


def to_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A table for each tree and optimizer."""
    parts = []
    for tree, optimizer in dict.fromkeys((row["tree"], row["optimizer"]) for row in rows):
        own = [row for row in rows if (row["tree"], row["optimizer"]) == (tree, optimizer)]
        gradient_bytes, cpu_seconds = own[0]["gradient_bytes"], own[0]["compile_cpu_seconds"]
        columns = {
            "pipeline": lambda row: row["variant"],
            "time / bare": lambda row: "fails" if "error" in row else _report.ratio_cell(row),
            "step": lambda row: _report.time_cell(row.get("step_seconds")),
            "bytes / gradients": number("hot_bytes", "{:.2f}", gradient_bytes),
            "above bare": number("extra_reads", "{:+.2f}"),
            "XLA's count": number("all_bytes", "{:.2f}", gradient_bytes),
            "kernels": number("num_kernels", "{}"),
            "conditionals": number("num_conditionals", "{}"),
            "large copies": number("num_large_copies", "{}"),
            "temp MB": number("temp_bytes", "{:.1f}", 1e6),
            "trace s": number("trace_seconds", "{:.2f}"),
            "compile s": number("compile_seconds", "{:.2f}"),
            "compile CPU s": number("compile_cpu_seconds", "{:.2f}"),
            "CPU / bare": number("compile_cpu_seconds", "{:.2f}", cpu_seconds),
        }
        parts += [f"### {optimizer}, {tree}", _report.markdown_table(own, columns)]
    return "\n\n".join(parts)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--trees", nargs="+", choices=[*_setups.TREES, "all"])
    parser.add_argument("--optimizers", nargs="+", choices=[*_setups.OPTIMIZERS, "all"])
    parser.add_argument("--variants", nargs="+", choices=list(_setups.VARIANTS))
    parser.add_argument("--peer", action="store_true", help="add all of Optax's own means")
    parser.add_argument("--rounds", type=int, help="0 compiles only (default: 15)")
    parser.add_argument("--slice-seconds", type=float, help="of one variant in a round")
    _harness.add_output_arguments(parser, "step_cost")
    arguments = parser.parse_args(argv)
    quick = arguments.quick
    if arguments.trees is None:
        arguments.trees = ["tiny"] if quick else list(DEFAULT_TREES)
    if arguments.optimizers is None:
        arguments.optimizers = ["adamw"]
    if "all" in arguments.trees:
        arguments.trees = list(_setups.TREES)
    if "all" in arguments.optimizers:
        arguments.optimizers = list(_setups.OPTIMIZERS)
    if arguments.variants is None:
        peers = _setups.PEERS if arguments.peer else {}
        everything = _setups.REFERENCES | peers | _setups.OURS
        arguments.variants = list(QUICK_VARIANTS if quick else everything)
    arguments.variants = [BARE, *(name for name in arguments.variants if name != BARE)]
    if arguments.rounds is None:
        arguments.rounds = 3 if quick else 15
    if arguments.slice_seconds is None:
        arguments.slice_seconds = 0.002 if quick else 0.1
    return arguments


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    arguments = parse(argv)
    _harness.warm_up_compiler()
    combinations = [(tree, name) for tree in arguments.trees for name in arguments.optimizers]
    rows: list[dict[str, Any]] = []
    total = len(combinations) * (len(arguments.variants) + 1)
    with _harness.progress("step cost", total) as advance:
        for tree, name in combinations:
            rows += compare(tree, name, arguments, advance)
            _harness.save_json(arguments.json, "step_cost", arguments, rows)
            jax.clear_caches()  # a long list of combinations would fill the memory
    print(to_markdown(rows))
    panels = {
        f"{name}, {tree}": [row for row in rows if (row["tree"], row["optimizer"]) == (tree, name)]
        for tree, name in combinations
    }
    _report.bar_chart(panels, arguments.plot, x_label="time of a step / bare optimizer")
    return rows


if __name__ == "__main__":
    main()
