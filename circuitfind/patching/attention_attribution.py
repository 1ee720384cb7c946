"""Why a head attends to a token: its attention score as a sum over pairs of a query-side and a key-side node.

With the norms' scales fixed to their values on this prompt, a score is bilinear in the residual streams at the query's
and the key's token (transformer-circuits.pub, "Tracing attention computation", 2025, for features; here for nodes):

    score(i, j) = sum over nodes u, v of parts[u, v] + position

1. The stream at either token is the sum of its writers. The constant rest (the biases of output projections, of the
   norm, of the projections and of the norms of queries and keys) is one more row, "constant".
2. Each summand goes through the block's norm, the projection and the model's further operations on queries and keys
   (`engine/score_form.py`).
3. Only differences between keys matter, because softmax does not change if all scores of a query rise by the same
   amount. So each pair has a second number, `relative`: its part minus its part for another key, or minus the mean over
   all other keys that the query sees.

The sum is the model's own score, up to rounding, before a soft-cap, if there is one (Gemma 2). For several prompts all
numbers are means over prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from circuitfind.batch import Inputs
from circuitfind.calls import model_call
from circuitfind.engine.capture import capture
from circuitfind.engine.experiment import bind, check_model
from circuitfind.engine.restart import Restart
from circuitfind.engine.score_form import read_parts, refuse, score_form
from circuitfind.engine.sites import tolerance
from circuitfind.errors import ScoreError
from circuitfind.export import html
from circuitfind.models.adapter import Adapter
from circuitfind.models.load import Model
from circuitfind.patching.attention import Prompts, one_prompt, place_of
from circuitfind.patching.spans import END, position_labels
from circuitfind.progress import track
from circuitfind.record import NO_EFFECT, Record
from circuitfind.result import Result, strongest
from circuitfind.tasks.bound import BoundTask
from circuitfind.tasks.task import Task

CONSTANT = "constant"
SUMMED = ("parts", "other", "position")
SIGN = f"{NO_EFFECT}part of an attention score before the softmax; positive = more attention"
Where = int | str


class ScorePair(NamedTuple):
    """The part of a score from a query-side and a key-side node, also relative to the other key."""

    query_side: str
    key_side: str
    score: float
    relative: float


class ScorePart(NamedTuple):
    """The part of a score from a node on one side and all nodes on the other, also relative to the other key."""

    node: str
    score: float
    relative: float


@dataclass(frozen=True, eq=False, repr=False)
class AttentionAttribution(Result):
    """One head's attention score between two tokens, by pairs of nodes.

    Attributes:
        query, key, against: the tokens, as "position token", or for several prompts as in the call; `against` may be
            "the mean of the other keys".
        nodes: names of the rows and columns: all writers before the head, and "constant", the biases.
        parts: each pair's part of the score, `[query side, key side]`.
        other: the same for the key with which the score is compared.
        position: the part of either score that depends on the distance only, `[2]` (ALiBi; else 0).
        weight: the head's attention weight for the key, 0 to 1.
        cap: c if the model applies `c tanh(score / c)`, else None.
    """

    FORMAT = "circuitfind.attention-attribution"
    DERIVED = ("score", "relative")
    SHOWN = ("head", "query", "key", "weight", "score", "against", "relative", "cap")

    head: str
    query: str
    key: str
    against: str
    nodes: tuple[str, ...]
    parts: np.ndarray
    other: np.ndarray
    position: np.ndarray
    weight: float
    cap: float | None
    record: Record

    @property
    def score(self) -> float:
        """The score as the model computes it, before a cap."""
        return float(self.parts.sum() + self.position[0])

    @property
    def relative(self) -> float:
        """The score minus the score with which it is compared."""
        return self.score - float(self.other.sum() + self.position[1])

    def rows(self) -> tuple[ScorePair, ...]:
        """Return every pair, in the order of `parts.ravel()`."""
        return tuple(map(self._pair, range(self.parts.size)))

    def top(self, n: int = 10, by: str = "absolute") -> list[ScorePair]:
        """Return the n pairs whose `relative` is largest in magnitude or (by="signed") most positive, largest first.
        ScoreError for another `by`."""
        return [self._pair(at) for at in strongest((self.parts - self.other).ravel(), n, by).tolist()]

    def query_side(self, n: int = 10, by: str = "absolute") -> list[ScorePart]:
        """Return the top nodes on the query side, summed over the key side; arguments as for `top`."""
        return self._side(1, n, by)

    def key_side(self, n: int = 10, by: str = "absolute") -> list[ScorePart]:
        """Return the top nodes on the key side, summed over the query side; arguments as for `top`."""
        return self._side(0, n, by)

    def _pair(self, at: int) -> ScorePair:
        query, key = divmod(at, len(self.nodes))
        score = float(self.parts[query, key])
        return ScorePair(self.nodes[query], self.nodes[key], score, score - float(self.other[query, key]))

    def _side(self, over: int, n: int, by: str) -> list[ScorePart]:
        scores, others = self.parts.sum(over), self.other.sum(over)
        chosen = strongest(scores - others, n, by).tolist()
        return [ScorePart(self.nodes[at], float(scores[at]), float(scores[at] - others[at])) for at in chosen]

    def _repr_html_(self) -> str:
        sides = {"query side": self.query_side(), "key side": self.key_side()}
        tables = [html.table(ScorePart._fields, rows, said) for said, rows in sides.items()]
        return html.block(repr(self), *tables, html.table(ScorePair._fields, self.top(), "pairs"))


class _Score(NamedTuple):
    """The result on one prompt. `at`: positions of the query, the key and the first other key; the rest: as for
    `AttentionAttribution`."""

    at: tuple[int, int, int]
    parts: Tensor
    other: Tensor
    position: Tensor
    weight: float
    cap: float | None


@model_call
def attention_attribution(
    model: Model,
    prompts: Prompts,
    head: str,
    key: Where,
    query: Where = -1,
    *,
    against: Where | None = None,
    example: int | None = None,
    corrupted: bool = False,
) -> AttentionAttribution:
    """Split a head's attention score between two tokens, exactly, into parts of pairs of nodes.

    A token is given as its position (negative: from the end), as its text if no other token of the prompt has the same,
    as "position token", or, for a task, as the name of a span of one token; "end" is the last token.

    Args:
        prompts: a task, a prompt, or several.
        head: a head such as "a5.h5".
        key, query: the token that is attended to, and the token that attends (default: the last).
        against: another key to compare the score with; default: the mean of all other keys that the query sees.
        example: number of the prompt, or of the task's pair, from 0; default: the mean over all of them.
        corrupted: for a task, use the corrupted prompts instead of the clean ones.

    Returns:
        The parts in units of the score, positive = more attention; their sum is the model's own score before a cap.

    Raises:
        ScoreError: there is no such head, example or token; or the query does not see the key, or no other key.
        TaskError: there is no prompt, it has no tokens, or it is text and the model has no tokenizer.
        ModelError: the model's scores cannot be read, or are no such sum (latent attention, clipped projections).
    """
    check_model(model)
    place = place_of(model.graph, head)
    given: Any = bind(model, prompts) if isinstance(prompts, (Task, BoundTask)) else prompts
    if example is None and (isinstance(given, str) or not isinstance(given, (BoundTask, Sequence)) or len(given) < 2):
        example = 0
    found = []
    for row in track(range(len(given)) if example is None else [example], "attention scores"):
        inputs, tokens, record = one_prompt(model, given, row, corrupted)
        spans, labels = _spans(given, row, corrupted), position_labels(tokens)
        try:
            at_query, at_key = (_position(name, at, labels, spans) for name, at in (("query", query), ("key", key)))
            at_other = None if against is None else _position("against", against, labels, spans)
        except ScoreError as error:
            if example is not None:
                raise
            remedy = "name a position or span that every pair has, or take one pair (example=, --example)"
            raise ScoreError(f"{error} (pair {row}; the mean is over all pairs): {remedy}") from None
        found.append(_score(model.adapter, inputs, head, place, labels, at_query, at_key, at_other))
    if example is None:
        names = [END if where in (-1, END) else str(where) for where in (query, key, against)]
        record = given.record("", "", "", 0) if isinstance(given, BoundTask) else replace(record, n_examples=len(given))
        record = replace(record, metric="", settings={**record.settings, "side": "corrupted" if corrupted else "clean"})
    else:
        names = [labels[position] for position in found[0].at]
    means = (np.mean([getattr(one, name).cpu().numpy() for one in found], axis=0) for name in SUMMED)
    return AttentionAttribution(
        head,
        names[0],
        names[1],
        "the mean of the other keys" if against is None else names[2],
        (*model.graph.writer_names[: model.graph.reads(place[0], "q")], CONSTANT),
        **dict(zip(SUMMED, means, strict=True)),
        weight=float(np.mean([one.weight for one in found])),
        cap=found[0].cap,
        record=replace(record, method="attention-attribution", sign=SIGN),
    )


def _score(
    adapter: Adapter,
    inputs: Inputs,
    name: str,
    place: tuple[int, int],
    labels: Sequence[str],
    query: int,
    key: int,
    against: int | None,
) -> _Score:
    """Return the result on one prompt. `query`, `key`, `against`: positions; `labels`: of all positions."""
    (layer, head), run = place, capture(adapter, inputs)
    form = score_form(Restart(adapter, inputs, run), layer, head)
    seen = form.visible[query].nonzero().flatten().tolist()
    if key not in seen:
        why = "comes after" if key > query else "lies outside the window of"
        raise ScoreError(f"key {labels[key]!r} {why} query {labels[query]!r}: {name} does not see it there")
    others = [at for at in seen if at != key and against in (None, at)]
    if not others:
        raise ScoreError(
            f"query {labels[query]!r} has no other key{'' if against is None else f' at {labels[against]!r}'}: a score"
            " has a meaning only in comparison with another key that the query sees"
        )
    keys = torch.tensor([key, *others])

    def side(kind: str, places: Tensor) -> Tensor:
        """Return the queries or keys at some positions by writer, `[places, nodes + 1, features]`."""
        affine = form.queries if kind == "q" else form.keys
        parts = read_parts(adapter, run, layer, kind, head, places) @ affine.linear[places]
        parts[:, -1] += affine.constant[places]
        return parts.double()

    of_query, of_keys = form.scale * side("q", torch.tensor([query]))[0], side("k", keys)
    position, scores = form.position[query].double(), form.scores[query]
    off = form.capped(of_query.sum(0) @ of_keys.sum(1).T + position[keys]) - scores[keys]
    if bool((off.abs() > tolerance(adapter) * form.scores[form.visible].abs().max()).any()):
        refuse(adapter, "scores are not the sum of the nodes' parts: are its queries or keys clipped?")
    parts, other = (of_query @ one.T for one in (of_keys[0], of_keys[1:].mean(0)))
    distance = torch.stack([position[key], position[others].mean()])
    return _Score((query, key, others[0]), parts, other, distance, float(form.pattern[query, key]), form.cap)


def _spans(given: Any, example: int, corrupted: bool) -> dict[str, tuple[int, int]]:
    """Return the spans of a task's prompt, without padding; none for the corrupted side of aligned pairs."""
    if not isinstance(given, BoundTask) or not given.spans or (corrupted and given.batch.alignment is not None):
        return {}
    side = given.batch.corrupted if corrupted else given.batch.clean
    before = int(side.mask[example].long().argmax())
    return {name: (start - before, stop - before) for name, (start, stop) in given.spans[example].items()}


def _position(name: str, where: Where, labels: tuple[str, ...], spans: dict[str, tuple[int, int]]) -> int:
    """Return the position of the token `where`. ScoreError if no token or several match. `name`: the keyword."""
    if isinstance(where, Integral) and not isinstance(where, bool):
        found = [range(len(labels))[where]] if -len(labels) <= where < len(labels) else []
    else:
        said = str(where).strip()
        found = list(range(*spans.get(said, (0, 0)))) or [len(labels) - 1] * (said == END)
        found = found or [at for at, label in enumerate(labels) if said in (label, label.split(" ", 1)[1])]
    if len(found) == 1:
        return found[0]
    there = ", ".join(map(repr, (labels[at] for at in found or range(len(labels)))))
    names = f"; spans: {', '.join(spans)}" if spans and not found else ""
    raise ScoreError(f"{name}={where!r} is {'several tokens' if found else 'no token'} of the prompt: {there}{names}")
