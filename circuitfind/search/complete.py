"""From a circuit that does the task to one that holds every way of doing it: backups, either-or, what cancels.

A search for the smallest circuit leaves out what stands in for another part (Wang et al. 2022, "Interpretability in the
wild", section 4), and single effects do not show it either: ablating one of two heads of which either will do changes
nothing. It becomes visible where the other is cut. So:

1. **Screen** a context, the model without some nodes (first: none): the gradient of every pair's metric with respect to
   every edge. In the whole model it is taken along the way from the ablated to the clean model, too: with all edges
   opened by half, and with the input's edges opened by a quarter, a half and three quarters. The largest |gradient|
   counts: an edge that matters anywhere on the way is seen. So do the scores that the search began with.
2. **Cut** the strongest nodes, one at a time: each is a new context. Where the model then still does part of the task
   (`ALIVE`), it is screened. Nodes that became visible there are cut beside it; whatever node is strongest comes next.
3. **Confirm** by exact runs: each edge of the circuit, and what the screen of the whole model shows, is ablated in the
   whole model. As long as it does nothing it is ablated in the contexts where it is visible, too: where its gradient is
   above that of the whole, open model (edges of the circuit: where they look strongest).
4. Nodes whose edges are still open stand in for each other, or do nothing. Each of the strongest (`STAND_INS`) is
   looked at where as many of the others are cut as the model can do without.
5. A saturated attention pattern passes no gradient on. So all edges that join nodes which are sure by now are run, too.
6. What ablating an edge changes at most, as a share of the total effect, decides: `KEPT` for edges outside the circuit,
   `LEFT` for those inside it. An edge of the circuit that there was no run for stays, and all of them stay where the
   circuit would otherwise leave the target. A way whose edges all matter less than `KEPT` is not found.
7. Edges that oppose the task may lead off target, where those that make up for them matter too little to be added. Then
   re-scored pruning goes down once more from the strongest edges, and never drops these (`rescoring.py`).
8. Out of time, what was confirmed by then is added, and nothing is left out.

A context costs a run, and where it is alive a masked gradient of `PAIRS` pairs (three passes), the first one five;
there are at most `CONTEXTS`. Confirming costs at most `CONFIRMED` runs, strongest edges first, stand-ins at most
`STAND_INS` squared: at most 480 runs of the search pairs and 60 passes of eight pairs. A run starts at the first block
that lacks an edge: in all that was 113 forward passes on SmolLM2's IOI, and 5 backward (docs/real-models.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from circuitfind.circuit import connected
from circuitfind.engine.prepare import PreparedRuns
from circuitfind.errors import warn
from circuitfind.progress import progress, stages
from circuitfind.scores import Scores
from circuitfind.search.rescoring import Rescoring, gradients_at
from circuitfind.search.trials import Trials, Tried

CONTEXTS, CONFIRMED = 16, 400
PAIRS = 8  # that contexts are screened on; edges are confirmed on all search pairs
ALIVE = 0.25  # of the total effect
VISIBLE = 2.0  # times stronger than in the whole model
SCREENED = 0.02  # of the total effect, by gradient
STAND_INS = 8
TRIES = 4  # contexts in which an edge is confirmed
KEPT, LEFT = 0.02, 0.002  # of the total effect, exactly
AT_ONCE = 16  # edges confirmed between two looks at the time limit
LOOKING = 160  # what contexts cost, in confirming runs
OPENING = ((0.5, 0.5), (0.25, 1.0), (0.5, 1.0), (0.75, 1.0))  # how far the input's edges, and all others, are open
OPEN = ((1.0, 1.0),)

Cut = tuple[int, ...]  # writers, sorted


class _Context(NamedTuple):
    """The model without some nodes: its mask, its metric `[pairs]`, and how strong each edge looks in it."""

    mask: np.ndarray
    metric: np.ndarray
    strength: np.ndarray


class Completion:
    """The search; `completed` gives its circuit."""

    def __init__(self, trials: Trials, scores: Scores) -> None:
        self.trials, self.graph, self.evaluator = trials, trials.graph, trials.evaluator
        ends = self.evaluator
        self.contrast = abs(float((ends.full - ends.empty).mean()))
        estimates = np.abs(scores.values) / self.contrast if scores.record.is_effect else np.zeros(scores.values.shape)
        self.estimates = np.where(self.graph.real, estimates, 0)
        self.contexts: dict[Cut, _Context] = {}
        self._cut: dict[Cut, Tried] = {(): trials.whole()}
        batch = ends.experiment.batch
        some = batch.rows(torch.arange(min(PAIRS, len(batch)), device=batch.answers.device))
        self.advance: Callable[[int], None] = lambda steps: None
        self.runs = PreparedRuns(ends.experiment, some, ends.runs.size)
        self.scores, self.tests = scores, _Tests(self, [], self.estimates)

    def completed(self, circuit: Tried) -> Tried:
        """The circuit with what stands in for its parts, and without what nowhere matters."""
        with stages("completing", LOOKING + CONFIRMED) as part:
            with part(LOOKING):
                self._look()
            with part(CONFIRMED), progress("confirming", CONFIRMED) as self.advance:
                effects = self._confirm(circuit.mask)
        more = circuit.mask | (effects >= KEPT)
        whole = self._run(more & ~(circuit.mask & (effects < LEFT)), circuit)  # not those that were not run: NaN
        if self.trials.meets(circuit) and not self.trials.meets(whole):  # many that hardly matter may do so together
            whole = self._run(more, circuit)
        if self.trials.meets(circuit) and not self.trials.meets(whole):
            whole = self._balanced(whole)
        added, gone = int((whole.mask & ~circuit.mask).sum()), int((circuit.mask & ~whole.mask).sum())
        said = f"{len(self.contexts)} contexts looked at; {added:,} edges added that matter there"
        self.trials.say("complete", f"{said}, {gone:,} of {circuit.n_edges:,} left out that matter nowhere")
        return whole

    def so_far(self, circuit: Tried) -> Tried:
        """The circuit with what is confirmed by now, where there was no time for the rest."""
        whole = self._run(circuit.mask | (self.tests.effects >= KEPT), circuit, late=True)
        added = int((whole.mask & ~circuit.mask).sum())
        self.trials.say("complete", f"{added:,} edges added that were confirmed in time")
        return whole

    def _run(self, mask: np.ndarray, otherwise: Tried, late: bool = False) -> Tried:
        mask = connected(self.graph, mask)
        return self.trials.run(mask, "complete", late=late) if mask.any() else otherwise

    def _balanced(self, whole: Tried) -> Tried:
        """The smallest circuit on target that holds this one and what makes up for it; else this one."""
        Rescoring(self.trials, self.scores, whole.mask).run()
        holding = (tried for tried in self.trials.every() if not (whole.mask & ~tried.mask).any())
        balanced = next(filter(self.trials.meets, holding), whole)
        said = f"with what stands in for its parts the circuit is off target (faithfulness {whole.faithfulness:.2f}"
        said += " on the search pairs): edges that oppose the task are in"
        if balanced is whole:
            said += "; for a faithful circuit leave complete=True out"
            warn(said)
        else:
            added = balanced.n_edges - whole.n_edges
            said += f"; {added:,} weak edges that make up for them bring it back ({balanced.faithfulness:.2f})"
        self.trials.say("complete", said)
        return balanced

    # ---------------------------------------------------------------- contexts
    def _look(self) -> None:
        """Screens contexts, the whole model first."""
        waiting: dict[Cut, float] = {(): 0.0}  # and how strong the node is that is cut last
        tried: set[Cut] = set()
        dead: list[Cut] = []
        with progress("contexts", CONTEXTS) as advance:
            while waiting and len(tried) < CONTEXTS:
                cut = max(waiting, key=waiting.__getitem__)
                del waiting[cut]
                tried.add(cut)
                if (context := self._context(cut)) is not None:
                    self.contexts[cut] = context
                    for node, strength in self._strong(cut):
                        more = tuple(sorted((*cut, node)))
                        if more not in tried and not any(set(one) <= set(more) for one in dead):
                            waiting.setdefault(more, strength)
                else:
                    dead.append(cut)
                    waiting = {one: of for one, of in waiting.items() if not set(cut) <= set(one)}
                advance(1)

    def _context(self, cut: Cut) -> _Context | None:
        """None where the model does nothing without these nodes."""
        tried = self._without(cut)
        if tried.faithfulness < ALIVE:
            return None
        strength = self._screen(tried.mask, OPEN)
        if not cut:
            self.open = strength
            strength = np.maximum(np.maximum(strength, self._screen(tried.mask, OPENING)), self.estimates)
        return _Context(tried.mask, tried.outcome.metric, strength)

    def _without(self, cut: Cut) -> Tried:
        """The model without these nodes."""
        if (cut := tuple(sorted(cut))) not in self._cut:
            mask = self.graph.real.copy()
            mask[list(cut)] = False
            self._cut[cut] = self.trials.look(mask)
        return self._cut[cut]

    def _screen(self, mask: np.ndarray, points: Sequence[tuple[float, float]]) -> np.ndarray:
        """`[writers, readers]`: the largest mean |gradient| at any point, as a share of the total effect."""
        experiment, found = self.evaluator.experiment, np.zeros(mask.shape)
        for of_input, of_others in points:
            self.trials.check_time()
            soft = torch.from_numpy(mask).to(experiment.adapter.device, experiment.adapter.work) * of_others
            soft[0] *= of_input / of_others
            each = gradients_at(experiment, self.runs, soft, mask, "screening")
            found[mask] = np.maximum(found[mask], np.abs(each).mean(1) / self.contrast)
        return found

    def _strong(self, cut: Cut) -> list[tuple[int, float]]:
        """Nodes to cut next, and how strong they are: in the whole model all that are screened, else those that became
        visible."""
        strength = self.contexts[cut].strength
        before = self.contexts[()].strength if cut else np.zeros_like(strength)
        visible = np.where(strength >= VISIBLE * before, strength, 0)
        nodes = visible.max(axis=1)
        return [(node, float(nodes[node])) for node in np.flatnonzero(nodes >= SCREENED).tolist() if node]

    def _confirm(self, inside: np.ndarray) -> np.ndarray:
        """`[writers, readers]`: what ablating an edge changes at most in the contexts tried, as a share of the total
        effect; NaN where none was run."""
        contexts = list(self.contexts.values())
        strengths = np.stack([context.strength for context in contexts])
        self.tests = tests = _Tests(self, contexts, strengths.max(0))
        order = np.argsort(-strengths[1:], axis=0, kind="stable") + 1  # of the contexts with cuts, for each edge
        cells = np.argwhere(inside | (strengths[0] >= SCREENED))
        tests.run(cells, np.zeros(len(cells), dtype=int))
        for chosen in order[: TRIES - 1]:
            there = np.take_along_axis(strengths, chosen[None], axis=0)[0]
            visible = (there >= SCREENED) & (there >= VISIBLE * self.open)
            cells = np.argwhere((visible & (tests.effects < KEPT)) | (inside & (tests.effects < LEFT)))
            tests.run(cells, chosen[tuple(cells.T)])
        self._stand_ins(tests)
        sure, serves = tests.effects >= KEPT, self.graph.serves
        read = np.asarray(sure.any(axis=0))
        nodes = np.asarray((read[:, None] & serves).any(axis=0))
        context = np.where(sure, tests.context, 0).max(0)  # by reader; then by node, and by reader again
        context = (serves * (serves * context[:, None]).max(0)).max(1)
        writers, readers = np.asarray(sure.any(axis=1)), np.asarray((serves & nodes).any(axis=1))
        joining = self.graph.real & writers[:, None] & readers & (tests.effects == 0)
        cells = np.argwhere(joining)
        tests.run(cells, np.zeros(len(cells), dtype=int))
        tests.run(cells, context[cells[:, 1]])
        return np.where(tests.done, tests.effects, np.nan)

    def _stand_ins(self, tests: _Tests) -> None:
        """Tests the edges of nodes that stand in for each other: each node where all others are cut that can be."""
        open_ = self.graph.real & (tests.rank >= SCREENED) & (tests.effects < KEPT)
        size = np.where(open_, tests.rank, 0).max(1)
        nodes = [node for node in np.argsort(-size, kind="stable").tolist() if node and size[node]][:STAND_INS]
        for node in nodes if len(nodes) > 1 else []:
            cut: tuple[int, ...] = ()
            for other in nodes:
                if other != node and self._without((*cut, other)).faithfulness >= ALIVE:
                    cut = (*cut, other)
            if tuple(sorted(cut)) not in self.contexts:
                alive = self._without(cut)
                tests.contexts.append(_Context(alive.mask, alive.outcome.metric, np.zeros(open_.shape)))
                touching = open_ & ((np.arange(len(open_)) == node)[:, None] | self.graph.serves[:, node])
                cells = np.argwhere(touching & (tests.effects < KEPT))
                tests.run(cells, np.full(len(cells), len(tests.contexts) - 1))


class _Tests:
    """Exact runs of contexts without one edge, while there are any left.

    Attributes:
        rank: `[writers, readers]`, which edges come first.
        effects: the largest change that ablating an edge made, as a share of the total effect; context: in which one;
            done: whether it was run at all.
    """

    def __init__(self, search: Completion, contexts: list[_Context], rank: np.ndarray) -> None:
        self.search, self.contexts, self.rank = search, contexts, rank
        self.effects, self.context = np.zeros(rank.shape), np.zeros(rank.shape, dtype=int)
        self.done = np.zeros(rank.shape, dtype=bool)
        self.left = CONFIRMED

    def run(self, cells: np.ndarray, contexts: np.ndarray) -> None:
        """Ablates edges `[edges, 2]`, each in the context of this number `[edges]`, unless its writer is cut there."""
        first = np.argsort(-self.rank[tuple(cells.T)], kind="stable")
        tests = [(int(contexts[at]), *cells[at].tolist()[::-1]) for at in first]
        tests = [one for one in tests if self.contexts[one[0]].mask[one[:0:-1]]][: self.left]
        tests.sort()  # runs side by side are those that restart in the same layer
        self.left -= len(tests)
        for start in range(0, len(tests), AT_ONCE):
            self.search.trials.check_time()
            some = tests[start : start + AT_ONCE]
            masks = np.stack([self.contexts[number].mask for number, _, _ in some])
            for mask, (_, reader, writer) in zip(masks, some, strict=True):
                mask[writer, reader] = False
            for (number, reader, writer), metric in zip(some, self.search.evaluator.run(masks).metric, strict=True):
                change = float(np.abs(metric - self.contexts[number].metric).mean()) / self.search.contrast
                self.done[writer, reader] = True
                if change > self.effects[writer, reader]:
                    self.effects[writer, reader], self.context[writer, reader] = change, number
            self.search.advance(len(some))
