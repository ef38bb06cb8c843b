"""Weights sharded across processes, and checkpoints to which each process writes its shard.

Such a checkpoint is a PyTorch distributed checkpoint folder, plus Lightning's own part and checksums:

step-000500.ckpt  .metadata  __0_0.distcp  __1_0.distcp  …  meta.pt  checksums.json
"""

import io
import json
import os
import pickle
import warnings
import zlib
from datetime import timedelta
from pathlib import Path, PurePath
from typing import Any, Literal

import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from experiment.compat.lightning import set_data_parallel_size
from experiment.renamed import current_checkpoint
from experiment.sources.paths import remove
from experiment.startup import give_back_large_blocks

Part = Literal["all", "weights", "outline"]
CHECKSUMS, META = "checksums.json", "meta.pt"
RECORDS = {  # the classes in .metadata besides plain values
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    ),
}  # fmt: skip


class FullyShardedStrategy(ModelParallelStrategy):
    """PyTorch's fully_shard over all processes: each holds a shard of every weight, gradient and optimizer state."""

    def __init__(
        self,
        save_distributed_checkpoint: bool = True,
        timeout: timedelta = timedelta(minutes=30),
        process_group_backend: str | None = None,
    ) -> None:
        """
        Args:
            save_distributed_checkpoint: A checkpoint is a folder to which each process writes its shard; false gathers
                everything in one process, which needs the memory for it, and writes one file.
            timeout: How long a process waits for another before it reports where.
            process_group_backend: Of torch.distributed; by default NCCL on GPUs and gloo elsewhere.
        """
        super().__init__(1, 1, save_distributed_checkpoint, process_group_backend, timeout)
        self.writes_folders = save_distributed_checkpoint

    def setup_environment(self) -> None:
        if self.root_device.type == "cpu":
            give_back_large_blocks()
        set_data_parallel_size(self, self.num_processes * self.num_nodes)
        super().setup_environment()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        super().save_checkpoint(checkpoint, filepath, storage_options)
        if self.writes_folders:
            _seal(Path(filepath), self.global_rank, self.world_size)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        folder = Path(checkpoint_path)
        if not folder.is_dir():
            return super().load_checkpoint(checkpoint_path, weights_only)
        state: dict[str, Any] = {"state_dict": get_model_state_dict(self.model)}
        dcp.load(state, storage_reader=_Reader(folder), planner=_Planner())
        self.model.load_state_dict(state["state_dict"], strict=self.lightning_module.strict_loading)
        for number, optimizer in enumerate(self.optimizers):
            key = f"optimizer_{number}"
            state = {key: get_optimizer_state_dict(self.model, optimizer)}
            dcp.load(state, storage_reader=_Reader(folder), planner=_Planner())
            set_optimizer_state_dict(self.model, optimizer, optim_state_dict=state[key])
        return _lightnings_part(folder)


def is_sharded(path: Path) -> bool:
    """Whether a folder is a completely written checkpoint."""
    return (path / CHECKSUMS).is_file()


def put_folder(partial: Path, file: Path, step: int) -> None:
    """Give a folder its name. A reusable name is a link, since a folder cannot replace another
    atomically."""
    if file.name.startswith("step-"):
        remove(file)
        partial.rename(file)
        return
    folder = file.with_name(f"{file.stem}-{step:06d}{file.suffix}")
    remove(folder)
    partial.rename(folder)
    if file.is_dir() and not file.is_symlink():  # in a copy that has lost the links
        remove(file)
    partial.symlink_to(folder.name)
    partial.replace(file)
    for old in set(file.parent.glob(f"{file.stem}-*{file.suffix}")) - {folder}:
        if old.is_dir() and is_sharded(old):
            remove(old)


def verify(folder: Path) -> None:
    """Check that a sharded checkpoint is undamaged.

    Raises:
        ValueError: A file is missing or damaged.
        OSError: A file cannot be read.
    """
    for name, written in json.loads((folder / CHECKSUMS).read_text(encoding="utf-8")).items():
        if _checksum(folder / name) != written:
            raise ValueError(f"{name} is damaged")


def read(folder: Path, part: Part) -> dict[str, Any]:
    """A sharded checkpoint in memory, as one process would have written it: all of it, all except optimizer states,
    or only the shapes of the weights, on the meta device."""
    metadata = _Reader(folder).read_metadata()
    flat: dict[str, Any] = {}
    for name, stored in metadata.state_dict_metadata.items():
        if name.startswith("state_dict.") or part == "all":
            is_tensor = isinstance(stored, TensorStorageMetadata)
            device = "meta" if part == "outline" else "cpu"
            flat[name] = torch.empty(stored.size, dtype=stored.properties.dtype, device=device) if is_tensor else None
    if part != "outline":
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # about being a single process
            dcp.load(flat, storage_reader=_Reader(folder), planner=_Planner(), no_dist=True)
    state: dict[str, Any] = {name.partition(".")[0]: {} for name in metadata.state_dict_metadata}
    for name, value in flat.items():
        *parents, last = metadata.planner_data[name]
        place = state
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    weights = state.pop("state_dict")
    optimizers = [_numbered(state[name]) if part == "all" else {} for name in sorted(state)]
    return _lightnings_part(folder) | {"state_dict": weights, "optimizer_states": optimizers}


def _numbered(states: dict[str, Any]) -> dict[str, Any]:
    """Convert an optimizer state from parameter names to parameter numbers, as a single process saves it."""
    groups = _with_lists(states["param_groups"])
    names = [name for group in groups for name in group["params"]]
    numbers = {name: number for number, name in enumerate(names)}
    return {
        "state": {numbers[name]: state for name, state in states["state"].items()},
        "param_groups": [group | {"params": [numbers[name] for name in group["params"]]} for group in groups],
    }


def _with_lists(value: Any) -> Any:
    """Turn dictionaries with number keys back into lists, which are stored that way."""
    if not isinstance(value, dict):
        return value
    if value and all(isinstance(key, int) for key in value):
        return [_with_lists(value[key]) for key in sorted(value)]
    return {key: _with_lists(part) for key, part in value.items()}


def _lightnings_part(folder: Path) -> dict[str, Any]:
    part = torch.load(folder / META, map_location="cpu", weights_only=True)
    current_checkpoint(part)
    return part


def _seal(folder: Path, rank: int, processes: int) -> None:
    """Flush all files to disk, and record their checksums, each computed by the process that wrote the file."""
    files = sorted(folder.glob(f"__{rank}_*.distcp"))
    if rank == 0:
        files += [folder / ".metadata", folder / META]
    for file in files:
        with file.open("r+b") as stream:
            os.fsync(stream.fileno())
    sums: list[Any] = [None] * processes
    torch.distributed.all_gather_object(sums, {file.name: _checksum(file) for file in files})
    if rank == 0:
        with (folder / CHECKSUMS).open("w", encoding="utf-8") as stream:
            json.dump({name: value for part in sums for name, value in part.items()}, stream)
            stream.flush()
            os.fsync(stream.fileno())


def _checksum(file: Path) -> int:
    value = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


class _PlainUnpickler(pickle.Unpickler):
    """Unpickles only the records that describe a distributed checkpoint."""

    def find_class(self, module: str, name: str) -> Any:
        if name in RECORDS.get(module, ()) or (module == "torch" and isinstance(getattr(torch, name), torch.dtype)):
            return super().find_class(module, name)
        if (module, name) in (("pathlib", "PosixPath"), ("pathlib", "WindowsPath")):
            return PurePath
        raise pickle.UnpicklingError(f"{module}.{name}")


class _Reader(dcp.FileSystemReader):
    """Reads a folder without running any code in it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _PlainUnpickler(file).load()
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


class _Planner(dcp.DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)  # fails if there is more than plain values
        value.seek(0)
        super().load_bytes(read_item, value)
