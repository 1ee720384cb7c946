"""The published circuits, by name.

A paper says "this class of heads feeds the queries of that class". Such a rule names writers and readers, and contains
every edge of the graph between them (the graph has no edges between heads of one layer, nor to earlier layers). A
circuit is the union of its rules. A new circuit is one function here and one line in `REFERENCES`.

The circuits are in the form of ACDC's repository, against which ACDC is evaluated (Conmy et al. 2023). There they also
have edges inside heads, one for each q, k and v input, which are not edges of this package's graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from os import PathLike
from pathlib import Path

import numpy as np

from circuitfind.errors import FileError, plain, unknown
from circuitfind.graph import Graph
from circuitfind.references.reference import Reference

_ACDC = "edges as in Conmy et al. 2023, arXiv:2304.14997"
_GPT2 = Graph(n_layers=12, n_heads=12, n_kv_heads=12, d_model=768)


def reference(name: str | PathLike[str]) -> Reference:
    """Return a published circuit by name ("ioi", "greater-than", "docstring"), or a circuit from a file.

    Args:
        name: underscores count as hyphens. A name that ends in .json or .pt is a path (`Reference.from_file`).

    Raises:
        FileError: there is no built-in circuit of this name, or the file cannot be read.
    """
    if not isinstance(name, (str, PathLike)):
        raise FileError(f"a reference circuit is given by name or path, not by a {type(name).__name__}")
    if isinstance(name, str) and plain(name) in REFERENCES:
        return REFERENCES[plain(name)]()
    if Path(name).suffix.lower() in (".json", ".pt"):
        return Reference.from_file(name)
    raise FileError(f"{unknown('reference circuit', str(name), REFERENCES)}, or give a .json or .pt file")


def _ioi() -> Reference:
    """Indirect object identification in GPT-2 small: 26 heads in seven classes, all MLPs, 963 edges (ACDC: 1,041).

    1. The MLPs feed all inputs of the later heads; `input` and classes of heads feed classes as in `rules`.
    2. `input`, the MLPs and the heads feed every later MLP.
    3. `input`, the MLPs and the last three classes feed the logits.
    """
    heads = {
        "name mover": ("a9.h9", "a10.h0", "a9.h6"),
        "backup name mover": ("a10.h10", "a10.h6", "a10.h2", "a10.h1", "a11.h2", "a9.h7", "a9.h0", "a11.h9"),
        "negative name mover": ("a10.h7", "a11.h10"),
        "S2 inhibition": ("a7.h3", "a7.h9", "a8.h6", "a8.h10"),
        "induction": ("a5.h5", "a5.h8", "a5.h9", "a6.h9"),
        "duplicate token": ("a0.h1", "a0.h10", "a3.h0"),
        "previous token": ("a2.h2", "a4.h11"),
    }
    movers = ("name mover", "backup name mover", "negative name mover")
    rules = (  # from, to which inputs, of which classes
        ("input", "qkv", ("previous token", "duplicate token")),
        ("input", "q", ("S2 inhibition",)),
        ("input", "kv", movers),
        ("previous token", "kv", ("induction",)),
        ("induction", "kv", ("S2 inhibition",)),
        ("duplicate token", "kv", ("S2 inhibition",)),
        ("S2 inhibition", "q", movers),
    )
    every, mlps, last = [*chain(*heads.values())], _mlps(range(12)), [*chain(*(heads[kind] for kind in movers))]
    edges = [(heads.get(one, (one,)), _inputs(heads[to], kinds)) for one, kinds, classes in rules for to in classes]
    edges += [(mlps, _inputs(every)), (("input", *mlps, *every), mlps), (("input", *mlps, *last), ("logits",))]
    source = f"Wang et al. 2022, arXiv:2211.00593; {_ACDC} (acdc/ioi/utils.py)"
    return Reference("ioi", _GPT2, _union(_GPT2, edges), heads, model="openai-community/gpt2", source=source)


def _greater_than() -> Reference:
    """Greater-than (years) in GPT-2 small: 9 heads, MLPs 0 to 11, 235 edges (ACDC: 262).

    1. `input` feeds the early heads and MLPs; the middle heads and the late MLPs feed the logits.
    2. Groups feed each other as in `rules`, heads through q, k and v.
    3. The paper does not patch the middle heads' queries. So MLPs 0 to 8, which are all before the last middle head,
       feed these queries and each other.
    """
    middle = ("a5.h5", "a6.h1", "a6.h9", "a7.h10", "a8.h11", "a9.h1")
    heads = {"early, into the middle": ("a0.h3", "a0.h5"), "early, into MLPs": ("a0.h1",), "middle": middle}
    mlps = {"early MLPs": _mlps(range(4)), "late MLPs": _mlps(range(8, 12))}
    rules = {  # from, to which groups
        "input": ("early, into the middle", "early, into MLPs", "early MLPs"),
        "early, into MLPs": ("early MLPs", "middle"),
        "early, into the middle": ("middle",),
        "early MLPs": ("early MLPs", "middle"),
        "middle": ("late MLPs",),
        "late MLPs": ("late MLPs",),
    }
    writers: Mapping[str, tuple[str, ...]] = {"input": ("input",), **heads, **mlps}
    readers = {kind: _inputs(names) for kind, names in heads.items()} | mlps
    edges = [(writers[one], readers[other]) for one, others in rules.items() for other in others]
    edges.append(((*middle, *mlps["late MLPs"]), ("logits",)))
    edges.append((_mlps(range(9)), (*_mlps(range(9)), *_inputs(middle, "q"))))
    source = f"Hanna et al. 2023, arXiv:2305.00586; {_ACDC} (acdc/greaterthan/utils.py)"
    return Reference("greater-than", _GPT2, _union(_GPT2, edges), heads, model="openai-community/gpt2", source=source)


def _docstring() -> Reference:
    """Docstring completion in the four-layer attention-only model attn-only-4l: 6 heads, 24 edges (ACDC: 37).

    Heads 0.2 and 0.4, which the post discusses, are not in ACDC's form. The classes are positions in the circuit: heads
    that only `input` feeds, heads in between, and heads that feed the logits. The model has no MLPs; this package's
    graph has MLP nodes, without edges.
    """
    graph = Graph(n_layers=4, n_heads=8, n_kv_heads=8, d_model=512)
    heads = {"first": ("a0.h5",), "middle": ("a1.h2", "a1.h4", "a2.h0"), "last": ("a3.h0", "a3.h6")}
    edges = [
        (("input",), _inputs(("a0.h5",), "v")),
        (("input", "a0.h5"), _inputs(("a1.h2", "a2.h0"), "qk")),
        (("input", "a0.h5"), _inputs(("a1.h4", *heads["last"]), "v")),
        (("a1.h4",), _inputs(("a2.h0",), "v")),
        (("a1.h4",), _inputs(heads["last"], "q")),
        (("a2.h0", "a1.h2"), _inputs(heads["last"], "k")),
        (heads["last"], ("logits",)),
    ]
    source = (
        f"Heimersheim and Janiak 2023 (alignmentforum.org/posts/u6KXXmKFbXfWzoAXn); {_ACDC} (acdc/docstring/utils.py)"
    )
    mask = _union(graph, edges)
    return Reference("docstring", graph, mask, heads, model="attn-only-4l", source=source, attention_only=True)


REFERENCES: dict[str, Callable[[], Reference]] = {"ioi": _ioi, "greater-than": _greater_than, "docstring": _docstring}


def _mlps(layers: Iterable[int]) -> tuple[str, ...]:
    """Return the names of the layers' MLPs, which are those of writers and of readers."""
    return tuple(f"m{layer}" for layer in layers)


def _inputs(heads: Iterable[str], kinds: str = "qkv") -> tuple[str, ...]:
    return tuple(f"{head}<{kind}>" for head in heads for kind in kinds)


def _union(graph: Graph, rules: Iterable[tuple[Iterable[str], Iterable[str]]]) -> np.ndarray:
    """Return the edges of all rules, `[writers, readers]` bool: from each writer to each reader of a rule."""
    mask = np.zeros_like(graph.real)
    for writers, readers in rules:
        columns = [graph.reader_names.index(name) for name in readers]
        mask[np.ix_([graph.writer(name) for name in writers], columns)] = True
    return np.asarray(mask & graph.real)
