"""A guarded step on many accelerators, by the word of their compilers; nothing is allocated or run.

    python -m benchmarks.sharded --platform v5p       # 512, 1024 and 256 chips; needs libtpu
    python -m benchmarks.sharded --platform h100      # a node of eight; needs jax[cuda13]
    python -m benchmarks.sharded --platform v5p --quick

Compiled ahead of time for chips that need not be there (see `benchmarks/_topologies.py`): the
update of AdamW on the shapes of models of 70 and 107 billion parameters, fully sharded x
tensor-parallel, and a whole training step, forward, backward and update, of a transformer that
scans its layers. For every pipeline the table tells the collectives that a healthy step has beside
those of the bare optimizer, and how many of all of them run while kernels do; the bytes of main
memory that a device moves; bytes of state added; the compiler's time. Expected: what
``clip_by_global_norm`` adds, all-reduces of one number for each array (or layer of a stack), and
kilobytes of state. Main memory, beside the bare optimizer and in gradients' bytes: the clip 0.97 to
1.00 on TPUs, the guard 1.10 (update of 70B), 1.13 (107B) and 1.15 (training step), above the 1.05
aimed at; on the node of H100s all of them 1.25.

The training step on TPUs wants jax 0.12: older ones cannot read what libtpu 0.0.52 makes of it.

Each platform has its file, `sharded_<platform>.json`, in `benchmarks/outputs` or `--folder`.
"""

from __future__ import annotations

import argparse
import collections
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_guard as og
from benchmarks import _harness, _hlo, _report, _setups, _topologies, accelerators, collectives
from benchmarks._setups import BARE, Optimizer

Row = dict[str, Any]
LAYERS = "layers/"


def _is_stack(path: str, leaf: Any) -> bool:
    del leaf
    return path.startswith(LAYERS)


VARIANTS: dict[str, Callable[[Optimizer], Optimizer]] = {
    BARE: lambda tx: tx,
    "clip_by_global_norm": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "og.guard": lambda tx: og.guard(tx, stacked=_is_stack),
    "og.stabilize": lambda tx: og.stabilize(tx, stacked=_is_stack),
}


class Update(NamedTuple):
    """The update alone, for gradients that are there."""

    platform: str
    model: str

    def compile(self, chips: _topologies.Chips, tx: Optimizer) -> tuple[Any, Any]:
        model = collectives.LARGE[self.model]
        return collectives.compile_sharded(tx, model.shapes, model.layout(), chips)


class Training(NamedTuple):
    """Forward, backward and update of a causal transformer that scans its layers.

    Parameters are float32, fully sharded over "data" and tensor-parallel over "model"; products
    are bfloat16, and the activations of a layer are computed again on the way back.
    """

    platform: str
    axes: dict[str, int]
    width: int
    hidden: int
    depth: int
    num_heads: int
    vocabulary: int
    context: int
    batch_size: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        of_layer = {
            **{f"attention/{name}": (self.width, self.width) for name in ("query", "key", "value")},
            "attention/out": (self.width, self.width),
            "mlp/gate": (self.width, self.hidden),
            "mlp/up": (self.width, self.hidden),
            "mlp/down": (self.hidden, self.width),
            "norm1": (self.width,),
            "norm2": (self.width,),
        }
        shapes = {"tokens": (self.vocabulary, self.width), "norm": (self.width,)}
        return shapes | {LAYERS + n: (self.depth, *shape) for n, shape in of_layer.items()}

    def spec(self, name: str, shape: tuple[int, ...]) -> P:
        is_stack = name.startswith(LAYERS)
        of_layer = collectives.split_both_ways(name, shape[1:] if is_stack else shape)
        return P(None, *of_layer) if is_stack else of_layer

    def loss(self, params: Any, tokens: jax.Array, mesh: Mesh) -> jax.Array:
        def keep_split(x):
            return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P("data")))

        def product(x, weights):
            return x.astype(jnp.bfloat16) @ weights.astype(jnp.bfloat16)

        def normalize(x, scale):
            wide = x.astype(jnp.float32)
            return wide * jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + 1e-6) * scale

        @jax.checkpoint
        def layer(x, weights):
            normed = normalize(x, weights["norm1"])
            query, key, value = (
                product(normed, weights[f"attention/{name}"]).reshape(
                    *x.shape[:2], self.num_heads, -1
                )
                for name in ("query", "key", "value")
            )
            mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
            x = x + product(mixed.reshape(x.shape), weights["attention/out"])
            normed = normalize(x, weights["norm2"])
            gate = jax.nn.silu(product(normed, weights["mlp/gate"]))
            x = x + product(gate * product(normed, weights["mlp/up"]), weights["mlp/down"])
            return keep_split(x), None

        layers = {n.removeprefix(LAYERS): x for n, x in params.items() if n.startswith(LAYERS)}
        x = keep_split(params["tokens"].astype(jnp.bfloat16)[tokens])
        x, _ = jax.lax.scan(layer, x, layers)
        logits = product(normalize(x, params["norm"]), params["tokens"].T).astype(jnp.float32)
        targets = jnp.roll(tokens, -1, axis=1)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    def compile(self, chips: _topologies.Chips, tx: Optimizer) -> tuple[Any, Any]:
        shapes = self.shapes()
        count = int(np.prod(list(self.axes.values())))
        devices = np.asarray(chips.devices[:count]).reshape(tuple(self.axes.values()))
        mesh = Mesh(devices, tuple(self.axes))

        def step(params, state, tokens):
            value, gradients = jax.value_and_grad(self.loss)(params, tokens, mesh)
            updates, state = tx.update(gradients, state, params, value=value)
            return optax.apply_updates(params, updates), state, value

        specs = {name: self.spec(name, shape) for name, shape in shapes.items()}
        params = {
            name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
            for (name, shape), spec in zip(shapes.items(), specs.values(), strict=True)
        }
        state = jax.eval_shape(tx.init, params)
        state_specs = collectives.specs_of_state(state, specs, shapes, by_hand=False)
        placed = jax.tree.map(
            lambda leaf, spec: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec)
            ),
            state,
            state_specs,
        )
        tokens = jax.ShapeDtypeStruct(
            (self.batch_size, self.context), jnp.int32, sharding=NamedSharding(mesh, P("data"))
        )
        arguments = (params, placed, tokens)
        kept = jax.tree.map(lambda leaf: leaf.sharding, arguments[:2])
        options = {"donate_argnums": (0, 1), "out_shardings": (*kept, NamedSharding(mesh, P()))}
        return chips.compile(step, *arguments, **options), state


CASES: dict[str, Update | Training] = {
    "update, 70B": Update("v5p:8x8x8", "70B on 512 devices"),
    "update, 107B": Update("v5p:8x8x16", "107B on 1024 devices"),
    "training step, 33B": Training(  # 33.2e9 parameters
        "v5p:4x8x8", {"data": 64, "model": 4}, width=8192, hidden=22_016, depth=40,
        num_heads=64, vocabulary=128_256, context=4096, batch_size=256,
    ),
    "training step, 1B": Training(  # 1.0e9 parameters
        "h100:8", {"data": 4, "model": 2}, width=2048, hidden=5632, depth=18,
        num_heads=16, vocabulary=64_000, context=2048, batch_size=32,
    ),
    "training step, small": Training(
        "v5p:2x2x1", {"data": 2, "model": 2}, width=256, hidden=512, depth=4,
        num_heads=4, vocabulary=1024, context=256, batch_size=8,
    ),
}  # fmt: skip


def describe(case: str, name: str) -> Row:
    """What a healthy step of one pipeline does, on one device."""
    chips = _topologies.describe(CASES[case].platform)
    began = time.perf_counter(), time.process_time()
    compiled, state = CASES[case].compile(chips, VARIANTS[name](optax.adamw(1e-3)))
    seconds = time.perf_counter() - began[0], time.process_time() - began[1]
    program = _hlo.analyze(compiled)
    return {
        "case": case,
        "platform": chips.platform,
        "num_devices": len(chips.devices),
        "compiler": accelerators.compiler_of(chips),
        "variant": name,
        "collectives": [
            {**each._asdict(), "count": count}
            for each, count in collections.Counter(program.hot.collectives).items()
        ],
        "hot_bytes": program.hot.num_bytes,
        "num_waits": program.hot.num_conditionals,
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "state_bytes": _setups.num_bytes(state),
        "seconds": seconds[0],
        "cpu_seconds": seconds[1],
    }


def add_differences(rows: Sequence[Row]) -> None:
    """What each pipeline of a case has more than the first, which is the bare optimizer."""

    def sizes(row):
        counts = collections.Counter()
        for each in row["collectives"]:
            counts[each["kind"], each["num_arrays"], each["size"]] += each["count"]
        return counts

    for row in rows:
        added = sizes(row) - sizes(rows[0])
        row["added"] = [{"kind": kind, "size": size} for kind, _, size in added.elements()]
        row["state_bytes_added"] = row["state_bytes"] - rows[0]["state_bytes"]


def to_markdown(rows: Sequence[Row]) -> str:
    def overlapping(row):
        counts = [(each["count"], each["overlaps"]) for each in row["collectives"]]
        return f"{sum(n for n, overlaps in counts if overlaps)} of {sum(n for n, _ in counts)}"

    return _report.markdown_table(
        rows,
        {
            "step": lambda row: f"{row['case']}, {row['platform']}",
            "pipeline": lambda row: row["variant"],
            "collectives added (elements)": lambda row: collectives.in_words(row["added"]),
            "overlapping": overlapping,
            "GB a device": lambda row: f"{row['hot_bytes'] / 1e9:.2f}",
            "conditionals": lambda row: str(row["num_waits"]),
            "temp GB": lambda row: f"{row['temp_bytes'] / 1e9:.2f}",
            "bytes of state added": lambda row: f"{row['state_bytes_added']:,}",
            "trace and compile s": lambda row: f"{row['seconds']:.0f}",
            "CPU s": lambda row: f"{row['cpu_seconds']:.0f}",
        },
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--platform", choices=["v5p", "h100"], required=True)
    parser.add_argument("--quick", action="store_true", help="a small training step, on a TPU")
    parser.add_argument("--cases", nargs="+", choices=list(CASES))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "outputs")
    arguments = parser.parse_args(argv)
    if arguments.cases is None:
        small = "training step, small"
        own = [n for n, case in CASES.items() if case.platform.startswith(arguments.platform)]
        arguments.cases = [small] if arguments.quick else [n for n in own if n != small]
    arguments.variants = [BARE, *(name for name in arguments.variants if name != BARE)]
    return arguments


def main(argv: Sequence[str] | None = None) -> list[Row]:
    arguments = parse(argv)
    _topologies.prepare()
    rows: list[Row] = []
    options = argparse.Namespace(**{**vars(arguments), "folder": None})
    total = len(arguments.cases) * len(arguments.variants)
    with _harness.progress("sharded", total) as advance:
        for case in arguments.cases:
            own: list[Row] = []
            for name in arguments.variants:
                try:
                    own.append(describe(case, name))
                except _topologies.CompilerMissing as missing:
                    raise SystemExit(str(missing)) from missing
                advance(f"{case}, {name}")
            add_differences(own)
            rows += own
            path = arguments.folder / f"sharded_{arguments.platform}.json"
            _harness.save_json(path, "sharded", options, rows)
            jax.clear_caches()
    print(to_markdown(rows))
    return rows


if __name__ == "__main__":
    main()
