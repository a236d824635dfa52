"""What a guard adds to the communication of a sharded training step, read off the compiled program.

    python -m benchmarks.collectives            # 4 minutes on 2 cores; 512 virtual CPU devices
    python -m benchmarks.collectives --layouts --large "107B on 1024 devices"
    python -m benchmarks.collectives --quick    # 8 virtual devices

Nothing is run: programs are compiled for shapes, on virtual CPU devices. First a small transformer
on 8 devices, sharded like data-parallel, fully sharded and tensor-parallel training under plain
``jit``, and by hand in ``shard_map`` with ``axis_name``. Then the shapes of a language model of 70
billion parameters, fully sharded over 64 x tensor-parallel over 8 devices. For every pipeline it
prints the collectives of a healthy step, those of rare branches apart, and the bytes of state that
it adds to the optimizer's. Expected: at most one small all-reduce more than the bare optimizer (XLA
on CPU splits it at 256 arrays; in ``shard_map`` the default of ``stabilize`` takes two), never an
all-gather, and kilobytes of state.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_guard as og
from benchmarks import _harness, _hlo, _report, _setups, _topologies
from benchmarks._setups import BARE, Optimizer

NUM_DEVICES = 8
QUICK_VARIANTS = (BARE, "og.guard", "og.guard, zscore")
VARIANTS: dict[str, Callable[[Optimizer, Any], Optimizer]] = {
    BARE: lambda tx, axes: tx,
    "clip_by_global_norm": lambda tx, axes: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "apply_if_finite(clip)": lambda tx, axes: optax.apply_if_finite(
        optax.chain(optax.clip_by_global_norm(1.0), tx), 5
    ),
    "og.guard": lambda tx, axes: og.guard(tx, axis_name=axes),
    "og.stabilize": lambda tx, axes: og.stabilize(tx, axis_name=axes),
    "og.guard, zscore": lambda tx, axes: og.guard(
        optax.chain(og.clip_by_zscore(axis_name=axes), tx), axis_name=axes
    ),
    "og.guard, zscore by leaf": lambda tx, axes: og.guard(
        optax.chain(og.clip_by_zscore(scope="leaf", axis_name=axes), tx), axis_name=axes
    ),
    "og.guard, zscore by unit": lambda tx, axes: og.guard(
        optax.chain(og.clip_by_zscore(scope="unit", axis_name=axes), tx), axis_name=axes
    ),
    "og.guard, zscore, check_update": lambda tx, axes: og.guard(
        optax.chain(og.clip_by_zscore(axis_name=axes), tx), axis_name=axes, check_update=True
    ),
}


class Layout(NamedTuple):
    """How parameters lie on a mesh.

    Attributes:
      axes: names and sizes of the mesh axes.
      spec: from the name and shape of a parameter to its partition spec.
      by_hand: whether the step is written with ``shard_map``, all axes given as ``axis_name``.
    """

    axes: dict[str, int]
    spec: Callable[[str, tuple[int, ...]], P]
    by_hand: bool = False

    def mesh(self, devices: Sequence[Any] | None = None) -> Mesh:
        """Of these devices, or of those that are there."""
        sizes = tuple(self.axes.values())
        chosen = (jax.devices() if devices is None else devices)[: int(np.prod(sizes))]
        return Mesh(np.asarray(chosen).reshape(sizes), tuple(self.axes))


def _replicated(name: str, shape: tuple[int, ...]) -> P:
    del name, shape
    return P()


def _fully_sharded(name: str, shape: tuple[int, ...]) -> P:
    del name
    return P("data") if len(shape) > 1 else P()


_SPLIT_INPUTS = ("out", "down", "tokens")  # the first of two matrices is split by columns


def _tensor_parallel(name: str, shape: tuple[int, ...]) -> P:
    if len(shape) < 2:
        return P("model") if name.endswith("up_bias") else P()
    return P("model", None) if name.endswith(_SPLIT_INPUTS) else P(None, "model")


def split_both_ways(name: str, shape: tuple[int, ...]) -> P:
    if len(shape) < 2:
        return P()
    return P("model", "data") if name.endswith(_SPLIT_INPUTS) else P("data", "model")


def _rows_sharded(name: str, shape: tuple[int, ...]) -> P:
    """Over all axes along the first dimension, which is the one that every scope reduces."""
    del name, shape
    return P(("data", "model"))


LAYOUTS = {
    "data-parallel": Layout({"data": 8}, _replicated),
    "fully sharded": Layout({"data": 8}, _fully_sharded),
    "tensor-parallel": Layout({"model": 8}, _tensor_parallel),
    "fully sharded x tensor-parallel": Layout({"data": 4, "model": 2}, split_both_ways),
    "shard_map": Layout({"data": 4, "model": 2}, _rows_sharded, by_hand=True),
}


class Large(NamedTuple):
    """A model of which nothing is allocated, on devices that do not exist."""

    num_devices: int
    shapes: dict[str, tuple[int, ...]]

    def layout(self) -> Layout:
        return Layout({"data": self.num_devices // 8, "model": 8}, split_both_ways)


LARGE = {
    "70B on 512 devices": Large(  # Llama 3 70B: 723 arrays, 70.6e9 numbers
        512,
        _setups.language_model_shapes(
            depth=80, width=8192, hidden=28_672, grouped=1024, vocabulary=128_256
        ),
    ),
    "107B on 1024 devices": Large(  # 579 arrays, 107e9 numbers
        1024,
        _setups.language_model_shapes(
            depth=64, width=12_288, hidden=33_792, grouped=1024, vocabulary=256_000
        ),
    ),
}


def specs_of_state(
    state: Any, specs: dict[str, P], shapes: dict[str, tuple[int, ...]], *, by_hand: bool
) -> Any:
    """Moments lie where their parameters lie, and one number a unit where XLA wants it."""

    def spec(path, leaf):
        name = getattr(path[-1], "key", None) if path else None
        if name in specs and leaf.shape == shapes[name]:
            return specs[name]
        return P() if leaf.ndim < 2 or by_hand else None

    return jax.tree_util.tree_map_with_path(spec, state)


def compile_sharded(
    tx: Optimizer,
    shapes: dict[str, tuple[int, ...]],
    layout: Layout,
    chips: _topologies.Chips | None = None,
) -> Any:
    """The compiled step, and the abstract state of the transformation."""
    mesh = layout.mesh(chips and chips.devices)
    specs = {name: layout.spec(name, shape) for name, shape in shapes.items()}
    params = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, specs[name]))
        for name, shape in shapes.items()
    }

    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, params)
    state_specs = specs_of_state(state, specs, shapes, by_hand=layout.by_hand)
    if layout.by_hand:
        step = jax.shard_map(
            step, mesh=mesh, in_specs=(specs, state_specs, specs), out_specs=(specs, state_specs)
        )
    place = lambda specs: jax.tree.map(  # noqa: E731
        lambda spec: None if spec is None else NamedSharding(mesh, spec),
        specs,
        is_leaf=lambda x: x is None or isinstance(x, P),
    )
    shardings = (place(specs), place(state_specs))
    options = {"out_shardings": shardings, "donate_argnums": (0, 1)}
    placed = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        shardings[1],
    )
    arguments = (params, placed, params)
    if chips is not None:
        return chips.compile(step, *arguments, **options), state
    return jax.jit(step, **options).lower(*arguments).compile(), state


def describe(
    shapes: dict[str, tuple[int, ...]], layout: Layout, optimizer: Optimizer, name: str
) -> dict[str, Any]:
    """Collectives of one pipeline; sizes are numbers of elements."""
    axes = tuple(layout.axes) if layout.by_hand else None
    tx = VARIANTS[name](optimizer, axes)
    compiled, state = compile_sharded(tx, shapes, layout)
    program = _hlo.analyze(compiled)
    healthy = program.dear if name == "apply_if_finite(clip)" else program.hot
    bare_state = jax.eval_shape(
        optimizer.init,
        {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()},
    )
    hot = collections.Counter(healthy.collectives)
    rare = collections.Counter(program.dear.collectives) - hot
    return {
        "hot": [collective._asdict() for collective in hot.elements()],
        "rare": [collective._asdict() for collective in rare.elements()],
        "num_all_gathers": sum("gather" in each.kind for each in hot.elements()),
        "hot_bytes_per_device": healthy.num_bytes,
        "state_bytes_added": _setups.num_bytes(state) - _setups.num_bytes(bare_state),
    }


def in_words(found: Sequence[dict[str, Any]]) -> str:
    """Such as ``2 all-reduce (35 + 1)``, with the elements of each."""
    sizes: dict[str, list[int]] = {}
    for each in found:
        sizes.setdefault(each["kind"], []).append(each["size"])
    parts = []
    for kind, own in sizes.items():
        shown = " + ".join(map(str, own[:4])) + (" + ..." if len(own) > 4 else "")
        parts.append(f"{len(own)} {kind} ({shown})")
    return ", ".join(parts) or "none"


def to_markdown(rows: Sequence[dict[str, Any]]) -> str:
    return _report.markdown_table(
        rows,
        {
            "layout": lambda row: row["layout"],
            "pipeline": lambda row: row["variant"],
            "collectives (elements)": lambda row: in_words(row["hot"]) if "hot" in row else "fails",
            "in rare branches": lambda row: in_words(row["rare"]) if "rare" in row else "-",
            "bytes of state added": lambda row: f"{row.get('state_bytes_added', 0):,}",
        },
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few layouts, no large model")
    parser.add_argument("--layouts", nargs="*", choices=list(LAYOUTS))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS))
    parser.add_argument("--optimizer", choices=list(_setups.OPTIMIZERS), default="adamw")
    large = next(iter(LARGE))
    parser.add_argument("--large", nargs="*", choices=list(LARGE), help=f"default: {large}")
    _harness.add_output_arguments(parser, "collectives", plot=False)
    arguments = parser.parse_args(argv)
    if arguments.layouts is None:
        quick = ["fully sharded", "shard_map"]
        arguments.layouts = quick if arguments.quick else list(LAYOUTS)
    if arguments.variants is None:
        arguments.variants = list(QUICK_VARIANTS if arguments.quick else VARIANTS)
    if arguments.large is None:
        arguments.large = [] if arguments.quick else [large]
    return arguments


def use_virtual_devices(number: int) -> None:
    """Asks for virtual CPU devices; a backend that already runs keeps what it has."""
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # JAX runs already
            jax.config.update("jax_num_cpu_devices", number)
            jax.config.update("jax_platforms", "cpu")
    if len(jax.devices()) < number:
        raise RuntimeError(
            f"{number} devices are needed, but JAX runs with {len(jax.devices())}. Run the "
            "benchmark in a process of its own, without XLA_FLAGS that set their number."
        )


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    arguments = parse(argv)
    large = {name: LARGE[name] for name in arguments.large}
    use_virtual_devices(max([NUM_DEVICES, *(model.num_devices for model in large.values())]))
    optimizer = _setups.OPTIMIZERS[arguments.optimizer]()
    toy = {name: leaf.shape for name, leaf in _setups.TREES["toy transformer"]().params.items()}
    work = [(name, toy, LAYOUTS[name]) for name in arguments.layouts]
    work += [(name, model.shapes, model.layout()) for name, model in large.items()]
    rows = []
    with _harness.progress("collectives", len(work) * len(arguments.variants)) as advance:
        for layout_name, shapes, layout in work:
            for name in arguments.variants:
                row = {"layout": layout_name, "optimizer": arguments.optimizer, "variant": name}
                try:
                    row |= describe(shapes, layout, optimizer, name)
                except (TypeError, ValueError) as error:  # a local verdict where all must agree
                    row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                rows.append(row)
                advance(f"{layout_name}, {name}")
    print(to_markdown(rows))
    _harness.save_json(arguments.json, "collectives", arguments, rows)
    return rows


if __name__ == "__main__":
    main()
