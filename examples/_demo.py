"""What the example scripts share: data, colours, and the saving of a figure."""

from __future__ import annotations

import contextlib
import gzip
import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

# Okabe & Ito's palette: told apart with every common form of colour blindness.
ORANGE, SKY, GREEN, BLUE = "#E69F00", "#56B4E9", "#009E73", "#0072B2"
VERMILION, PURPLE, GREY = "#D55E00", "#CC79A7", "#6B6B6B"

_STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
}


class Dataset(NamedTuple):
    """Images as float32 ``[number, pixels]`` in [0, 1], labels as int32 ``[number]``."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load_digits() -> Dataset:
    """The 1797 digits of 8x8 pixels that scikit-learn brings along: 1437 to train, 360 to test."""
    from sklearn import datasets

    images, labels = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images = (images[order] / 16).astype(np.float32)
    labels = labels[order].astype(np.int32)
    return Dataset(images[:1437], labels[:1437], images[1437:], labels[1437:])


def load_idx_folder(folder: str | Path) -> Dataset:
    """MNIST, Fashion-MNIST or another data set in the same four IDX files, gzipped or not."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"--data must name a folder with IDX files; {folder} is none.")
    parts = []
    for split in ("train", "t10k"):
        images = read_idx(_find(folder, split, "images-idx3-ubyte"), rank=3)
        labels = read_idx(_find(folder, split, "labels-idx1-ubyte"), rank=1)
        if len(images) != len(labels):
            raise ValueError(
                f"{folder} holds {len(images)} {split} images but {len(labels)} {split} labels; "
                "take all four files from the same data set."
            )
        pixels = images.reshape(len(images), math.prod(images.shape[1:]))
        parts += [pixels.astype(np.float32) / 255, labels.astype(np.int32)]
    return Dataset(*parts)


def _find(folder: Path, split: str, kind: str) -> Path:
    """The file under any of the names in which these data sets are handed round."""
    plain = f"{split}-{kind}"
    candidates = [plain, f"{plain}.gz", plain.replace("-idx", ".idx")]
    for name in candidates:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder} holds none of {', '.join(candidates)}.")


def read_idx(path: str | Path, *, rank: int) -> np.ndarray:
    """Reads an IDX file of unsigned bytes with ``rank`` dimensions.

    The format: two zero bytes, the type (8 for unsigned bytes), the rank, the sizes as big-endian
    32-bit integers, then the elements.
    """
    path = Path(path)
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path} is a damaged gzip file: {error}") from error
    header = 4 + 4 * rank
    if len(content) < header or content[:3] != b"\x00\x00\x08" or content[3] != rank:
        raise ValueError(
            f"{path} is no IDX file of unsigned bytes with {rank} dimension(s): it begins with "
            f"{content[:4].hex(' ') or 'nothing'}, expected 00 00 08 {rank:02x}."
        )
    sizes = struct.unpack(f">{rank}I", content[4:header])
    expected = math.prod(sizes)
    if len(content) - header != expected:
        raise ValueError(
            f"{path} promises {expected} bytes ({' x '.join(map(str, sizes))}) but holds "
            f"{len(content) - header}; copy it again."
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(sizes)


@contextlib.contextmanager
def figure_at(path: str | Path, width: float, height: float) -> Iterator[Figure]:
    """Gives a figure to draw on, and writes it to ``path`` as a PNG; sizes are in inches."""
    path = Path(path)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        # No version of matplotlib inside, so that the same figure gives the same file.
        figure.savefig(path, dpi=125, metadata={"Software": None})
