"""GGUF files (llama.cpp's format), which transformers reads and de-quantises to floats.

1. `located` splits a path that ends in ".gguf" into the folder and the file name that transformers expects.
2. `reading` makes transformers parse the file once. Otherwise transformers parses it again for config, weights and
   tokenizer, each entry through a memory map, and rebuilds the table of tensor names for every module of the model: 110
   s of CPU time for Gemma 3 270M in place of 23 s.
3. `unmark` removes transformers' mark of a quantised model, so that the de-quantised weights can be saved and cast.
   `stored_as` returns the kind of quantisation, which headers and records show.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from transformers.utils import logging
from transformers.utils.hub import cached_file

from circuitfind.errors import ModelError, installing

SUFFIX = ".gguf"
NEEDED = ("gguf", "accelerate")
_LOCK = Lock()


def located(name: str) -> tuple[str, str] | None:
    """Return the folder or hub id of a GGUF file, and the file's name there; None if the name is not a GGUF file's.
    ModelError if there is no such file."""
    path, parts = Path(name).expanduser(), name.split("/")
    if path.suffix.lower() != SUFFIX or path.is_dir():
        return None
    if not path.parent.is_dir() and len(parts) > 2 and parts[0] not in ("", ".", "..", "~"):
        return "/".join(parts[:2]), "/".join(parts[2:])
    if not path.is_file():
        raise ModelError(f"cannot load '{name}': there is no such file{lying_in(path.parent)}")
    return str(path.parent), path.name


def lying_in(folder: Path) -> str:
    """Return the end of an error message, which lists the GGUF files in a folder; empty if there are none."""
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() == SUFFIX) if folder.is_dir() else []
    return f"; give one of the GGUF files in that folder: {', '.join(map(str, files))}" if files else ""


@contextmanager
def reading(name: str, file: str | None) -> Iterator[None]:
    """Inside the block, transformers parses a GGUF file once; without a `file`, change nothing. ModelError if a package
    is missing."""
    if file is None:
        yield
        return
    if missing := [package for package in NEEDED if find_spec(package) is None]:
        lack = f"{' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed"
        raise ModelError(f"'{name}' is a GGUF file, which needs {lack}: {installing(*missing)}")
    gguf, legacy = import_module("gguf"), import_module("transformers.modeling_gguf_pytorch_utils")
    # Read the mapped file as a plain array: slicing a `memmap` costs ten times as much.
    plain = property(lambda reader: reader.plain, lambda reader, mapped: setattr(reader, "plain", np.asarray(mapped)))
    reader = type("Reader", (gguf.GGUFReader,), {"data": plain})
    swaps = [
        (gguf, "GGUFReader", functools.cache(reader)),
        (gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
        (legacy, "tqdm", logging.tqdm),  # so that its progress is shown like that of transformers' other bars
    ]
    with _LOCK:
        before = [(module, attribute, getattr(module, attribute, None)) for module, attribute, _ in swaps]
        try:
            for module, attribute, value in swaps:
                setattr(module, attribute, value)
            yield
        finally:
            for module, attribute, value in before:
                setattr(module, attribute, value)


def stored_as(source: str, file: str, **keywords: Any) -> str:
    """Return llama.cpp's name for the precision of a file, such as "Q4_1" or "F16"."""
    gguf = import_module("gguf")
    content = gguf.GGUFReader(cached_file(source, file, **keywords))
    if (kind := content.get_field("general.file_type")) is not None:
        return str(gguf.LlamaFileType(int(kind.parts[-1][0])).name).removeprefix("MOSTLY_").removeprefix("ALL_")
    return str(max(content.tensors, key=lambda tensor: int(tensor.n_elements)).tensor_type.name)


def marked(model: Any) -> bool:
    """Whether transformers read the model from a GGUF file."""
    mark = getattr(model.config, "quantization_config", None) or {}
    return getattr(mark, "quant_method", None) == "gguf"


def unmark(model: Any) -> None:
    """Remove transformers' mark of a quantised model from a de-quantised one, so that it can be saved and cast."""
    if marked(model):
        del model.config.quantization_config
        model.is_quantized, model.hf_quantizer = False, None
