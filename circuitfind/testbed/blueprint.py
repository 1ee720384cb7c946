"""A circuit as its author draws it: what each head looks at and moves, and what each MLP computes.

1. The residual stream holds *variables*, each a block of channels. `input` writes `token` and `position` (one-hot),
   `start` (1 at the first word, which opens every prompt) and `one` (1 everywhere). The unembedding reads `output`, the
   logit of each word. Every other variable is the author's.
2. A head attends by a sum of *matches*: how well a query variable, through a matrix, fits a key variable. It moves
   variables, through a matrix, to another one. An MLP is a table of ReLU neurons from variables to variables.
3. What a prompt can change is *varying*: `token`, and what is computed from a varying variable. What leads to `output`
   is *live*.
4. The true edges follow: from each varying part to each live part that reads a variable which it writes earlier.

A part is a head, or one table of an MLP: a layer's MLP may hold several tables, of which some are live.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from circuitfind.errors import ScoreError

SHARP = 8.0  # attention score of a match: e^8 against e^0


@dataclass(frozen=True)
class Variable:
    """Channels of the residual stream with one meaning."""

    name: str
    width: int


@dataclass(frozen=True, eq=False)
class Match:
    """A term of a head's attention scores: `query @ by @ key`, `by [query width, key width]`."""

    query: Variable
    key: Variable
    by: Tensor


@dataclass(frozen=True, eq=False)
class Offset:
    """A term of a head's attention scores: `strength` where the key stands `back` tokens before the query."""

    back: int
    strength: float = 2 * SHARP


@dataclass(frozen=True, eq=False)
class Head:
    """`carried = sum over tokens of attention * sum of (variable @ moves[variable])`, with matrices `[width, carried]`;
    `carried @ writes[variable]`, with `[carried, width]`, is added to each variable."""

    layer: int
    head: int
    looks: tuple[Match | Offset, ...]
    moves: Mapping[Variable, Tensor]
    writes: Mapping[Variable, Tensor]

    @property
    def carried(self) -> int:
        """Channels that it carries."""
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
        """By kind of reader, the variables that it reads."""
        matches = [look for look in self.looks if isinstance(look, Match)]
        return {"q": [match.query for match in matches], "k": [match.key for match in matches], "v": list(self.moves)}


@dataclass(frozen=True, eq=False)
class Table:
    """Neurons `relu(sum of variable @ takes[variable] + bias)`, and `neurons @ gives[variable]` for each variable."""

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
        words: the vocabulary; the first word opens every prompt.
        length: tokens of the longest prompt.
        heads: heads in each layer; those without a part have weights of 0.
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
        """A new variable; by default as wide as the vocabulary."""
        new = Variable(name, len(self.words) if width is None else width)
        if new.name in {old.name for old in self.variables}:
            raise ScoreError(f"testbed: there is a variable '{name}' already")
        self.variables.append(new)
        return new

    def select(self, *words: str, strength: float = 1.0) -> Tensor:
        """`[words]`: `strength` at these words, 0 elsewhere."""
        return torch.tensor([strength * (word in words) for word in self.words])

    def match(self, query: Variable, key: Variable, by: Tensor | float = SHARP) -> Match:
        """How well query and key fit; a number stands for that multiple of the identity."""
        if isinstance(by, (int, float)):
            by = by * torch.eye(query.width, key.width)
        return Match(query, key, by.reshape(query.width, key.width))

    def towards(self, key: Variable, strengths: Tensor) -> Match:
        """A preference of keys, whatever the query: `strengths [key width]`."""
        return self.match(self.one, key, strengths)

    def resting(self, strength: float = SHARP / 2) -> Match:
        """A preference for the first word, where a head rests that finds nothing better."""
        return self.match(self.one, self.start, strength)

    def head(
        self,
        layer: int,
        looks: Iterable[Match | Offset],
        moves: Mapping[Variable, Tensor],
        writes: Mapping[Variable, Tensor | float],
    ) -> Head:
        """Adds the layer's next head; a number in `writes` stands for that multiple of the identity."""
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
        """Adds a table to the layer's MLP."""
        neurons = next(iter(gives.values())).shape[0]
        table = Table(layer, dict(takes), torch.as_tensor(bias, dtype=torch.float32).expand(neurons), dict(gives))
        self.parts.append(table)
        return table

    def word(self, *words: str) -> dict[Variable, Tensor]:
        """What a head moves that copies the token's word; by default all words but the first."""
        copied = self.select(*(words or self.words[1:]))
        return {self.token: torch.diag(copied)}

    # ---------------------------------------------------------------- what follows
    @property
    def n_layers(self) -> int:
        return 1 + max(part.layer for part in self.parts)

    def tables(self, layer: int) -> list[Table]:
        return [part for part in self.parts if isinstance(part, Table) and part.layer == layer]

    def neurons(self, layer: int) -> int:
        """Neurons of a layer's MLP."""
        return sum(len(table.bias) for table in self.tables(layer))

    def embedding(self) -> dict[Variable, Tensor]:
        """What `input` writes for each word, `[words, width]`, positions aside."""
        start = torch.zeros(len(self.words), 1)
        start[0] = 1
        return {self.token: torch.eye(len(self.words)), self.start: start, self.one: torch.ones(len(self.words), 1)}

    def stages(self) -> list[list[Part]]:
        """Parts that run side by side, in order: a layer's heads, then its tables."""
        by_place: dict[tuple[int, bool], list[Part]] = {}
        for part in self.parts:
            by_place.setdefault((part.layer, isinstance(part, Table)), []).append(part)
        return [by_place[place] for place in sorted(by_place)]

    def true_edges(self) -> list[str]:
        """Their names, such as `a0.h0->a1.h0<k>`."""
        writers: dict[Variable, list[str]] = {self.token: ["input"]}  # of what varies, so far
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
