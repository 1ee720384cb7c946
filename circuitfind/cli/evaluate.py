"""`circuitfind evaluate`: run a circuit exactly, and test it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import circuitfind as cf
from circuitfind.cli import inputs, options, tables, verdicts
from circuitfind.cli.cells import count, number
from circuitfind.cli.options import option
from circuitfind.cli.output import Output
from circuitfind.errors import FileError

if TYPE_CHECKING:
    from circuitfind.record import Record
    from circuitfind.tasks.bound import BoundTask

OVER = ("pairs", "templates", "seeds")
OF_A_CIRCUIT = ("completeness", "minimality", "tests", "stability", "per_example")


@dataclass(frozen=True)
class EvaluateOptions:
    PANEL = options.JUDGING
    circuit: Path | None = option("Circuit to evaluate (circuit.json).", metavar="FILE")
    curve: Path | None = option(
        "Scores (scores.safetensors): faithfulness of circuits of ten sizes made from them, CPR and CMD.",
        metavar="FILE",
    )
    completeness: bool = option(
        "Completeness: run the model without the circuit; knock out random nodes in circuit and model.", False
    )
    minimality: bool = option("Minimality: measure what the circuit loses without each of its edges.", False)
    tests: bool = option("Run hypothesis tests of the circuit.", False)
    stability: str | None = option("Measure how far circuits agree over pairs, templates or seeds.", words=OVER)
    unseen: bool = option("Leave out the pairs that the search used.", False)
    per_example: bool = option("Print the metric of every pair.", False)


def evaluate(model: options.Model, task: options.Task, run: options.Run, asked: EvaluateOptions, out: Output) -> None:
    """Run the model as a circuit, exactly, and measure how much of the task it keeps.

    With --curve, circuits of ten sizes are made from scores; --circuit is then optional.

    Example: circuitfind evaluate tiny --circuit circuitfind-out/circuit.json
    """
    _check(asked)
    loaded, bound = inputs.load(model, task, out)
    from circuitfind.engine.experiment import Experiment
    from circuitfind.evaluation.variants import like, variants

    circuit = None if asked.circuit is None else inputs.of_model(cf.Circuit, asked.circuit, loaded)
    scores = None if asked.curve is None else inputs.of_model(cf.Scores, asked.curve, loaded)
    found = [each for each in (circuit, scores) if each is not None]
    for each in found if asked.unseen else ():
        bound = cf.unseen(loaded, bound, each)
    same: Any = inputs.run_keywords(task, run)
    experiment = Experiment.of(loaded, bound, same, inherit=found[0].record, direction=False)
    bound, record = experiment.bound, experiment.record("evaluate")
    about = f"{bound.name}, {record.metric}: {count(len(bound), 'pair')}, ablation {record.ablation}"
    memory = inputs.task_memory(loaded, bound, run, None)
    lines = [("model", inputs.model_line(loaded)), ("memory", memory), ("task", about)]
    if circuit is not None:
        lines.append(("circuit", f"{asked.circuit}: {count(len(circuit), 'edge')} of {circuit.graph.n_edges:,}"))
    out.facts(lines)
    out.say()
    content = {**inputs.described(loaded, bound, out), "prompts": bound.prompts}
    if circuit is not None:
        content |= {"circuit": str(asked.circuit), **_circuit(loaded, bound, circuit, asked, out, same)}
        if asked.stability:
            name = None if task.data is not None else task.task or inputs.DEFAULT_TASK
            over = variants(loaded, bound, asked.stability, name, **inputs.drawn(task))
            with out.progress():
                stable = cf.stability(loaded, over, **like(circuit, **same))
            verdicts.stability(stable, out)
            content["stability"] = stable.to_dict()
    if scores is not None:
        with out.progress():
            both = cf.mib(loaded, bound, scores, **same)
        out.say()
        verdicts.mib(both, out)
        out.few(both.record.n_distinct)
        content |= {"scores": str(asked.curve), "curve": both.to_dict()}
    for made in {each.record.pairs: each.record for each in found}.values():
        _say_of_seen_pairs(made, record, task.data is None, out)
    out.document(content)


def _check(asked: EvaluateOptions) -> None:
    if asked.circuit is not None:
        return
    if asked.curve is None:
        raise FileError("give --circuit FILE (a circuit.json), or --curve FILE (scores to make circuits from)")
    for name in OF_A_CIRCUIT:
        if getattr(asked, name):
            raise FileError(f"--{name.replace('_', '-')} needs a circuit: add --circuit FILE")


def _circuit(
    model: cf.Model, bound: BoundTask, circuit: cf.Circuit, asked: EvaluateOptions, out: Output, same: Any
) -> dict[str, Any]:
    """Run and print the evaluations asked for; return them for the JSON document."""
    with out.progress():
        value = cf.evaluate(model, bound, circuit, **same)
    out.facts([*verdicts.evaluation(value), *verdicts.overshoot(value.faithfulness)])
    out.few(value.record.n_distinct)
    content = value.to_dict()
    if asked.per_example:
        each = value.per_example
        texts = zip(bound.prompts, bound.answer_texts, each.full, each.circuit, each.empty, strict=True)
        rows = [(prompt, answer, *map(number, values)) for prompt, answer, *values in texts]
        out.say()
        out.table(f"Every example ({value.record.metric})", ("prompt", "answer", "full", "circuit", "empty"), rows)
    for name, call in (("completeness", "completeness"), ("minimality", "minimality"), ("tests", "hypotheses")):
        if getattr(asked, name):
            with out.progress():
                found = getattr(cf, call)(model, bound, circuit, **same)
            out.say()
            tables.show(found, out)
            content[call] = found.to_dict()
    return content


def _say_of_seen_pairs(made: Record, now: Record, drawn: bool, out: Output) -> None:
    seen, pairs = made.seen(now), count(now.n_examples, "pair")
    others = "another --seed draws others" if drawn else "judge on pairs of another file"
    if seen:
        leave_out = "--unseen leaves them out, " if seen < now.n_examples else ""
        advice = f"{leave_out}{others}"
        out.say(f"\nThe search ({made.method}) used {seen} of these {pairs}: {advice}.", "yellow")
    elif seen == 0:
        out.say(f"\nThe search used none of these {pairs}.", style="dim")
    elif (made.task, made.seed, made.model) == (now.task, now.seed, now.model):
        out.say(f"\nThe search may have used some of these pairs; {others}.", style="dim")
