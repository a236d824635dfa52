"""Two processes of one training run: the same verdict in both, the death of one, and a restart."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import optax_guard as og

SCRIPT = Path(__file__).parents[1] / "examples" / "data_parallel.py"
sys.path.append(str(SCRIPT.parent))  # as `python examples/...` has it

import data_parallel  # noqa: E402

STEPS, SAVE_EVERY, FAULT_STEP, KILL_STEP = 36, 12, 8, 30
OPTIONS = {"steps": STEPS, "save-every": SAVE_EVERY, "fault-step": FAULT_STEP, "processes": 2}
# Many times what a run takes on two cores: a process that waits for ever is found, a busy machine
# is not taken for one. After a death the script itself waits for the others for a few seconds.
TIME_LIMIT = 200


def run(folder, *more):
    """The script with a folder of its own, in an environment without the tests' devices."""
    words = [word for name, value in OPTIONS.items() for word in (f"--{name}", str(value))]
    words += ["--run-dir", str(folder), "--out", str(folder / "run.png"), *more]
    environment = {name: text for name, text in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *words],
        env=environment | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,
    )


def rows_of(done):
    """One dict for each process, from the printed table."""
    assert done.returncode == 0, done.stdout + done.stderr
    pattern = (
        r"^ *(?P<process>\d+) +(?P<resumed>\d+|-) +(?P<skipped>\d+) +(?P<last_fault>\d+|-)"
        r" +(?P<accuracy>[\d.]+) % +(?P<params>[0-9a-f]{12}) +(?P<opt_state>[0-9a-f]{12})"
    )
    rows = [match.groupdict() for match in re.finditer(pattern, done.stdout, re.MULTILINE)]
    assert [row.pop("process") for row in rows] == ["0", "1"], done.stdout
    return rows


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Folder and table of a run with a NaN in one process, and nothing else."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return folder, rows_of(run(folder))


def test_a_nan_in_one_process_is_skipped_by_both_and_they_stay_identical(uninterrupted):
    folder, rows = uninterrupted
    assert rows[0] == rows[1]
    assert rows[0]["skipped"] == "1"
    assert rows[0]["last_fault"] == str(FAULT_STEP + 1)  # counted from 1
    assert float(rows[0]["accuracy"]) > 70
    history = og.History.load(folder / "history.jsonl")
    assert len(history) == STEPS  # written once, by process 0
    skipped = history.series("guard/last_step_skipped")
    assert [step for step in range(STEPS) if skipped[step]] == [FAULT_STEP]
    assert (folder / "run.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"24", "36"}


@pytest.mark.parametrize(
    "victim",
    [pytest.param(1, marks=pytest.mark.slow), pytest.param(0, marks=pytest.mark.by_hand)],
)
def test_a_killed_process_ends_the_run_with_a_clear_error_and_a_restart_with_the_same_bits(
    uninterrupted, tmp_path, victim
):
    killed = run(tmp_path, "--kill-step", str(KILL_STEP), "--kill-process", str(victim))
    assert killed.returncode == 1, killed.stdout + killed.stderr
    message = killed.stderr.replace("\n", " ")
    assert f"Process {victim} of 2 was killed by SIGKILL, after step {KILL_STEP}." in message
    end = r"(ended with exit code 1|had to be stopped|was killed by SIGABRT)"  # JAX may abort
    assert re.search(f"Process {1 - victim} then {end}", message)
    # The save of step 24 went on behind when the process died; that of step 12 was complete.
    complete = re.search(r"The checkpoint of step (12|24) is complete", message)
    assert complete and "--resume" in message and str(tmp_path) in message
    assert "Traceback" not in message

    resumed = rows_of(run(tmp_path, "--resume"))
    assert [row.pop("resumed") for row in resumed] == [complete[1]] * 2
    expected = [row | {} for row in uninterrupted[1]]
    assert [row.pop("resumed") for row in expected] == ["-"] * 2
    assert resumed == expected
    history = og.History.load(tmp_path / "history.jsonl")
    assert [row["step"] for row in history.records] == list(range(STEPS))


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--resume"], r"--resume finds no complete checkpoint in .*checkpoints"),
        (["--processes", "3"], "--processes must divide 64, got 3"),
    ],
)
def test_what_cannot_work_is_refused_before_a_process_starts(argv, expected, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_info:
        data_parallel.main(["--run-dir", str(tmp_path), *argv])
    assert exit_info.value.code == 2
    assert re.search(expected, " ".join(capsys.readouterr().err.split()))


def test_the_script_tells_its_options_and_how_to_run_it(capsys):
    with pytest.raises(SystemExit) as exit_info:
        data_parallel.main(["--help"])
    assert exit_info.value.code == 0
    assert "--kill-step" in capsys.readouterr().out
    assert "python examples/data_parallel.py" in data_parallel.__doc__
