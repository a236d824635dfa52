"""Every transformation in every setup; the cells are those of ``setup_matrix.py``."""

from __future__ import annotations

import pytest
import setup_matrix

QUICK = {cell.id for cell in setup_matrix.cells(is_quick=True)}


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(cell, id=cell.id, marks=[pytest.mark.by_hand] * (cell.id not in QUICK))
        for cell in setup_matrix.cells(is_quick=False)
    ],
)
def test_is_right_or_refused_in_words(cell):
    cell.check()
