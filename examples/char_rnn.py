"""A character model with a GRU that meets empty batches and exploding ones, guarded and not.

    python examples/char_rnn.py                 # 75 seconds of CPU time
    python examples/char_rnn.py --data FILE     # any text

A GRU of 128 units learns, by Adam, to continue the descriptions that scikit-learn gives of its data
sets. Every 40th batch is empty, nothing but padding, so that its mean loss is 0 / 0; or three
batches in a row, every 60 steps, hold random characters at 1000 times the loss, as from a damaged
file and a sum in the place of a mean. Expected, in nats per character of the last tenth of the
text, and (skipped steps):

                              no fault    empty     exploding
    no protection             2.02 (0)     dead      3.84 (0)
    optax.zero_nans + clip 1  2.02 (0)   2.03 (0)    2.11 (0)
    og.stabilize              2.02 (0)   2.03 (6)    2.03 (0)
    og.guard + z-score        2.02 (0)   2.03 (6)    2.04 (0)

Adam bounds the length of a step, and still a burst ruins it: three steps lead far off, and then the
squares of gradients of norm 1000 stay in the second moment for a thousand steps, in which Adam
hardly moves. Healthy norms are about 0.25 here: a limit of 1 still lets four times as much
through, where rules that look at the run have learnt better.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import _demo
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

import optax_guard as og

BATCH_SIZE, LENGTH, WIDTH = 32, 48, 128
NUM_STEPS, NUM_STEPS_QUICK, MEASURE_EVERY = 240, 70, 10
FAULTS = ("no fault", "empty batches", "exploding batches")
UNPROTECTED, ZSCORE = "no protection", "og.guard + z-score"


def load_text(path: Path | None) -> str:
    """The file, or the descriptions that scikit-learn brings along with its data sets: 43 kB."""
    if path is not None:
        text = path.read_text(encoding="utf-8", errors="replace")
    else:
        folder = resources.files("sklearn.datasets.descr")
        files = sorted(folder.iterdir(), key=lambda file: file.name)
        texts = [file.read_text(encoding="utf-8") for file in files if file.name.endswith(".rst")]
        text = "\n".join(texts)
    if len(text) < 20 * (LENGTH + 1):
        raise ValueError(
            f"The text has {len(text)} characters; give one of {20 * (LENGTH + 1)} or more."
        )
    return text


class Corpus(NamedTuple):
    """A text as int32 positions in ``alphabet``; the last tenth is for validation."""

    alphabet: list[str]
    train: np.ndarray  # [characters]
    validation: np.ndarray  # [windows, LENGTH + 1]


def make_corpus(text: str) -> Corpus:
    alphabet = sorted(set(text))
    position = {character: index for index, character in enumerate(alphabet)}
    codes = np.array([position[character] for character in text], np.int32)
    cut = len(codes) * 9 // 10
    rest = codes[cut:]
    num_windows = min(len(rest) // (LENGTH + 1), 200)  # so that a long text is no slower
    windows = rest[: num_windows * (LENGTH + 1)].reshape(num_windows, LENGTH + 1)
    return Corpus(alphabet, codes[:cut], windows)


class Batch(NamedTuple):
    tokens: np.ndarray  # int32 [BATCH_SIZE, LENGTH + 1]
    weights: np.ndarray  # float32 [BATCH_SIZE, LENGTH], 0 for padding
    loss_scale: np.float32


def is_empty(step: int) -> bool:
    return step % 40 == 39


def is_exploding(step: int) -> bool:
    return step >= 60 and step % 60 < 3


def make_batch(corpus: Corpus, rng: np.random.Generator, step: int, fault: str) -> Batch:
    """The same windows whatever the fault."""
    starts = rng.integers(0, len(corpus.train) - LENGTH, BATCH_SIZE)
    tokens = corpus.train[starts[:, None] + np.arange(LENGTH + 1)]
    noise = rng.integers(0, len(corpus.alphabet), tokens.shape, np.int32)
    weights, loss_scale = np.ones((BATCH_SIZE, LENGTH), np.float32), 1
    if fault == "empty batches" and is_empty(step):
        weights[:] = 0  # nothing but padding: the mean loss is 0 / 0
    if fault == "exploding batches" and is_exploding(step):
        tokens, loss_scale = noise, 1000  # a damaged file, and a sum where a mean was meant
    return Batch(tokens, weights, np.float32(loss_scale))


class CharRNN(nnx.Module):
    """Embedding, one layer of GRU that is scanned over time, logits."""

    def __init__(self, num_characters: int, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(num_characters, 32, rngs=rngs)
        self.rnn = nnx.RNN(nnx.GRUCell(32, WIDTH, rngs=rngs))
        self.output = nnx.Linear(WIDTH, num_characters, rngs=rngs)

    def __call__(self, tokens):  # int32 [batch, time] -> [batch, time, characters]
        return self.output(self.rnn(self.embed(tokens)))


def make_optimizers(learning_rate: float) -> dict[str, optax.GradientTransformation]:
    """The rows of the table: one optimizer, protected in different ways."""
    adam = optax.adam(learning_rate)
    zero_nans_and_clip = (optax.zero_nans(), optax.clip_by_global_norm(1.0))
    return {
        UNPROTECTED: adam,
        "optax.zero_nans + clip 1": optax.chain(*zero_nans_and_clip, adam),
        "og.stabilize": og.stabilize(adam),
        ZSCORE: og.guard(optax.chain(og.clip_by_zscore(), adam)),
    }


def mean_loss(model: CharRNN, tokens, weights):
    """Nats per character that is not padding."""
    logits = model(tokens[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.sum(weights * losses) / jnp.sum(weights)


def guard_metrics(optimizer: nnx.Optimizer) -> dict[str, jax.Array]:
    """Those of og.metrics, which raises where nothing is guarded; none of plain Optax."""
    try:
        return og.metrics(optimizer)
    except ValueError:
        return {}


@nnx.jit
def train_step(model: CharRNN, optimizer: nnx.Optimizer, batch: Batch) -> dict[str, jax.Array]:
    def loss_fn(model):
        return batch.loss_scale * mean_loss(model, batch.tokens, batch.weights)

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads, value=loss)  # the guard looks at the loss, too
    return {"loss": loss, "norm": optax.global_norm(grads), **guard_metrics(optimizer)}


@nnx.jit
def validation_loss(model: CharRNN, windows) -> jax.Array:
    return mean_loss(model, windows, jnp.ones((len(windows), LENGTH)))


class Run(NamedTuple):
    """One training run, with the model that came out of it."""

    model: CharRNN
    optimizer: nnx.Optimizer
    norm: np.ndarray  # float32 [steps]
    measured: np.ndarray  # int [measurements], after how many steps
    validation: np.ndarray  # float32 [measurements], nats per character

    @property
    def skipped(self) -> int:
        return int(guard_metrics(self.optimizer).get("guard/skipped_total", 0))


def train(
    corpus: Corpus, tx: optax.GradientTransformation, fault: str, num_steps: int, bar: Progress
) -> Run:
    model = CharRNN(len(corpus.alphabet), rngs=nnx.Rngs(0))
    tx = optax.with_extra_args_support(tx)  # so that plain Optax takes value=, too
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    is_guarded = bool(guard_metrics(optimizer))
    rng = np.random.default_rng(0)
    norms, measured, validation = [], [], []
    for step in range(num_steps):
        scalars = train_step(model, optimizer, make_batch(corpus, rng, step, fault))
        norms.append(scalars["norm"])  # stays on the device
        bar.advance(bar.task_ids[0])
        if (step + 1) % MEASURE_EVERY == 0:
            measured.append(step + 1)
            validation.append(validation_loss(model, corpus.validation))
            bar.update(bar.task_ids[0], status=status_line(jax.device_get(scalars)))
            if is_guarded:
                og.check(optimizer, nnx.state(model, nnx.Param))  # raises if it is hopeless
    norms, validation = jax.device_get((norms, validation))
    return Run(model, optimizer, np.array(norms), np.array(measured), np.array(validation))


def status_line(scalars: dict[str, np.ndarray]) -> str:
    skipped = scalars.get("guard/skipped_total", "-")
    return f"loss {scalars['loss']:.2f} norm {scalars['norm']:.2g} skips {skipped}"


def train_all(
    corpus: Corpus, optimizers: dict[str, optax.GradientTransformation], num_steps: int, console
) -> dict[tuple[str, str], Run]:
    columns = ("{task.description}", BarColumn(8), MofNCompleteColumn(), "{task.fields[status]}")
    columns = [TextColumn(c) if isinstance(c, str) else c for c in columns]
    runs = {}
    with Progress(*columns, console=console) as bar:
        bar.add_task("", total=len(optimizers) * len(FAULTS) * num_steps, status="")
        for name, tx in optimizers.items():
            for fault in FAULTS:
                bar.update(bar.task_ids[0], description=name.ljust(24))
                runs[name, fault] = train(corpus, tx, fault, num_steps, bar)
    return runs


def sample(model: CharRNN, alphabet: list[str], length: int, *, temperature: float = 0.6) -> str:
    """Characters drawn from the model one by one, each fed back as the next input."""
    graphdef, state = nnx.split(model)

    def step(carry, key):
        model = nnx.merge(graphdef, state)
        hidden, token = carry
        hidden, features = model.rnn.cell(hidden, model.embed(token))
        token = jax.random.categorical(key, model.output(features) / temperature, axis=-1)
        return (hidden, token), token[0]

    first = (jnp.zeros((1, WIDTH)), jnp.zeros(1, jnp.int32))
    keys = jax.random.split(jax.random.key(0), length)
    _, tokens = jax.jit(lambda: jax.lax.scan(step, first, keys))()
    return "".join(alphabet[token] for token in np.asarray(tokens))


def make_table(runs: dict[tuple[str, str], Run]) -> Table:
    table = Table(title="Validation loss, nats per character (skipped steps)", box=box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for fault in FAULTS:
        table.add_column(fault, justify="right")
    for name in dict.fromkeys(name for name, _ in runs):
        cells = []
        for fault in FAULTS:
            loss, skipped = runs[name, fault].validation[-1], runs[name, fault].skipped
            text = f"{loss:.2f} ({skipped})" if math.isfinite(loss) else "dead"
            is_lost = not loss < runs[name, "no fault"].validation[-1] + 0.2
            cells.append(f"[red]{text}[/]" if is_lost else text)
        table.add_row(name, *cells)
    return table


LINES = {
    UNPROTECTED: {"color": _demo.VERMILION},
    "optax.zero_nans + clip 1": {"color": _demo.GREEN, "linestyle": (0, (2, 3))},
    "og.stabilize": {"color": _demo.SKY, "linestyle": (0, (5, 3))},
    ZSCORE: {"color": _demo.BLUE},
}


def plot(runs: dict[tuple[str, str], Run], path: Path) -> None:
    """Validation loss above, gradient norm below, for the two faults."""
    names = list(dict.fromkeys(name for name, _ in runs))
    with _demo.figure_at(path, 8, 4.8) as figure:
        axes = figure.subplots(2, 2, sharex=True, sharey="row")
        for (above, below), fault, is_bad in zip(
            axes.T, FAULTS[1:], (is_empty, is_exploding), strict=True
        ):
            above.set_title(fault)
            below.set(xlabel="step", yscale="log")
            for name in names:
                run, style = runs[name, fault], LINES[name]
                finite = np.isfinite(run.validation)
                above.plot(run.measured[finite], run.validation[finite], label=name, **style)
                norm = np.where(np.isfinite(run.norm), run.norm, np.nan)
                below.plot(np.arange(len(norm)), norm, **(style | {"linewidth": 1}))
                if not finite.all():
                    mark_death(below, norm, style["color"])
            for step in filter(is_bad, range(len(run.norm))):
                for axis in (above, below):
                    band = {"color": "#D4D4D4", "linewidth": 0, "label": "bad batches"}
                    axis.axvspan(step - 0.5, step + 0.5, zorder=0, **band)
        axes[0, 0].set(ylabel="validation loss, nats")
        axes[1, 0].set(ylabel="gradient norm")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        once = dict(zip(labels, handles, strict=True))
        figure.legend(once.values(), once.keys(), loc="outside upper center", ncols=3)


def mark_death(axis, norm: np.ndarray, color: str) -> None:
    last = np.flatnonzero(np.isfinite(norm))[-1]
    axis.plot(last, norm[last], "x", color=color, markersize=8, markeredgewidth=2)
    place = {"xy": (last, norm[last]), "xytext": (12, 45), "textcoords": "offset points"}
    axis.annotate("NaN from here on", **place, arrowprops={"arrowstyle": "-"})


class Results(NamedTuple):
    """What :func:`main` returns; losses and counts by optimizer and fault."""

    loss: dict[tuple[str, str], float]
    skipped: dict[tuple[str, str], int]
    text: str
    explanation: str
    figure: Path


def main(argv: Sequence[str] | None = None) -> Results:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "--quick",
        action="store_true",
        help=f"two rows, {NUM_STEPS_QUICK} steps instead of {NUM_STEPS}",
    )
    add("--steps", type=int, help="of each run")
    add("--data", type=Path, help="a text file; by default what scikit-learn says of its data")
    add("--out", type=Path, default=Path(__file__).parent / "figures" / "char_rnn.png")
    args = parser.parse_args(argv)
    num_steps = NUM_STEPS_QUICK if args.quick else NUM_STEPS
    num_steps = num_steps if args.steps is None else args.steps
    if num_steps < MEASURE_EVERY:
        parser.error(f"--steps must be at least {MEASURE_EVERY}, got {num_steps}.")
    try:
        corpus = make_corpus(load_text(args.data))
    except (OSError, ValueError) as error:
        parser.error(f"--data: {error}")
    console = Console()
    optimizers = make_optimizers(5e-3)
    if args.quick:
        optimizers = {name: optimizers[name] for name in (UNPROTECTED, ZSCORE)}
    runs = train_all(corpus, optimizers, num_steps, console)
    plot(runs, args.out)
    shown = runs[ZSCORE, "empty batches"]
    results = Results(
        loss={key: float(run.validation[-1]) for key, run in runs.items()},
        skipped={key: run.skipped for key, run in runs.items()},
        text=sample(shown.model, corpus.alphabet, 300),
        explanation=og.explain(shown.optimizer, nnx.state(shown.model, nnx.Param)),
        figure=args.out,
    )
    console.print(make_table(runs))
    for title, text in (
        (f"og.explain, after the run of {ZSCORE} with empty batches:", results.explanation),
        ("What that model writes:", results.text),
    ):
        console.print(f"\n{title}", style="bold", highlight=False)
        console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)
    console.print(f"\nFigure: {results.figure}", highlight=False, soft_wrap=True)
    return results


if __name__ == "__main__":
    main()
