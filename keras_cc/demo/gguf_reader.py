"""Reads GGUF files with a small, flat memory peak.

`gguf.GGUFReader` wraps every element of every metadata array in its own `numpy.memmap`: on a
vocabulary of 262,144 tokens that is several seconds and 5 GB. The header is therefore parsed here
(it is a short, public format), and only the block formulas of the quantisation types are taken
from the `gguf` package. Tensors are read one at a time, on request.

Source: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import os
import struct
from typing import Any, NamedTuple

import numpy as np

MAGIC = b"GGUF"
VERSIONS = (2, 3)

# GGUF metadata value types: id -> little-endian struct code. 8 is a string, 9 an array.
_SCALARS = {**dict(enumerate("BbHhIif?")), 10: "Q", 11: "q", 12: "d"}
_STRING = 8
_ARRAY = 9

_SLICE = 1 << 22  # Values dequantised at a time.


class TensorInfo(NamedTuple):
    """Where a tensor lies in the file: `shape` is in NumPy order (slowest axis first)."""

    shape: tuple[int, ...]
    ggml_type: int
    offset: int


class GGUFFile:
    """A GGUF file: its metadata, and its tensors dequantised one by one.

    Args:
        path: The file to read.

    Attributes:
        metadata: dict, name to value: Python scalars, strings, lists of strings, and NumPy arrays
            for arrays of numbers.
        tensors: dict, name to `TensorInfo`.

    Raises:
        ValueError: If the file is not a GGUF file of version 2 or 3, or is shorter than its header
            says.

    Example:

    ```python
    with GGUFFile("model.gguf") as file:
        print(file.metadata["general.architecture"])
        norm = file.tensor("output_norm.weight")  # float32, (hidden,)
    ```
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = os.fspath(path)
        self._handle = open(self.path, "rb")  # noqa: SIM115 - closed by `close`.
        try:
            size = os.fstat(self._handle.fileno()).st_size
            if size < 24 or self._handle.read(4) != MAGIC:
                raise ValueError(
                    f"Not a GGUF file: it must begin with {MAGIC!r}. Received: path={self.path!r}"
                )
            self._data = mmap.mmap(self._handle.fileno(), 0, access=mmap.ACCESS_READ)
            try:
                self._read_header()
            except struct.error as error:
                raise ValueError(
                    f"The GGUF file ends inside its header. Received: path={self.path!r}"
                ) from error
        except BaseException:
            self._handle.close()
            raise

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file. Arrays returned by `tensor` stay valid."""
        self._data.close()
        self._handle.close()

    def tensor(self, name: str) -> np.ndarray:
        """Returns one tensor, dequantised.

        Args:
            name: Its name in the file, e.g. `"blk.0.attn_q.weight"`.

        Returns:
            float32 array. A weight matrix has the shape (out, in), as in Hugging Face.

        Raises:
            KeyError: If the file has no such tensor.
            ValueError: If the tensor's bytes lie beyond the end of the file.
        """
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize

        if name not in self.tensors:
            raise KeyError(f"No tensor of this name in {self.path!r}. Received: name={name!r}")
        info = self.tensors[name]
        kind = GGMLQuantizationType(info.ggml_type)
        block, block_bytes = GGML_QUANT_SIZES[kind]
        # Blocks run along the last axis: (..., n) values are (..., n // block * block_bytes) bytes.
        columns = info.shape[-1] if info.shape else 1
        rows = int(np.prod(info.shape[:-1], dtype=np.int64))
        row_bytes = columns // block * block_bytes
        if info.offset + rows * row_bytes > len(self._data):
            raise ValueError(
                f"The file ends before the last byte of tensor {name!r}. "
                f"Received: path={self.path!r}"
            )
        values = np.empty((rows, columns), dtype=np.float32)
        # In slices: the formulas of `gguf` need several times the memory of what they return.
        step = max(1, _SLICE // columns)
        for first in range(0, rows, step):
            last = min(first + step, rows)
            begin = info.offset + first * row_bytes
            raw = np.frombuffer(self._data[begin : begin + (last - first) * row_bytes], np.uint8)
            values[first:last] = dequantize(raw.reshape(last - first, row_bytes), kind)
        return values.reshape(info.shape)

    # --- The header. ---

    def _read_header(self) -> None:
        self._position = 4
        version = self._scalar("I")
        if version not in VERSIONS:
            raise ValueError(
                f"GGUF versions {VERSIONS} (little-endian) are supported. "
                f"Received: version={version} in {self.path!r}"
            )
        tensor_count, pair_count = self._scalar("Q"), self._scalar("Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(pair_count):
            key = self._string()
            self.metadata[key] = self._value(self._scalar("I"))
        infos = []
        for _ in range(tensor_count):
            name = self._string()
            dims = tuple(self._scalar("Q") for _ in range(self._scalar("I")))
            infos.append((name, dims[::-1], self._scalar("I"), self._scalar("Q")))
        # Offsets count from the end of the header, rounded up to the alignment.
        alignment = int(self.metadata.get("general.alignment", 32))
        start = -(-self._position // alignment) * alignment
        self.tensors = {
            name: TensorInfo(shape, kind, start + offset) for name, shape, kind, offset in infos
        }

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self._data, self._position)
        self._position += struct.calcsize("<" + code)
        return value

    def _string(self) -> str:
        length = self._scalar("Q")
        raw = self._data[self._position : self._position + length]
        if len(raw) != length:
            raise struct.error("string beyond the end of the file")
        self._position += length
        return raw.decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            item, length = self._scalar("I"), self._scalar("Q")
            if item in _SCALARS:
                dtype = np.dtype("<" + _SCALARS[item] if item != 7 else "?")
                size = dtype.itemsize * length
                raw = self._data[self._position : self._position + size]
                if len(raw) != size:
                    raise struct.error("array beyond the end of the file")
                self._position += size
                return np.frombuffer(raw, dtype=dtype)
            return [self._value(item) for _ in range(length)]
        if kind not in _SCALARS:
            raise ValueError(f"Unknown GGUF value type. Received: type={kind} in {self.path!r}")
        return self._scalar(_SCALARS[kind])
