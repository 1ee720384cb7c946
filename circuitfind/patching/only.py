"""`only`: run the user's own Hugging Face model as a circuit, for experiments with the user's own hooks and code.

1. On entering the block, both prompts of all pairs are run once, and every writer's ablated value is kept.
2. Inside, each forward pass of the Hugging Face model on clean prompts of the task runs the circuit: edges outside it
   carry ablated values to their readers (`engine/circuit_run.py`). So the user's hooks see the circuit's heads, MLPs
   and logits. The residual stream between blocks is the sum of the circuit's writers; each reader's input is
   replaced at its projection.
3. Any other prompt raises an error, because its ablated values are unknown. `run` takes a task with other pairs.
4. Other functions of circuitfind raise an error inside, because their clean run would be the circuit's.
5. On leaving, the model is restored.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from typing import Any, Unpack

import torch
from einops import rearrange
from torch import Tensor, nn

from circuitfind.batch import Batch
from circuitfind.calls import ready
from circuitfind.circuit import Circuit, as_circuit
from circuitfind.engine.ablation import Ablation
from circuitfind.engine.batches import in_batches, within_memory
from circuitfind.engine.capture import Run
from circuitfind.engine.circuit_run import CircuitVisitor, Plan, prefers_sparse, run_circuits
from circuitfind.engine.experiment import Experiment, bind, check_model
from circuitfind.engine.memory_plan import KEPT_RUNS, run_bytes
from circuitfind.engine.prepare import Prepared
from circuitfind.errors import NoFile, TaskError
from circuitfind.models.backends import attached, read_rows, undisturbed
from circuitfind.models.load import Model
from circuitfind.setting import JudgeKeywords
from circuitfind.tasks.bound import BoundTask
from circuitfind.tasks.task import Task
from circuitfind.tasks.tokens import piece


@contextmanager
def only(
    model: Model, circuit: Circuit | Iterable[str], task: Task | BoundTask, **asked: Unpack[JudgeKeywords]
) -> Iterator[CircuitModel]:
    """Run a model as a circuit inside a `with` block.

    Inside, `model.hf(...)` on any of the task's clean prompts returns the circuit's logits at every position, and
    `model.hf.generate(..., max_new_tokens=1)` on prompts of one length its next token. There are no gradients. Call
    other functions of circuitfind outside the block. Your own hooks may read anything, but a change to the residual
    stream does not reach every reader, because readers' inputs are computed from the writers.

    Args:
        circuit: a `Circuit`, or edge names; every other edge carries its ablated value.
        task: the pairs whose clean prompts can be run inside.
        asked: ablation (by default the circuit's own) and seed; see `circuitfind.setting.JudgeKeywords`.

    Raises:
        TaskError: the runs of all pairs take too much memory; or, inside, a prompt is not a clean prompt of the task.
        ModelError: inside, another function of circuitfind is called.
        FileError: the circuit belongs to another model.
    """
    check_model(model)
    chosen = as_circuit(model.graph, circuit)
    with ready(model):
        experiment = Experiment.of(model, task, asked, inherit=replace(chosen.record, metric=""), direction=False)
        held = CircuitModel(experiment, chosen)
    with held._in_force():
        yield held


class CircuitModel(NoFile):
    """A model that runs as a circuit, as `circuitfind.only` yields it.

    Attributes:
        hf: the Hugging Face model.
        circuit: the circuit.
        task: the pairs, in the model's tokens.
    """

    def __init__(self, experiment: Experiment, circuit: Circuit) -> None:
        self.hf, self.circuit, self.task = experiment.model.hf, circuit, experiment.bound
        self._model, self._experiment = experiment.model, experiment
        self._prepared = _prepared(experiment)
        masks = circuit.mask[None]
        self._plan = Plan.of(self._prepared, masks, prefers_sparse(self._prepared, masks))
        self._rows = defaultdict(list)
        for row, ids in enumerate(_prompts(*self._prepared.batch.clean[:2])):
            self._rows[ids].append(row)
        self._ablation_inputs = _ablation_inputs(self._prepared.batch, experiment.ablation)
        self._visitor: CircuitVisitor | None = None
        self._next_rows: list[int] | None = None  # the rows of the next pass, if they are known

    def inputs(self, rows: Sequence[int] | None = None) -> dict[str, Any]:
        """Return the keyword arguments of the model's forward for the clean prompts of some rows (default: all)."""
        return self._model.adapter.keywords(self._batch(rows).clean)

    def logits(self, rows: Sequence[int] | None = None) -> Tensor:
        """Return the circuit's logits at the read positions of some rows (default: all), `[rows, reads, vocab]`.

        Raises:
            TaskError: there are no such rows, or the block has been left.
        """
        if self._model.adapter.held_by is not self:
            raise TaskError("the block of cf.only has been left: call this inside the block, or use run()")
        batch = self._batch(rows)
        known = list(range(len(self.task)) if rows is None else rows)

        def one(part: Batch, at: slice) -> Tensor:
            self._next_rows = known[at]
            try:
                whole: Tensor = self.hf(**self._model.adapter.keywords(part.clean)).logits
            finally:
                self._next_rows = None  # a hook of the user may have ended the pass before it was used
            return read_rows(whole, part.clean)

        return self._together(batch, one)

    def next_token(self, rows: Sequence[int] | None = None) -> list[str] | list[int]:
        """Return the most likely token at each prompt's last read position, as text, or without a tokenizer as ids."""
        ids: list[int] = self.logits(rows)[:, -1].argmax(-1).tolist()
        tokenizer = self._model.tokenizer
        return ids if tokenizer is None else [piece(tokenizer, token) for token in ids]

    def run(self, task: Task | BoundTask) -> Tensor:
        """Return the circuit's logits on the pairs of another task, `[pairs, reads, vocab]`."""
        experiment, adapter = self._experiment.on(bind(self._model, task)), self._model.adapter
        holder, adapter.held_by = adapter.held_by, None
        try:
            run = self._together(
                experiment.batch, lambda part, _: run_circuits(experiment.prepare(part), self.circuit.mask[None])[0]
            )
        finally:
            adapter.held_by = holder
        return run

    def _together(self, batch: Batch, one: Callable[[Batch, slice], Tensor]) -> Tensor:
        """Apply a function to all pairs, in smaller batches if memory runs out; return its results, concatenated."""
        adapter = self._model.adapter
        with within_memory(adapter):
            return torch.cat([part for _, part in in_batches(adapter, batch, one, len(batch), "the circuit's runs")])

    def _batch(self, rows: Sequence[int] | None) -> Batch:
        return self._prepared.batch if rows is None else self.task.subset(rows).batch

    @contextmanager
    def _in_force(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(undisturbed(self.hf))
            stack.callback(self.hf.register_forward_pre_hook(self._before, with_kwargs=True).remove)
            stack.enter_context(attached(self._model.adapter, self._visit))
            stack.callback(self.hf.register_forward_hook(self._after, always_call=True).remove)
            self._model.adapter.held_by = self
            try:
                yield
            finally:
                self._model.adapter.held_by = None

    def _visit(self, site: str, layer: int, value: Tensor) -> Any:
        if self._visitor is not None:
            return self._visitor(site, layer, value)
        if self._model.adapter.held_by is self and site == "resid" and layer == 0:
            raise TaskError("inside cf.only call the whole model, model.hf(...): its parts do not run as a circuit")
        return None

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self._model.adapter.held_by is not self:
            return
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None or ids.ndim != 2:
            raise TaskError("inside cf.only the model needs token ids [rows, positions]: give input_ids=")
        mask = kwargs.get("attention_mask")
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        if kwargs.get("logits_to_keep") == 1 and not mask[:, -1].all():
            remedy = "give it prompts of one length, or use next_token()"
            raise TaskError(f"generate() continues the last column, which is padding in some rows: {remedy}")
        index = torch.tensor(self._next_rows or self._rows_of(ids, mask), device=self._prepared.batch.clean.ids.device)
        self._next_rows = None
        self._visitor = CircuitVisitor(_selected(self._prepared, index, ids.shape[1]), self._plan)

    def _after(self, *_: Any) -> None:
        self._visitor = None

    def _rows_of(self, ids: Tensor, mask: Tensor) -> list[int]:
        """Return the task's row of each prompt. TaskError for other prompts, or if rows with the same clean prompt have
        different corrupted prompts and only some of these rows are asked for."""
        asked, twins = _prompts(ids, mask), self._ablation_inputs
        found, left = [], {prompt: list(self._rows.get(prompt, ())) for prompt in asked}
        for number, prompt in enumerate(asked):
            known = self._rows.get(prompt)
            if not known:
                raise TaskError(
                    f"row {number} is not among the task's clean prompts ({len(prompt)} tokens), so its ablated values"
                    " are unknown. Give prompts of the task padded on the right with their attention_mask (inputs() has"
                    " them), or a task of pairs to run()"
                )
            if asked.count(prompt) != len(known) and len({twins[row] for row in known}) > 1:
                raise TaskError(
                    f"row {number} is the clean prompt of rows {', '.join(map(str, known))}, with different corrupted"
                    " prompts: run all of these rows, or open the task without the others (subset)"
                )
            found.append(left[prompt].pop(0) if asked.count(prompt) == len(known) else known[0])
        return found


def _prepared(experiment: Experiment) -> Prepared:
    """Return the runs of all pairs. TaskError if they take too much memory."""
    batch = experiment.batch
    most = max(1, KEPT_RUNS // run_bytes(experiment.adapter, batch.clean.ids.shape[1], runs=2))
    if len(batch) > most:
        remedy = f"give at most {most}, task.on(model).subset(range({most}))"
        raise TaskError(f"the runs of {len(batch)} pairs take too much memory: {remedy}")
    found = in_batches(
        experiment.adapter, batch, lambda _, rows: experiment.prepare(batch.rows(rows)), len(batch), "both sides' runs"
    )
    return _joined([part for _, part in found])


def _joined(parts: list[Prepared]) -> Prepared:
    """Join the runs of batches that are padded to one length. All values have rows, or rows x positions, first."""
    first = parts[0]
    if len(parts) == 1:
        return first

    def joined(values: Sequence[Any]) -> Any:
        one = values[0]
        if isinstance(one, Tensor):
            return torch.cat(list(values))
        if isinstance(one, list):
            return [joined(some) for some in zip(*values, strict=True)]
        if isinstance(one, tuple):  # heads, inputs, writers
            return type(one)(*(joined(some) for some in zip(*values, strict=True)))
        if isinstance(one, (Run, Batch)):
            return type(one)(**{field.name: joined([getattr(x, field.name) for x in values]) for field in fields(one)})
        return one

    names = ("batch", "clean", "ablated", "empty")
    return replace(first, **{name: joined([getattr(part, name) for part in parts]) for name in names}, _readers={})


def _prompts(ids: Tensor, mask: Tensor) -> list[tuple[int, ...]]:
    """Return each prompt's ids up to its last real token; padding before that is -1, which matches no prompt."""
    lengths = [int(row.nonzero().max()) + 1 if row.any() else 0 for row in mask]
    kept = ids.masked_fill(~mask.to(ids.device), -1)
    return [tuple(row[:length].tolist()) for row, length in zip(kept, lengths, strict=True)]


def _ablation_inputs(batch: Batch, ablation: Ablation) -> list[Any]:
    """Return for each row what, besides the clean prompt, decides its ablated values: the corrupted prompt and the
    alignment, or None if the ablation does not use them."""
    if not ablation.corrupted:
        return [None] * len(batch)
    twins = _prompts(*batch.corrupted[:2])
    aligned = [None] * len(batch) if batch.alignment is None else _prompts(batch.alignment, batch.clean.mask)
    return list(zip(twins, aligned, strict=True))


def _selected(prepared: Prepared, rows: Tensor, length: int) -> Prepared:
    """Return the runs of some rows, cut to `length` positions."""
    whole, size = prepared.batch.clean.ids.shape[1], len(prepared.batch)
    if length > whole:
        raise TaskError(f"prompts are padded to {length} tokens, the task's to {whole}: pad them to at most {whole}")

    def pick(value: Tensor) -> Tensor:
        flat = value.ndim == 2  # OPT's MLPs have one axis for batch and position
        value = (rearrange(value, "(b t) d -> b t d", b=size) if flat else value)[rows][:, :length].contiguous()
        return value.flatten(0, 1) if flat else value

    clean, empty = (replace(run.map(pick), logits=run.logits[rows]) for run in (prepared.clean, prepared.empty))
    batch, ablated = prepared.batch.rows(rows), prepared.ablated.map(pick)
    return replace(prepared, batch=batch, inputs=batch.clean, clean=clean, ablated=ablated, empty=empty)
