"""Distances between two sets of points, block after block, so that memory does not grow with their product."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

BLOCK_BYTES = 1 << 26
"""Of a matrix of distances that are held at a time."""


def squared_distances(
    points: NDArray[np.floating], others: NDArray[np.floating]
) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """The matrix of squared Euclidean distances by blocks of rows.

    Args:
        points: (n, d).
        others: (m, d).

    Yields:
        which rows of ``points``, and their (rows, m) squared distances, never negative; the array may be written to.
    """
    # Far from the origin |a|^2 + |b|^2 - 2ab loses the digits that tell close points apart.
    centre = others.mean(0, dtype=np.float64) if len(others) else 0.0
    others = others - centre
    norms = np.einsum("md,md->m", others, others)
    rows = max(1, BLOCK_BYTES // (8 * max(1, len(others))))
    for start in range(0, len(points), rows):
        block = points[start : start + rows] - centre
        squares = block @ others.T
        squares *= -2
        squares += norms
        squares += np.einsum("nd,nd->n", block, block)[:, None]
        yield slice(start, start + len(block)), np.maximum(squares, 0, out=squares)


def squared_radii(points: NDArray[np.floating], neighbour: int) -> NDArray[np.float64]:
    """(n,) the squared distance from each point to its k-th nearest other point.

    Args:
        points: (n, d), more than ``neighbour`` of them.
        neighbour: k, from 1.
    """
    radii = np.empty(len(points))
    for rows, squares in squared_distances(points, points):
        squares[np.arange(len(squares)), np.arange(rows.start, rows.stop)] = np.inf
        radii[rows] = np.partition(squares, neighbour - 1, axis=1)[:, neighbour - 1]
    return radii


def nearest(
    points: NDArray[np.floating], others: Iterable[NDArray[np.floating]], count: int = 1
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The nearest others of each point, where the others come in parts and need never be in memory together.

    Distances are taken anew for those that are found, so that a copy is at exactly 0.

    Returns:
        (n, count) distances, ascending; infinite where there are fewer others.
        (n, count) numbers of the others, counted over all parts; -1 where there are fewer.
    """
    distances = np.full((len(points), count), np.inf)
    numbers = np.full((len(points), count), -1, dtype=np.int64)
    first = 0
    for part in others:
        few = min(count, len(part))
        for rows, squares in squared_distances(points, part):
            found = np.argpartition(squares, few - 1, axis=1)[:, :few] if few < len(part) else _all(squares)
            difference = points[rows, None].astype(np.float64) - part[found]  # (rows, few, d)
            candidates = np.hstack([distances[rows], np.sqrt(np.einsum("nkd,nkd->nk", difference, difference))])
            names = np.hstack([numbers[rows], found + first])
            order = np.argsort(candidates, axis=1, kind="stable")[:, :count]
            distances[rows] = np.take_along_axis(candidates, order, axis=1)
            numbers[rows] = np.take_along_axis(names, order, axis=1)
        first += len(part)
    return distances, numbers


def _all(squares: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.broadcast_to(np.arange(squares.shape[1]), squares.shape)
