"""Every recipe of examples/recipes.md runs as it stands there, and its assertions hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[1] / "examples" / "recipes.md").read_text(encoding="utf-8")
MOST_LINES = 15
RECIPES = {
    title: re.findall(r"^```python\n(.*?)^```$", body, re.M | re.S)
    for title, body in re.findall(r"^#+ ([^\n]+)\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S)
}
NAMES = RECIPES.pop("Recipes")[0]


@pytest.fixture(scope="module")
def shared():
    """What all recipes take for granted."""
    names = {}
    exec(compile(NAMES, "recipes.md", "exec"), names)
    return names


@pytest.mark.parametrize("title", RECIPES)
def test_recipe_runs(title, shared):
    (code,) = RECIPES[title]
    exec(compile(code, f"recipes.md, {title}", "exec"), dict(shared))


@pytest.mark.parametrize("title", RECIPES)
def test_recipe_is_short_and_can_fail(title):
    (code,) = RECIPES[title]
    assert sum(bool(line.strip()) for line in code.splitlines()) <= MOST_LINES
    assert re.search(r"^ *assert ", code, re.M)
    assert len(RECIPES) >= 20
