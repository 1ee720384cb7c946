"""From a circuit that does the task to one with every way of doing it: backups, alternatives, parts that cancel.

A search for the smallest circuit leaves out nodes that stand in for another (Wang et al. 2022, "Interpretability in the
wild", section 4). Single effects do not show them either: if either of two heads is enough, ablating one of them
changes nothing. Each of them shows an effect once the other is cut. So:

1. **Screen** a context, which is the model without some nodes (the first: without none): take the gradient of every
   pair's metric with respect to every edge. In the whole model, also take it at points between the ablated and the
   clean model: with all edges open by half, and with the input's edges open by a quarter, a half and three quarters.
   An edge's strength in a context is its largest |gradient| (in the whole model: or its |score|, if that is larger).
2. **Cut** the strongest nodes, one at a time: each makes a new context. If the model then still does part of the task
   (`ALIVE`), screen that context, and later cut, in addition, the nodes that became visible in it. The strongest node
   that waits is cut next.
3. **Confirm** by exact runs: ablate each edge of the circuit, and each edge that is strong in the whole model, in the
   whole model. While its effect is below `KEPT`, it is also ablated in contexts in which it is visible: with at least
   twice its gradient in the whole, open model. An edge of the circuit with effects below `LEFT` is also ablated in the
   contexts in which it is strongest.
4. Nodes whose strong edges still have no effect stand in for each other, or do nothing. Test each of the strongest
   (`STAND_INS`) in a context in which as many of the others are cut as the model can do without.
5. A saturated attention pattern passes no gradient on. So all edges between nodes with confirmed edges are run, too.
6. The largest change by which ablating an edge moves the metric, as a fraction of the total effect, decides: an edge
   outside the circuit is added from `KEPT` on, and one inside is removed below `LEFT`. An edge of the circuit that was
   not run stays; and all of them stay if the circuit would leave the target without them. A way of doing the task
   whose edges all have effects below `KEPT` is not found.
7. Added edges that oppose the task may lead off target, if the edges that compensate have effects too small to be
   added. Then re-scored pruning starts once more from the strongest edges, and never drops this circuit
   (`rescoring.py`).
8. If the time limit passes, the edges that are confirmed by then are added, and none are removed.

A context costs one run and, if the model still does the task, a masked gradient of `PAIRS` pairs (three passes; five
such gradients in the first context); there are at most `CONTEXTS`. Confirming costs at most `CONFIRMED` runs, strongest
edges first, and stand-ins at most `STAND_INS` squared: at most 480 runs of the search pairs and 60 passes of eight
pairs. A run starts at the first block that lacks an edge, so on SmolLM2's IOI all this cost 113 forward passes and 5
backward passes (docs/real-models.md).
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
PAIRS = 8  # pairs on which contexts are screened; edges are confirmed on all search pairs
ALIVE = 0.25  # the least faithfulness of a context that is screened
VISIBLE = 2.0  # an edge is visible in a context if it is this many times as strong as in the whole model
SCREENED = 0.02  # the least strength of an edge that is tested, as a fraction of the total effect
STAND_INS = 8
TRIES = 4  # the most contexts in which one edge is tested
KEPT, LEFT = 0.02, 0.002  # exact effects, as fractions of the total effect
AT_ONCE = 16  # edges confirmed between two checks of the time limit
LOOKING = 160  # estimated duration of screening all contexts, in confirming runs
OPENING = ((0.5, 0.5), (0.25, 1.0), (0.5, 1.0), (0.75, 1.0))  # points: mask of the input's edges, of all other edges
OPEN = ((1.0, 1.0),)

Cut = tuple[int, ...]  # writers, sorted


class _Context(NamedTuple):
    """The model without some nodes: its mask, its metric `[pairs]`, and the strength of each edge in it (a fraction of
    the total effect). Masks and strengths are `[writers, readers]`."""

    mask: np.ndarray
    metric: np.ndarray
    strength: np.ndarray


class Completion:
    """The search for what stands in for parts of a circuit; `completed` returns the larger circuit."""

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
        """Return the circuit with what stands in for its parts, and without edges that matter in no context."""
        with stages("completing", LOOKING + CONFIRMED) as part:
            with part(LOOKING):
                self._screen_contexts()
            with part(CONFIRMED), progress("confirming", CONFIRMED) as self.advance:
                effects = self._confirm(circuit.mask)
        more = circuit.mask | (effects >= KEPT)
        without = circuit.mask & (effects < LEFT)  # edges that were not run, with NaN, are not among them
        whole = self._run(more & ~without, circuit)
        if self.trials.meets(circuit) and not self.trials.meets(whole):  # many small effects may add up
            whole = self._run(more, circuit)
        if self.trials.meets(circuit) and not self.trials.meets(whole):
            whole = self._balanced(whole)
        added, gone = int((whole.mask & ~circuit.mask).sum()), int((circuit.mask & ~whole.mask).sum())
        said = f"{len(self.contexts)} contexts screened; added {added:,} edges that matter in one of them"
        self.trials.say("complete", f"{said}, removed {gone:,} of {circuit.n_edges:,} that matter in none")
        return whole

    def so_far(self, circuit: Tried) -> Tried:
        """Return the circuit with the edges that are confirmed by now, if there is no time for the rest."""
        whole = self._run(circuit.mask | (self.tests.effects >= KEPT), circuit, late=True)
        added = int((whole.mask & ~circuit.mask).sum())
        self.trials.say("complete", f"added {added:,} edges that were confirmed in time")
        return whole

    def _run(self, mask: np.ndarray, otherwise: Tried, late: bool = False) -> Tried:
        mask = connected(self.graph, mask)
        return self.trials.run(mask, "complete", late=late) if mask.any() else otherwise

    def _balanced(self, whole: Tried) -> Tried:
        """Return the smallest circuit on target with all edges of `whole` and some that compensate; else `whole`."""
        Rescoring(self.trials, self.scores, whole.mask).run()
        holding = (tried for tried in self.trials.every() if not (whole.mask & ~tried.mask).any())
        balanced = next(filter(self.trials.meets, holding), whole)
        said = (
            f"with its backups the circuit is off target (faithfulness {whole.faithfulness:.2f} on the search pairs),"
        )
        said += " because they include edges that oppose the task"
        if balanced is whole:
            said += "; leave out complete=True for a faithful circuit"
            warn(said)
        else:
            added = balanced.n_edges - whole.n_edges
            said += f"; {added:,} weak edges were added to compensate (faithfulness {balanced.faithfulness:.2f})"
        self.trials.say("complete", said)
        return balanced

    # ---------------------------------------------------------------- contexts
    def _screen_contexts(self) -> None:
        """Screen contexts, the whole model first."""
        waiting: dict[Cut, float] = {(): 0.0}  # with the strength of the last node to cut
        tried: set[Cut] = set()
        dead: list[Cut] = []
        with progress("contexts", CONTEXTS) as advance:
            while waiting and len(tried) < CONTEXTS:
                cut = max(waiting, key=waiting.__getitem__)
                del waiting[cut]
                tried.add(cut)
                if (context := self._context(cut)) is not None:
                    self.contexts[cut] = context
                    for node, strength in self._nodes_to_cut(cut):
                        more = tuple(sorted((*cut, node)))
                        if more not in tried and not any(set(one) <= set(more) for one in dead):
                            waiting.setdefault(more, strength)
                else:
                    dead.append(cut)
                    waiting = {one: of for one, of in waiting.items() if not set(cut) <= set(one)}
                advance(1)

    def _context(self, cut: Cut) -> _Context | None:
        """Return the screened context without these nodes; None if the model no longer does the task."""
        tried = self._without(cut)
        if tried.faithfulness < ALIVE:
            return None
        strength = self._screen(tried.mask, OPEN)
        if not cut:
            self.open_strength = strength
            strength = np.maximum(np.maximum(strength, self._screen(tried.mask, OPENING)), self.estimates)
        return _Context(tried.mask, tried.outcome.metric, strength)

    def _without(self, cut: Cut) -> Tried:
        """Return the model without these nodes, run once."""
        if (cut := tuple(sorted(cut))) not in self._cut:
            mask = self.graph.real.copy()
            mask[list(cut)] = False
            self._cut[cut] = self.trials.look(mask)
        return self._cut[cut]

    def _screen(self, mask: np.ndarray, points: Sequence[tuple[float, float]]) -> np.ndarray:
        """Return each edge's largest mean |gradient| at any of the points, as a fraction of the total effect,
        `[writers, readers]`."""
        experiment, found = self.evaluator.experiment, np.zeros(mask.shape)
        for of_input, of_others in points:
            self.trials.check_time()
            soft = torch.from_numpy(mask).to(experiment.adapter.device, experiment.adapter.work) * of_others
            soft[0] *= of_input / of_others
            each = gradients_at(experiment, self.runs, soft, mask, "screening")
            found[mask] = np.maximum(found[mask], np.abs(each).mean(1) / self.contrast)
        return found

    def _nodes_to_cut(self, cut: Cut) -> list[tuple[int, float]]:
        """Return the nodes to cut next, with their strength: those with a strong edge in this context that, unless the
        context is the whole model, became visible."""
        strength = self.contexts[cut].strength
        before = self.contexts[()].strength if cut else np.zeros_like(strength)
        visible = np.where(strength >= VISIBLE * before, strength, 0)
        nodes = visible.max(axis=1)
        return [(node, float(nodes[node])) for node in np.flatnonzero(nodes >= SCREENED).tolist() if node]

    def _confirm(self, inside: np.ndarray) -> np.ndarray:
        """Return the largest change of the metric by ablating each edge in any context, `[writers, readers]`, as a
        fraction of the total effect; NaN for edges that were not run. `inside`: the circuit."""
        contexts = list(self.contexts.values())
        strengths = np.stack([context.strength for context in contexts])
        self.tests = tests = _Tests(self, contexts, strengths.max(0))
        order = np.argsort(-strengths[1:], axis=0, kind="stable") + 1  # for each edge, the contexts with cuts
        cells = np.argwhere(inside | (strengths[0] >= SCREENED))
        tests.run(cells, np.zeros(len(cells), dtype=int))
        for chosen in order[: TRIES - 1]:
            there = np.take_along_axis(strengths, chosen[None], axis=0)[0]
            visible = (there >= SCREENED) & (there >= VISIBLE * self.open_strength)
            cells = np.argwhere((visible & (tests.effects < KEPT)) | (inside & (tests.effects < LEFT)))
            tests.run(cells, chosen[tuple(cells.T)])
        self._stand_ins(tests)
        sure, serves = tests.effects >= KEPT, self.graph.serves
        read = np.asarray(sure.any(axis=0))
        nodes = np.asarray((read[:, None] & serves).any(axis=0))
        # the last context with a sure edge: into each reader, then into each node, which all its readers share
        context = np.where(sure, tests.context, 0).max(0)
        context = (serves * (serves * context[:, None]).max(0)).max(1)
        writers, readers = np.asarray(sure.any(axis=1)), np.asarray((serves & nodes).any(axis=1))
        joining = self.graph.real & writers[:, None] & readers & (tests.effects == 0)
        cells = np.argwhere(joining)
        tests.run(cells, np.zeros(len(cells), dtype=int))
        tests.run(cells, context[cells[:, 1]])
        return np.where(tests.done, tests.effects, np.nan)

    def _stand_ins(self, tests: _Tests) -> None:
        """Test the edges of nodes that may stand in for each other: each with as many of the others cut as possible."""
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
    """Exact runs of contexts with one more edge ablated, at most `CONFIRMED`. Arrays are `[writers, readers]`.

    Attributes:
        rank: edges with larger values are run first.
        effects: the largest change of the metric by ablating the edge, as a fraction of the total effect.
        context: the number of the context in which it was largest.
        done: whether the edge was run.
        left: the number of runs that are left.
    """

    def __init__(self, search: Completion, contexts: list[_Context], rank: np.ndarray) -> None:
        self.search, self.contexts, self.rank = search, contexts, rank
        self.effects, self.context = np.zeros(rank.shape), np.zeros(rank.shape, dtype=int)
        self.done = np.zeros(rank.shape, dtype=bool)
        self.left = CONFIRMED

    def run(self, cells: np.ndarray, contexts: np.ndarray) -> None:
        """Ablate edges `[edges, 2]`, each in the context with this number `[edges]`, unless the context lacks it."""
        first = np.argsort(-self.rank[tuple(cells.T)], kind="stable")
        tests = [(int(contexts[at]), *cells[at].tolist()[::-1]) for at in first]
        tests = [one for one in tests if self.contexts[one[0]].mask[one[:0:-1]]][: self.left]
        tests.sort()  # so that runs in one batch restart in the same layer
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
