"""A recommender at learning rates that are too high: embeddings, sparse gradients, Clippy.

    python examples/recommender.py                     # 2 minutes of CPU time
    python examples/recommender.py --data ratings.csv  # MovieLens; u.data of the 100k set, too

Factorisation with biases plus a small network predicts ratings (synthetic: a truth of rank 4, few
popular items) from 36,000 of them in 600 steps of 128. In a step 87 % of the embedding rows have a
gradient of zero. Expected, root mean squared error on ratings held out, median of 2 seeds;
predicting the mean gives 0.962:

                                     adagrad                   adam
    learning rate               0.1    0.3      1      3     0.01   0.03    0.1    0.3
    none                      0.799  0.744  0.633   14.9    0.571  0.650   1.88   15.1
    clip_by_norm 1            0.801  0.736  0.633  0.568    0.570  0.655   1.71   12.1
    clip_by_zscore            0.801  0.744  0.633   14.1    0.575  0.652   1.95   14.4
    clip_by_param_norm, rows  0.885  0.839  0.805  0.695    0.602  0.698   1.71   11.4
    clip_by_relative_change   0.802  0.802  0.803  0.803    0.582  0.588  0.586  0.588
    og.stabilize              0.800  0.738  0.633  0.568    0.570  0.656   1.92   13.2

Adam undoes most of what is done to the length of a gradient before it, so that none of the clips
in front saves its high rates. `clip_by_relative_change`, which acts on the update itself, makes
them all equally good, nearly as good as the best rate without it. With Adagrad it does not win: it
has one factor for a whole array, so that the most extreme row of an embedding table holds back all
of them; a plain norm of 1 learns more at every rate above 0.1. At a well chosen rate (Adam, 0.01)
nothing needs protection.

Reference: Tang et al., Improving training stability for multitask ranking models in recommender
systems, 2023, https://arxiv.org/abs/2302.09178 (Clippy). There Adagrad trains a ranking network
that clipping the norm did not save; at the size of this one it does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import _demo
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

import optax_guard as og

DIMENSION = 16
BATCH_SIZE = 128
RATES = {"adagrad": (0.03, 0.1, 0.3, 1.0, 3.0), "adam": (0.003, 0.01, 0.03, 0.1, 0.3)}
OPTIMIZERS = {"adagrad": optax.adagrad, "adam": optax.adam}


class Ratings(NamedTuple):
    """Who rated what, and how: arrays ``[ratings]``, users and items counted from 0."""

    users: np.ndarray
    items: np.ndarray
    ratings: np.ndarray

    def take(self, rows: Any) -> Ratings:
        return Ratings(*(array[rows] for array in self))


class Dataset(NamedTuple):
    train: Ratings
    test: Ratings
    num_users: int
    num_items: int


def make_ratings(num_users: int = 1000, num_items: int = 600, number: int = 40_000) -> Ratings:
    """Ratings from 1 to 5 of a truth of rank 4; few items are popular, most are rarely rated."""
    rng = np.random.default_rng(0)
    popularity = 1 / (np.arange(num_items) + 5.0)
    activity = rng.lognormal(0, 1, num_users)
    users = rng.choice(num_users, number, p=activity / activity.sum())
    items = rng.choice(num_items, number, p=popularity / popularity.sum())
    tastes, traits = rng.normal(size=(num_users, 4)), rng.normal(size=(num_items, 4))
    mean = 3.4 + rng.normal(0, 0.4, num_users)[users] + rng.normal(0, 0.4, num_items)[items]
    affinity = np.sum(tastes[users] * traits[items], axis=1)
    ratings = np.clip(mean + 0.35 * affinity + rng.normal(0, 0.4, number), 1, 5)
    return Ratings(users.astype(np.int32), items.astype(np.int32), ratings.astype(np.float32))


def load_ratings(path: str | Path) -> Ratings:
    """MovieLens: ``ratings.csv`` with a header, or ``u.data`` with tabs; user, item, rating, ..."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"--data must name a file of ratings; {path} is none.")
    with path.open(encoding="utf-8", errors="replace") as file:
        head = file.readline()
    delimiter = "\t" if "\t" in head else ","
    has_header = not head.split(delimiter)[0].strip().isdigit()
    try:
        table = np.loadtxt(path, delimiter=delimiter, skiprows=int(has_header), usecols=(0, 1, 2))
    except ValueError as error:
        raise ValueError(
            f"{path} is no table of user, item and rating, separated by commas or tabs; it begins "
            f"with {head[:60]!r}."
        ) from error
    table = table.reshape(-1, 3)
    if not len(table):
        raise ValueError(f"{path} holds no ratings; its first line is {head[:60]!r}.")
    users, items = (np.unique(table[:, k], return_inverse=True)[1] for k in (0, 1))
    return Ratings(users.astype(np.int32), items.astype(np.int32), table[:, 2].astype(np.float32))


def split(ratings: Ratings) -> Dataset:
    """A tenth to test."""
    order = np.random.default_rng(1).permutation(len(ratings.ratings))
    cut = len(order) // 10
    train, test = ratings.take(order[cut:]), ratings.take(order[:cut])
    return Dataset(train, test, int(ratings.users.max()) + 1, int(ratings.items.max()) + 1)


def make_params(key: jax.Array, num_users: int, num_items: int) -> dict[str, Any]:
    """Embeddings and biases of users and items, and two dense layers over both embeddings."""
    keys = iter(jax.random.split(key, 5))

    def embedding(number):
        return 0.1 * jax.random.normal(next(keys), (number, DIMENSION))

    def dense(inputs, outputs):
        kernel = jax.nn.initializers.he_normal()(next(keys), (inputs, outputs))
        return {"kernel": kernel, "bias": jnp.zeros(outputs)}

    return {
        "users": {"embedding": embedding(num_users), "bias": jnp.zeros((num_users, 1))},
        "items": {"embedding": embedding(num_items), "bias": jnp.zeros((num_items, 1))},
        "hidden1": dense(2 * DIMENSION, 32),
        "hidden2": dense(32, 16),
        "output": dense(16, 1),
    }


def predict(params: dict[str, Any], users: jax.Array, items: jax.Array) -> jax.Array:
    """Factorisation with biases plus a small network (as in neural collaborative filtering)."""
    user, item = params["users"]["embedding"][users], params["items"]["embedding"][items]
    bias = params["users"]["bias"][users] + params["items"]["bias"][items]
    hidden = jnp.concatenate([user, item], axis=1)
    for name in ("hidden1", "hidden2"):
        hidden = jax.nn.relu(hidden @ params[name]["kernel"] + params[name]["bias"])
    output = hidden @ params["output"]["kernel"] + params["output"]["bias"]
    return jnp.sum(user * item, axis=1) + (bias + output)[:, 0]


def one_row(path: str, leaf: Any) -> int | None:
    """The unit of an embedding is a row, of a dense layer a column: the axes to take norms over."""
    if path.startswith(("users", "items")):
        return 1
    return 0 if leaf.ndim == 2 else None


# The rows of the table: an optimizer that is given, protected in different ways.
Protect = Callable[[optax.GradientTransformation], optax.GradientTransformation]
PROTECTIONS: dict[str, Protect] = {
    "none": lambda optimizer: optimizer,
    "clip_by_norm 1": lambda optimizer: optax.chain(og.clip_by_norm(1.0), optimizer),
    "clip_by_zscore": lambda optimizer: optax.chain(og.clip_by_zscore(2.5), optimizer),
    "clip_by_param_norm, rows": lambda optimizer: optax.chain(
        og.clip_by_param_norm(0.01, scope=one_row), optimizer
    ),
    "clip_by_relative_change": lambda optimizer: optax.chain(
        optimizer, og.clip_by_relative_change()
    ),
    "og.stabilize": og.stabilize,
    "og.stabilize + relative change": lambda optimizer: og.stabilize(
        optax.chain(optimizer, og.clip_by_relative_change())
    ),
}


class Run(NamedTuple):
    """One training run; ``[rates, seeds]`` in front when all are run at once."""

    error: jax.Array  # root mean squared error on the test ratings; NaN if the run was lost
    worst_loss: jax.Array  # highest loss of a batch after the first tenth of the steps
    zero_rows: jax.Array  # per cent of the embedding rows without a gradient, first step


def train(
    make_optimizer: Callable[[jax.Array], optax.GradientTransformation],
    data: Dataset,
    steps: int,
    rate: jax.Array,
    seed: jax.Array,
) -> Run:
    """One run as a pure function of learning rate and seed."""
    optimizer = optax.with_extra_args_support(make_optimizer(rate))
    key = jax.random.key(seed)
    params = make_params(key, data.num_users, data.num_items)
    mean = data.train.ratings.mean()

    def loss_fn(params, batch):
        errors = mean + predict(params, batch.users, batch.items) - batch.ratings
        return jnp.mean(errors**2)

    def train_step(carry, step):
        params, opt_state = carry
        step_key = jax.random.fold_in(key, step)
        rows = jax.random.randint(step_key, (BATCH_SIZE,), 0, len(data.train.ratings))
        loss, grads = jax.value_and_grad(loss_fn)(params, data.train.take(rows))
        updates, opt_state = optimizer.update(grads, opt_state, params, value=loss)
        embeddings = [grads[name]["embedding"] for name in ("users", "items")]
        zero_rows = jnp.mean(jnp.concatenate([jnp.all(g == 0, axis=1) for g in embeddings]))
        return (optax.apply_updates(params, updates), opt_state), (loss, zero_rows)

    carry = (params, optimizer.init(params))
    (params, _), (losses, zero_rows) = jax.lax.scan(train_step, carry, jnp.arange(steps))
    error = jnp.sqrt(loss_fn(params, data.test))
    return Run(error, losses[steps // 10 :].max(), 100 * zero_rows[0])


def train_all(
    data: Dataset, *, seeds: int, steps: int, names: Sequence[str], console: Console
) -> dict[str, dict[str, Run]]:
    """For each optimizer and protection all learning rates and seeds at once."""
    arrays = data._replace(
        train=jax.tree.map(jnp.asarray, data.train), test=jax.tree.map(jnp.asarray, data.test)
    )
    jobs = [(optimizer, name) for optimizer in OPTIMIZERS for name in names]
    runs: dict[str, dict[str, Run]] = {optimizer: {} for optimizer in OPTIMIZERS}
    for optimizer, name in track(jobs, "Training", console=console):

        def make_optimizer(rate, optimizer=optimizer, name=name):
            return PROTECTIONS[name](OPTIMIZERS[optimizer](rate))

        over_seeds = jax.vmap(partial(train, make_optimizer, arrays, steps), (None, 0))
        over_rates = jax.jit(jax.vmap(over_seeds, (0, None)))
        rates = jnp.array(RATES[optimizer])
        runs[optimizer][name] = jax.device_get(over_rates(rates, jnp.arange(seeds)))
    return runs


def make_table(runs: dict[str, Run], optimizer: str, baseline: float) -> Table:
    """Median over the seeds; what is worse than predicting the mean is in red."""
    seeds = next(iter(runs.values())).error.shape[1]
    title = f"{optimizer}: test RMSE at each learning rate, median of {seeds} seed(s)"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column("learning rate", no_wrap=True)
    for rate in RATES[optimizer]:
        table.add_column(f"{rate:g}", justify="right")
    for name, run in runs.items():
        medians = np.median(run.error, axis=1)
        cells = [f"{x:.3f}" if x < baseline else f"[red]{show(x)}[/]" for x in medians]
        table.add_row(name, *cells)
    return table


def show(error: float) -> str:
    return f"{error:.3g}" if np.isfinite(error) else "NaN"


def conclude(results: dict[str, dict[str, Run]], baseline: float) -> list[str]:
    """The best of each protection over all rates, and how many rates work with it."""
    lines = []
    for optimizer, runs in results.items():
        for name, run in runs.items():
            medians = np.nan_to_num(np.median(run.error, axis=1), nan=np.inf)
            best = int(np.argmin(medians))
            useful = int(np.sum(medians < 1.1 * medians[best]))
            lines.append(
                f"{optimizer}, {name}: best {medians[best]:.3f} at {RATES[optimizer][best]:g}; "
                f"{useful} of {len(medians)} rates within 10 % of that; at the highest "
                f"{show(medians[-1])}{'' if medians[-1] < baseline else ', worse than the mean'}"
            )
    return lines


STYLES: dict[str, dict[str, Any]] = {
    "none": {"color": _demo.VERMILION, "marker": "x"},
    "clip_by_norm 1": {"color": _demo.SKY, "marker": "s"},
    "clip_by_zscore": {"color": _demo.PURPLE, "marker": "v"},
    "clip_by_param_norm, rows": {"color": _demo.ORANGE, "marker": "^"},
    "clip_by_relative_change": {"color": _demo.BLUE, "marker": "o"},
    "og.stabilize": {"color": _demo.GREY, "marker": "d", "linestyle": "--"},
    "og.stabilize + relative change": {"color": _demo.GREEN, "marker": "P", "linestyle": ":"},
}


def plot(results: dict[str, dict[str, Run]], baseline: float, path: Path) -> None:
    with _demo.figure_at(path, 8.5, 4.2) as figure:
        panels = figure.subplots(1, len(results), sharey=True)
        for axis, (optimizer, runs) in zip(panels, results.items(), strict=True):
            plot_optimizer(axis, runs, optimizer, baseline)
        panels[0].set(ylabel="test RMSE, lower is better")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)


def plot_optimizer(axis: Axes, runs: dict[str, Run], optimizer: str, baseline: float) -> None:
    """Errors above ``top`` are drawn at the upper edge."""
    rates, top = RATES[optimizer], 1.35 * baseline
    for name, run in runs.items():
        medians = np.nan_to_num(np.median(run.error, axis=1), nan=np.inf)
        axis.plot(
            rates, np.minimum(medians, top), label=name, clip_on=False, markersize=5, **STYLES[name]
        )
    axis.axhline(baseline, color="black", linewidth=0.8, linestyle="--")
    axis.annotate("predicting the mean", (rates[0], baseline), (0, 3), textcoords="offset points")
    axis.text(0.02, 0.95, "worse: at the upper edge", transform=axis.transAxes, fontsize=8)
    axis.set(xscale="log", xlabel="learning rate", title=optimizer, ylim=(None, top))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="1 seed, 100 steps, two protections")
    add("--seeds", type=int, help="default 2")
    add("--steps", type=int, help="default 600")
    add("--data", type=Path, help="ratings.csv or u.data of MovieLens")
    add("--out", type=Path, default=Path(__file__).parent / "figures" / "recommender.png")
    args = parser.parse_args(argv)
    args.seeds = args.seeds or (1 if args.quick else 2)
    args.steps = args.steps or (100 if args.quick else 600)
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, Run]]:
    args = parse(argv)
    console = Console()
    data = split(load_ratings(args.data) if args.data else make_ratings())
    names = ["none", "clip_by_relative_change"] if args.quick else list(PROTECTIONS)
    results = train_all(data, seeds=args.seeds, steps=args.steps, names=names, console=console)
    errors = data.test.ratings - data.train.ratings.mean()
    baseline = float(np.sqrt(np.mean(errors**2)))
    plot(results, baseline, args.out)
    for optimizer, runs in results.items():
        console.print(make_table(runs, optimizer, baseline))
    zero_rows = np.mean([run.zero_rows for runs in results.values() for run in runs.values()])
    lines = (
        f"{len(data.train.ratings)} ratings of {data.num_items} items by {data.num_users} users; "
        f"{zero_rows:.0f} % of the embedding rows have no gradient in a step.",
        f"Predicting the mean: {baseline:.3f}.",
        *conclude(results, baseline),
        f"\nFigure: {args.out}",
    )
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return results


if __name__ == "__main__":
    main()
