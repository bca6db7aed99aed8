"""The safetensors format, one tensor at a time: memory-mapped on the way in, streamed on the way out.

The library's own reader copies each tensor and its writer takes a whole file at once. The format is simple: eight bytes
of length, that much JSON with every tensor's type, shape and place, then the bytes.
"""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from unisd_jax.errors import UserError

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}
CODES = {dtype: code for code, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """What a file's header says of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """One `*.safetensors` file; nothing is read before it is looked at.

    Raises:
      UserError: not a sound file.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with safe_open(path, framework="numpy"):
                pass  # the library checks the header against the size of the file
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a readable safetensors file ({error})") from None
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            self._header = json.loads(file.read(length))
        self._header.pop("__metadata__", None)
        self._start = 8 + length
        self._bytes = np.asarray(np.memmap(path, np.uint8, mode="r")) if self._header else np.empty(0, np.uint8)

    @property
    def names(self) -> list[str]:
        """The tensors in it."""
        return list(self._header)

    def view(self, name: str) -> np.ndarray:
        """A tensor as a read-only view of the file.

        Raises:
          UserError: it is stored in a type that no weight has.
        """
        entry = self._header[name]
        if entry["dtype"] not in DTYPES:
            known = ", ".join(DTYPES)
            raise UserError(f"{self.path}: tensor {name} is stored as {entry['dtype']}; expected one of {known}")
        begin, end = (self._start + offset for offset in entry["data_offsets"])
        return self._bytes[begin:end].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])


@contextlib.contextmanager
def new_tensor_file(path: Path, entries: Iterable[Entry]) -> Iterator[Callable[[np.ndarray], None]]:
    """Writes a file of the tensors in `entries`: the function it gives appends the next of them.

    The file is on disk for good when the context ends. A tensor that lies contiguous in memory is not copied.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        begin, end = end, end + entry.nbytes
        header[entry.name] = {"dtype": CODES[entry.dtype], "shape": entry.shape, "data_offsets": (begin, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        yield lambda value: file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
