"""What a guard costs on accelerators, by the word of their own compilers; nothing is run.

    python -m benchmarks.accelerators --platform v5p:2x2x1 v6e:2x2 h100 cpu
    python -m benchmarks.accelerators --platform v5p:2x2x1 --quick

Programs are compiled ahead of time for one chip that is described and need not be there (see
`benchmarks/_topologies.py` for platforms and what to install: TPUs and the H100 in environments of
their own). A step is ``update`` and ``apply_updates`` of AdamW, with parameters and state donated.
For every tree, dtype and pipeline the table tells the bytes that a healthy step reads from and
writes to main memory, in units of the gradients' bytes (what stays in a TPU's vector memory is
free), kernels, the conditionals that it comes to, copies of arrays as large as a parameter,
temporary memory and the compiler's time. Expected: bare and 1.05 gradients for the guard, every
clip of scope global and leaf, and the default of ``stabilize``. Not reached on a v5p with 48
arrays: 1.06 with ``clip_by_zscore`` or the default, because its compiler brings two gradients into
vector memory for the rare branch, drops them, and reads them again for the update; nor on a v6e,
whose vector memory is larger: 1.12 to 1.17, and 1.31 for the default with bfloat16 gradients.

Each platform has its file, `accelerators_<platform>.json`, in `benchmarks/outputs` or `--folder`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import _harness, _report, _setups, _topologies, step_cost
from benchmarks._setups import BARE, Optimizer, Tree

Row = dict[str, Any]
VARIANTS = (
    BARE,
    "clip_by_global_norm",
    "apply_if_finite(clip)",
    "og.guard",
    "og.stabilize, norm",
    "og.guard, zscore",
    "og.guard, zscore by leaf",
    "og.guard, zscore by unit",
    "og.stabilize",
)
QUICK_VARIANTS = (BARE, "og.guard", "og.stabilize")
SHAPES = {
    "148 arrays": _setups.transformer_shapes(width=768, depth=12, vocabulary=20_000, context=1024),
    "48 arrays": _setups.language_model_shapes(
        depth=5, width=1024, hidden=2816, grouped=256, vocabulary=16_000
    ),
    "8 arrays": {
        "tokens": (4_000, 768),
        "attention/query": (768, 768),
        "attention/out": (768, 768),
        "mlp/up": (768, 3072),
        "mlp/up_bias": (3072,),
        "mlp/down": (3072, 768),
        "mlp/down_bias": (768,),
        "norm/scale": (768,),
    },
}
DEFAULT_TREES = ("148 arrays", "48 arrays")


class Dtypes(NamedTuple):
    """Of parameters, gradients, and the parameters that ``init`` sees, whose dtype moments take."""

    params: Any
    gradients: Any
    initial: Any


DTYPES = {
    "f32": Dtypes(jnp.float32, jnp.float32, jnp.float32),
    "bf16 gradients": Dtypes(jnp.float32, jnp.bfloat16, jnp.float32),
    "bf16, f32 moments": Dtypes(jnp.bfloat16, jnp.bfloat16, jnp.float32),
}


def measure(
    chips: _topologies.Chips,
    shapes: dict[str, tuple[int, ...]],
    dtypes: Dtypes,
    tx: Optimizer,
    *,
    is_hot: bool,
) -> tuple[Any, Row]:
    """The step compiled for one chip, and what is known of it."""
    sharding = chips.one()

    def of_dtype(dtype):
        return {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
            for name, shape in shapes.items()
        }

    tree = Tree(of_dtype(dtypes.params), of_dtype(dtypes.gradients))
    state = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(tx.init, of_dtype(dtypes.initial)),
    )
    compiled, measures = _harness.compile_step(
        step_cost.make_step(tx),
        (tree.params, state),
        tree.gradients,
        large=tree.large,
        is_hot=is_hot,
        chips=chips,
    )
    sizes = {"gradient_bytes": tree.gradient_bytes, "state_bytes": _setups.num_bytes(state)}
    return compiled, sizes | measures._asdict()


def compare(
    chips: _topologies.Chips, tree: str, dtypes: str, arguments: argparse.Namespace, advance: Any
) -> list[Row]:
    """One row for each pipeline."""
    rows: list[Row] = []
    for name in arguments.variants:
        variant = _setups.VARIANTS[name]
        tx = variant.make(_setups.OPTIMIZERS["adamw"]())
        row = {"platform": chips.platform, "compiler": compiler_of(chips), "tree": tree}
        row |= {"dtypes": dtypes, "variant": name, "is_ours": variant.is_ours}
        try:
            row |= measure(chips, SHAPES[tree], DTYPES[dtypes], tx, is_hot=variant.is_hot)[1]
        except TypeError as error:  # apply_if_finite with mixed dtypes
            row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        else:
            row["extra_reads"] = _extra_reads(row, rows[0] if rows else row)
        rows.append(row)
        advance(f"{chips.platform}, {tree}, {dtypes}, {name}")
    return rows


def _extra_reads(row: Row, bare: Row) -> float:
    return (row["hot_bytes"] - bare["hot_bytes"]) / row["gradient_bytes"]


def compiler_of(chips: _topologies.Chips) -> str:
    package = {"tpu": "libtpu", "cuda": "jax-cuda13-plugin", "cpu": "jaxlib"}[chips.language]
    return f"{package} {metadata.version(package)}"


def to_markdown(rows: Sequence[Row]) -> str:
    """A table for each tree and dtype."""
    parts = []
    for tree, dtypes in dict.fromkeys((row["tree"], row["dtypes"]) for row in rows):
        own = [row for row in rows if (row["tree"], row["dtypes"]) == (tree, dtypes)]
        columns = {
            "pipeline": lambda row: row["variant"],
            "bytes / gradients": lambda row: "fails" if "error" in row else _bytes_cell(row),
            "above bare": step_cost.number("extra_reads", "{:+.2f}"),
            "kernels": step_cost.number("num_kernels", "{}"),
            "conditionals": step_cost.number("num_waits", "{}"),
            "in all": step_cost.number("num_conditionals", "{}"),
            "large copies": step_cost.number("num_large_copies", "{}"),
            "temp MB": step_cost.number("temp_bytes", "{:.1f}", 1e6),
            "compile s": step_cost.number("compile_seconds", "{:.1f}"),
            "compile CPU s": step_cost.number("compile_cpu_seconds", "{:.1f}"),
        }
        title = f"### {own[0]['platform']}, {tree}, {dtypes}"
        parts += [title, _report.markdown_table(own, columns)]
    return "\n\n".join(parts)


def _bytes_cell(row: Row) -> str:
    return f"{row['hot_bytes'] / row['gradient_bytes']:.2f}"


def accelerators_table(results_dir: Path) -> str:
    """All platforms side by side, from the files in a folder; empty if there are none."""
    rows: list[Row] = []
    for path in sorted(results_dir.glob("accelerators_*.json")):
        rows += json.loads(path.read_text())["rows"]
    parts = []
    for tree, dtypes in dict.fromkeys((row["tree"], row["dtypes"]) for row in rows):
        own = [row for row in rows if (row["tree"], row["dtypes"]) == (tree, dtypes)]
        lines: dict[str, dict[str, str]] = {}
        for row in own:
            line = lines.setdefault(row["variant"], {"pipeline": row["variant"]})
            line[row["platform"]] = _cell(row)
        titles = dict.fromkeys(["pipeline", *(row["platform"] for row in own)])
        columns = {title: _getter(title) for title in titles}
        parts += [
            f"AdamW, {tree}, {dtypes}:",
            _report.markdown_table(list(lines.values()), columns),
        ]
    if not parts:
        return ""
    compilers = dict.fromkeys(row["compiler"] for row in rows)
    note = (
        "Bytes of main memory that a healthy step moves / the gradients' bytes; in brackets the "
        "conditionals that it comes to. Compiled ahead of time by the compilers of these platforms "
        f"({', '.join(compilers)}), not run. Optax's clip and its guarded clip are at the floor on "
        "the H100 as we are: what they cost more elsewhere is what those compilers make of them."
    )
    return "\n\n".join([*parts, note])


def _getter(title: str) -> Callable[[dict[str, str]], str]:
    return lambda line: line.get(title, "-")


def _cell(row: Row) -> str:
    if "error" in row:
        return "fails"
    waits = row["num_waits"]
    return _bytes_cell(row) + (f" ({waits})" if waits else "")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--platform", nargs="+", required=True, type=_platform)
    parser.add_argument("--quick", action="store_true", help="eight arrays, three pipelines")
    parser.add_argument("--trees", nargs="+", choices=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES))
    parser.add_argument("--variants", nargs="+", choices=list(_setups.VARIANTS))
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "outputs")
    arguments = parser.parse_args(argv)
    quick = arguments.quick
    arguments.trees = arguments.trees or (["8 arrays"] if quick else list(DEFAULT_TREES))
    arguments.dtypes = arguments.dtypes or (["f32"] if quick else list(DTYPES))
    names = arguments.variants or (QUICK_VARIANTS if quick else VARIANTS)
    arguments.variants = [BARE, *(name for name in names if name != BARE)]
    return arguments


def _platform(name: str) -> str:
    if not _topologies.is_platform(name):
        raise argparse.ArgumentTypeError(
            f"{name!r} is none of cpu, h100 and topologies such as v5p:2x2x1"
        )
    return name


def main(argv: Sequence[str] | None = None) -> list[Row]:
    arguments = parse(argv)
    _topologies.prepare()
    everything: list[Row] = []
    for platform in arguments.platform:
        try:
            chips = _topologies.describe(platform)
        except _topologies.CompilerMissing as missing:
            print(missing)
            continue
        rows: list[Row] = []
        work = [(tree, dtypes) for tree in arguments.trees for dtypes in arguments.dtypes]
        with _harness.progress("accelerators", len(work) * len(arguments.variants)) as advance:
            for tree, dtypes in work:
                rows += compare(chips, tree, dtypes, arguments, advance)
                options = argparse.Namespace(**{**vars(arguments), "folder": None})
                path = arguments.folder / f"accelerators_{chips.family}.json"
                _harness.save_json(path, "accelerators", options, rows)
                jax.clear_caches()
        print(to_markdown(rows))
        everything += rows
    if not everything:
        raise SystemExit("Nothing was compiled.")
    return everything


if __name__ == "__main__":
    main()
