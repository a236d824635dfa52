"""What the documents say is what the benchmarks have written, and what they point to is there."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

from benchmarks import _documents, _records, _rule_tables, _sections, summary

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def save(folder: Path, name: str, *, version: str = "0.2.0", **record: object) -> None:
    content = {"versions": {"optax_guard": version}, **record}
    (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize("name", _documents.DOCUMENTS)
def test_document_is_what_the_files_say(name):
    assert _documents.write(read(name), RESULTS) == read(name), (
        "write it anew: python -m benchmarks.summary --write"
    )


@pytest.mark.parametrize("name", _documents.DOCUMENTS)
def test_no_figure_of_a_document_is_written_by_hand(name):
    text = _documents.BLOCK.sub("", read(name))
    for kept in (
        r"^```.*?^```$",
        r"`[^`]*`",
        r"\[[^]]*\]\([^)]*\)",
        r"Python 3\.11|Apache 2\.0|1996",
    ):
        text = re.sub(kept, "", text, flags=re.M | re.S)
    assert re.findall(r"\d+\.\d+|\d+ ?%|\d+ of \d+|\d{3,}", text) == []


def test_readme_can_be_read_in_five_minutes():
    assert len(read("README.md").splitlines()) <= 180


@pytest.mark.parametrize("name", _documents.DOCUMENTS)
def test_what_a_document_points_to_is_there(name):
    links = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", read(name))
    scripts = re.findall(r"(?:python |`)((?:examples|tests|benchmarks)/\w+\.py)", read(name))
    assert links or scripts
    for path in links:
        assert (ROOT / name).parent.joinpath(path).exists(), path
    for path in scripts:
        assert (ROOT / path).is_file(), path


def test_what_an_index_shows_needs_no_file():
    project = tomllib.loads(read("pyproject.toml"))
    shown = read("README.md")
    for each in project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        shown = re.sub(each["pattern"], each["replacement"], shown)
    assert re.findall(r"\]\((?!https:)|!\[|<!--", shown) == []
    assert "More: recipes, examples, evidence" in " ".join(shown.split())
    assert len(shown) > 0.9 * len(read("README.md"))


def test_every_example_and_picture_is_in_the_gallery():
    gallery = read("examples/README.md")
    scripts = [path.name for path in (ROOT / "examples").glob("[!_]*.py")]
    pictures = [path.name for path in (ROOT / "examples" / "figures").glob("*.png")]
    assert len(scripts) >= 9
    assert [name for name in scripts + pictures if name not in gallery] == []


def test_another_figure_in_a_file_changes_the_documents(tmp_path):
    for path in RESULTS.glob("*.json"):
        record = json.loads(path.read_text())
        for row in record.get("rows", []):
            if "ratio" in row:
                row["ratio"] += 1
        for cell in record.get("cells", []):
            if cell["value"] is not None:
                cell["value"] += 1
        (tmp_path / path.name).write_text(json.dumps(record))
    for name in ("README.md", "benchmarks/README.md"):
        changed = _documents.write(read(name), tmp_path)
        assert changed != read(name)
        assert _documents.write(changed, RESULTS) == read(name)


def test_losing_rows_are_shown():
    shown = _sections.evidence(RESULTS)
    cells = _rule_tables.read(RESULTS, "faults")
    assert {cell["rule"] for cell in cells} >= {"none", "spike_skip", "og.stabilize"}
    for cell in cells + _rule_tables.read(RESULTS, "clinic"):
        assert re.search(rf"^\| {re.escape(cell['rule'])} +\|", shown, re.M), cell["rule"]


def test_without_files_only_what_needs_none_is_written(tmp_path):
    assert re.findall("^## .*", _sections.evidence(tmp_path), re.M) == ["## Setups"]
    text = "<!-- begin cost -->\nold\n<!-- end cost -->\n"
    assert _documents.write(text, tmp_path) == "<!-- begin cost -->\n<!-- end cost -->\n"


def test_files_of_a_new_benchmark_get_a_section(tmp_path):
    cells = [
        {"rule": "og.stabilize", "case": "rate 0.1", "value": 2.5, "low": 2.4, "high": 2.6},
        {"rule": "none", "case": "rate 0.1", "value": 2.41},
        {"rule": "og.stabilize", "case": "rate 0.3", "value": None},
        {"rule": "none", "case": "rate 0.3", "value": 3.0, "dead": 1, "seeds": 4},
    ]
    save(tmp_path, "new_cpu.json", benchmark="new", cells=cells)
    more = [{"rule": "none", "case": "rate 1", "value": 9.0}]
    save(tmp_path, "new_rest_cpu.json", benchmark="new", cells=more)
    shown = _sections.evidence(tmp_path)
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert lines.count("## new") == 1
    assert "| case | none | og.stabilize | version |" in lines
    assert "| rate 0.1 | 2.41 | 2.5 (2.4 to 2.6) | 0.2.0 |" in lines
    assert "| rate 0.3 | 3, 1 dead | dead | 0.2.0 |" in lines
    assert "| rate 1 | 9 | - | 0.2.0 |" in lines
    assert "From `new_cpu.json`, `new_rest_cpu.json` (version 0.2.0)." in shown


def test_a_benchmark_is_described_by_its_header(tmp_path):
    cell = {"rule": "none", "case": "a case", "value": 1.0}
    save(tmp_path, "history_cpu.json", benchmark="healthy", cells=[cell])
    shown = _sections.evidence(tmp_path)
    assert "## What does a rule cost a run that needs none?" in shown
    assert "A healthy network learns by plain SGD" in shown


def test_of_two_files_the_newer_version_counts(tmp_path):
    for version, name, value in (("0.2.0", "healthy_z", 1.0), ("0.10.0", "healthy_a", 2.0)):
        cell = {"rule": "clip_by_norm(1)", "case": "digits", "value": value, "se": 0.5}
        save(tmp_path, f"{name}.json", version=version, cells=[cell])
    (cell,) = _rule_tables.read(tmp_path, "healthy")
    assert (cell["rule"], cell["value"], cell["version"]) == ("clip_by_norm", 2.0, "0.10.0")
    assert [each.name for each in _records.records(tmp_path, "healthy")] == [
        "healthy_z.json",
        "healthy_a.json",
    ]


def test_figures_of_two_devices_are_not_mixed(tmp_path):
    row = {"setup": "call, 64-64-10", "variant": "bare", "step_seconds": 1e-6, "ratio": 1.0}
    row |= {"ratio_low": 1.0, "ratio_high": 1.0, "num_state_arrays": 9}
    for platform in ("cpu", "gpu"):
        device = {"platform": platform, "kind": "a chip", "host_cores": 2}
        save(tmp_path, f"call_overhead_{platform}.json", device=device, rows=[row])
    shown = _sections.evidence(tmp_path)
    assert "On cpu:\n\n|" in shown and "On gpu:\n\n|" in shown


def test_fault_matrix_is_summed(tmp_path):
    rows = [
        {"protection": "og.guard", "context": context, "tried": 54, "passed": passed}
        for context, passed in (("plain", 54), ("lookahead", 53))
    ]
    save(tmp_path, "fault_matrix_cpu.json", rows=rows)
    lines = [" ".join(line.split()) for line in _sections.evidence(tmp_path).splitlines()]
    assert "| lookahead | 53 of 54 |" in lines and "| **all** | 107 of 108 |" in lines


def test_markers_must_be_whole_and_known(tmp_path):
    with pytest.raises(ValueError, match="needs its '<!-- end NAME -->'"):
        _documents.write("<!-- begin cost -->\n", tmp_path)
    with pytest.raises(ValueError, match=r"No block is called 'price'; there are .*cost"):
        _documents.write("<!-- begin price -->\n<!-- end price -->", tmp_path)


def test_write_fills_the_documents(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(_documents, "ROOT", tmp_path)
    monkeypatch.setattr(_documents, "DOCUMENTS", ("README.md",))
    (tmp_path / "README.md").write_text("Before\n<!-- begin cost -->\n<!-- end cost -->\nAfter\n")
    summary.main(["--write", "--folder", str(RESULTS)])
    written = (tmp_path / "README.md").read_text()
    assert written.startswith("Before\n<!-- begin cost -->\nAdamW on a transformer's")
    assert written.endswith(" clip.\n<!-- end cost -->\nAfter\n")
    assert "Written: README.md" in capsys.readouterr().out
