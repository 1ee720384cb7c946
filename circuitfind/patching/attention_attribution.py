"""Why a head attends to a token: its attention score as a sum over pairs of nodes, one on its query and one on its key side.

A score is bilinear in what was written at the two tokens, once the scales of the norms are held as they are on this
prompt (transformer-circuits.pub, "Tracing attention computation", 2025, for features; here for heads and MLPs):

    score(i, j) = sum over nodes u, v of parts[u, v] + position

1. The stream at the query's and at the key's token is divided by writers; what no node wrote (the biases of output
   projections, of the norm, of the projections and of the norms of queries and keys) is one more row, "constant".
2. Each part goes through the block's norm and the projection, and then through what the model does to queries and keys
   (`engine/score_form.py`).
3. A score matters only beside those of other keys: the softmax does not change when all of a query's scores rise. So
   each pair has a second number, `relative`: less what the same pair adds for another key, or on average for all
   others that the query sees.

The sum is the model's own score, to rounding; before the soft-cap, where there is one (Gemma 2).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from circuitfind.calls import model_call
from circuitfind.engine.capture import capture
from circuitfind.engine.experiment import bind, check_model
from circuitfind.engine.restart import Restart
from circuitfind.engine.score_form import read_parts, refuse, score_form, tolerance
from circuitfind.errors import ScoreError
from circuitfind.export import html
from circuitfind.models.load import Model
from circuitfind.patching.attention import Prompts, one_prompt, place_of
from circuitfind.patching.spans import END, position_labels
from circuitfind.record import NO_EFFECT, Record
from circuitfind.result import Result, strongest
from circuitfind.tasks.bound import BoundTask
from circuitfind.tasks.task import Task

CONSTANT = "constant"
SIGN = f"{NO_EFFECT}part of an attention score before the softmax; positive = more attention"
Where = int | str


class ScorePair(NamedTuple):
    """What a node on the query side and one on the key side add to a score together, and to the score less another."""

    query_side: str
    key_side: str
    score: float
    relative: float


class ScorePart(NamedTuple):
    """What a node on one side adds to a score, with all nodes on the other side."""

    node: str
    score: float
    relative: float


@dataclass(frozen=True, eq=False, repr=False)
class AttentionAttribution(Result):
    """One head's attention score between two tokens, by pairs of nodes.

    Attributes:
        query, key, against: the tokens, as "position token"; `against` may be "the mean of N other keys".
        nodes: names of the rows and columns: all writers before the head, and "constant", the biases.
        parts: `[query side, key side]` what each pair adds to the score.
        other: the same for the key that the score is compared with.
        position: `[2]` what the distance adds to the two scores (ALiBi; else 0).
        weight: the head's attention to the key, 0 to 1.
        cap: None, or c where the model goes on with `c tanh(score / c)`.
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
        """As the model computes it, before a cap."""
        return float(self.parts.sum() + self.position[0])

    @property
    def relative(self) -> float:
        """Less the score that it is compared with."""
        return self.score - float(self.other.sum() + self.position[1])

    def rows(self) -> tuple[ScorePair, ...]:
        """Every pair, query side by query side."""
        return tuple(map(self._pair, range(self.parts.size)))

    def top(self, n: int = 10, by: str = "absolute") -> list[ScorePair]:
        """The pairs that move the score most, beside the other key's, or (by="signed") raise it most.

        Raises:
            ScoreError: an unknown way to rank.
        """
        return [self._pair(at) for at in strongest((self.parts - self.other).ravel(), n, by).tolist()]

    def query_side(self, n: int = 10, by: str = "absolute") -> list[ScorePart]:
        """The same for nodes on the query side, summed over the key side."""
        return self._side(1, n, by)

    def key_side(self, n: int = 10, by: str = "absolute") -> list[ScorePart]:
        """The same for nodes on the key side, summed over the query side."""
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
        sides = {"query side": self.query_side(), "key side": self.key_side(), "pairs": self.top()}
        tables = (html.table(rows[0]._fields, rows, said) for said, rows in sides.items())
        return html.block(repr(self), html.facts(self.shown()), *tables)


@model_call
def attention_attribution(
    model: Model,
    prompts: Prompts,
    head: str,
    key: Where,
    query: Where = -1,
    *,
    against: Where | None = None,
    example: int = 0,
    corrupted: bool = False,
) -> AttentionAttribution:
    """Why a head attends from one token to another: its attention score by pairs of nodes, exact.

    A token is given as its position (negative: from the end), as text that one token of the prompt has, as "position
    token", or, of a task, as the name of a span of one token; "end" is the last.

    Args:
        prompts: a task, a prompt, or several.
        head: such as "a5.h5".
        key, query: attended to, and from where (default: the last token).
        against: another key to compare the score with; default: the mean of all others that the query sees.
        example: which of the prompts, or of the task's pairs.
        corrupted: of a task: the corrupted prompt instead of the clean one.

    Returns:
        The parts in units of the score, positive = more attention; their sum is the model's own score before a cap.

    Raises:
        ScoreError: no such head, example or token, or the query does not see the key, or no other.
        TaskError: no prompt, one without tokens, or one as text for a model without tokenizer.
        ModelError: the model does not show its scores, or they are no such sum: latent attention, clipped projections.
    """
    check_model(model)
    layer, number = place_of(model.graph, head)
    given = bind(model, prompts) if isinstance(prompts, (Task, BoundTask)) else prompts
    inputs, tokens, record = one_prompt(model, given, example, corrupted)
    spans = _spans(given, example, corrupted)
    at_query, at_key = (_position(name, where, tokens, spans) for name, where in (("query", query), ("key", key)))
    adapter, run = model.adapter, capture(model.adapter, inputs)
    form, labels = score_form(Restart(adapter, inputs, run), layer, number), position_labels(tokens)
    seen = form.visible[at_query].nonzero().flatten().tolist()
    if at_key not in seen:
        why = "comes after" if at_key > at_query else "lies outside the window of"
        raise ScoreError(f"key {labels[at_key]!r} {why} query {labels[at_query]!r}: {head} does not see it there")
    others = [at for at in seen if at != at_key] if against is None else [_position("against", against, tokens, spans)]
    if not others or others[0] not in seen or others == [at_key]:
        what = "no other key" if not others else f"against={labels[others[0]]!r}, which is no other key that it sees"
        raise ScoreError(f"query {labels[at_query]!r} has {what}: all of its attention is relative to that of others")
    positions = torch.tensor([at_key, *others])

    def side(kind: str, places: Tensor) -> Tensor:
        """`[places, nodes + 1, features]`."""
        affine = form.queries if kind == "q" else form.keys
        parts = read_parts(adapter, run, layer, kind, number, places) @ affine.linear[places]
        parts[:, -1] += affine.constant[places]
        return parts.double()

    of_query, of_keys = side("q", torch.tensor([at_query]))[0], side("k", positions)
    parts, other = (form.scale * of_query @ keys.T for keys in (of_keys[0], of_keys[1:].mean(0)))
    position, scores = form.position[at_query].double(), form.scores[at_query]
    made = form.capped(form.scale * of_query.sum(0) @ of_keys.sum(1).T + position[positions])
    if bool(((made - scores[positions]).abs() > tolerance(adapter) * form.scores[form.visible].abs().max()).any()):
        refuse(adapter, "scores are not the sum of what nodes add: are its queries or keys clipped?")
    return AttentionAttribution(
        head,
        labels[at_query],
        labels[at_key],
        labels[others[0]] if against is not None else f"the mean of {len(others)} other keys",
        (*model.graph.writer_names[: model.graph.reads(layer, "q")], CONSTANT),
        parts.cpu().numpy(),
        other.cpu().numpy(),
        torch.stack([position[at_key], position[others].mean()]).cpu().numpy(),
        float(form.pattern[at_query, at_key]),
        form.cap,
        replace(record, method="attention-attribution", sign=SIGN),
    )


def _spans(given: Any, example: int, corrupted: bool) -> dict[str, tuple[int, int]]:
    """The spans of a task's prompt, in positions without padding."""
    if not isinstance(given, BoundTask) or not given.spans or (corrupted and given.batch.alignment is not None):
        return {}
    side = given.batch.corrupted if corrupted else given.batch.clean
    before = int(side.mask[example].long().argmax())
    return {name: (start - before, stop - before) for name, (start, stop) in given.spans[example].items()}


def _position(name: str, where: Where, tokens: tuple[str, ...], spans: dict[str, tuple[int, int]]) -> int:
    """The position of the token that is meant."""
    labels = position_labels(tokens)
    if isinstance(where, Integral) and not isinstance(where, bool):
        found = [range(len(tokens))[where]] if -len(tokens) <= where < len(tokens) else []
    else:
        said = str(where).strip()
        found = list(range(*spans.get(said, (0, 0))))
        found = found or [len(tokens) - 1] * (said == END)
        found = found or [at for at, label in enumerate(labels) if said in (label, *label.split(" ", 1))]
    if len(found) == 1:
        return found[0]
    there = ", ".join(map(repr, (labels[at] for at in found or range(len(tokens)))))
    names = f"; spans: {', '.join(spans)}" if spans and not found else ""
    raise ScoreError(f"{name}={where!r} is {'several tokens' if found else 'no token'} of the prompt: {there}{names}")
