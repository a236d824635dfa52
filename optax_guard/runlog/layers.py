"""Layers in the order of the network, folded where there are many, and what to call them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from optax_guard.reading.names import network_order, unrolled

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
    titles = unrolled(names)
    groups = _fold([titles[row] for row in rows], most)
    bands: list[tuple[str, tuple[int, ...]]] = []
    for title, places in groups:
        inside = [rows[place] for place in places]
        rest = tuple(row for row in inside if row not in alone)
        bands += [(title, rest)] if len(rest) > 1 else []
        bands += [(names[row], (row,)) for row in inside if row in alone or len(rest) == 1]
    labels = shorten([title for title, _ in bands], longest)
    return [
        Band(label + (f" ({len(inside)})" if len(inside) > 1 else ""), inside)
        for label, (_, inside) in zip(labels, bands, strict=True)
    ]


Groups = list[tuple[str, list[int]]]


def _fold(names: Sequence[str], most: int) -> Groups:
    """Titles and places of neighbours: as deep in the tree as there is room for."""
    parts = [name.split("/") for name in names]
    fitting: Groups = []
    for depth in range(1, max(map(len, parts)) + 1):
        groups: dict[str, list[int]] = {}
        for place, name in enumerate(parts):
            groups.setdefault("/".join(name[:depth]), []).append(place)
        if len(groups) > most:
            # A level with two or three lines for all would say little.
            too_many = list(groups.items())
            return fitting if len(fitting) >= most // 4 else _ranges(too_many, most)
        fitting = list(groups.items())
    return fitting


def _ranges(groups: Groups, most: int) -> Groups:
    """Neighbours joined, as many in each as it takes; of one kind, unless there are many kinds."""
    kinds = [re.sub(r"\d+", "#", title) for title, _ in groups]
    if len(set(kinds)) > most // 2:
        kinds = [""] * len(groups)
    size = -(-len(groups) // most)
    joined: list[Groups] = []
    for place, group in enumerate(groups):
        if place and kinds[place] == kinds[place - 1] and len(joined[-1]) < size:
            joined[-1].append(group)
        else:
            joined.append([group])
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

    What all names begin with is left out; of a name that is still too long, parts without a number
    in which names differ least. Should two labels become the same, both stay long.
    """
    parts = [name.split("/") for name in names]
    while len(parts) > 1 and min(map(len, parts)) > 1 and len({name[0] for name in parts}) == 1:
        parts = [name[1:] for name in parts]
    depth = max(map(len, parts), default=0)
    kinds = [len({name[place] for name in parts if place < len(name)}) for place in range(depth)]
    labels = [_without_middle(name, kinds, longest) for name in parts]
    return [
        "/".join(name) if labels.count(label) > 1 else label
        for name, label in zip(parts, labels, strict=True)
    ]


def _without_middle(parts: Sequence[str], kinds: Sequence[int], longest: int) -> str:
    """Leaves out parts with the fewest ``kinds`` first, of these the longest."""
    kept: list[str | None] = list(parts)
    spare = [place for place, part in enumerate(parts[:-1]) if not re.search(r"\d", part)]
    for place in sorted(spare, key=lambda place: (kinds[place], -len(parts[place]))):
        if len(_joined(kept)) > longest:
            kept[place] = None
    label = _joined(kept)
    if len(label) <= longest:
        return label
    keep = longest - 1
    return label[: keep // 2] + "…" + label[-(keep - keep // 2) :]


def _joined(parts: Sequence[str | None]) -> str:
    """With one ellipsis for what is left out side by side."""
    shown = ["…" if part is None else part for part in parts]
    return "/".join(p for i, p in enumerate(shown) if i == 0 or (p, shown[i - 1]) != ("…", "…"))
