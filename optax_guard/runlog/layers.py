"""Layers in the order of the network, folded where there are many, and what to call them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from optax_guard.reading.names import network_order

_MOST_FAULTY = 8  # that get a line of their own among folded ones


class Band(NamedTuple):
    """One line of the picture.

    Attributes:
      label: what tells it from the others.
      rows: indices of the leaves that it shows.
    """

    label: str
    rows: tuple[int, ...]


def names_for(count: int, leaf_names: Sequence[str]) -> list[str]:
    """The names, if there are as many as leaves; otherwise numbers."""
    return list(leaf_names) if len(leaf_names) == count else [f"leaf {i}" for i in range(count)]


def ordered(names: Sequence[str], rows: Sequence[int]) -> list[int]:
    """Those rows in the order of the network."""
    chosen = set(rows)
    return [row for row in network_order(names).tolist() if row in chosen]


def arrange(
    names: Sequence[str], rows: Sequence[int], faulty: Sequence[int], *, most: int, longest: int
) -> list[Band]:
    """At most about ``most`` lines for all layers.

    Args:
      names: of all leaves.
      rows: the leaves to show.
      faulty: those that were not finite at some time; a few of them are never folded away.
      most: lines that there is room for.
      longest: characters that there is room for in a label.
    """
    rows = ordered(names, rows)
    if len(rows) <= most:
        labels = shorten([names[row] for row in rows], longest)
        return [Band(label, (row,)) for label, row in zip(labels, rows, strict=True)]
    alone = set(faulty) if len(set(faulty)) <= _MOST_FAULTY else set()
    groups = _fold([names[row] for row in rows], most)
    bands: list[tuple[str, tuple[int, ...]]] = []
    for title, places in groups:
        inside = [rows[place] for place in places]
        rest = tuple(row for row in inside if row not in alone)
        bands += [(f"{title} ({len(rest)} arrays)", rest)] if len(rest) > 1 else []
        bands += [(names[row], (row,)) for row in inside if row in alone or len(rest) == 1]
    labels = shorten([title for title, _ in bands], longest)
    return [Band(label, inside) for label, (_, inside) in zip(labels, bands, strict=True)]


def _fold(names: Sequence[str], most: int) -> list[tuple[str, list[int]]]:
    """Titles and places of neighbours: as deep in the tree as there is room for."""
    parts = [name.split("/") for name in names]
    best: list[tuple[str, list[int]]] = []
    for depth in range(1, max(map(len, parts)) + 1):
        groups: dict[str, list[int]] = {}
        for place, name in enumerate(parts):
            groups.setdefault("/".join(name[:depth]), []).append(place)
        best = best if len(groups) > most and best else list(groups.items())
        if len(groups) > most:
            break
    if len(best) <= most and len(best) > 1:
        return best
    return _ranges(best if len(best) > 1 else [(name, [i]) for i, name in enumerate(names)], most)


def _ranges(groups: list[tuple[str, list[int]]], most: int) -> list[tuple[str, list[int]]]:
    """Neighbours joined, as many in each as it takes."""
    size = -(-len(groups) // most)
    joined = [groups[start : start + size] for start in range(0, len(groups), size)]
    return [
        (_span(part[0][0], part[-1][0]), [place for _, places in part for place in places])
        for part in joined
    ]


def _span(first: str, last: str) -> str:
    """``"Dense_0 to 24"`` for names that differ in one number only, else both in full."""
    if first == last:
        return first
    pattern = re.compile(r"\d+")
    numbers = [pattern.findall(name) for name in (first, last)]
    if pattern.sub("#", first) == pattern.sub("#", last):
        differing = [i for i, pair in enumerate(zip(*numbers, strict=True)) if pair[0] != pair[1]]
        if len(differing) == 1:
            place = list(pattern.finditer(first))[differing[0]]
            low, high = (found[differing[0]] for found in numbers)
            return f"{first[: place.start()]}{low}–{high}{first[place.end() :]}"
    return f"{first} to {last}"


def shorten(names: Sequence[str], longest: int) -> list[str]:
    """Labels that keep what tells names apart: numbers, and the ends.

    What all names begin with is left out; of a name that is still too long, parts in the middle
    that hold no number. Should two labels become the same, both stay long.
    """
    parts = [name.split("/") for name in names]
    while len(parts) > 1 and min(map(len, parts)) > 1 and len({name[0] for name in parts}) == 1:
        parts = [name[1:] for name in parts]
    labels = [_without_middle(name, longest) for name in parts]
    return [
        "/".join(name) if labels.count(label) > 1 else label
        for name, label in zip(parts, labels, strict=True)
    ]


def _without_middle(parts: Sequence[str], longest: int) -> str:
    parts = list(parts)
    while len("/".join(parts)) > longest:
        tells = [bool(re.search(r"\d", part)) or part == "…" for part in parts]
        spare = [place for place in range(len(parts) - 1) if not tells[place]]
        if not spare:
            break
        parts[max(spare, key=lambda place: len(parts[place]))] = "…"
        parts = [p for i, p in enumerate(parts) if p != "…" or i == 0 or parts[i - 1] != "…"]
    label = "/".join(parts)
    if len(label) <= longest:
        return label
    keep = longest - 1
    return label[: keep // 2] + "…" + label[-(keep - keep // 2) :]
