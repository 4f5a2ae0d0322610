"""Safetensors files without torch: read, divide into shards, write.

A file is 8 bytes with the length of its header, the header (JSON: type, shape and place of each
tensor), and the bytes of the tensors. Tensors are copied in pieces, so the memory that this takes
does not depend on the model.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from dpo.errors import ArtifactError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_PIECE_BYTES = 8 << 20
_MOST_HEADER_BYTES = 100 << 20
_ALIGNMENT = 8
_BITS = {
    **{"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32},
    **{"F16": 16, "BF16": 16, "I16": 16, "U16": 16},
    **{"I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8},
}


@dataclass(frozen=True)
class Tensor:
    """Where a tensor is."""

    name: str
    dtype: str
    """As safetensors write it: F32, BF16, ..."""
    shape: tuple[int, ...]
    path: Path
    start: int
    """First byte in the file."""
    n_bytes: int

    def pieces(self) -> Iterator[bytes]:
        """Its bytes, a few MiB at a time."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            left = self.n_bytes
            while left:
                data = file.read(min(left, _PIECE_BYTES))
                if not data:
                    raise _damaged(self.path, "it ends early")
                left -= len(data)
                yield data


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, in the order of their bytes.

    Raises:
        ArtifactError: not a whole safetensors file.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, _MOST_HEADER_BYTES):
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        found = [_tensor(name, entry, path, 8 + length) for name, entry in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise _damaged(path, str(error) or type(error).__name__) from None
    end = 8 + length
    for tensor in sorted(found, key=lambda item: item.start):
        if tensor.start != end:
            raise _damaged(path, f"{tensor.name} is not where it should be")
        end += tensor.n_bytes
    if end != size:
        raise _damaged(path, f"it has {size} bytes, its header says {end}")
    return {item.name: item for item in sorted(found, key=lambda item: item.start)}


def _tensor(name: str, entry: Mapping[str, Any], path: Path, base: int) -> Tensor:
    begin, end = entry["data_offsets"]
    shape = tuple(int(n) for n in entry["shape"])
    n_bytes = end - begin
    bits = _BITS.get(entry["dtype"])
    if bits is not None and math.prod(shape) * bits != n_bytes * 8:
        raise ValueError(f"{name} has another size than its shape")
    return Tensor(name, str(entry["dtype"]), shape, path, base + begin, n_bytes)


def write_tensors(
    path: Path,
    tensors: Sequence[Tensor],
    bytes_of: Callable[[Tensor], Iterator[bytes]] = Tensor.pieces,
) -> None:
    """Write a file with these tensors, in this order.

    Args:
        path: Where to.
        tensors: What; where they are now.
        bytes_of: Their bytes, where these are others than in the file that they are in.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.n_bytes],
        }
        offset += tensor.n_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            _copy(tensor, file, bytes_of)


def _copy(tensor: Tensor, file: BinaryIO, bytes_of: Callable[[Tensor], Iterator[bytes]]) -> None:
    written = sum(file.write(piece) for piece in bytes_of(tensor))
    if written != tensor.n_bytes:
        raise _damaged(tensor.path, f"{tensor.name} has {written} bytes of {tensor.n_bytes}")


def write_model(
    folder: Path,
    tensors: Sequence[Tensor],
    max_bytes: int,
    bytes_of: Callable[[Tensor], Iterator[bytes]] = Tensor.pieces,
) -> list[Path]:
    """Weights as a model's folder has them: one file, or shards of at most ``max_bytes`` and index.

    A tensor that is larger gets a shard of its own. Tensors keep their order.
    """
    shards: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.n_bytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.n_bytes
    if len(shards) == 1:
        write_tensors(folder / SINGLE, tensors, bytes_of)
        return [folder / SINGLE]
    names = [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    for name, shard in zip(names, shards, strict=True):
        write_tensors(folder / name, shard, bytes_of)
    index = {
        "metadata": {"total_size": sum(tensor.n_bytes for tensor in tensors)},
        "weight_map": {
            tensor.name: name
            for name, shard in zip(names, shards, strict=True)
            for tensor in sorted(shard, key=lambda item: item.name)
        },
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")
    return [folder / INDEX, *(folder / name for name in names)]


def model_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model's folder by name, over its shards.

    Raises:
        ArtifactError: a shard that the index names is missing, or has not what the index says.
    """
    if not (folder / INDEX).is_file():
        if not (folder / SINGLE).is_file():
            raise ArtifactError(
                f"there are no weights: neither {SINGLE} nor {INDEX}",
                where=str(folder),
                fix="run the training step again",
            )
        return read_tensors(folder / SINGLE)
    try:
        index = json.loads((folder / INDEX).read_text("utf-8"))["weight_map"]
        names = sorted(set(index.values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _damaged(folder / INDEX, "it is no index") from None
    found: dict[str, Tensor] = {}
    for name in names:
        if "/" in name or not (folder / name).is_file():
            raise _damaged(folder / INDEX, f"{name} is missing")
        found |= read_tensors(folder / name)
    placed = {tensor.name: tensor.path.name for tensor in found.values()}
    if wrong := sorted(key for key in {*index, *placed} if index.get(key) != placed.get(key)):
        raise _damaged(folder / INDEX, f"{wrong[0]} is not where the index says")
    return found


def _damaged(path: Path, why: str) -> ArtifactError:
    return ArtifactError(
        f"{path.name} is damaged: {why}", where=str(path), fix="run the step that wrote it again"
    )
