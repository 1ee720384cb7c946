"""A family and a task from outside the package: passed, or registered by name; and what is refused."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from families import build

import circuitfind as cf
from circuitfind.models import families
from circuitfind.models.families import FAMILIES
from circuitfind.tasks import builtin
from circuitfind.tasks.builder import Choice, Draw, SingleTokens


def refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(cf.CircuitfindError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


# -------------------------------------------------------------------- families
@pytest.fixture()
def unknown_model() -> Iterator[Any]:
    """GPT-NeoX under a type of its own."""
    model = build("gpt_neox")
    model.config.model_type = "my_neox"
    yield model


def test_a_family_is_passed(unknown_model: Any) -> None:
    assert cf.wrap(unknown_model).kind == "my_neox (inferred as gpt_neox)"
    own = cf.wrap(unknown_model, family=FAMILIES["gpt_neox"])
    assert own.graph == cf.wrap(build("gpt_neox")).graph and own.graph.parallel, "the row's variants apply"


def test_a_family_is_registered(unknown_model: Any) -> None:
    families.register("my_neox", FAMILIES["gpt_neox"])
    assert cf.wrap(unknown_model).graph == cf.wrap(build("gpt_neox")).graph


def test_a_family_is_used_in_place_of_the_table() -> None:
    assert cf.load("tiny", family=FAMILIES["gpt2"]).graph == cf.load("tiny", check=False).graph
    refused(
        lambda: cf.load("tiny", family=FAMILIES["llama"]), "layers='model.layers' is not a module of a GPT2LMHeadModel"
    )
    swapped = replace(FAMILIES["gpt2"], attn_norm="ln_2", mlp_norm="ln_1")
    refused(lambda: cf.load("tiny", family=swapped), "is off by")


def test_families_that_are_none(unknown_model: Any) -> None:
    wrong = replace(FAMILIES["gpt_neox"], mlp_in="mlp.up")
    there = "block gpt_neox.layers.0: there are input_layernorm, .*mlp.dense_h_to_4h"
    refused(lambda: cf.wrap(unknown_model, family=wrong), f"family: mlp_in='mlp.up' is not a module of {there}")
    refused(lambda: cf.wrap(unknown_model, family="gpt_nexo"), "family 'gpt_nexo' is unknown")
    refused(lambda: families.register("llama", wrong), "'llama' is built in: pass yours with family=")
    refused(lambda: families.register("x", "llama"), "'llama' is not a circuitfind.Family")  # type: ignore[arg-type]


# -------------------------------------------------------------------- tasks
def prepare(words: SingleTokens, choice: Choice) -> Draw:
    names = words.need(["Mary", "Anna", "John", "Tom"], 3, "echo", "names")

    def draw(rng: random.Random, number: int) -> cf.Pair:
        name, other = rng.sample(names, 2)
        spans = {"name": ["first", "second"]}
        said, corrupted = {"name": name}, {"name": other}
        return cf.Pair.filled(choice.patterns[0], said, corrupted, [name], [other], flips=True, spans=spans)

    return draw


ECHO = cf.TaskBuilder("echo", prepare, ("other-name",), templates={"1": "Everyone said: {name}, {name},"})


@pytest.fixture(scope="module")
def tiny() -> cf.Model:
    return cf.load("tiny", check=False)


def test_a_task_is_passed(tiny: cf.Model) -> None:
    task = cf.task(ECHO, tiny, n=4)
    assert task.name == "echo" and len(set(task.clean)) == 4 and task.flips
    bound = task.on(tiny)
    start, stop = bound.spans[0]["second"]
    assert "".join(bound.tokens[0][start:stop]).strip() == bound.prompts[0].split()[-1].strip(",")
    assert cf.attribute(tiny, task).record.task == "echo"
    assert cf.task(ECHO, tiny, n=2, corruption="Other_Name", template=1).name == "echo:other-name [1]"


def test_a_task_is_registered(tiny: cf.Model) -> None:
    refused(lambda: cf.task("echo", tiny), "task 'echo' is unknown. Known: ioi, ")
    assert builtin.register(ECHO) is ECHO
    assert cf.task("Echo", tiny, n=4).clean == cf.task(ECHO, tiny, n=4).clean
    builtin.register(replace(ECHO, metric="prob_diff"))
    assert cf.task("echo", tiny, n=4).metric == "prob_diff"


def test_a_task_is_named_by_its_module(tiny: cf.Model) -> None:
    task = cf.task(f"{__name__}:ECHO", tiny, n=4)
    assert task.clean == cf.task(ECHO, tiny, n=4).clean
    refused(lambda: cf.task(f"{__name__}:EHCO", tiny), "task '.*:EHCO' cannot be imported: .* no attribute 'EHCO'")
    refused(lambda: cf.task(f"{__name__}:prepare", tiny), "is a function, not a circuitfind.TaskBuilder")
    refused(lambda: cf.task("ioi:abc", tiny), "task 'ioi:abc': give the corruption on its own, as corruption='abc'")


def test_tasks_that_are_none(tiny: cf.Model) -> None:
    refused(lambda: cf.TaskBuilder("echo", prepare, ()), r"echo: corruptions is \(\): name at least one")
    refused(lambda: cf.TaskBuilder("echo", prepare, "other"), "echo: corruptions is 'other'")  # type: ignore[arg-type]
    refused(lambda: cf.TaskBuilder("", prepare, ("other",)), "TaskBuilder: name is ''")
    refused(lambda: builtin.register(replace(ECHO, name="ioi")), "'ioi' is a built-in task: give yours another name")
    refused(lambda: builtin.register("echo"), "'echo' is not a circuitfind.TaskBuilder")  # type: ignore[arg-type]
    text = replace(ECHO, prepare=lambda words, choice: lambda rng, number: "Mary")  # type: ignore[arg-type, return-value]
    refused(lambda: cf.task(text, tiny), "echo: its generator returned a str: return a circuitfind.Pair")
    refused(lambda: cf.task(3, tiny), "a task is named by text such as 'ioi' or given as a TaskBuilder, not as a int")  # type: ignore[arg-type]
    refused(
        lambda: cf.task(ECHO, tiny, corruption="other-nam"), "echo: corruption 'other-nam' is unknown: did you mean"
    )


def test_tasks_are_shown_in_one_line(tiny: cf.Model) -> None:
    task = cf.task(ECHO, tiny, n=4)
    assert repr(task) == "Task(echo: 4 pairs, logit_diff)"
    assert repr(task.on(tiny)) == "BoundTask(echo: 4 pairs on tiny, logit_diff)"
