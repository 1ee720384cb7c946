"""Plain data from the `.pt`, `.pth` and `.pkl` files of other tools, read without running any code in them.

1. Files of `torch.save` are read with `weights_only=True`: tensors, lists, dictionaries, text and numbers.
2. A plain pickle may name `slice`, `OrderedDict` and ACDC's `TorchIndex` (an index such as `[:, :, 3]`). It is refused
   if it names any other class or function.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from os import PathLike
from pathlib import Path
from typing import Any

from circuitfind.errors import FileError
from circuitfind.export.files import read_bytes

ENDINGS = (".pt", ".pth", ".pkl")


class TorchIndex:
    """ACDC's index into a hook's tensor. `hashable_tuple` is `(None, None, head)` for a head, `(None,)` for a layer."""

    hashable_tuple: tuple[Any, ...]


PLAIN = {
    ("builtins", "slice"): slice,
    ("collections", "OrderedDict"): OrderedDict,
    ("acdc.acdc_utils", "TorchIndex"): TorchIndex,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in PLAIN:
            raise FileError(f"it names {module}.{name}, and only plain data are read: save it as tensors or text")
        return PLAIN[module, name]


def load(path: str | PathLike[str]) -> Any:
    """Return the content of a file; raise FileError if it is missing or holds more than plain data."""
    content = read_bytes(path)
    try:
        if not zipfile.is_zipfile(io.BytesIO(content)) and Path(path).suffix.lower() != ".pt":
            return _Unpickler(io.BytesIO(content)).load()
        import torch

        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except FileError as error:
        raise FileError(f"{path}: {error}") from None
    except Exception as error:  # a broken or hostile pickle can raise anything
        said = str(error).partition("\n")[0]
        if said.startswith("Weights only load failed"):  # torch's own message advises to run the code
            said = "it names code, and only plain data are read: save it as tensors or text"
        raise FileError(f"{path}: not a file of plain tensors: {said}") from None
