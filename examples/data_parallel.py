"""Several processes train one network: a NaN in one of them, a process killed, a resumed run.

    python examples/data_parallel.py                    # 300 steps: 20 seconds of CPU time
    python examples/data_parallel.py --kill-step 250    # ends with an error and exit code 1
    python examples/data_parallel.py --resume           # goes on, ends where the first ended

Each process holds its part of every batch of 8x8 digits, and `jit` sums the gradients over all of
them. The processes run on one machine and talk through `jax.distributed`, as they would on many.
At step 25 (`--fault-step`) one pixel is NaN in the last process only. Being summed, the NaN reaches
all processes; the guard judges the sum, so that all of them skip the step without a word more
between them. Expected, with digests of your own that agree between the rows:

    process resumed skipped last fault accuracy parameters   optimizer state
          0       -       1         26   96.9 % bfe894e74898 0767e8c70fc4
          1       -       1         26   96.9 % bfe894e74898 0767e8c70fc4

Every 20 steps Orbax saves parameters and optimizer state, the guard's counters included, while the
training goes on. The second command kills the last process with SIGKILL before step 250 (with
`--kill-process 0` the coordinator, which the others depend on). The others
fail in their next sum; the script stops who is left, and says who died, what the others said, and
which checkpoint is complete. The third command goes on from there and ends with the digests of the
first, bit for bit. Another number of processes can resume, too; its sums round differently.

On a cluster nothing starts the others: each host calls `jax.distributed.initialize()`, then trains.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

import _demo
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from mlp_digits import MLP
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import optax_guard as og

BATCH_SIZE = 64  # over all processes
HEARTBEAT_SECONDS = 10  # a process that is silent for so long counts as dead
GRACE_SECONDS = 5  # for the others to end by themselves after one has died
PATIENCE_SECONDS = 120  # without a sign of life of any process
HERE = Path(__file__).parent


class Outcome(NamedTuple):
    """How one process ended."""

    resumed_from: int | None  # step of the checkpoint
    skipped: int
    last_fault_step: int  # from 1; 0: none
    accuracy: float  # percent
    params_digest: str
    state_digest: str  # of the optimizer state, the guard's counters included


class Results(NamedTuple):
    """What :func:`main` returns."""

    outcomes: list[Outcome]  # one for each process
    figure: Path


# One process


class TrainState(NamedTuple):
    """All that a checkpoint has to hold; the step is its name."""

    params: Any
    opt_state: Any


def batch_of_step(data: _demo.Dataset, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a step, the same whoever asks, and after a restart."""
    steps_per_epoch = len(data.train_labels) // BATCH_SIZE
    epoch, position = divmod(step, steps_per_epoch)
    order = np.random.default_rng(epoch).permutation(len(data.train_labels))
    rows = order[position * BATCH_SIZE :][:BATCH_SIZE]
    return data.train_images[rows], data.train_labels[rows]


def part_of_process(batch: Sequence[np.ndarray], has_fault: bool) -> list[np.ndarray]:
    """The rows of a batch that this process holds, one pixel NaN if it ``has_fault``."""
    size = BATCH_SIZE // jax.process_count()
    begin = jax.process_index() * size
    images, labels = (array[begin : begin + size] for array in batch)
    if has_fault:
        images[0, images.shape[1] // 2] = np.nan
    return [images, labels]


def make_train_step(graphdef: Any, tx: optax.GradientTransformationExtraArgs) -> Any:
    """Knows nothing of processes: for the mean over a sharded batch ``jit`` sums over them."""

    @jax.jit
    def train_step(state, images, labels):
        def loss_fn(params):
            logits = nnx.merge(graphdef, params)(images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params, value=loss)
        return TrainState(optax.apply_updates(state.params, updates), opt_state), loss

    return train_step


def train(args: argparse.Namespace, tell: Any) -> Outcome:
    """Trains in this process, together with all others; ``tell`` takes the steps done."""
    mesh = Mesh(jax.devices(), ("data",))  # of all processes
    replicated = NamedSharding(mesh, PartitionSpec())
    sharded = NamedSharding(mesh, PartitionSpec("data"))
    is_last = jax.process_index() == jax.process_count() - 1
    data = _demo.load_digits()
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: MLP(64, rngs=nnx.Rngs(0))))
    tx = og.stabilize(optax.adam(3e-3))

    def init():
        params = nnx.state(MLP(64, rngs=nnx.Rngs(0)), nnx.Param)
        return TrainState(params, tx.init(params))

    state = jax.jit(init, out_shardings=replicated)()
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    folder = checkpoints_of(args).absolute()
    train_step = make_train_step(graphdef, tx)
    manager = ocp.CheckpointManager(folder, options=options)
    resumed_from = manager.latest_step() if args.resume else None
    if resumed_from is not None:
        state = manager.restore(resumed_from, args=ocp.args.StandardRestore(state))
    with og.History(args.run_dir / "history.jsonl", params=state.params) as history:
        for step in range(resumed_from or 0, args.steps):
            if step == args.kill_step and jax.process_index() == args.kill_process:
                os.kill(os.getpid(), signal.SIGKILL)
            batch = part_of_process(batch_of_step(data, step), is_last and step == args.fault_step)
            parts = (jax.make_array_from_process_local_data(sharded, part) for part in batch)
            state, loss = train_step(state, *parts)
            history.append(step, state.opt_state, loss=loss)  # process 0 writes, the others do not
            if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
                og.check(state.opt_state, state.params)  # a run beyond help saves nothing
                manager.save(step + 1, args=ocp.args.StandardSave(state))  # goes on behind
            tell(step + 1)
        history.plot(args.out)
    manager.close()  # not after an error: it waits for all processes
    return judge(state, graphdef, data, resumed_from)


def judge(state: TrainState, graphdef: Any, data: _demo.Dataset, resumed: int | None) -> Outcome:
    """What this process ended with, from its own copy of all arrays."""
    params, opt_state = jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0)), state)
    logits = nnx.merge(graphdef, jax.tree.map(jnp.asarray, params))(data.test_images)
    accuracy = 100 * np.mean(logits.argmax(axis=-1) == data.test_labels)
    metrics = og.metrics(opt_state)
    skipped = int(metrics["guard/skipped_total"])
    last_fault = int(metrics["guard/last_fault_step"])
    digests = digest(params), digest(opt_state)
    return Outcome(resumed, skipped, last_fault, float(accuracy), *digests)


def digest(tree: Any) -> str:
    """Equal if every bit of every array is."""
    content = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        content.update(leaf.tobytes())
    return content.hexdigest()[:12]


def work(args: argparse.Namespace, process: int, address: str, channel: connection.Connection):
    """The whole life of a process. What it prints goes to a file of its own."""
    log = os.open(log_of(args, process), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 1)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            address,
            args.processes,
            process,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            initialization_timeout=PATIENCE_SECONDS,
        )
        channel.send(train(args, channel.send))
        jax.distributed.shutdown()
    except BaseException as error:
        traceback.print_exc()
        # Last, because JAX ends its tracebacks with advice of its own.
        first_line = f"{error}".partition("\n")[0]
        print(f"{type(error).__name__}: {first_line}", file=sys.stderr, flush=True)
        os._exit(1)  # an orderly exit waits for all processes, and one may be dead


# The process that starts the others


class Worker(NamedTuple):
    process: Any
    channel: connection.Connection


class WorkerDied(Exception):
    """A process ended before its work was done."""


def start_workers(args: argparse.Namespace) -> list[Worker]:
    context = multiprocessing.get_context("spawn")  # JAX does not survive a fork
    with socket.create_server(("localhost", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"  # free, a moment ago
    workers = []
    for index in range(args.processes):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(args, index, address, sender), daemon=True)
        process.start()
        sender.close()  # only the process itself holds it now: its death closes the channel
        workers.append(Worker(process, receiver))
    return workers


def watch(workers: list[Worker], args: argparse.Namespace, console: Console) -> list[Outcome]:
    """Waits for all outcomes.

    Raises:
      WorkerDied: if a process ends without one, or none says anything for long.
    """
    outcomes: dict[int, Outcome] = {}
    steps = [0] * len(workers)
    open_channels = {worker.channel: index for index, worker in enumerate(workers)}
    with Progress(console=console) as progress:
        task = progress.add_task("Training", total=args.steps)
        while open_channels:
            ready = connection.wait(list(open_channels), PATIENCE_SECONDS)
            if not ready:
                raise WorkerDied(f"No process has made a step for {PATIENCE_SECONDS} seconds.")
            for channel in ready:
                index = open_channels[channel]
                try:
                    message = channel.recv()
                except EOFError:
                    del open_channels[channel]
                    if index not in outcomes:
                        raise WorkerDied(tell_end(workers, index, args, steps[index])) from None
                    continue
                if isinstance(message, Outcome):
                    outcomes[index] = message
                else:
                    steps[index] = message
                    progress.update(task, completed=min(steps))
    return [outcomes[index] for index in range(len(workers))]


def tell_end(workers: list[Worker], first: int, args: argparse.Namespace, step: int) -> str:
    """How a process died, and what became of the others."""
    deadline = time.monotonic() + GRACE_SECONDS
    for worker in workers:
        worker.process.join(max(0, deadline - time.monotonic()))
    end = how_it_ended(workers, first, args)
    lines = [f"Process {first} of {len(workers)} {end}, after step {step}."]
    for index in range(len(workers)):
        if index != first:
            lines.append(f"Process {index} then {how_it_ended(workers, index, args)}.")
    return "\n".join(lines)


def how_it_ended(workers: list[Worker], index: int, args: argparse.Namespace) -> str:
    process = workers[index].process
    if process.exitcode is None:
        return "had to be stopped"
    if process.exitcode < 0:
        return f"was killed by {signal.Signals(-process.exitcode).name}"
    return f"ended with exit code {process.exitcode} ({last_line(log_of(args, index))})"


def last_line(path: Path) -> str:
    """The error; of a long one the end, where JAX has the cause."""
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    if not lines:
        return f"see {path}"
    return lines[-1] if len(lines[-1]) <= 160 else f"... {lines[-1][-150:]}"


def stop(workers: list[Worker]) -> None:
    for ask in ("terminate", "kill"):
        for worker in workers:
            if worker.process.is_alive():
                getattr(worker.process, ask)()
        for worker in workers:
            worker.process.join(GRACE_SECONDS)


def launch(args: argparse.Namespace, console: Console) -> list[Outcome]:
    workers = start_workers(args)
    try:
        return watch(workers, args, console)
    except WorkerDied as death:
        stop(workers)
        sys.exit(f"{death}\n{how_to_resume(args)}")
    finally:
        stop(workers)


def how_to_resume(args: argparse.Namespace) -> str:
    steps = saved_steps(args)
    if not steps:
        return f"No checkpoint was complete; start again. Logs: {args.run_dir}"
    command = f"python examples/data_parallel.py --resume --run-dir {args.run_dir}"
    for name in ("processes", "steps", "save_every", "fault_step"):
        command += f" --{name.replace('_', '-')} {getattr(args, name)}"
    return f"The checkpoint of step {max(steps)} is complete. To go on from there:\n  {command}"


def saved_steps(args: argparse.Namespace) -> list[int]:
    folder = checkpoints_of(args)
    return list(ocp.utils.checkpoint_steps(folder)) if folder.is_dir() else []


def checkpoints_of(args: argparse.Namespace) -> Path:
    return args.run_dir / "checkpoints"


def log_of(args: argparse.Namespace, process: int) -> Path:
    return args.run_dir / f"process{process}.log"


def make_table(outcomes: list[Outcome]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    for head in ("process", "resumed", "skipped", "last fault", "accuracy"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("parameters", no_wrap=True)
    table.add_column("optimizer state", no_wrap=True)
    for index, (resumed, skipped, fault, accuracy, *digests) in enumerate(outcomes):
        counts = ("-" if resumed is None else str(resumed), str(skipped), str(fault or "-"))
        table.add_row(str(index), *counts, f"{accuracy:.1f} %", *digests)
    return table


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="60 steps instead of 300")
    add("--processes", type=int, default=2, help=f"how many; divides {BATCH_SIZE}")
    add("--steps", type=int)
    add("--save-every", type=int, default=20, help="steps between two checkpoints")
    add("--fault-step", type=int, default=25, help="NaN pixel in the last process; -1: never")
    add("--kill-step", type=int, default=-1, help="SIGKILL for one process; -1: never")
    add("--kill-process", type=int, help="default: the last; 0 is the coordinator of all")
    add("--resume", action="store_true", help="from the last checkpoint in --run-dir")
    add(
        "--run-dir",
        type=Path,
        default=HERE / "outputs" / "data_parallel",
        help="its folder `checkpoints` is emptied without --resume",
    )
    add("--out", type=Path, default=HERE / "figures" / "data_parallel.png")
    args = parser.parse_args(argv)
    args.steps = args.steps or (60 if args.quick else 300)
    args.kill_process = args.processes - 1 if args.kill_process is None else args.kill_process
    if args.processes < 1 or BATCH_SIZE % args.processes:
        parser.error(f"--processes must divide {BATCH_SIZE}, got {args.processes}")
    if args.resume and not saved_steps(args):
        parser.error(f"--resume finds no complete checkpoint in {checkpoints_of(args)}")
    return args


def main(argv: Sequence[str] | None = None) -> Results:
    args = parse(argv)
    args.run_dir.mkdir(parents=True, exist_ok=True)
    if not args.resume:
        shutil.rmtree(checkpoints_of(args), ignore_errors=True)
        (args.run_dir / "history.jsonl").unlink(missing_ok=True)
    console = Console()
    outcomes = launch(args, console)
    console.print(make_table(outcomes))
    if len({outcome[1:] for outcome in outcomes}) > 1:
        sys.exit("The processes have drifted apart: the rows above differ.")
    console.print(f"All processes agree, bit for bit. Figure: {args.out}", soft_wrap=True)
    return Results(outcomes, args.out)


if __name__ == "__main__":
    main()
