"""ACDC's loop over the edges, on all batches of a task at once, with as few runs as the decisions allow.

1. An edge that is already removed (with a dangling node) is skipped.
2. An edge is decided without a run if its effect is exactly 0: its reader no longer leads to the logits, or, under
   interchange, no path of kept edges reaches its writer (`engine/reach.py`). The rule is applied to the effect 0, as a
   threshold may be 0 or negative.
3. Consecutive screened edges are removed together, and one run measures the circuit that is left.
4. Of the other edges, the next few are tried side by side, each without all edges before it. The removals are accepted
   up to the first edge that stays (or that leaves a node dangling, if dangling nodes are removed). Twice as many edges
   are tried next if all were removed.
5. If the rule removes dangling nodes, a node that has lost its last input loses its outgoing edges; so do the nodes
   that lose their last input through this, and so on.
6. Several processes each hold the states of some pairs. If there are more processes than pairs, the processes with the
   same pairs divide the trials, and each repeats the accepted trial if another process ran it. Metrics are added up in
   the order of the batches.
7. Every 128 runs the states are computed anew from the mask, so that rounding errors do not accumulate, and the
   decisions so far are written to the checkpoint. A run that continues from there computes the same states, so it
   repeats the later decisions of the stopped run to the bit. The file's key holds everything that decides an effect:
   model, prompts, metric, ablation, edges and their order, and the rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain
from os import PathLike

import numpy as np
import torch

from circuitfind import processes
from circuitfind.checkpoint import CheckpointFile, key_of
from circuitfind.engine.batches import free_memory, out_of_memory
from circuitfind.engine.memory_plan import MOST_TRIALS, TRIALS, budget, room
from circuitfind.engine.revision import CircuitState, trial_bytes
from circuitfind.errors import ScoreError, check_count, warn
from circuitfind.evaluation.faithfulness import Evaluator
from circuitfind.progress import progress
from circuitfind.search.acdc_rule import (
    CUT_OFF,
    DANGLING,
    REASONS,
    SCREENED,
    TESTED,
    UNREACHED,
    Decision,
    Edge,
    Rule,
    mask_after,
)

RUNS_BETWEEN_STATES = 128


class Pruning:
    """A run of the loop.

    Args:
        side_by_side: the most trials in one batch; None: as many as make the device faster.

    Attributes:
        decisions: in the order in which they were made.
        position: number of edges that have had their turn.
        current: mean metric of the current circuit.
        at_once: number of edges to try side by side next.
        screening_runs: number of runs that measured the circuit after screened edges were removed.
    """

    def __init__(self, evaluator: Evaluator, rule: Rule, edges: list[Edge], side_by_side: int | None = None) -> None:
        if side_by_side is not None:
            check_count("side_by_side", side_by_side, 1)
        self.evaluator, self.rule, self.edges = evaluator, rule, edges
        self.decisions: list[Decision] = []
        self.position, self.at_once, self.screening_runs = 0, 1, 0
        self.current = float(evaluator.full.mean())
        self._side_by_side = side_by_side
        device = evaluator.experiment.adapter.device
        self._division = processes.division(len(evaluator.full), MOST_TRIALS.at_most(device))
        self._states: list[CircuitState] = []
        self._groups: list[list[Edge]] = []  # the trials of the last run
        self._own = slice(0, 0)  # the trials among them that this process has run
        self._runs = 0  # trials since the states were computed

    @property
    def mask(self) -> np.ndarray:
        """The current circuit, `[writers, readers]` bool."""
        return mask_after(self.evaluator.graph.real, self.decisions)

    def run(self, checkpoint: str | PathLike[str] | None, label: str = "ACDC") -> CheckpointFile:
        """Run to the end, from where the checkpoint left off; return the checkpoint, with the finished run in it.

        Raises:
            FileError: the checkpoint belongs to another run.
        """
        parts = "model, prompts, metric, threshold, order or options"
        file = CheckpointFile(checkpoint, self._key() if checkpoint else "", parts)
        known = file.read()
        if known is not None:
            self._restore(known)
        with progress(label, len(self.edges)) as advance:
            advance(self.position)
            self._renew()
            while (at := self.position) < len(self.edges):
                if self._runs >= RUNS_BETWEEN_STATES:
                    self._renew()
                    file.write(self._arrays())
                self._step()
                advance(self.position - at)
        file.write(self._arrays())
        return file

    # ---------------------------------------------------------------- decisions
    def _step(self) -> None:
        """Decide the next edge, and the edges after it that can be decided in the same run."""
        edge = self.edges[self.position]
        self.position += 1
        if not self._states[0].mask[edge]:
            return
        why = self._without_effect(edge)
        if why is not None:
            self._cascade(self._decide(edge, why))
        elif self.rule.screens(edge):
            self._screen(self._group_from(edge, len(self.edges)))
        else:
            self._try(self._group_from(edge, min(self.at_once, self._most)))

    def _without_effect(self, edge: Edge) -> str | None:
        """Return the reason if the edge's effect is known to be exactly 0, else None."""
        state, (writer, reader) = self._states[0], edge
        if not state.reach.useful[reader]:
            return CUT_OFF
        return UNREACHED if state.prepared.interchange and not state.reach.reached[writer] else None

    def _decide(self, edge: Edge, how: str, kept: bool | None = None) -> list[int]:
        """Decide an edge without effect, by the rule unless `kept` is given; return nodes that lost their last input
        by it."""
        kept = not self.rule.goes(0.0) if kept is None else kept
        self.decisions.append(Decision(edge, 0.0, kept, how))
        return [] if kept else self._in_all_states(lambda state: state.drop(edge))

    def _group_from(self, edge: Edge, most: int) -> list[Edge]:
        """Return the edge and the edges after it that are screened like it (or tried like it) and not decided without a
        run: at most `most`, up to the first whose removal leaves a node dangling if dangling nodes are removed."""
        group, screened = {edge: None}, self.rule.screens(edge)
        for other in self.edges[self.position : self.position + most - 1]:
            there = bool(self._states[0].mask[other]) and other not in group
            if not there or self.rule.screens(other) != screened or self._without_effect(other) is not None:
                break
            group[other] = None
        place = self._states[0].reach.without_inputs(list(group)) if self.rule.dangling else None
        return list(group)[: None if place is None else place + 1]

    def _screen(self, group: list[Edge]) -> None:
        """Remove edges without a test, and measure the circuit that is left."""
        (self.current,) = self._measured([group])
        self._check_finite(self.current, group[-1])
        self.screening_runs += 1
        self.decisions += [Decision(edge, math.nan, False, SCREENED) for edge in group]
        self.position += len(group) - 1
        self._cascade(self._commit(0))

    def _try(self, group: list[Edge]) -> None:
        """Try edges side by side, each without all edges before it."""
        accepted = 0
        metrics = self._measured([[edge] for edge in group])
        for edge, after in zip(group, metrics, strict=False):  # fewer metrics if memory ran out
            if not self._test(edge, after):
                break
            accepted += 1
        decided = min(accepted + 1, len(metrics))
        self.at_once = max(self.at_once, 2 * accepted) if accepted == len(metrics) else max(1, accepted)
        self.position += decided - 1
        if accepted:
            self._cascade(self._commit(accepted - 1))

    def _test(self, edge: Edge, after: float) -> bool:
        """Decide an edge by `after`, the metric without it; return whether it is removed."""
        self._check_finite(after, edge)
        goes = self.rule.goes(self.current - after)
        self.decisions.append(Decision(edge, self.current - after, not goes, TESTED))
        self.current = after if goes else self.current
        return goes

    def _check_finite(self, after: float, edge: Edge) -> None:
        if not math.isfinite(after):
            name, found = self.evaluator.graph.edge_name(*edge), "NaN" if math.isnan(after) else "infinite"
            raise ScoreError(f"the metric is {found} after removing {name}: look for inf or NaN in the model's logits")

    def _cascade(self, dangling: list[int]) -> None:
        """If the rule says so, remove the outgoing edges of nodes without inputs, and of the nodes that lose their last
        input through this. A node's edges are removed in the graph's order of readers."""
        pending = dangling if self.rule.dangling else []
        while pending:
            node, *pending = pending
            if node < self.evaluator.graph.n_writers:
                for reader in np.flatnonzero(self._states[0].mask[node]).tolist():
                    pending += self._remove_dangling((node, reader))

    def _remove_dangling(self, edge: Edge) -> list[int]:
        """Decide an edge from a dangling node; return the nodes that lost their last input."""
        if self._without_effect(edge) is not None:
            return self._decide(edge, DANGLING, kept=None if self.rule.dangling == "tested" else False)
        (after,) = self._measured([[edge]])
        return self._commit(0) if self._test(edge, after) else []

    # ---------------------------------------------------------------- runs
    def _renew(self) -> None:
        """Compute the states from the mask, and how many trials fit in a batch."""
        adapter = self.evaluator.experiment.adapter
        self._states, mask, device = [], self.mask, adapter.device

        def compute() -> tuple[float, int]:
            prepared = self.evaluator.prepared(self._division)
            self._states = [CircuitState(one, mask, budget(device) // len(prepared)) for one in prepared]
            n_tokens = max(one.inputs.ids.numel() for one in prepared)
            fit = budget(device) // trial_bytes(adapter, n_tokens)
            return room().part, min(MOST_TRIALS.at_most(device), TRIALS.at_most(device) // n_tokens, fit)

        parts, trials = zip(*processes.gathered(compute), strict=True)
        room().part = min(parts)
        self._most = self._side_by_side or max(1, min(trials)) * self._division.most
        self._runs = 0

    def _commit(self, trial: int) -> list[int]:
        """Make a trial of the last run the current state of every batch; return the nodes that lost their last input. A
        trial that another process ran is repeated first."""
        own = self._own
        if own.start <= trial < own.stop:
            return self._in_all_states(lambda state: state.commit(trial - own.start))
        gone = list(chain(*self._groups[: trial + 1]))
        for state in self._states:
            state.attempt([gone])
        return self._in_all_states(lambda state: state.commit(0))

    def _in_all_states(self, change: Callable[[CircuitState], list[int]]) -> list[int]:
        """Change every batch's state; return the result, which is the same for all batches."""
        return [change(state) for state in self._states][-1]

    def _measured(self, groups: list[list[Edge]]) -> list[float]:
        """Return the mean metric after the removal of each group and all groups before it; if memory runs out, of the
        first groups only."""
        while True:
            try:
                metrics = self._metrics(groups)
                self._runs += len(groups)
                return metrics
            except Exception as error:
                smaller = self.evaluator.runs.size // 2
                if not out_of_memory(error) or (len(groups) == 1 and not smaller):
                    raise
            if len(groups) > 1:
                groups = groups[: len(groups) // 2]
                self._side_by_side = self._most = len(groups)
                self._free()
                warn(f"out of memory: going on with {len(groups)} trials side by side")
                continue
            self._states = []
            self._free()
            warn(f"out of memory: going on with batches of {smaller}")
            self.evaluator = Evaluator(self.evaluator.experiment.set(batch_size=smaller))
            self._renew()

    def _free(self) -> None:
        free_memory(self.evaluator.experiment.adapter.device)

    def _metrics(self, groups: list[list[Edge]]) -> list[float]:
        """Return the mean metrics of `_measured`, in one batch of trials; each process runs its part of them."""
        own = self._division.part(len(groups))
        self._groups, self._own = groups, own
        mine = [list(chain(*groups[: own.start + 1])), *groups[own.start + 1 : own.stop]]

        def one(state: CircuitState) -> np.ndarray:
            logits, batch = state.attempt(mine), state.prepared.batch
            values = torch.stack([self.evaluator.bound.metric(one, batch) for one in logits])
            return np.asarray(values.cpu().double().sum(-1))

        total = np.zeros(len(groups))
        states = self._states if own.stop > own.start else []
        for tried, sums in processes.gathered(lambda: (own, [one(state) for state in states])):
            for values in sums:  # in the order of the batches
                total[tried] += values
        means: list[float] = (total / len(self.evaluator.full)).tolist()
        return means

    # ---------------------------------------------------------------- on disk
    def _key(self) -> str:
        """Return a digest of everything that decides the effects."""
        rule, run = self.rule, self.evaluator.experiment.key(np.array(self.edges))
        mask = np.zeros(0) if rule.screened is None else rule.screened
        return key_of(run, mask, "acdc", rule.threshold, rule.absolute, rule.dangling, RUNS_BETWEEN_STATES)

    def _arrays(self) -> dict[str, np.ndarray]:
        edges, effects, kept, how = zip(*self.decisions, strict=True) if self.decisions else ([], [], [], [])
        return {
            "edges": np.array(edges, dtype=np.int32).reshape(-1, 2),
            "effects": np.array(effects, dtype=np.float64),
            "kept": np.array(kept, dtype=np.uint8),
            "how": np.array([REASONS.index(one) for one in how], dtype=np.uint8),
            "counts": np.array([self.position, self.at_once, self.screening_runs], dtype=np.int64),
            "current": np.array([self.current], dtype=np.float64),
        }

    def _restore(self, known: dict[str, np.ndarray]) -> None:
        columns = (known[name].tolist() for name in ("edges", "effects", "kept", "how"))
        self.decisions = [
            Decision((edge[0], edge[1]), effect, bool(kept), REASONS[how])
            for edge, effect, kept, how in zip(*columns, strict=True)
        ]
        self.position, self.at_once, self.screening_runs = known["counts"].tolist()
        self.current = float(known["current"][0])
