"""The computation graph of a transformer as index arithmetic: names and counts from a few numbers.

1. *Writers* add to the residual stream: `input`, then per layer the heads `a{l}.h{h}` and the MLP `m{l}`.
   Writer `input` has index 0, head h of layer l has `1 + l(H+1) + h`, its MLP `1 + l(H+1) + H`.
2. *Readers* read the residual stream, before their norm: per layer all q, all k, all v, the MLP; `logits` last.
   With grouped-query attention, k and v are the model's key/value heads, `a{l}.kv{g}<k>`.
   In a hybrid model some layers have a *mixer* in place of attention: a convolution, a state space, linear attention.
   It is one writer and one reader, `s{l}` ("sequence mixer"), in place of the layer's heads and of its q, k and v.
3. A reader reads the writers before it, which are a *prefix* of all writers. So one number per reader (`limits`)
   determines the edges. An edge is a cell of a `[writers, readers]` matrix, and circuits and scores are such matrices.

The numbering is that of the EAP-IG library's files (Hanna et al. 2024), where every query head has its own k and v;
`Graph.ungrouped()` gives that graph for a grouped model. GPT-2 small has 32,491 edges.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import product
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np

from circuitfind.errors import FileError, NoFile

KINDS = "qkv"
MOST = 100_000  # heads in all layers; a file with more is damaged
_WRITER = re.compile(r"input|a(\d+)\.h(\d+)|[ms](\d+)")
_READER = re.compile(r"logits|a(\d+)\.(h|kv)(\d+)<([qkv])>|[ms](\d+)")
_KIND = r"(?:[.\s_<(\[/-]*([qkv])(?:_input)?[>)\]]?)?"  # the end of a name: query, key or value
_MLP_HOOK = r"(?:[._](?:hook_)?(?:out|in|post))?"
_SPELLINGS = (  # names in TransformerLens, ACDC, EAP, auto-circuit and papers, each with the kind of node it names
    ("head", re.compile(rf"(?:head|h|a|l|attn|\()?[\s.]*(\d+)(?:[\s.,:_]+|[\s.]*(?:h|head)[\s.]*)(\d+)\)?{_KIND}")),
    ("head", re.compile(rf"(?:blocks|layers?|l)[\s.]*(\d+)[\s.]*(?:(?:self_)?attn|h|heads?)[^\d]*?(\d+)\]?\)?{_KIND}")),
    ("mlp", re.compile(rf"(?:mlp|m|l|layers?|blocks)[\s._]*(\d+)[\s._]*(?:(?:hook_)?mlp{_MLP_HOOK})?")),
    ("input", re.compile(r"(?:hook_)?(?:embed(?:s|ding|dings)?|tok_embed|resid[\s_]start|wte|token embedding)")),
    ("logits", re.compile(r"(?:un)embed(?:ding)?|resid[\s_]end|lm_head|output|logit")),
)


class Reader(NamedTuple):
    """A reader's layer, its kind (q, k, v, mixer, mlp or logits) and its query or key/value head (0 for others)."""

    layer: int
    kind: str
    head: int


def ends_of(edge: str) -> tuple[str, str]:
    """Return the names of an edge's writer and reader."""
    writer, _, reader = edge.partition("->")
    return writer, reader


@dataclass(frozen=True)
class Graph(NoFile):
    """Writers, readers and edges of a decoder-only transformer. `parallel`: attention and MLP read the same residual
    stream, so an MLP does not read its own layer's heads; `mixers`: the layers with a mixer in place of attention."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    parallel: bool = False
    mixers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        numbers = (self.n_layers, self.n_heads, self.n_kv_heads)
        whole = all(isinstance(number, Integral) for number in numbers)
        if not whole or min(numbers) < 1 or self.n_heads % self.n_kv_heads or self.n_layers * self.n_heads > MOST:
            layers, heads, shared = numbers
            raise FileError(f"no such graph: {layers!r} layers, {heads!r} heads on {shared!r} key/value heads")
        object.__setattr__(self, "mixers", tuple(self.mixers))  # files hold a list
        if not set(self.mixers) <= set(range(self.n_layers)):
            raise FileError(f"no such graph: {self.n_layers} layers, and mixers in layers {list(self.mixers)}")

    # ---------------------------------------------------------------- counts
    @property
    def group(self) -> int:
        """The number of query heads per key/value head."""
        return self.n_heads // self.n_kv_heads

    def heads_in(self, layer: int) -> int:
        """Return the number of writers in a layer besides its MLP: its heads, or 1 for a mixer."""
        return 1 if layer in self.mixers else self.n_heads

    def counts(self, layer: int) -> tuple[int, int, int]:
        """Return the numbers of q, k and v readers in a layer; a mixer counts as one q."""
        return (1, 0, 0) if layer in self.mixers else (self.n_heads, self.n_kv_heads, self.n_kv_heads)

    @cached_property
    def _first_writers(self) -> list[int]:
        """The first writer index of each layer, and of one more layer."""
        counts = [self.heads_in(layer) + 1 for layer in range(self.n_layers)]
        return [1, *(1 + np.cumsum(counts)).tolist()]

    @cached_property
    def _first_readers(self) -> list[int]:
        """The first reader index of each layer, and the index of `logits`."""
        return [0, *np.cumsum([sum(self.counts(layer)) + 1 for layer in range(self.n_layers)]).tolist()]

    @property
    def n_writers(self) -> int:
        return self._first_writers[-1]

    @property
    def readers_per_layer(self) -> int:
        """The number of readers in the layer that has most."""
        return max(sum(self.counts(layer)) for layer in range(self.n_layers)) + 1

    @property
    def n_readers(self) -> int:
        return self._first_readers[-1] + 1

    @property
    def n_edges(self) -> int:
        return int(self.limits.sum())

    @property
    def n_nodes(self) -> int:
        """The number of nodes: all writers and `logits`."""
        return self.n_writers + 1

    # ---------------------------------------------------------------- index arithmetic
    def head(self, layer: int, head: int = 0) -> int:
        """Return the writer index of a head, by default the layer's first."""
        return self._first_writers[layer] + head

    def heads(self, layer: int) -> slice:
        """Return the writer indices of a layer's heads, or of its mixer."""
        return slice(self.head(layer), self.mlp(layer))

    def mlp(self, layer: int) -> int:
        """Return the writer index of a layer's MLP."""
        return self._first_writers[layer + 1] - 1

    def readers(self, layer: int, kind: str) -> slice:
        """Return the reader indices of one kind (q, k, v, qkv, mlp, all or logits) in a layer. `logits` ignores the
        layer; a mixer is its layer's q."""
        if kind == "logits":
            return slice(self.n_readers - 1, self.n_readers)
        start, (k, keys, values) = self._first_readers[layer], self.counts(layer)
        v, mlp, end = k + keys, k + keys + values, k + keys + values + 1
        bounds = {"q": (0, k), "k": (k, v), "v": (v, mlp), "qkv": (0, mlp), "mlp": (mlp, end), "all": (0, end)}
        low, high = bounds[kind]
        return slice(start + low, start + high)

    def reads(self, layer: int, kind: str) -> int:
        """Return how many writers a reader of this layer and kind reads; they are the first ones."""
        if kind == "logits":
            return self.n_writers
        return self.mlp(layer) if kind == "mlp" and not self.parallel else self.head(layer)

    @cached_property
    def limits(self) -> np.ndarray:
        """The number of writers that each reader reads, `[readers]`."""
        limits = np.full(self.n_readers, self.n_writers, dtype=np.int64)
        for layer, kind in product(range(self.n_layers), ("qkv", "mlp")):
            limits[self.readers(layer, kind)] = self.reads(layer, kind)
        return limits

    @cached_property
    def real(self) -> np.ndarray:
        """Which cells are edges, `[writers, readers]` bool."""
        return np.arange(self.n_writers)[:, None] < self.limits[None, :]

    def reader(self, index: int) -> Reader:
        """Return the layer, kind and head of the reader with this index."""
        if index == self.n_readers - 1:
            return Reader(self.n_layers, "logits", 0)
        layer = bisect_right(self._first_readers, index) - 1
        head = int(index) - self._first_readers[layer]
        for kind, count in zip(KINDS, self.counts(layer), strict=True):
            if head < count:
                return Reader(layer, "mixer" if layer in self.mixers else kind, head)
            head -= count
        return Reader(layer, "mlp", 0)

    @cached_property
    def serves(self) -> np.ndarray:
        """Which nodes each reader is an input of, `[readers, nodes]` bool; a shared key/value head is one of its whole
        group."""
        serves = np.zeros((self.n_readers, self.n_nodes), dtype=bool)
        for index in range(self.n_readers):
            layer, kind, head = self.reader(index)
            if kind in ("mlp", "logits"):
                serves[index, self.mlp(layer) if kind == "mlp" else -1] = True
            else:
                first, count = (head * self.group, self.group) if kind in ("k", "v") else (head, 1)
                serves[index, self.head(layer, first) : self.head(layer, first + count)] = True
        return serves

    def among(self, nodes: np.ndarray) -> np.ndarray:
        """Return the edges between some nodes, given as `[nodes]` bool: `[writers, readers]` bool."""
        return np.asarray(self.real & nodes[:-1, None] & (self.serves & nodes).any(axis=1))

    @cached_property
    def steps(self) -> tuple[tuple[slice, slice], ...]:
        """In the order of computation, sets of nodes that are computed together (a layer's heads, its MLP, `logits`),
        as (nodes, the readers that are their inputs)."""
        steps = []
        for layer in range(self.n_layers):
            heads, mlp = self.heads(layer), slice(self.mlp(layer), self.mlp(layer) + 1)
            steps += [(heads, self.readers(layer, "qkv")), (mlp, self.readers(layer, "mlp"))]
        return (*steps, (slice(self.n_writers, self.n_nodes), self.readers(self.n_layers, "logits")))

    def layer_of(self, writer: int) -> int:
        """Return the layer of a writer; -1 for `input`."""
        return bisect_right(self._first_writers, writer) - 1

    # ---------------------------------------------------------------- names
    @cached_property
    def writer_names(self) -> tuple[str, ...]:
        names = ["input"]
        for layer in range(self.n_layers):
            heads = [f"a{layer}.h{head}" for head in range(self.n_heads)]
            names += [*([f"s{layer}"] if layer in self.mixers else heads), f"m{layer}"]
        return tuple(names)

    @cached_property
    def node_names(self) -> tuple[str, ...]:
        return (*self.writer_names, "logits")

    @cached_property
    def reader_names(self) -> tuple[str, ...]:
        kv, names = "h" if self.group == 1 else "kv", []
        for layer in range(self.n_layers):
            if layer in self.mixers:
                names += [f"s{layer}", f"m{layer}"]
                continue
            names += [f"a{layer}.h{head}<q>" for head in range(self.n_heads)]
            names += [f"a{layer}.{kv}{g}<{kind}>" for kind in "kv" for g in range(self.n_kv_heads)] + [f"m{layer}"]
        return (*names, "logits")

    @cached_property
    def _writer_index(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.writer_names)}

    @cached_property
    def _reader_index(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.reader_names)}

    def edge_name(self, writer: int, reader: int) -> str:
        return f"{self.writer_names[writer]}->{self.reader_names[reader]}"

    def names(self, mask: np.ndarray) -> list[str]:
        """Return the names of the edges in a `[writers, readers]` mask, in the order of their readers."""
        return [self.edge_name(u, r) for r, u in zip(*(index.tolist() for index in np.nonzero(mask.T)), strict=True)]

    def edge(self, name: str) -> tuple[int, int]:
        """Return the indices `(writer, reader)` of an edge's name. FileError if the name is malformed, or no edge of
        this graph."""
        if not isinstance(name, str):
            raise FileError(f"{name!r} is not an edge: give its name, such as 'a0.h1->m2'")
        writer, arrow, reader = name.partition("->")
        if not arrow:
            raise FileError(f"'{name}' is not an edge: write it as WRITER->READER, such as 'a0.h1->m2'")
        u, r = self._writer_index.get(writer), self._reader_index.get(reader)
        if u is None:
            raise FileError(f"edge '{name}': {self._why_not(writer, 'writer')}")
        if r is None:
            raise FileError(f"edge '{name}': {self._why_not(reader, 'reader')}")
        if u >= self.limits[r]:
            raise FileError(f"edge '{name}' runs backwards: '{reader}' is computed before '{writer}'")
        return u, r

    def mask(self, edges: Iterable[str]) -> np.ndarray:
        """Return the mask of the named edges (or of one name), `[writers, readers]` bool. FileError as for `edge`."""
        if not isinstance(edges, Iterable):
            given = f"not as a {type(edges).__name__} (from scores cut a circuit first: scores.top(200))"
            raise FileError(f"edges are given as a circuit or as a list of names, {given}")
        mask = np.zeros((self.n_writers, self.n_readers), dtype=bool)
        for name in [edges] if isinstance(edges, str) else edges:
            mask[self.edge(name)] = True
        return mask

    def writer(self, name: str) -> int:
        """Return the index of a writer's name. FileError if there is no such writer."""
        if name not in self._writer_index:
            raise FileError(self._why_not(name, "writer"))
        return self._writer_index[name]

    def meant(self, name: str) -> str | None:
        """Return this graph's name for a node or reader in another tool's spelling; None if it is not recognised.

        >>> Graph(12, 12, 12, 768).meant("L9H9"), Graph(12, 12, 12, 768).meant("blocks.9.attn.9.q")
        ('a9.h9', 'a9.h9<q>')
        """
        for what, pattern in _SPELLINGS:
            found = pattern.fullmatch(name.strip().lower())
            if found is None:
                continue
            guess = f"m{int(found[1])}" if what == "mlp" else what
            if what == "head":
                layer, head, kind = int(found[1]), int(found[2]), found[3]
                shared = self.group > 1 and kind in ("k", "v")
                guess = f"a{layer}.kv{head // self.group}" if shared else f"a{layer}.h{head}"
                guess += f"<{kind}>" if kind else ""
            if guess in self.node_names or guess in self.reader_names:
                return guess
        return None

    def not_named(self, role: str, name: object, known: tuple[str, ...]) -> str:
        """Return the error message for a name that is not in `known`, with a suggestion if there is one."""
        guess = self.meant(name) if isinstance(name, str) else None
        if guess is not None and guess not in known:  # a head where a reader is wanted, or the other way round
            guess = next((other for other in known if other.partition("<")[0] == guess.partition("<")[0]), None)
        hint = f": did you mean '{guess}'?" if guess else "."
        return f"this graph ({self}) has no {role} {name!r}{hint}"

    def _why_not(self, name: str, role: str) -> str:
        pattern, known = (_WRITER, self.writer_names) if role == "writer" else (_READER, self.reader_names)
        if not pattern.fullmatch(name):
            guess = self.not_named(role, name, known)
            return guess if guess[-1] == "?" else f"'{name}' is not a {role}'s name (such as {', '.join(known[-2:])})"
        grouped = role == "reader" and self.group > 1 and ".h" in name and not name.endswith("<q>")
        heads = f"name the key/value head (a0.kv0 to a0.kv{self.n_kv_heads - 1})"
        hint = f"; its keys and values are grouped, {heads}" if grouped else ""
        return f"this graph ({self}) has no {role} '{name}'{hint}"

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, for files; `mixers` only if there are any."""
        given = asdict(self)
        return given if self.mixers else {name: value for name, value in given.items() if name != "mixers"}

    def __str__(self) -> str:
        grouped = f" on {self.n_kv_heads} key/value heads" if self.group > 1 else ""
        form = ", parallel blocks" if self.parallel else ""
        mixed = f", {len(self.mixers)} of them with a mixer in place of attention" if self.mixers else ""
        return f"{self.n_layers} layers{mixed}, {self.n_heads} heads{grouped}{form}"

    def ungrouped(self) -> Graph:
        """Return the graph with one key and one value reader per query head, as in EAP-IG's and MIB's files."""
        return replace(self, n_kv_heads=self.n_heads)

    def unlike(self, other: Graph) -> str:
        """Return the end of an error message about something that belongs to the graph `other`; self is the model's."""
        by_head = "; it is by query head: score without ungrouped=True, or open its EAP-IG file with graph=model.graph"
        return f"({other}); this model has {self}{by_head if self.ungrouped() == other else ''}"
