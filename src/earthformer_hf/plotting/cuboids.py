"""How cuboid attention cuts a sequence of maps, drawn by the functions that cut it in the model.

Source: Gao et al., "Earthformer", NeurIPS 2022, https://arxiv.org/abs/2207.05833, figure 3 of which draws the same.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..cuboid import DILATED, Cuboid, cuboid_regions, cuboid_reverse, padding_to, roll_grid
from .canvas import add_title, new_figure


if TYPE_CHECKING:
    from matplotlib.figure import Figure


GRID = (6, 4, 4)
DECOMPOSITIONS = {
    "local": Cuboid((3, 2, 2)),
    "dilated": Cuboid((3, 2, 2), DILATED),
    "shifted": Cuboid((3, 2, 2), shift=(1, 1, 1)),
}


def cuboids_of_cells(cuboid: Cuboid, grid: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The cuboid to which each cell of a grid (T, H, W) belongs, and its part.

    Returns:
        Numbers of cuboids, (T, H, W); and numbers of parts of a cuboid, (T, H, W): a shifted grid wraps around, and
        cells of one cuboid that lie at both ends of an axis are different parts, which do not see each other.
    """
    cuboid = cuboid.fit(grid)
    padding = padding_to(grid, cuboid.size)
    total = [n + p for n, p in zip(grid, padding)]
    region = cuboid_regions(grid, padding, cuboid, True, torch.device("cpu"))  # (cuboids, cells of one)
    number = torch.arange(len(region))[:, None].expand_as(region)
    cells = cuboid_reverse(torch.stack([number, region], -1)[None], cuboid, total)
    found = roll_grid(cells, cuboid.shift, 1)[0, : grid[0], : grid[1], : grid[2]].numpy()
    return found[..., 0], found[..., 1]


def plot_cuboids(decompositions: Mapping[str, Cuboid] | None = None, grid: Sequence[int] = GRID) -> "Figure":
    """Which cells attend to each other: a row for each decomposition, a map for each frame.

    Cells of one colour and number are one cuboid. Where a shifted one wraps around, its parts have letters. Lines lie
    between cells that do not see each other.

    Args:
        decompositions: name -> cuboid; local, dilated and shifted ones of 3 x 2 x 2 if omitted.
        grid: frames, rows and columns.

    Raises:
        ValueError: a grid that is not three positive numbers.
    """
    if len(grid) != 3 or min(grid) < 1:
        raise ValueError(f"`grid` must be frames, rows and columns, got {grid!r}.")
    decompositions = DECOMPOSITIONS if decompositions is None else decompositions
    time, height, width = grid
    cell = 0.34
    figure = new_figure((cell * width + 0.25) * time + 1.6, (cell * height + 0.5) * len(decompositions) + 0.8)
    axes = figure.subplots(len(decompositions), time, squeeze=False)
    for line, (name, cuboid) in zip(axes, decompositions.items()):
        number, part = cuboids_of_cells(cuboid, grid)
        labels = _labels(number, part)
        line[0].set_ylabel(f"{name}\n{' x '.join(map(str, cuboid.fit(grid).size))}", fontsize=9)
        for frame, axis in enumerate(line):
            _draw_frame(axis, number[frame], labels[frame], int(number.max()) + 1)
            axis.set_title(f"frame {frame + 1}", fontsize=8)
    add_title(figure, f"Cuboids of {time} frames of {height} x {width}: cells of one label attend to each other")
    return figure


def _labels(number: np.ndarray, part: np.ndarray) -> np.ndarray:
    """The number of each cell's cuboid, from 1, and a letter if it has several parts."""
    labels = (number + 1).astype("<U8")
    for cuboid in np.unique(number):
        parts = np.unique(part[number == cuboid])
        for letter, value in zip("abcdefgh", parts):
            if len(parts) > 1:
                labels[(number == cuboid) & (part == value)] = f"{cuboid + 1}{letter}"
    return labels


def _draw_frame(axis: Any, number: np.ndarray, labels: np.ndarray, count: int) -> None:
    """A frame's cells, coloured and labelled by their cuboids."""
    from matplotlib import colormaps

    colors = colormaps["tab20"] if count > 10 else colormaps["tab10"]
    axis.imshow(colors(number % colors.N), interpolation="nearest", alpha=0.75)
    axis.set(xticks=[], yticks=[])
    for row, column in np.ndindex(number.shape):
        axis.text(column, row, labels[row, column], ha="center", va="center", fontsize=7)
    across, down = np.nonzero(labels[:, 1:] != labels[:, :-1]), np.nonzero(labels[1:] != labels[:-1])
    axis.vlines(across[1] + 0.5, across[0] - 0.5, across[0] + 0.5, color="black", lw=1.2)
    axis.hlines(down[0] + 0.5, down[1] - 0.5, down[1] + 0.5, color="black", lw=1.2)


__all__ = ["DECOMPOSITIONS", "cuboids_of_cells", "plot_cuboids"]
