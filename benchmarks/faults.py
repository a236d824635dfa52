"""What do bad batches leave of a run? Every rule against four faults, from three first steps on.

    python -m benchmarks.faults            # about 3 minutes of CPU time
    python -m benchmarks.faults --quick

The task and the faults of `examples/mlp_digits.py`: a 64-128-64-10 network learns 8x8 digits, 10
epochs in batches of 64, and every 20th batch goes wrong: a NaN pixel, NaN pixels in 8 batches in a
row, one sample times a million, random labels with the loss times 1000. The first fault comes at
step 0, 20 or 60: a rule that is still warming up may have no limit yet. All rules are guarded (the
finite faults are theirs to stop); peers from Optax are as they come; "spike_skip" is
`og.guard(..., skip_if=og.spike())` without a clip. SGD(0.05, momentum 0.9) and Adam(0.002), 5
seeds. Test accuracy in per cent, median, "dead" if most seeds end in NaN. Expected on CPU, for a
first fault at step 0, 20 and 60:

    sgd                       clean       NaN pixel   8 NaN batches     sample ×1e6   random labels
    none                       98.1  dead dead dead  dead dead dead     8    8   98     8    8    8
    optax.apply_if_finite      98.1    98   98   98  dead dead dead     8    8   98     8    8    8
    optax.zero_nans+clip       97.8    98   98   98    97   97   97    98   98   98    98   98   98
    optax.adaptive_grad_clip   96.7  dead dead dead  dead dead dead    97   97   97    96   96   96
    og.stabilize               98.1    98   98   98    97   97   97    98   98   98    98   98   98
    clip_by_norm               97.8    98   98   98    97   97   97    98   98   98    98   98   98
    clip_by_zscore             97.8    98   98   98    97   97   97     8   98   98    12    9   98
    clip_by_zscore_capped      97.8    98   98   98    97   97   98    98   98   98    98   98   98
    clip_by_percentile         97.8    98   98   98    97   97   97     8   98   98     8   98   98
    clip_by_median             98.1    98   98   98    97   97   98    98   98   98    98   98   98
    clip_by_ema                97.8    98   98   98    98   98   98    98   98   98    98   98   98
    clip_by_max_ema            98.1    98   98   98    97   97   97     8   97   97     9   10   10
    clip_by_update_ratio       98.1    98   98   98    97   97   97    98   98   98    98   98   98
    normalize_by_ema_norm      97.8    97   97   98    97   96   97    91   98   97    79   85   88
    normalize_and_scale        96.9    98   98   97    98   97   98    98   98   97    97   98   98
    normalize_and_scale_auto   96.7    98   97   97    97   97   97    14   97   97     8   97   97
    spike_skip                 98.1    98   98   98    97   97   97     8   98   98     8    8    8

One point is 3.6 of the 360 test digits; smaller differences are noise. Adaptive rules without a
limit from the first step on, the spike condition included, are lost to a finite fault at step 0;
`clip_by_median`, which only observes for three steps, and `clip_by_update_ratio`, the default of
`og.stabilize`, which knows a limit without history, are not. The two lines of Optax, `zero_nans`
and a clip to norm 1, hold against everything here.

With Adam, one huge sample does no harm without a clip either, and random labels leave 13, 38 and 65
without one, 28, 86 and 98 with the z-score rule, 92 from step 0 on with the percentile and the
automatic length; what held above holds here.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_guard as og
from benchmarks import _harness, _report
from benchmarks._rules import ADAPTIVE, PEERS, RULES, Rule, _demo, mlp_digits

OPTIMIZERS = {"sgd": optax.sgd(0.05, momentum=0.9), "adam": optax.adam(2e-3)}
FIRST_FAULTS = (0, 20, 60)
FAULTS = tuple(mlp_digits.FAULTS)  # the first is none, for comparison


def guarded(rule: Rule) -> Rule:
    return lambda optimizer: og.guard(rule(optimizer))


METHODS: dict[str, Rule] = {
    **PEERS,
    "og.stabilize": RULES["og.stabilize"],
    "clip_by_norm": guarded(RULES["clip_by_norm"]),
    **{name: guarded(rule) for name, rule in ADAPTIVE.items()},
    "spike_skip": partial(og.guard, skip_if=og.spike()),
}
QUICK = ("none", "og.stabilize", "clip_by_zscore")


def run(optimizer: optax.GradientTransformation, data: Any, starts: Any, first_faults: Any) -> Any:
    """Accuracy in per cent and whether parameters are finite, each ``[firsts, faults, seeds]``."""

    def outcome(start, fault, first_fault):
        result = mlp_digits.train(optimizer, data, start, fault, first_fault)
        return result.final_accuracy, result.is_alive

    over_seeds = jax.vmap(outcome, (0, None, None))
    over_faults = jax.vmap(over_seeds, (None, 0, None))
    over_firsts = jax.vmap(over_faults, (None, None, 0))
    return over_firsts(starts, jnp.arange(len(FAULTS)), first_faults)


def to_cells(name: str, optimizer: str, firsts: Sequence[int], outcome: Any) -> list[dict]:
    """A cell for each fault and first step; one for the run without a fault, whatever the step."""
    accuracy, is_alive = (np.asarray(each) for each in outcome)
    cells = []
    for (i, first), (j, fault) in itertools.product(enumerate(firsts), enumerate(FAULTS)):
        if fault == FAULTS[0] and i > 0:
            continue
        of_seeds = accuracy[i, j]
        cells.append(
            {
                "rule": name,
                "case": f"{optimizer}, {fault}" + (f", first {first}" if j else ""),
                "value": float(np.median(of_seeds)),
                "worst": float(of_seeds.min()),
                "dead": int(np.sum(~is_alive[i, j])),
                "seeds": len(of_seeds),
            }
        )
    return cells


def to_markdown(cells: Sequence[dict[str, Any]], optimizer: str) -> str:
    """One row a rule; a cell has a number for each step of the first fault."""
    names = dict.fromkeys(cell["rule"] for cell in cells)
    found = {
        fault: {
            name: [
                "dead" if 2 * cell["dead"] > cell["seeds"] else f"{cell['value']:.1f}"
                for cell in cells
                if cell["rule"] == name and f"{cell['case']},".startswith(f"{optimizer}, {fault},")
            ]
            for name in names
        }
        for fault in FAULTS
    }
    columns = {
        fault: lambda row, fault=fault: " / ".join(found[fault][row["rule"]]) for fault in FAULTS
    }
    rows = [{"rule": name} for name in names]
    return _report.markdown_table(rows, {optimizer: lambda row: row["rule"], **columns})


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="2 seeds, 3 epochs, SGD, two first steps, three rules")
    add("--seeds", type=int, help="default 5")
    add("--rules", nargs="+", choices=list(METHODS), metavar="RULE", help="default: all")
    add("--optimizers", nargs="+", choices=list(OPTIMIZERS), help="default: both")
    _harness.add_output_arguments(parser, "faults", plot=False)
    arguments = parser.parse_args(argv)
    quick = arguments.quick
    arguments.seeds = arguments.seeds or (2 if quick else 5)
    arguments.rules = arguments.rules or list(QUICK if quick else METHODS)
    arguments.optimizers = arguments.optimizers or list(OPTIMIZERS)[: 1 if quick else 2]
    return arguments


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    arguments = parse(argv)
    epochs, firsts = (3, FIRST_FAULTS[:2]) if arguments.quick else (10, FIRST_FAULTS)
    data = jax.tree.map(jnp.asarray, _demo.load_digits())
    make_starts = jax.jit(jax.vmap(mlp_digits.make_start, (0, None, None)), static_argnums=2)
    starts = make_starts(jnp.arange(arguments.seeds), data, epochs)
    cells: list[dict[str, Any]] = []
    pairs = list(itertools.product(arguments.optimizers, arguments.rules))
    with _harness.progress("faults", len(pairs)) as advance:
        for optimizer, name in pairs:
            method = METHODS[name](OPTIMIZERS[optimizer])
            outcome = jax.jit(partial(run, method))(data, starts, jnp.asarray(firsts))
            cells += to_cells(name, optimizer, firsts, outcome)
            _harness.save_json(arguments.json, "faults", arguments, cells, key="cells")
            advance(f"{name}, {optimizer}")
    print(f"First fault at step {' / '.join(map(str, firsts))}; median of the seeds, per cent\n")
    for optimizer in arguments.optimizers:
        print(to_markdown(cells, optimizer) + "\n")
    return cells


if __name__ == "__main__":
    main()
