"""Fewer bytes for what copies of a model exchange: compressors of summed gradients, and numbers packed into bytes.

A compressor sums one bucket of :class:`genscale.parallel.gradients.GradientSum` over a group. What it rounds away must
not depend on the rank, so that all copies stay alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup
from torch.nn import functional

_BLOCK = 256
"""Numbers that share a scale: it costs an eighth of a bit for each."""


class HalfSum:
    """bfloat16 on the wire, float32 in the sum: half the bytes.

    Each rank sums its part of the bucket from all others' pieces and sends the rounded sum round: as many bytes as a
    ring all-reduce in bfloat16, but every number is rounded twice instead of once for each rank.
    """

    def start(self, bucket: int, flat: Tensor, shapes: list[torch.Size], group: ProcessGroup) -> Callable[[], None]:
        """Begin summing ``flat`` in place; what is returned waits for it."""
        ranks = distributed.get_world_size(group)
        rounded = functional.pad(flat, (0, -len(flat) % ranks)).to(torch.bfloat16)
        received = torch.empty_like(rounded)
        work = distributed.all_to_all_single(received, rounded, group=group, async_op=True)

        def finish() -> None:
            work.wait()
            own = received.view(ranks, -1).float().sum(0).to(torch.bfloat16)
            distributed.all_gather(list(rounded.chunk(ranks)), own, group=group)
            flat.copy_(rounded[: len(flat)])

        return finish

    def state(self) -> dict[str, Tensor]:
        return {}

    def load(self, tensors: dict[str, Tensor]) -> None:
        pass


class _Matrix(NamedTuple):
    """One matrix of a bucket: its name in the state, and its place in the flat buffer."""

    name: str
    start: int
    rows: int
    columns: int

    def of(self, flat: Tensor) -> Tensor:
        return flat[self.start : self.start + self.rows * self.columns].view(self.rows, self.columns)


class PowerSGD:
    """Matrices as products of two thin factors, with error feedback (Vogels et al. 2019, algorithms 1 and 2).

    One step of power iteration from the last step's factor: P = M Q, orthonormal; Q = M^T P; the sum is about P Q^T.
    What a rank's own M loses in that, its error, is added to its next gradient, so that nothing is lost for good. Where
    the factors would not be smaller, and for vectors, the sum is plain.

    The paper means over ranks; here M is the *sum* of the ranks' gradients and errors, to which the factors are linear.
    So only the sum of the errors matters: it is what the state holds, and any number of ranks goes on from it.

    Args:
        rank: columns of the factors.
        start_after_steps: plain sums until then, as the first gradients turn quickly.
        seed: of the first Q, alike on all ranks.
    """

    def __init__(self, rank: int = 4, start_after_steps: int = 0, seed: int = 0):
        self.rank = rank
        self.start_after_steps = start_after_steps
        self._seed = seed
        self._steps: dict[int, int] = {}
        self._factors: dict[str, Tensor] = {}
        self._errors: dict[str, Tensor] = {}
        self._loaded: dict[str, Tensor] = {}
        self._group: ProcessGroup | None = None

    @torch.no_grad()
    def start(self, bucket: int, flat: Tensor, shapes: list[torch.Size], group: ProcessGroup) -> Callable[[], None]:
        """Begin summing ``flat`` in place; what is returned waits for it."""
        self._group = group
        self._steps[bucket] = self._steps.get(bucket, 0) + 1
        matrices = self._matrices(bucket, shapes) if self._steps[bucket] > self.start_after_steps else []
        if not matrices:
            work = distributed.all_reduce(flat, group=group, async_op=True)
            return lambda: work.wait()
        for matrix in matrices:
            self._prepare(matrix, flat, distributed.get_world_size(group))
            matrix.of(flat).add_(self._errors[matrix.name])
        rest = _rest(flat, matrices)
        products = [matrix.of(flat) @ self._factors[matrix.name] for matrix in matrices]
        sent = torch.cat([product.flatten() for product in products] + rest)  # all P, and what is not compressed
        work = distributed.all_reduce(sent, group=group, async_op=True)

        def finish() -> None:
            work.wait()
            self._finish(flat, matrices, sent, rest, group)

        return finish

    @torch.no_grad()
    def _finish(
        self, flat: Tensor, matrices: list[_Matrix], sent: Tensor, rest: list[Tensor], group: ProcessGroup
    ) -> None:
        sizes = [matrix.rows * self.rank for matrix in matrices] + [piece.numel() for piece in rest]
        pieces = sent.split(sizes)
        for own, total in zip(rest, pieces[len(matrices) :], strict=True):
            own.copy_(total)
        bases, factors = [], []
        for matrix, piece in zip(matrices, pieces, strict=False):
            basis = torch.linalg.qr(piece.view(matrix.rows, self.rank)).Q
            factor = matrix.of(flat).mT @ basis
            self._errors[matrix.name] = matrix.of(flat) - basis @ factor.mT
            bases.append(basis)
            factors.append(factor)
        summed = torch.cat([factor.flatten() for factor in factors])
        distributed.all_reduce(summed, group=group)
        for matrix, basis, piece in zip(
            matrices, bases, summed.split([factor.numel() for factor in factors]), strict=True
        ):
            factor = piece.view(matrix.columns, self.rank)
            matrix.of(flat).copy_(basis @ factor.mT)
            # A step with an overflow is skipped by the loop; it must not stay in what is carried on. All ranks see it.
            finite = torch.isfinite(factor).all()
            self._errors[matrix.name] = torch.where(finite, self._errors[matrix.name], 0.0)
            self._factors[matrix.name] = torch.where(finite, factor, self._factors[matrix.name])

    def _matrices(self, bucket: int, shapes: list[torch.Size]) -> list[_Matrix]:
        """Tensors of a bucket that factors make smaller; a kernel is a matrix of output channels by all else."""
        matrices, start = [], 0
        for place, shape in enumerate(shapes):
            size = math.prod(shape)
            if len(shape) >= 2 and size:
                rows, columns = shape[0], size // shape[0]
                if self.rank * (rows + columns) < size:
                    matrices.append(_Matrix(f"{bucket}.{place}.{rows}x{columns}", start, rows, columns))
            start += size
        return matrices

    def _prepare(self, matrix: _Matrix, flat: Tensor, ranks: int) -> None:
        """The first time: what was loaded, else no error and a random factor."""
        name = matrix.name
        if name in self._factors:
            return
        generator = torch.Generator().manual_seed(self._seed)
        random = torch.randn(matrix.columns, self.rank, generator=generator)
        self._factors[name] = self._loaded.pop(f"factor.{name}", random).to(flat)
        error = self._loaded.pop(f"error.{name}", torch.zeros(matrix.rows, matrix.columns))
        self._errors[name] = error.to(flat).div(ranks)

    def state(self) -> dict[str, Tensor]:
        """For the checkpoint, alike on all ranks, which call it together: factors, and the errors' sums."""
        state = dict(self._loaded)
        state |= {f"steps.{bucket}": torch.tensor(steps) for bucket, steps in self._steps.items()}
        for name, error in self._errors.items():
            state[f"factor.{name}"] = self._factors[name].clone()
            state[f"error.{name}"] = total = error.clone()
            distributed.all_reduce(total, group=self._group)
        return state

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over what :meth:`state` gave, on any number of ranks. Of other buckets or shapes nothing is used."""
        self._factors.clear()
        self._errors.clear()
        self._steps = {int(key.split(".")[1]): int(steps) for key, steps in tensors.items() if key.startswith("steps.")}
        self._loaded = {key: tensor.clone() for key, tensor in tensors.items() if not key.startswith("steps.")}


def _rest(flat: Tensor, matrices: list[_Matrix]) -> list[Tensor]:
    """Views of what lies between the matrices."""
    starts = [0, *(matrix.start + matrix.rows * matrix.columns for matrix in matrices)]
    ends = [*(matrix.start for matrix in matrices), len(flat)]
    return [flat[start:end] for start, end in zip(starts, ends, strict=True)]


def packed(flat: Tensor, bits: int) -> Tensor:
    """As bytes: bfloat16 for 16 bits; for 8 and 4, integers from -m to m with a float32 scale for each block."""
    if bits == 16:
        return flat.to(torch.bfloat16).view(torch.uint8)
    largest = 2 ** (bits - 1) - 1
    padded = functional.pad(flat, (0, -len(flat) % _BLOCK))
    blocks = padded.view(len(padded) // _BLOCK, _BLOCK)
    scales = blocks.abs().amax(1, keepdim=True) / largest
    codes = (blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)).round().to(torch.int8).view(torch.uint8)
    if bits == 4:
        codes = (codes[:, ::2] & 15) | (codes[:, 1::2] << 4)
    return torch.cat([scales.flatten().view(torch.uint8), codes.flatten()])


def unpacked(piece: Tensor, bits: int, count: int) -> Tensor:
    """The ``count`` float32 numbers that :func:`packed` made into bytes."""
    if bits == 16:
        return piece.view(torch.bfloat16).float()
    blocks = -(-count // _BLOCK)
    scales, codes = piece[: 4 * blocks].view(torch.float32), piece[4 * blocks :].view(blocks, _BLOCK * bits // 8)
    if bits == 4:
        low, high = (codes << 4).view(torch.int8) >> 4, codes.view(torch.int8) >> 4  # >> keeps the sign
        codes = torch.stack([low, high], -1).flatten(1)
    return (codes.view(torch.int8).float() * scales[:, None]).flatten()[:count]
