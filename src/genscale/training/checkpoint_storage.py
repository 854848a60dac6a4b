"""How torch's distributed checkpoint (DCP) plans, and how its tensors lie on the disk, without a pickle anywhere.

DCP knows which rank holds which part of a sharded tensor and which parts another layout needs. Its own file formats
pickle (``FileSystemWriter``) or lack 0-dimensional tensors (``HuggingFaceStorageWriter``, torch 2.13), so the storage
is ours: each rank writes one safetensors file, and ``index.json`` says where the chunks of each tensor lie.

Staging is ours too. Every chunk is copied once into a CPU buffer that is kept for the next save; the copy is all that
training waits for. A tensor that several ranks hold alike is staged and written by one of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import DefaultSavePlanner, StorageReader, StorageWriter
from torch.distributed.checkpoint.default_planner import create_default_local_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import find_tensor_shard
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.futures import Future

from genscale.runtime.randomness import key
from genscale.training.tensor_file import DTYPES, DamagedFile, Extent, read, write

_TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


def _written_here(tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """The tensors of which this rank writes its part.

    A plain tensor is alike on all ranks that have one of its name: the largest go first, each to the rank with the
    least to write so far. A DTensor is alike along the replicated dimensions of its mesh: of each, one index writes,
    chosen by the tensor's name.
    """
    if group is None:
        return tensors
    plain = {name: tensor.nbytes for name, tensor in tensors.items() if not isinstance(tensor, DTensor)}
    of_rank: list[dict[str, int]] = [{} for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(of_rank, plain, group=group)
    holders: dict[str, list[int]] = {}
    for rank, names in enumerate(of_rank):
        for name in names:
            holders.setdefault(name, []).append(rank)
    load = [0] * len(of_rank)
    writers = {}
    for name in sorted(holders, key=lambda name: (-of_rank[holders[name][0]][name], name)):
        writers[name] = min(holders[name], key=load.__getitem__)
        load[writers[name]] += of_rank[writers[name]][name] + 1
    here = {name: tensors[name] for name in plain if writers[name] == dist.get_rank(group)}
    for name, tensor in tensors.items():
        if not isinstance(tensor, DTensor):
            continue
        if any(isinstance(placement, Partial) for placement in tensor.placements):
            raise ValueError(f"'{name}' is a partial sum; reduce it before it is saved")
        mesh, coordinate = tensor.device_mesh, tensor.device_mesh.get_coordinate()
        if coordinate is not None and all(
            coordinate[dimension] == key(name) % mesh.size(dimension)
            for dimension, placement in enumerate(tensor.placements)
            if isinstance(placement, Replicate)
        ):
            here[name] = tensor
    return here


class Staging:
    """CPU copies of what this rank writes, in buffers that are kept from one save to the next."""

    def __init__(self) -> None:
        self._buffers: dict[MetadataIndex, Tensor] = {}

    @torch.no_grad()
    def plan(self, tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> Planner:
        """Copy the tensors; when this returns they may change again."""
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES:
                raise TypeError(f"'{name}' is not a tensor of a type that checkpoints hold: {type(tensor)}")
        here = {name: tensor.detach() for name, tensor in _written_here(tensors, group).items()}
        plan = create_default_local_save_plan(here, is_coordinator=group is None or dist.get_rank(group) == 0)
        staged: dict[MetadataIndex, Tensor] = {}
        on_accelerator = False
        for item in plan.items:
            shard = find_tensor_shard(here[item.index.fqn], item.index).detach()
            buffer = self._buffers.get(item.index)
            if buffer is None or buffer.shape != shard.shape or buffer.dtype != shard.dtype:
                pinned = shard.device.type != "cpu"  # the accelerator copies into pinned memory at full speed
                buffer = torch.empty(shard.shape, dtype=shard.dtype, pin_memory=pinned)
            on_accelerator |= shard.device.type != "cpu"
            staged[item.index] = buffer.copy_(shard, non_blocking=True)
        if on_accelerator:
            torch.accelerator.synchronize()
        self._buffers = staged
        return Planner(plan, staged)


class Planner(DefaultSavePlanner):
    """DCP's planner, with the local plan made and its data staged before."""

    def __init__(self, plan: SavePlan, staged: dict[MetadataIndex, Tensor]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._plan = plan
        self._staged = staged

    def create_local_plan(self) -> SavePlan:
        self.plan = self._plan
        return self._plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._staged[index]


Index = dict[str, dict[str, Any]]
"""Plain JSON: tensor name to ``dtype``, ``shape`` and ``chunks``; a chunk has ``file``, ``offsets`` and ``sizes`` in
the tensor, and ``start``, ``bytes`` and ``blake2b`` in the file."""


class Writer(StorageWriter):
    """Writes each rank's chunks to ``rank-NNNNN.safetensors`` in a new folder.

    ``begin`` is called on rank 0 before any rank writes, ``commit`` with the index when all files are on the disk. They
    run inside DCP's steps, so that every rank learns when one fails.
    """

    def __init__(self, folder: Path, rank: int, begin: Callable[[], None], commit: Callable[[Index], None]):
        self.folder = folder
        self._rank = rank
        self._begin = begin
        self._commit = commit

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self._begin()
        self.folder.mkdir(parents=True)
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        file = f"rank-{self._rank:05d}.safetensors"
        chunks: dict[str, Tensor] = {}
        items = {}
        for item in plan.items:
            chunk = cast(Tensor, planner.resolve_data(item))
            offsets = list(item.index.offset or ())
            whole = item.tensor_data is not None and chunk.shape == item.tensor_data.size
            name = item.index.fqn if whole else f"{item.index.fqn}@{','.join(map(str, offsets))}"
            chunks[name] = chunk
            place: dict[str, Any] = {"file": file, "offsets": offsets, "sizes": list(chunk.shape)}
            items[name] = (item, place)
        extents = write(self.folder / file, chunks) if chunks else {}
        results = []
        for name, (item, place) in items.items():
            start, count, checksum = extents[name]
            place |= {"start": start, "bytes": count, "blake2b": checksum}
            results.append(WriteResult(index=item.index, size_in_bytes=count, storage_data=place))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        index: Index = {}
        for name, tensor in metadata.state_dict_metadata.items():
            assert isinstance(tensor, TensorStorageMetadata)
            index[name] = {"dtype": DTYPES[tensor.properties.dtype], "shape": list(tensor.size), "chunks": []}
        for result in (result for of_rank in results for result in of_rank):
            index[result.index.fqn]["chunks"].append(result.storage_data)
        self._commit(index)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def dtype_and_shape(index: Index, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
    return _TORCH_DTYPES[index[name]["dtype"]], tuple(index[name]["shape"])


class Reader(StorageReader):
    """Reads the chunks that this rank needs, checking each one's checksum; raises DamagedFile.

    A chunk is read whole even where a part of it is needed, because its checksum is of the whole.
    """

    def __init__(self, folder: Path, index: Index):
        self.folder = folder
        self._index = index

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def read_metadata(self, *args: Any) -> Metadata:
        tensors: dict[str, Any] = {}
        for name, entry in self._index.items():
            dtype, shape = dtype_and_shape(self._index, name)
            chunks = [
                ChunkStorageMetadata(torch.Size(chunk["offsets"]), torch.Size(chunk["sizes"]))
                for chunk in entry["chunks"]
            ]
            tensors[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), chunks)
        return Metadata(tensors)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        wanted: dict[tuple[str, int, int], tuple[dict[str, Any], torch.dtype, list[ReadItem]]] = {}
        for item in plan.items:
            entry = self._index[item.storage_index.fqn]
            chunk = entry["chunks"][cast(int, item.storage_index.index)]
            where = (chunk["file"], chunk["start"], chunk["bytes"])
            wanted.setdefault(where, (chunk, _TORCH_DTYPES[entry["dtype"]], []))[2].append(item)
        # One buffer for all chunks: memory that is fresh from the system costs more than the reading.
        buffer = torch.empty(max((count for _, _, count in wanted), default=0), dtype=torch.uint8)
        with ExitStack() as stack:
            files: dict[str, int] = {}
            for (file, start, count), (chunk, dtype, items) in sorted(wanted.items(), key=lambda entry: entry[0]):
                if file not in files:
                    files[file] = os.open(self.folder / Path(file).name, os.O_RDONLY | os.O_CLOEXEC)
                    stack.callback(os.close, files[file])
                try:
                    read(files[file], Extent(start, count, chunk["blake2b"]), buffer)
                except DamagedFile as damage:
                    raise DamagedFile(f"{file}, tensor '{items[0].storage_index.fqn}', {damage}") from None
                tensor = buffer[:count].view(dtype).view(chunk["sizes"])
                for item in items:
                    source = narrow_tensor_by_index(tensor, item.storage_offsets, item.lengths)
                    target = planner.resolve_tensor(item).detach()
                    planner.commit_tensor(item, target.copy_(source))
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True
