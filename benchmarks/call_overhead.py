"""What a guarded update costs on networks so small that the call itself is what takes the time.

    python -m benchmarks.call_overhead            # 2 minutes on 2 cores
    python -m benchmarks.call_overhead --one-core
    python -m benchmarks.call_overhead --quick

Each compiled call pays for every array that goes in and comes out, so the state's number of arrays
counts more than its kernels. AdamW on a 64-64-10 and a 784-128-64-10 network: microseconds a call
of ``tx.update`` and ``apply_updates``, with donated state, beside the bare optimizer and Optax's
guarded clip, and the number of arrays in the state. Then a step of LoRA: eight layers of 512 x 512
whose weights are frozen (``optax.partition`` with ``set_to_zero``) and whose adapters of rank 8
are trained, forward and backward pass included, beside plain ``partition``; there a guard must
not keep the gradients of the frozen weights alive. Expected: ``og.guard`` at most 1.2 times, and
``og.stabilize`` 1.5 times, the guarded clip's call; LoRA within some percent, equal arithmetic.

On 64-64-10 that holds with ``--one-core``, and on an H100. On two cores it does not, and the bare
optimizer is itself slower than with a clip: where more than eight kernels are ready at once,
XLA:CPU (its ``ThunkExecutor``) wakes another thread for half of them, which takes longer than they
do. A guard lets all moments go at once, when its verdict is there: with two layers these are eight,
and the counters make it eleven.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_guard as og
from benchmarks import _harness, _report, _setups
from benchmarks._setups import BARE, Variant, mlp_shapes

GUARDED_CLIP = "apply_if_finite(clip)"
CALLS = (
    BARE,
    "clip_by_global_norm",
    GUARDED_CLIP,
    "og.guard",
    "og.guard, zscore",
    "og.stabilize, norm",
    "og.stabilize",
    "og.guard, zscore by unit",
)
NETWORKS = {"64-64-10": (64, 64, 10), "784-128-64-10": (784, 128, 64, 10)}

_LAYERS, _WIDTH, _RANK, _BATCH = 8, 512, 8, 256
LORA: dict[str, Variant] = {
    BARE: Variant(lambda tx: tx, False),
    "clip_by_global_norm": Variant(
        lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx), False
    ),
    "og.guard": Variant(og.guard, True),
    "og.stabilize": Variant(og.stabilize, True),
}


def call_steppers(shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compiled updates of every pipeline, and the rows that describe them."""
    tree = _setups.make_tree(shapes)
    steppers, rows = {}, {}
    for name in CALLS:
        variant = _setups.VARIANTS[name]
        tx = variant.make(optax.adamw(1e-3))
        params = _harness.random_like(tree.params, 0.1)
        gradients = _harness.random_like(tree.gradients, 0.01, seed=1)
        carry = (params, jax.jit(tx.init)(params))

        def step(carry, gradients, tx=tx):
            params, state = carry
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        compiled, measures = _harness.compile_step(
            step, carry, gradients, large=1024, is_hot=variant.is_hot
        )
        steppers[name] = _harness.Stepper(compiled, carry, gradients)
        num_arrays = len(jax.tree.leaves(carry[1]))
        rows[name] = {"num_state_arrays": num_arrays, "num_kernels": measures.num_kernels}
    return steppers, rows


def lora_steppers() -> tuple[dict[str, Any], dict[str, Any]]:
    """The same for whole training steps of adapters beside frozen weights."""
    keys = iter(jax.random.split(jax.random.key(0), 2 * _LAYERS))
    layer = {"kernel": (_WIDTH, _WIDTH), "a": (_WIDTH, _RANK)}

    def draw():
        weights = {
            name: jax.random.normal(next(keys), shape) * shape[0] ** -0.5
            for name, shape in layer.items()
        }
        return weights | {"b": jnp.zeros((_RANK, _WIDTH))}

    params = {f"layer{i}": draw() for i in range(_LAYERS)}
    labels = jax.tree.map_with_path(
        lambda path, _: "freeze" if path[-1].key == "kernel" else "train", params
    )
    groups = {"train": optax.adamw(1e-3), "freeze": optax.set_to_zero()}
    batch = jax.random.normal(jax.random.key(1), (_BATCH, _WIDTH))

    def loss(params, x):
        for layer in params.values():
            x = jnp.tanh(x @ layer["kernel"] + x @ layer["a"] @ layer["b"])
        return jnp.mean((x - 1) ** 2)

    steppers, rows = {}, {}
    for name, variant in LORA.items():
        tx = variant.make(optax.partition(groups, labels))
        own = jax.tree.map(jnp.copy, params)
        carry = (own, jax.jit(tx.init)(own))

        def step(carry, batch, tx=tx):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
            return optax.apply_updates(params, updates), state

        compiled, _ = _harness.compile_step(step, carry, batch, large=1024, is_hot=variant.is_hot)
        steppers[name] = _harness.Stepper(compiled, carry, batch)
        flops = (compiled.cost_analysis() or {}).get("flops", float("nan"))
        rows[name] = {"flops": flops, "num_state_arrays": len(jax.tree.leaves(carry[1]))}
    return steppers, rows


def compare(
    setup: str, steppers: dict[str, Any], rows: dict[str, Any], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Times them, interleaved, relative to the bare optimizer and to Optax's guarded clip."""
    timings = _harness.interleave(
        steppers, BARE, rounds=arguments.rounds, slice_seconds=arguments.slice_seconds
    )
    result = []
    for name, timing in timings.items():
        row = {"setup": setup, "variant": name, **rows[name], **timing.summary()}
        if GUARDED_CLIP in timings:
            pairs = zip(timing.seconds, timings[GUARDED_CLIP].seconds, strict=True)
            row["over_guarded_clip"] = _harness.quartiles([a / b for a, b in pairs])[1]
        result.append(row)
    return result


def to_markdown(rows: Sequence[dict[str, Any]]) -> str:
    def over(row):
        return f"{row['over_guarded_clip']:.2f}" if "over_guarded_clip" in row else ""

    return _report.markdown_table(
        rows,
        {
            "setup": lambda row: row["setup"],
            "pipeline": lambda row: row["variant"],
            "µs": lambda row: f"{row['step_seconds'] * 1e6:.1f}",
            "time / bare": _report.ratio_cell,
            "/ guarded clip": over,
            "arrays of state": lambda row: str(row["num_state_arrays"]),
            "Mflop": lambda row: f"{row['flops'] / 1e6:.1f}" if "flops" in row else "",
        },
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--one-core", action="store_true", help="no kernel changes its thread")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--slice-seconds", type=float, help="of one variant in a round")
    _harness.add_output_arguments(parser, "call_overhead", plot=False)
    arguments = parser.parse_args(argv)
    if arguments.one_core and not hasattr(os, "sched_setaffinity"):
        parser.error("--one-core needs Linux; without it, keep the process to a core yourself.")
    if arguments.rounds is None:
        arguments.rounds = 3 if arguments.quick else 40
    if arguments.slice_seconds is None:
        arguments.slice_seconds = 0.002 if arguments.quick else 0.05
    return arguments


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    arguments = parse(argv)
    if arguments.one_core:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    suffix = ", one core" if arguments.one_core else ""
    _harness.warm_up_compiler()
    makers: dict[str, Callable[[], Any]] = {
        f"call, {name}": lambda sizes=sizes: call_steppers(mlp_shapes(*sizes))
        for name, sizes in NETWORKS.items()
    }
    makers["LoRA step"] = lora_steppers
    rows: list[dict[str, Any]] = []
    with _harness.progress("call overhead", len(makers)) as advance:
        for setup, make in makers.items():
            rows += compare(setup + suffix, *make(), arguments)
            advance(setup)
    print(to_markdown(rows))
    _harness.save_json(arguments.json, "call_overhead", arguments, rows)
    return rows


if __name__ == "__main__":
    main()
