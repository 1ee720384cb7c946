"""`Model`, made from the embedded model "tiny", a Hugging Face id, a folder, a GGUF file, or a model in memory."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from circuitfind.batch import Inputs
from circuitfind.errors import CircuitfindError, ModelError, NoFile, unknown, warn
from circuitfind.graph import Graph
from circuitfind.models import gguf_files, tiny
from circuitfind.models.adapter import Adapter
from circuitfind.models.backends import BACKENDS, bare_logits, observe
from circuitfind.models.families import FAMILIES, Family, family_of
from circuitfind.models.inference import matching, row_of

EMBEDDED = {"tiny": tiny.PATH}
BROKEN = (OSError, ValueError, LookupError, struct.error, SafetensorError, UnpicklingError, RuntimeError)
"""The errors that reading a truncated file, or a file of another kind, may raise."""


@dataclass(frozen=True, eq=False)
class Model(NoFile):
    """An unmodified Hugging Face model with its computation graph. `hf`: the model itself, which is never changed;
    `tokenizer`: its tokenizer, or None, in which case tasks must be given as token ids."""

    INSTEAD = "save its weights with model.hf.save_pretrained(folder)"

    name: str
    hf: Any
    tokenizer: Any
    adapter: Adapter

    @property
    def graph(self) -> Graph:
        return self.adapter.graph

    @property
    def config(self) -> Any:
        return self.adapter.config

    @property
    def device(self) -> torch.device:
        """The device of token ids."""
        return self.adapter.device

    @property
    def dtype(self) -> torch.dtype:
        return self.adapter.dtype

    @property
    def dequantised(self) -> str:
        """For de-quantised weights, their precision and source: "float32 from GGUF Q4_1"; else empty."""
        origin = self.adapter.origin
        return f"{self.dtype} from {origin}".removeprefix("torch.") if origin else ""

    @property
    def row(self) -> str:
        """How the family's row was found ("inferred as llama"); empty for the table's row of its `model_type`."""
        return self.adapter.row

    @property
    def kind(self) -> str:
        """The `model_type`, and how the family's row was found: "cwm (inferred as llama)"."""
        kind = str(getattr(self.config, "model_type", "?"))
        return f"{kind} ({self.row})" if self.row else kind

    @property
    def place(self) -> str:
        """The device or devices that the model runs on, for messages."""
        places = getattr(self.hf, "hf_device_map", {}) if self.adapter.spread else {}
        kinds = {f"cuda:{at}" if isinstance(at, int) else str(at) for at in places.values()}
        return " and ".join(sorted(kinds)) or str(self.device)

    @property
    def remote(self) -> bool:
        """Whether the model runs on a server."""
        return False

    @property
    def vocabulary(self) -> int:
        """The number of token ids in the embedding."""
        return int(self.hf.get_input_embeddings().weight.shape[0])

    def logits(self, inputs: Inputs) -> Tensor:
        """Return the logits at the positions `inputs.read`, `[batch, reads, vocab]`, without gradients."""
        return bare_logits(self.adapter, inputs)

    def __repr__(self) -> str:
        return (
            f"Model({self.name}: {self.kind}, {self.graph}; {self.graph.n_edges:,} edges, {self.dtype}, {self.place})"
        )


def adapt(
    name: str, hf: nn.Module, tokenizer: Any = None, backend: str = "nnsight", family: Family | str | None = None
) -> Model:
    """Make a `Model` from a Hugging Face model in memory. ModelError if its family, or this form, is not covered."""
    if hasattr(hf, "peft_config"):
        raise ModelError("the model carries adapters: merge them first: hf = hf.merge_and_unload()")
    if not hasattr(hf, "config"):
        raise ModelError(f"{type(hf).__name__} is not a Hugging Face model: it has no config")
    if backend not in BACKENDS:
        raise ModelError(unknown("backend", backend, BACKENDS))
    for weight_name, weight in hf.named_parameters():
        if weight.is_inference():
            raise ModelError(
                f"weight '{weight_name}' was made inside torch.inference_mode(), so it allows no gradients: load the"
                " model outside that block"
            )
    try:
        row, origin = row_of(hf, family)
        adapter = Adapter(hf, row)
        adapter.row, adapter.backend = origin, backend
        if adapter.processes is not None:  # nnsight bypasses the forwards of tensor parallelism
            adapter.backend = "hooks"
        observe(adapter)
    except (CircuitfindError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:  # raised by the model's code
        reason = next(iter(str(error).strip().splitlines()), "")
        raise ModelError(
            f"{type(hf).__name__} does not run on a few tokens without a cache: {type(error).__name__}: {reason}"
        ) from error
    return Model(name, hf, tokenizer, adapter)


def fetch(
    name: str,
    dtype: str | torch.dtype | None = None,
    device: Any = None,
    family: Family | str | None = None,
    allow_missing: bool = False,
    **keywords: Any,
) -> tuple[Any, Any, str]:
    """Load a Hugging Face model; return it in evaluation mode, its tokenizer or None, and what its weights were
    de-quantised from (empty for stored floats).

    `name`: "tiny", a hub id, a folder, or a GGUF file. `dtype`: as in `from_pretrained`; by default that of the stored
    weights, and float32 for a GGUF file. `device`: by default the accelerator if there is one. `family`: replaces the
    table's row. `allow_missing`: accept a checkpoint that lacks weights, with a warning. `keywords`: passed on to
    `from_pretrained`.
    """
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype not in (None, "auto") and not (isinstance(kind, torch.dtype) and kind.is_floating_point):
        raise ModelError(unknown("dtype", dtype, ("float32", "bfloat16", "float16", "float64")))
    source, file = source_of(name)
    _check_places(name, device, keywords)
    with gguf_files.reading(name, file):
        config = config_of(name, **keywords)
        _check_form(config, family)
        hf, report = _weights(name, config, dtype or (torch.float32 if file else "auto"), keywords)
        tokenizer, origin = _tokenizer(name, keywords), ""
        if file:
            origin = f"GGUF {gguf_files.stored_as(source, file, **_shared(keywords))}"
            gguf_files.unmark(hf)
    _check_loaded(name, type(hf).__name__, report, allow_missing)
    if "device_map" in keywords or "tp_plan" in keywords:  # transformers has placed the weights
        _check_parts(name, hf, keywords.get("device_map"))
        return hf.eval(), tokenizer, origin
    device = device or torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        hf = hf.to(device)
    except (RuntimeError, AssertionError) as error:  # no such device, or its memory is full
        raise ModelError(f"cannot put '{name}' on device '{device}': {str(error).splitlines()[0]}") from None
    return hf.eval(), tokenizer, origin


def _check_places(name: str, device: Any, keywords: dict[str, Any]) -> None:
    """Raise ModelError for a device map that puts nothing on a device, contradicts `device`, or lacks accelerate."""
    if keywords.get("device_map") is None:
        keywords.pop("device_map", None)
        return
    given = keywords["device_map"]
    if isinstance(given, dict):
        followed = any(str(place) not in ("disk", "meta", "None") for place in given.values())
    else:
        followed = isinstance(given, (str, int, torch.device))
    if not followed:
        raise ModelError(f"device_map={given!r} puts no part of '{name}' on a device: give 'auto', or a device by part")
    if device is not None:
        raise ModelError(
            f"device_map= places every part of '{name}', and device='{device}' the whole model: give only one of them"
        )
    if find_spec("accelerate") is None:
        raise ModelError("device_map= needs accelerate, which is not installed: pip install 'circuitfind[devices]'")


def _check_parts(name: str, hf: Any, given: Any) -> None:
    """Raise ModelError if a device map names parts that the model lacks; transformers would ignore them."""
    parts = {path for path, _ in (*hf.named_modules(), *hf.named_parameters())}
    if isinstance(given, dict) and (others := [key for key in given if key not in parts]):
        known = ", ".join([path for path, _ in hf.named_modules() if path.count(".") == 1][:6])
        raise ModelError(f"device_map= names '{others[0]}', which '{name}' does not have: it has {known}, ...")


def _weights(name: str, config: Any, dtype: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Load a model; return it and transformers' report on missing, unused and mismatched weights."""
    source, file = source_of(name)
    asked: dict[str, Any] = {"ignore_mismatched_sizes": True, **keywords}  # `_check_loaded` refuses them by name
    if file:
        asked = {"gguf_file": file, "config": config, **asked}
        if packed := getattr(transformers, "GgufConfig", None):
            asked.setdefault("quantization_config", packed(dequantize=True))
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True, **asked)
    except TypeError as error:
        for keyword in keywords:
            if f"'{keyword}'" in str(error):
                raise ModelError(f"cannot load '{name}': keyword '{keyword}' is unknown to transformers") from None
        raise ModelError(_why_not(name, error)) from None
    except (*BROKEN, AssertionError) as error:  # damaged weights, or a device that does not exist
        raise ModelError(_why_not(name, error)) from None
    hf, report = loaded
    return hf, report


def _check_form(config: Any, family: Family | str | None) -> None:
    """Raise ModelError for models that are not covered, as far as this is known before the weights are read."""
    text = config.get_text_config()
    if family is not None or text.model_type in FAMILIES:
        family_of(text, family)
        return
    try:
        with torch.device("meta"):
            outline = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except Exception:  # a class that cannot be built without weights is checked once it is loaded
        return
    matching(outline)


def _check_loaded(name: str, kind: str, report: dict[str, Any], allow_missing: bool) -> None:
    """Raise ModelError (with `allow_missing`, warn) if weights are missing or have other shapes than the config says;
    warn of weights in the checkpoint that were not used."""

    def some(found: Any) -> str:
        names = sorted(entry if isinstance(entry, str) else entry[0] for entry in found)
        return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    if absent := {*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])}:
        text = f"the checkpoint '{name}' lacks weights, or has them in another shape: {some(absent)}"
        if not allow_missing:
            raise ModelError(
                f"{text}. transformers fills in random numbers, so results would not be about this model: complete the"
                " checkpoint, or load it as it is with allow_missing=True (--allow-missing)"
            )
        warn(f"{text}; they are random numbers, different in every run")
    if unused := report["unexpected_keys"]:
        warn(f"the checkpoint '{name}' holds weights that {kind} does not use: {some(unused)}")


def source_of(name: str) -> tuple[str, str | None]:
    """Return the name or folder to give to transformers, and the name of the GGUF file in it, or None."""
    return gguf_files.located(name) or (os.path.expanduser(EMBEDDED.get(name, name)), None)


def config_of(name: str, **keywords: Any) -> Any:
    """Return a model's configuration, without loading its weights. ModelError if it cannot be read."""
    source, file = source_of(name)
    if Path(source).is_file():
        remedy = "give a .gguf file, or the folder that holds config.json and the weights"
        raise ModelError(f"cannot load '{name}': it is a file; {remedy}")
    try:
        return AutoConfig.from_pretrained(source, **_shared(keywords), **({"gguf_file": file} if file else {}))
    except BROKEN as error:
        raise ModelError(_why_not(name, error)) from None


def fetch_tokenizer(name: str, **keywords: Any) -> Any:
    """Return a model's tokenizer, or None, without loading its weights."""
    with gguf_files.reading(name, source_of(name)[1]):
        config_of(name, **keywords)
        return _tokenizer(name, keywords)


def _shared(keywords: dict[str, Any]) -> dict[str, Any]:
    names = ("revision", "token", "cache_dir", "local_files_only", "trust_remote_code", "subfolder")
    return {key: keywords[key] for key in names if key in keywords}


def _tokenizer(name: str, keywords: dict[str, Any]) -> Any:
    """Return the tokenizer; None if the folder has none (transformers may then return an empty one)."""
    source, file = source_of(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **_shared(keywords), **({"gguf_file": file} if file else {}))
    except (OSError, ValueError, TypeError, AttributeError, KeyError, ImportError):
        return None
    probe = tokenizer("probe text", add_special_tokens=False)["input_ids"]
    unknown = getattr(tokenizer, "unk_token_id", None)
    return tokenizer if any(token != unknown for token in probe) else None


def _why_not(name: str, error: Exception) -> str:
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    source, file = source_of(name)
    folder = Path(source)
    if file and folder.is_dir():
        why = "it may be truncated, or of a kind that transformers does not know"
        return f"cannot load '{name}': transformers cannot read this GGUF file; {why} ({reason.rstrip('.')})"
    if folder.is_dir():
        lying = gguf_files.lying_in(folder)
        return f"cannot load a causal language model from the folder '{name}': {reason.rstrip('.')}{lying}"
    return (
        f"cannot load '{name}': there is no such folder, and the hub was not reached or has no such model ({reason})."
        f" Embedded models: {', '.join(EMBEDDED)}"
    )
