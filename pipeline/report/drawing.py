"""Writes plots to files, complete or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from bluelm.errors import InputError
from bluelm.system.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@contextmanager
def drawing(path: Path, *, xlabel: str, ylabel: str) -> Iterator[Axes]:
    """Axes to draw on; the file appears when the block ends. The same drawing gives the same bytes.

    Raises:
        InputError: the file's ending is not a supported image format.
    """
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    kind = path.suffix.lstrip(".").lower()
    known = figure.canvas.get_supported_filetypes()
    if kind not in known:
        raise InputError(
            f"{path.name!r} is not a supported image format", fix=f"end it in .{', .'.join(sorted(known))}"
        )
    axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
    yield axes
    axes.grid(alpha=0.3)
    undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "ps": {"CreationDate": None}}
    with matplotlib.rc_context({"svg.hashsalt": "bluelm-export"}), atomic_file(path) as temporary:
        figure.savefig(temporary, format=kind, metadata=undated.get(kind))
