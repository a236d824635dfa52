"""``python -m optax_guard``: what it prints and draws, and what it says when it cannot.

Covered: summary and picture, their places, exit status, a missing, empty, broken and torn file,
a folder, a missing matplotlib, the module as a process, output cut off, the page, the live view.
"""

from __future__ import annotations

import base64
import io
import math
import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import pytest
from rich.console import Console

import optax_guard as og
from optax_guard.__main__ import main
from optax_guard.runlog.watch import sparkline, watch


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


def run(*argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "optax_guard", *argv]
    root = Path(__file__).parents[1]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run(command, cwd=root, text=True, check=False, **options)


def test_the_module_runs_as_a_process(path, tmp_path):
    good = run(str(path), "--no-plot")
    assert (good.returncode, good.stderr) == (0, "")
    assert "skipped: 1 of 4 steps" in good.stdout
    bad = run(str(tmp_path / "none.jsonl"))
    assert (bad.returncode, bad.stdout) == (2, "")
    assert "Traceback" not in bad.stderr and "none.jsonl" in bad.stderr
    assert run().returncode == 2  # of argparse


def test_a_reader_that_goes_away_is_no_error_and_the_picture_is_made(path):
    reader, writer = os.pipe()
    os.close(reader)  # as `| head` does once it has its lines
    cut_off = run(str(path), stdout=writer)
    os.close(writer)
    assert (cut_off.returncode, cut_off.stderr) == (0, "")
    assert path.with_suffix(".png").exists()


class Page(HTMLParser):
    """What a page shows, and what it loads."""

    def __init__(self, text: str):
        super().__init__()
        self.sources: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.words += data


def test_report_is_one_page_with_words_tables_and_picture(path, tmp_path, capsys):
    target = tmp_path / "deep" / "report.html"
    assert main([str(path), "--html", str(target)]) == 0
    assert capsys.readouterr().out.endswith(f"\nReport: {target}\n")
    page = Page(target.read_text())
    for words in ("run.jsonl", "4 records, steps 0 to 3", "skipped: 1 of 4 steps", "not finite"):
        assert words in page.words
    (source,) = page.sources  # nothing from elsewhere
    kind, _, content = source.partition(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(content, validate=True).startswith(b"\x89PNG")


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_a_browser_without_a_network_shows_the_page(path, tmp_path):
    target = og.History.load(path).report(tmp_path / "report.html")
    options = ("headless", "no-sandbox", "disable-gpu", "host-resolver-rules=MAP * ~NOTFOUND")
    shot, profile = tmp_path / "page.png", tmp_path / "profile"
    more = (f"user-data-dir={profile}", f"screenshot={shot}", "window-size=900,1200", "dump-dom")
    command = [BROWSER, *(f"--{option}" for option in (*options, *more)), target.as_uri()]
    shown = subprocess.run(command, capture_output=True, timeout=120, check=True, text=True)
    assert "skipped: 1 of 4 steps" in Page(shown.stdout).words
    pixels = plt.imread(shot)[..., :3]
    assert pixels.shape[:2] == (1200, 900)
    is_orange = (pixels[..., 0] > 0.7) & (pixels[..., 1] < 0.5) & (pixels[..., 2] < 0.3)
    assert is_orange.sum() > 20  # the mark of the skipped step is drawn


def test_names_are_text_in_the_page(tmp_path):
    params = {"<script>alert(1)</script>": jnp.ones(2)}
    tx = og.guard(optax.sgd(0.1))
    history = og.History(params=params)
    history.append(0, tx.update(params, tx.init(params))[1])
    text = history.report(tmp_path / "r.html", title="a & b").read_text()
    assert "<script>" not in text and "&lt;script&gt;" in text and "a &amp; b" in text


def watched(path: Path, **options: Any) -> str:
    text = io.StringIO()
    console = Console(file=text, width=100, force_terminal=False)
    watch(path, seconds=0.0, console=console, frames=1, **options)
    return text.getvalue()


def test_live_view_shows_numbers_events_and_the_worst_layers(path):
    text = watched(path)
    assert "step 3, 4 records" in text
    for words in ("loss", "gradient norm", "clip_by_update_ratio: share cut"):
        assert words in text
    assert "!" in next(line for line in text.splitlines() if line.startswith("gradient norm"))
    assert "step 2: gradients were not finite" in text
    assert "largest layer norms" in text


def test_live_view_waits_for_a_file_and_follows_it(path, tmp_path):
    assert "waiting" in watched(tmp_path / "later.jsonl")
    with og.History(path) as history:
        history.append(4, None, loss=0.125)
        history.flush()
        assert "step 4, 5 records" in watched(path)


def test_live_view_of_what_is_no_history_or_no_folder_is_an_error(tmp_path, capsys):
    (tmp_path / "h.jsonl").write_text("hello\n")
    assert main([str(tmp_path / "h.jsonl"), "--watch"]) == 2
    assert "no history" in capsys.readouterr().err
    assert main([str(tmp_path / "none" / "h.jsonl"), "--watch", "1"]) == 2
    assert "is no folder" in capsys.readouterr().err


def test_live_view_without_rich_names_the_extra(path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.live", None)
    assert main([str(path), "--watch"]) == 1
    assert "pip install 'optax_guard[report]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "bars"),
    [
        ([1.0, 10.0, 100.0], "▁▅█"),
        ([1.0, math.nan, 1.0, math.inf], "▁!▁!"),
        ([-1.0, 0.0, 1.0], "▁▅█"),
        ([math.nan], "!"),
        ([0.0, 0.0], "▁▁"),
    ],
)
def test_course_of_a_number_in_bars(values, bars):
    assert sparkline(np.array(values)) == bars
