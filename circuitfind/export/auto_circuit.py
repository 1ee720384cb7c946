"""Edge scores in the files of auto-circuit (Miller et al. 2024): its cached `PruneScores`.

    scores   {receiver: tensor}: `blocks.0.hook_q_input` [heads, writers], `blocks.0.hook_mlp_in` [writers],
             `blocks.11.hook_resid_post` [writers], where the writers are those before the receiver, in the order of
             computation. Scores by position have positions as a further first dimension.
    cache    scores by algorithm, or by task and algorithm, saved by `save_cache`

1. auto-circuit ranks edges by the magnitude of scores, and their meaning depends on the algorithm. So they are read as
   scores and not as effects. An infinite score ("kept at every threshold") becomes the next float above all others.
2. Scores by position are summed over positions.
3. The files name no model. The shapes give the graph, with one key and one value for every query head.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from circuitfind.errors import FileError
from circuitfind.export.eap_ig import Foreign
from circuitfind.graph import Graph
from circuitfind.record import NO_EFFECT, Record

SIGN = f"{NO_EFFECT}a pruning score of auto-circuit: its magnitude ranks edges"
RECORD = Record(method="auto-circuit", sign=SIGN, settings={"file": "auto-circuit"}, versions={})
_MODULE = re.compile(r"blocks\.(\d+)\.hook_(q_input|k_input|v_input|mlp_in|resid_post|attn_in)")
KINDS = {"q_input": "q", "k_input": "k", "v_input": "v", "mlp_in": "mlp", "resid_post": "logits"}


def fits(raw: Any) -> bool:
    """Whether this is a set of auto-circuit's scores, or a cache of several sets."""
    while isinstance(raw, Mapping) and raw and not hasattr(next(iter(raw.values())), "shape"):
        raw = next(iter(raw.values()))
    return isinstance(raw, Mapping) and bool(raw) and all(_MODULE.fullmatch(str(name)) for name in raw)


def sets(raw: Mapping[str, Any], name: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield every set of scores in a cache with its name, such as "task, algorithm"."""
    if all(_MODULE.fullmatch(str(key)) for key in raw):
        yield name, raw
    else:
        for key, part in raw.items():
            yield from sets(part, f"{name}, {key}" if name else str(key))


def read(raw: Mapping[str, Any]) -> Foreign:
    """Return one set of scores; raise FileError if q, k and v have one score together, or shapes do not fit."""
    parts: dict[tuple[str, str], np.ndarray] = {}
    for name, tensor in raw.items():
        _, layer, kind = name.replace(".hook_", ".").split(".")
        parts[layer, kind] = tensor.detach().float().numpy()
    if any(kind == "attn_in" for _, kind in parts):
        raise FileError("q, k and v have one score together: compute the scores with separate_qkv=True")
    graph = _graph(parts)
    scores = np.zeros(graph.real.shape, dtype=np.float32)
    for (layer, kind), values in parts.items():
        readers = graph.readers(int(layer), KINDS[kind])
        writers = int(graph.limits[readers.start])
        wanted = [*([graph.n_heads] if kind[1:] == "_input" else []), writers]
        if list(values.shape[-len(wanted) :]) != wanted or values.ndim > len(wanted) + 1:
            raise FileError(f"blocks.{layer}.hook_{kind} has scores of shape {list(values.shape)}, not {wanted}")
        values = values.sum(axis=0) if values.ndim > len(wanted) else values
        scores[:writers, readers] = values.reshape(-1, writers).T
    largest = np.abs(scores[np.isfinite(scores)]).max(initial=0)
    scores = np.where(np.isinf(scores), np.nextafter(largest, np.float32(math.inf)), scores)
    return Foreign(graph, np.zeros_like(graph.real), scores, record=RECORD)


def _graph(parts: Mapping[tuple[str, str], np.ndarray]) -> Graph:
    layers = 1 + max(int(layer) for layer, _ in parts)
    try:
        heads = parts["0", "q_input"].shape[-2]
        parallel = parts["0", "mlp_in"].shape[-1] == parts["0", "q_input"].shape[-1]
    except (KeyError, IndexError):
        raise FileError("no scores of edges into the first layer's queries and MLP: such files are not read") from None
    return Graph(layers, heads, heads, 0, parallel)
