"""``python -m optax_guard``: what it prints and draws, and what it says when it cannot.

Covered: summary and picture, their places, exit status, a missing, empty, broken and torn file,
a folder, a missing matplotlib, the module as a process.
"""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import optax
import pytest

import optax_guard as og
from optax_guard.__main__ import main


@pytest.fixture
def path(tmp_path) -> Path:
    """A run of four steps, the third of them with NaN."""
    params = {"w": jnp.ones(2)}
    tx = og.stabilize(optax.sgd(0.1))
    state = tx.init(params)
    with og.History(tmp_path / "run.jsonl", params=params) as history:
        for step, size in enumerate((0.1, 3.0, math.nan, 0.1)):
            _, state = tx.update({"w": jnp.full(2, size)}, state, params)
            history.append(step, state, loss=1.0 / (step + 1))
    return tmp_path / "run.jsonl"


def test_command_prints_the_summary_and_draws_beside_the_history(path, capsys):
    assert main([str(path)]) == 0
    output = capsys.readouterr()
    assert output.out.startswith(og.History.load(path).summary())
    assert "skipped: 1 of 4 steps" in output.out
    assert output.out.endswith(f"\nPicture: {path.with_suffix('.png')}\n")
    assert "incomplete" not in output.out
    assert output.err == ""
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_picture_goes_where_it_is_told_or_nowhere(path, tmp_path, capsys):
    assert main([str(path), "--plot", str(tmp_path / "deep" / "own.pdf")]) == 0
    assert (tmp_path / "deep" / "own.pdf").read_bytes().startswith(b"%PDF")
    assert main([str(path), "--no-plot"]) == 0
    assert not path.with_suffix(".png").exists()
    assert "skipped: 1 of 4 steps" in capsys.readouterr().out


def test_torn_last_line_is_left_out_and_said(path, capsys):
    path.write_bytes(path.read_bytes()[:-20])
    assert main([str(path)]) == 0
    output = capsys.readouterr().out
    assert output.startswith("3 records, steps 0 to 2")
    assert "The last line is incomplete (the run was killed in it) and was left out." in output


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file or directory"),
        (b"", "holds no record"),
        (b'{"step": 1, "gua', "holds no record"),
        (b"a,b\n1,2\n", "line 1 is not a record"),
        (b'{"step": 0}\n{"st\n{"step": 2}\n', "line 2 is not a record"),
        (b"\x89PNG\r\n\x1a\n", "line 1 is not a record"),
    ],
)
def test_missing_empty_or_broken_file_is_one_line_of_error_and_status_2(
    tmp_path, capsys, content, words
):
    path = tmp_path / "h.jsonl"
    if content is not None:
        path.write_bytes(content)
    assert main([str(path)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("python -m optax_guard: ") and output.err.count("\n") == 1
    assert words in output.err and str(path) in output.err
    assert not path.with_suffix(".png").exists()


def test_folder_is_an_error_of_status_2(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "Is a directory" in capsys.readouterr().err


def test_without_matplotlib_the_summary_is_printed_and_the_extra_named(path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([str(path)]) == 1
    output = capsys.readouterr()
    assert "skipped: 1 of 4 steps" in output.out
    assert "pip install 'optax_guard[report]'" in output.err


def test_picture_of_an_unknown_kind_is_an_error_of_status_1(path, tmp_path, capsys):
    assert main([str(path), "--plot", str(tmp_path / "picture.xyz")]) == 1
    assert "xyz" in capsys.readouterr().err


def test_the_module_runs_as_a_process(path, tmp_path):
    def run(*argv):
        command = [sys.executable, "-m", "optax_guard", *argv]
        root = Path(__file__).parents[1]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)

    good = run(str(path), "--no-plot")
    assert (good.returncode, good.stderr) == (0, "")
    assert "skipped: 1 of 4 steps" in good.stdout
    bad = run(str(tmp_path / "none.jsonl"))
    assert (bad.returncode, bad.stdout) == (2, "")
    assert "Traceback" not in bad.stderr and "none.jsonl" in bad.stderr
    assert run().returncode == 2  # of argparse
