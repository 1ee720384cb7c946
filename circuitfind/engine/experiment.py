"""`Experiment`: the model, the tokenised pairs and the setting, which every measurement takes.

1. `Experiment.of` binds a task to a model, fills in the setting (from the call's keywords, else from the record of the
   circuit or scores that are evaluated, else from the task and the defaults) and checks that the three are compatible.
2. What depends on all pairs is computed once, when it is first needed: the means of the mean ablations, and the
   shuffled corrupted prompts of "resample".
3. Measurements run it batch by batch: `in_batches`, `prepare`, `ablated`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

from torch import Tensor, nn

from circuitfind import processes
from circuitfind.batch import Batch
from circuitfind.checkpoint import key_of
from circuitfind.engine.ablation import Ablation, ablation_of, mean_of, resampled, sum_writers
from circuitfind.engine.batches import in_batches
from circuitfind.engine.capture import Run, capture
from circuitfind.engine.identities import require_identities_on
from circuitfind.engine.prefix import after_prefix
from circuitfind.engine.prepare import Prepared, ablated, prepare
from circuitfind.engine.writers import Writers
from circuitfind.errors import ModelError, ProcessError, ScoreError, TaskError, warn
from circuitfind.graph import Graph
from circuitfind.metrics import METRICS, Function, Metric
from circuitfind.models.adapter import Adapter
from circuitfind.models.load import Model
from circuitfind.models.placement import held, weights_of
from circuitfind.processes import Division
from circuitfind.record import Record
from circuitfind.setting import JudgeKeywords, Keywords, Setting
from circuitfind.tasks.bound import BoundTask
from circuitfind.tasks.task import Task

R = TypeVar("R")
FROM_EACH_WEIGHT = 64  # values of each weight tensor that enter a checkpoint's key


@dataclass(frozen=True, eq=False)
class Experiment:
    """A model, its task and the setting of a call. TaskError or ScoreError if the ablation or the direction is not
    defined for the pairs."""

    model: Model
    bound: BoundTask
    setting: Setting

    def __post_init__(self) -> None:
        self.ablation.check(self.bound.batch, self.setting.direction)

    @classmethod
    def of(
        cls,
        model: Model,
        task: Task | BoundTask,
        asked: Keywords | JudgeKeywords | None = None,
        *,
        inherit: Record | None = None,
        made: str = "the circuit was",
        metric: str | Metric | None = None,
        direction: bool = True,
    ) -> Experiment:
        """Return the experiment of a public call.

        Args:
            asked: the call's keywords.
            inherit: the record of the circuit or scores that are evaluated. Its metric, ablation and direction are used
                unless a keyword overrides them, with a warning.
            made: what `inherit` is of, as the subject of messages ("the circuit was", "the scores were").
            metric: the call's default, in place of the task's metric.
            direction: whether the call has a direction.

        Raises:
            TypeError: a keyword that the call does not have.
            ModelError: `model` is no model of circuitfind, or fails its self-check on the pairs.
            ScoreError, TaskError: the metric is not known in this process, or does not fit the task; `task` is no task,
                or does not fit the model; see also `Experiment`.
        """
        known = [name for name in Keywords.__annotations__ if direction or name != "direction"]
        # None means the default, except for a seed: some generators take None for the time of day
        given: dict[str, Any] = {k: v for k, v in (asked or {}).items() if v is not None or k == "seed"}
        for name in asked or {}:
            if name not in known:
                raise TypeError(f"keyword '{name}' does not apply here: the keywords of a run are {', '.join(known)}")
        bound = bind(model, task)
        inherited: dict[str, str] = {}
        if inherit is not None:
            inherited = _inherited(inherit, known)
            _warn_of_others(inherit, bound, made)
        for name, value in inherited.items():
            if name not in given:
                given[name] = value
            elif _name(given[name]) != value:
                warn(f"{made} made with {name}='{value}' and judged with {name}='{_name(given[name])}', as asked")
        chosen = given.pop("metric", metric)
        if chosen not in (None, bound.metric.name):  # the name of a task's own function is not in METRICS
            bound = _with_metric(bound, chosen, made if chosen == inherited.get("metric") else "")
        require_identities_on(model.adapter, bound.batch)
        return cls(model, bound, Setting(bound.metric, **given))

    def tell_of(self, record: Record, made: str) -> None:
        """Warn if something else that is evaluated here was made with another metric or ablation."""
        now = {"metric": self.metric.name, "ablation": self.setting.ablation}
        for name, value in _inherited(record, [*now]).items():
            if value != now[name]:
                warn(f"{made} made with {name}='{value}' and judged with {name}='{now[name]}'")

    # ---------------------------------------------------------------- its parts
    @property
    def adapter(self) -> Adapter:
        return self.model.adapter

    @property
    def graph(self) -> Graph:
        return self.model.graph

    @property
    def metric(self) -> Metric:
        return self.setting.metric

    @property
    def ablation(self) -> Ablation:
        return ablation_of(self.setting.ablation)

    def __len__(self) -> int:
        return len(self.bound)

    @cached_property
    def batch(self) -> Batch:
        """All pairs as they are run: under "resample" with shuffled corrupted prompts."""
        batch = self.bound.batch
        return resampled(batch, self.setting.seed, self.bound.copies) if self.ablation.redealt else batch

    @property
    def interchange(self) -> bool:
        """Whether every writer computes exactly its ablated value in the run with every edge ablated."""
        return self.ablation.interchange and self.batch.alignment is None

    @cached_property
    def means(self) -> Writers | None:
        """Each writer's mean, for the mean ablations; None for other ablations."""
        over = self.ablation.mean
        if over is None:
            return None

        def sums(part: Batch, _: slice) -> tuple[Writers, int]:
            return sum_writers(self.adapter, part, over == "position")

        found = in_batches(self.adapter, self.batch, sums, self.setting.batch_size, "mean activations")
        return mean_of(part for _, part in found)

    # ---------------------------------------------------------------- variants
    def on(self, bound: BoundTask) -> Experiment:
        """Return the same experiment on other pairs."""
        return replace(self, bound=bound.with_metric(self.metric))

    def set(self, **changes: Any) -> Experiment:
        """Return the same experiment with these fields of the setting changed."""
        setting = replace(self.setting, **changes)
        return Experiment(self.model, self.bound.with_metric(setting.metric), setting)

    def ungrouped(self) -> Experiment:
        """Return the experiment with a key and a value reader for every query head (`Adapter.ungrouped`), for scores of
        edges."""
        return replace(self, model=replace(self.model, adapter=self.adapter.ungrouped()))

    # ---------------------------------------------------------------- running it
    def share(self) -> None:
        """With several processes: check that all have the same pairs and model, and compute the means together.

        Raises:
            ProcessError: the processes have different pairs or models.
        """
        if processes.size() > 1:
            _ = self._is_shared, self.means

    @cached_property
    def _is_shared(self) -> bool:
        embedding = held(self.adapter.model.get_input_embeddings())
        assert embedding is not None, "a model embeds its tokens"
        own = _key_of(*self._pairs, embedding[self.batch.clean.ids[0]].float())
        if len(set(processes.gathered(lambda: own))) > 1:
            remedy = "load and build them in the same way in every process, with the same seeds"
            raise ProcessError(f"the processes have different pairs or models: {remedy}", processes.first())
        return True

    @property
    def _pairs(self) -> list[Tensor]:
        """The tensors that identify the pairs."""
        batch = self.batch
        return [*batch.clean[:3], *batch.corrupted[:3], batch.answers, batch.wrong]

    def in_batches(
        self,
        function: Callable[[Batch, slice], R],
        label: str,
        batch_size: int | None = None,
        division: Division | None = None,
    ) -> Iterator[tuple[slice, R]]:
        """Call `engine.batches.in_batches` over all pairs; `batch_size`: the default if the setting has none."""
        self.share()
        size = self.setting.batch_size or batch_size
        return in_batches(self.adapter, self.batch, function, size, label, division)

    def after_prefix(self, batch: Batch) -> Batch:
        """Return some pairs without the tokens before the first difference, if the ablation and the model allow it.

        Positions then count from the first token that is left.
        """
        shared = self.ablation.interchange and self.ablation.corrupted and batch.alignment is None
        return after_prefix(self.adapter, batch) if shared else batch

    def prepare(self, batch: Batch, divided: bool = False) -> Prepared:
        """Return the clean and empty runs and the ablated values of some pairs; `divided`: `after_prefix`."""
        run = self.after_prefix(batch) if divided else batch
        return prepare(self.adapter, batch, self.ablation, self.means, run)

    def ablated(self, clean: Run, corrupted: Run | None) -> Writers:
        """Return the writers' ablated values for a batch, in the shapes of the clean run."""
        return ablated(self.ablation, clean, corrupted, self.means)

    # ---------------------------------------------------------------- records and keys
    def record(self, method: str, **settings: Any) -> Record:
        """Return the record of a result that this experiment made."""
        asked = self.setting
        return self.bound.record(method, asked.ablation, asked.direction, asked.seed, **settings)

    def key(self, *settings: object) -> str:
        """Return a digest of everything that determines effects, so that a checkpoint is used only by its own run.

        It covers prompts and answers, a few values of every weight, the ablation and the direction, the metric's name
        and its values on the first pair (the user's own functions differ in nothing else), and `settings`: arrays by
        content, everything else by its `repr`. Values are rounded, so that a run can go on with another number of
        threads or on another processor.
        """
        batch, asked = self.batch, self.setting
        first = batch.rows(slice(0, 1)).trimmed()
        logits = [capture(self.adapter, side).logits for side in (first.clean, first.corrupted)]
        first = first.with_reference(logits[0])
        weights = (weight.flatten() for weight in weights_of(self.adapter.model))
        own = _key_of(
            *self._pairs,
            _rounded([float(self.metric(one, first).mean()) for one in logits]),
            *([] if batch.alignment is None else [batch.alignment]),
            *(flat[:: max(1, len(flat) // FROM_EACH_WEIGHT)].float() for flat in weights),
            *(self.graph, self.metric.name, asked.ablation, asked.direction, *settings),
        )
        return processes.same(own)


def _key_of(*parts: object) -> str:
    """Call `key_of`, with tensors as arrays."""
    return key_of(*(part.cpu().numpy() if isinstance(part, Tensor) else part for part in parts))


def _rounded(values: list[float]) -> list[str]:
    """Return values with three digits; 0 for values that are small enough, beside the largest, to be rounding."""
    least = 1e-4 * max(map(abs, values))
    return [f"{value if abs(value) > least else 0.0:.2e}" for value in values]


def _name(value: Any) -> Any:
    return getattr(value, "name", getattr(value, "__name__", value))


def _inherited(record: Record, known: list[str]) -> dict[str, str]:
    """Return a record's metric, ablation and direction, those among the known keywords; none if no run made it."""
    made = {name: getattr(record, name) for name in ("metric", "ablation", "direction") if name in known}
    return {name: value for name, value in made.items() if value and record.n_examples}


def _warn_of_others(record: Record, bound: BoundTask, made: str) -> None:
    """Warn if the record is of another model or task, or of another rule for BOS tokens."""
    sides = {
        "model": (record.model, bound.model),
        "task": (record.task, bound.name),
        "BOS rule": (record.bos, bound.bos),
    }
    for what, (then, now) in sides.items():
        if then and then != now:
            warn(f"{made} made with {what} '{then}', this run has '{now}'")


def _with_metric(bound: BoundTask, metric: str | Metric | Function, made: str) -> BoundTask:
    """Return the task with another metric; `made`: what the metric was inherited from, or empty."""
    if made and metric not in METRICS:
        raise ScoreError(
            f"{made} made with the metric '{metric}', which is not known in this process, and the task measures"
            f" '{bound.metric.name}': pass metric="
        )
    try:
        return bound.with_metric(metric)
    except TaskError as error:
        raise TaskError(f"{made} made with metric='{metric}': {error}" if made else str(error)) from None


def bind(model: Model, task: Task | BoundTask) -> BoundTask:
    """Return the task in the model's tokens, on its device. A task that is already bound to the model is kept.

    Raises:
        ModelError: `model` is not what `cf.load` or `cf.wrap` returned.
        TaskError: `task` is no task, is bound to another model, or does not fit the model.
    """
    check_model(model)
    if isinstance(task, Task):
        return task.on(model)
    if not isinstance(task, BoundTask):
        what, named = f"a {type(task).__name__}", "'ioi'"
        if isinstance(task, str):
            what, named = f"the text '{task}'", repr(task)
        raise TaskError(f"task is {what}: make a task of it with cf.task({named}, model), cf.Task or cf.Task.from_file")
    if (task.model, task.vocabulary) != (model.name, model.vocabulary):
        raise TaskError(
            f"task '{task.name}' was bound to model '{task.model}' ({task.vocabulary} token ids), this one is"
            f" '{model.name}' ({model.vocabulary}): give the unbound task, or bind it with task.on(model)"
        )
    if task.batch.answers.is_inference():  # bound inside torch.inference_mode(): autograd refuses such tensors
        task = replace(task, batch=task.batch.each(Tensor.clone))
    if task.batch.answers.device != model.device:  # bound to the model before it was moved, or to one on a server
        return replace(task, batch=task.batch.to(model.device))
    return task


def check_model(model: Any) -> None:
    """Raise a ModelError, which says what was passed, unless `model` came from `load` or `wrap`."""
    if isinstance(model, Model):
        return
    what = f"a {type(model).__name__}: give what cf.load or cf.wrap returned"
    if isinstance(model, str):
        what = f"the text '{model}': load it: cf.load('{model}')"
    elif isinstance(model, nn.Module):
        what = f"a bare {type(model).__name__}: wrap it: cf.wrap(hf_model, tokenizer)"
    raise ModelError(f"model is {what}")
