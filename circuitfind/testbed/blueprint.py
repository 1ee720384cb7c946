"""`Blueprint`: a drawing of a circuit: what each head attends to and moves, and what each MLP computes.

1. The residual stream holds *variables*, each in its own channels. `input` writes `token` and `position` (one-hot),
   `start` (1 at the first word, which begins every prompt) and `one` (1 everywhere). The unembedding reads `output`,
   the logit of each word. The author of the circuit adds all other variables.
2. A head's attention scores are a sum of *matches* (bilinear forms of a query and a key variable) and *offsets*
   (distances between tokens). Its values are linear in variables, and its output is added to other variables. An MLP
   consists of *tables* of ReLU neurons, which read variables and write to others.
3. A *part* is a head, or one table of an MLP. A part is *varying* if it depends on the prompt: it reads `token`, or a
   variable that a varying part writes. A varying part is *live* if `output` depends on it.
4. The true edges lead from `input` and from each varying part to each later live part that reads a variable which it
   writes, and to `logits` from each that writes `output`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from circuitfind.errors import ScoreError

SHARP = 8.0  # attention score of a match: weight e^8 against e^0


@dataclass(frozen=True)
class Variable:
    """Channels of the residual stream with one meaning."""

    name: str
    width: int


@dataclass(frozen=True, eq=False)
class Match:
    """A term of a head's attention scores: `query @ by @ key`, with `by [query width, key width]`."""

    query: Variable
    key: Variable
    by: Tensor


@dataclass(frozen=True, eq=False)
class Offset:
    """A term of a head's attention scores: `strength` for the key that is `back` tokens before the query."""

    back: int
    strength: float = 2 * SHARP


@dataclass(frozen=True, eq=False)
class Head:
    """An attention head.

    Attributes:
        layer, head: its place in the model.
        looks: the terms of its attention scores.
        moves: variable -> matrix `[width, carried]`; the head's value is the sum of `variable @ matrix`.
        writes: variable -> matrix `[carried, width]`; the attended values times this matrix are added to the variable.
    """

    layer: int
    head: int
    looks: tuple[Match | Offset, ...]
    moves: Mapping[Variable, Tensor]
    writes: Mapping[Variable, Tensor]

    @property
    def carried(self) -> int:
        """The number of channels of its value."""
        return next(iter(self.moves.values())).shape[1]

    @property
    def writer(self) -> str:
        return f"a{self.layer}.h{self.head}"

    def reader(self, kind: str) -> str:
        return f"{self.writer}<{kind}>"

    @property
    def written(self) -> list[Variable]:
        return list(self.writes)

    def reads(self) -> dict[str, list[Variable]]:
        """Return the variables that each kind of reader ("q", "k", "v") reads."""
        matches = [look for look in self.looks if isinstance(look, Match)]
        return {"q": [match.query for match in matches], "k": [match.key for match in matches], "v": list(self.moves)}


@dataclass(frozen=True, eq=False)
class Table:
    """Neurons of an MLP: `relu(sum of variable @ takes[variable] + bias)`; `neurons @ gives[variable]` is written."""

    layer: int
    takes: Mapping[Variable, Tensor]
    bias: Tensor
    gives: Mapping[Variable, Tensor]

    @property
    def writer(self) -> str:
        return f"m{self.layer}"

    @property
    def written(self) -> list[Variable]:
        return list(self.gives)

    def reader(self, kind: str) -> str:
        return self.writer

    def reads(self) -> dict[str, list[Variable]]:
        return {"mlp": list(self.takes)}


Part = Head | Table


@dataclass
class Blueprint:
    """A circuit under construction.

    Attributes:
        words: the vocabulary; the first word begins every prompt.
        length: number of tokens of the longest prompt.
        heads: number of heads in each layer; heads without a part have weights of 0.
    """

    words: Sequence[str]
    length: int
    heads: int = 4
    parts: list[Part] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.token = Variable("token", len(self.words))
        self.position = Variable("position", self.length)
        self.start, self.one = Variable("start", 1), Variable("one", 1)
        self.output = Variable("output", len(self.words))
        self.variables = [self.token, self.position, self.start, self.one, self.output]

    # ---------------------------------------------------------------- drawing
    def variable(self, name: str, width: int | None = None) -> Variable:
        """Add a variable, by default as wide as the vocabulary, and return it."""
        new = Variable(name, len(self.words) if width is None else width)
        if new.name in {old.name for old in self.variables}:
            raise ScoreError(f"testbed: there is a variable '{name}' already")
        self.variables.append(new)
        return new

    def select(self, *words: str, strength: float = 1.0) -> Tensor:
        """Return a vector `[words]` that is `strength` at these words and 0 elsewhere."""
        return torch.tensor([strength * (word in words) for word in self.words])

    def match(self, query: Variable, key: Variable, by: Tensor | float = SHARP) -> Match:
        """Return a match of query and key; a number for `by` stands for that multiple of the identity."""
        if isinstance(by, (int, float)):
            by = by * torch.eye(query.width, key.width)
        return Match(query, key, by.reshape(query.width, key.width))

    def towards(self, key: Variable, strengths: Tensor) -> Match:
        """Return a preference for keys that does not depend on the query. `strengths`: `[key width]`."""
        return self.match(self.one, key, strengths)

    def resting(self, strength: float = SHARP / 2) -> Match:
        """Return a preference for the first word, to which a head attends if no other match is stronger."""
        return self.match(self.one, self.start, strength)

    def head(
        self,
        layer: int,
        looks: Iterable[Match | Offset],
        moves: Mapping[Variable, Tensor],
        writes: Mapping[Variable, Tensor | float],
    ) -> Head:
        """Add the layer's next head, and return it; a number in `writes` stands for that multiple of the identity."""
        taken = sum(isinstance(part, Head) and part.layer == layer for part in self.parts)
        if taken == self.heads:
            raise ScoreError(f"testbed: layer {layer} has only {self.heads} heads")
        carried = next(iter(moves.values())).shape[1]
        by = {one: how * torch.eye(carried) if isinstance(how, (int, float)) else how for one, how in writes.items()}
        head = Head(layer, taken, tuple(looks), dict(moves), by)
        self.parts.append(head)
        return head

    def table(
        self, layer: int, takes: Mapping[Variable, Tensor], bias: Tensor | float, gives: Mapping[Variable, Tensor]
    ) -> Table:
        """Add a table to the layer's MLP, and return it."""
        neurons = next(iter(gives.values())).shape[0]
        table = Table(layer, dict(takes), torch.as_tensor(bias, dtype=torch.float32).expand(neurons), dict(gives))
        self.parts.append(table)
        return table

    def word(self, *words: str) -> dict[Variable, Tensor]:
        """Return `moves` of a head that copies these words and no others; by default all words but the first."""
        copied = self.select(*(words or self.words[1:]))
        return {self.token: torch.diag(copied)}

    # ---------------------------------------------------------------- derived from the drawing
    @property
    def n_layers(self) -> int:
        return 1 + max(part.layer for part in self.parts)

    def tables(self, layer: int) -> list[Table]:
        return [part for part in self.parts if isinstance(part, Table) and part.layer == layer]

    def neurons(self, layer: int) -> int:
        """Return the number of neurons of a layer's MLP."""
        return sum(len(table.bias) for table in self.tables(layer))

    def embedding(self) -> dict[Variable, Tensor]:
        """Return what `input` writes to each variable for each word, `[words, width]`, without positions."""
        start = torch.zeros(len(self.words), 1)
        start[0] = 1
        return {self.token: torch.eye(len(self.words)), self.start: start, self.one: torch.ones(len(self.words), 1)}

    def stages(self) -> list[list[Part]]:
        """Return the parts in the order of computation, in groups: a layer's heads, then its tables."""
        by_place: dict[tuple[int, bool], list[Part]] = {}
        for part in self.parts:
            by_place.setdefault((part.layer, isinstance(part, Table)), []).append(part)
        return [by_place[place] for place in sorted(by_place)]

    def true_edges(self) -> list[str]:
        """Return the names of the true edges, such as `a0.h0->a1.h0<k>`."""
        writers: dict[Variable, list[str]] = {self.token: ["input"]}  # varying writers so far
        sources: dict[Part, dict[str, list[str]]] = {}
        for stage in self.stages():
            for part in stage:
                reads = part.reads().items()
                sources[part] = {kind: [w for one in read for w in writers.get(one, [])] for kind, read in reads}
            for part in stage:
                for variable in part.written if any(sources[part].values()) else []:
                    writers.setdefault(variable, []).append(part.writer)
        edges, live = [f"{writer}->logits" for writer in writers.get(self.output, [])], {self.output}
        for stage in reversed(self.stages()):
            used = [part for part in stage if live & {*part.written} and any(sources[part].values())]
            for part in used:
                found = sources[part].items()
                edges += [f"{writer}->{part.reader(kind)}" for kind, some in found for writer in some]
            live |= {variable for part in used for read in part.reads().values() for variable in read}
        return list(dict.fromkeys(edges))
