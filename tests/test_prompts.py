"""Prompts that are chats, answers of several tokens, spellings: each equals the same task given as token ids."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_task import Stub, starting_with
from toys import wrapped

import circuitfind as cf
from circuitfind.cli.app import main
from circuitfind.costs import measuring
from circuitfind.errors import CircuitfindWarning, FileError, TaskError
from circuitfind.tasks.chat import Rendered, render
from circuitfind.tasks.spelling import percent
from circuitfind.tasks.tokens import PromptTokenizer

TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}The store is near.\n{% endif %}"
    "{% for one in messages %}{% if one['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ one['role'] + ': ' + one['content'] | trim + '!\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TEXTS = ["Mary and John went to the store, John gave it to", "Mary and Luke met, Luke gave it to"]
TWINS = ["Mary and John went to the store, Mary gave it to", "Mary and Luke met, Mary gave it to"]
ANSWERS = {"answers": ["Mary", "Mary"], "wrong_answers": ["John", "Luke"]}
LONG = {"answers": ["Mary and Kate", "Luke and a friend"], "wrong_answers": ["Mary and Paul", "Anna and a friend"]}


def turns(*texts: str) -> list[dict[str, str]]:
    """Messages of the user and the assistant in turn."""
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]


def chats(**changes: Any) -> cf.Task:
    return cf.Task(**{"clean": list(map(turns, TEXTS)), "corrupted": list(map(turns, TWINS)), **ANSWERS, **changes})


def plain(**changes: Any) -> cf.Task:
    return cf.Task(**{"clean": TEXTS, "corrupted": TWINS, **ANSWERS, **changes})


@pytest.fixture(scope="module")
def tiny() -> Iterator[cf.Model]:
    """The embedded model with a chat template: its BOS token, and words of its own before the first message."""
    model = cf.load("tiny", check=False)
    model.tokenizer.chat_template = TEMPLATE
    yield model
    model.tokenizer.chat_template = None


def padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """Ids and mask, padded on the right."""
    length = max(map(len, rows))
    mask = torch.tensor([[at < len(row) for at in range(length)] for row in rows])
    return {"ids": torch.tensor([row + [0] * (length - len(row)) for row in rows]), "mask": mask}


def of_ids(clean: list[list[int]], corrupted: list[list[int]], right: Any, wrong: Any, **more: Any) -> cf.Task:
    sides = padded(clean), padded(corrupted)
    masks = {"attention_mask": sides[0]["mask"], "corrupted_attention_mask": sides[1]["mask"]}
    return cf.Task(sides[0]["ids"], sides[1]["ids"], right, wrong, **masks, **more)


def same(model: cf.Model, first: cf.Task, second: cf.Task, times: float = 1) -> None:
    """Their scores, exact effects and metrics are the same, up to the metric's rounding: an effect is a difference."""
    clean = np.float32(abs(cf.summarise(model, first, warn=False).clean))
    for measure in (
        lambda task: cf.attribute(model, task, "eap").values,
        lambda task: cf.patch(model, task, "heads").effects,
        lambda task: cf.summarise(model, task, warn=False).clean,
    ):
        wanted = np.asarray(measure(second)) * times
        np.testing.assert_allclose(measure(first), wanted, rtol=1e-4, atol=max(1e-6, np.spacing(clean)))


# -------------------------------------------------------------------- chat
def test_a_chat_is_the_templates_own_ids(tiny: cf.Model) -> None:
    def templated(sides: list[Any]) -> list[list[int]]:
        made = (tiny.tokenizer.apply_chat_template(side, add_generation_prompt=True) for side in sides)
        return [row["input_ids"] for row in made]

    task = chats()
    bound, ids = task.on(tiny), [templated(side) for side in (task.clean, task.corrupted)]
    assert ids[0][0][0] == tiny.tokenizer.bos_token_id != ids[0][0][1], "the test needs a template that writes BOS"
    assert [row[keep].tolist() for row, keep in zip(*bound.batch.clean[:2], strict=True)] == ids[0]
    assert bound.bos == "in the prompt's text" and bound.prompts[0].endswith("gave it to!\nassistant:")
    assert type(bound.prompts[0]) is str
    answers = [side[:, 0, 0].tolist() for side in (bound.batch.answers, bound.batch.wrong)]
    same(tiny, task, of_ids(*ids, *answers))
    assert torch.equal(bound.batch.clean.ids, plain(chat=True).on(tiny).batch.clean.ids)
    forced = chats(bos=True).on(tiny)
    assert torch.equal(forced.batch.clean.ids, bound.batch.clean.ids), "it is there already"


def test_the_last_message_of_the_assistant_is_continued(tiny: cf.Model) -> None:
    begun = [turns(text, "It was for") for text in TEXTS], [turns(text, "It was for") for text in TWINS]
    bound = chats(clean=begun[0], corrupted=begun[1]).on(tiny)
    assert bound.prompts[0].endswith("assistant: It was for")
    made = tiny.tokenizer.apply_chat_template(begun[0][0], continue_final_message=True)["input_ids"]
    assert bound.batch.clean.ids[0][bound.batch.clean.mask[0]].tolist() == made
    assert bound.spans == (), "nothing asks for an answer"


class WithTokenizer:
    """What a task needs of a model, without weights."""

    def __init__(self, tokenizer: Any, **more: Any) -> None:
        self.tokenizer, self.config, self.device = tokenizer, object(), torch.device("cpu")
        self.vocabulary = 10
        vars(self).update(more)


def test_a_template_decides_on_bos() -> None:
    """The tokenizer adds one to text; the template's own is not doubled, and one that it lacks is not added."""
    tokenizer = starting_with("<s>")
    model, task = (
        WithTokenizer(tokenizer),
        cf.Task([turns("Paris is in")], [turns("Rome is in")], ["France"], ["Italy"]),
    )
    for template, ids, bos in (
        ("<s> {{ messages[0]['content'] }}", [1, 4, 6, 7], "in the prompt's text"),
        ("{{ messages[0]['content'] }}", [4, 6, 7], "none, as the chat template has it"),
    ):
        tokenizer.chat_template = template
        bound = task.on(model)
        assert bound.batch.clean.ids.tolist() == [ids] and bound.bos == bos
    assert replace(task, bos=True).on(model).batch.clean.ids.tolist() == [[1, 4, 6, 7]]


def test_files_keep_messages(tiny: cf.Model, tmp_path: Path) -> None:
    task, path = plain(chat=True, spelling="space"), tmp_path / "pairs.jsonl"
    again = cf.Task.from_file(task.save(path))
    assert again.clean == chats().clean and again.spelling == ["space"] * 2
    assert again.on(tiny).batch.clean.ids.equal(task.on(tiny).batch.clean.ids)
    rows = [{**json.loads(line)} for line in path.read_text().splitlines()]
    for text in (json.dumps(rows), json.dumps({"prompts": rows})):
        path.write_text(text)
        assert cf.Task.from_file(path).clean == chats().clean
    path = tmp_path / "pairs.csv"
    path.write_text('clean,corrupted,answer\n"[{""role"": ""user"", ""content"": ""a""}]",[b] c,d\n')
    with pytest.raises(TaskError, match="row 0: some prompts are text and some are messages"):
        cf.Task.from_file(path)
    assert cf.Task.from_rows(rows, tiny).exchanged().corrupted == chats().clean


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "the list of messages is empty"),
        ({"role": "user", "content": "a"}, r"one message is not a list of them: put it in brackets"),
        (["a"], r"message 0 is 'a': a message is {'role': ..., 'content': ...}"),
        ([{"role": "user", "contents": "a"}], "message 0 has no 'content': it has role, contents"),
        ([{"content": "a"}], "message 0 has no 'role'"),
        (
            [*turns("a"), {"role": "usr", "content": "a"}],
            "message 1: role 'usr' is unknown: use system, user, assistant",
        ),
        ([{"role": "user", "content": None}], "message 0: its content must be text, not None"),
        (
            [{"role": "user", "content": [{"type": "text"}]}],
            r"message 0: its content must be text, not \[{'type': 'text'}\]",
        ),
        (turns("a", " "), "the last message is the assistant's and empty: leave it out"),
        (
            [{"role": "tool", "content": "a"}],
            "the tokenizer's chat template does not take these messages: no tools here",
        ),
        ("a", "some prompts are text and some are messages: give all as messages, or all as text with chat=True"),
    ],
)
def test_messages_that_are_none(tiny: cf.Model, messages: Any, words: str, tmp_path: Path) -> None:
    sides = [turns(TEXTS[0]), messages], [turns(TWINS[0]), messages]
    with pytest.raises(TaskError, match=f"row 1: (clean: )?{words}"):
        chats(clean=sides[0], corrupted=sides[1]).on(tiny)
    if isinstance(messages, str) or "template" in words:
        return
    path = tmp_path / "pairs.jsonl"
    rows = [dict(clean=a, corrupted=b, answer="c") for a, b in zip(*sides, strict=True)]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(FileError, match=f"pairs.jsonl, line 2: 'clean': {words}"):
        cf.Task.from_file(path)


def test_a_tokenizer_without_a_template() -> None:
    with pytest.raises(
        TaskError, match=r"row 0: clean: the tokenizer has no chat template: take the model's chat \(inst"
    ):
        chats().on(WithTokenizer(starting_with("<s>")))
    with pytest.raises(TaskError, match="chat=True is for prompts as text"):
        cf.Task(torch.tensor([[3, 4]]), torch.tensor([[3, 5]]), [6], [7], chat=True)


# -------------------------------------------------------------------- spans of a chat
def test_spans_are_found_in_the_messages(tiny: cf.Model) -> None:
    """ "store" is in the template, too; "John" twice in the message."""
    spans = [{"place": "store", "S2": ("John", 2)}, {"place": "Mary", "S2": ("Luke", 2)}]
    bound = chats(spans=spans).on(tiny)
    words = [
        {name: "".join(row[slice(*at)]) for name, at in found.items()}
        for row, found in zip(bound.tokens, bound.spans, strict=True)
    ]
    assert words[0] == {"generation": "assistant:", "place": " store", "S2": " John"} and words[1]["place"] == " Mary"
    assert (
        bound.spans[0]["place"][0] > bound.tokens[0].index(" store")
        and bound.spans[0]["S2"][0] > bound.spans[0]["place"][0]
    )
    assert chats().on(tiny).spans[0] == {"generation": bound.spans[0]["generation"]}
    swept = cf.patch(tiny, chats(spans=spans), "resid", by_span=True)
    assert {"place", "S2", "generation"} <= set(swept.positions)
    for text, words_ in (
        ("near", r"'near' occurs 0 times in the messages of the clean prompt \(the chat template's own"),
        ("to", "'to' occurs 3 times in the messages"),
        ("user", "'user' occurs 0 times in the messages"),
    ):
        with pytest.raises(TaskError, match=f"row 0: span 'x': {words_}"):
            chats(spans=[{"x": text}, {}]).on(tiny)
    with pytest.raises(TaskError, match="span 'x': 'stor' begins or ends inside a token"):
        chats(spans=[{"x": "stor"}, {}]).on(tiny)


@pytest.mark.parametrize("content", [" a b ", "a b", "b", "The store is near.", "!\nassistant:"])
def test_where_contents_stand(tiny: cf.Model, content: str) -> None:
    made = render(tiny.tokenizer, [*turns(content, "b"), {"role": "user", "content": content}])
    assert isinstance(made, Rendered) and [made[slice(*at)] for at in made.contents] == [
        content.strip(),
        "b",
        content.strip(),
    ]
    assert made.asks is not None and made[made.asks :] == "assistant:"


def test_contents_that_a_template_changes() -> None:
    class Loud:
        chat_template = "yes"

        def apply_chat_template(self, messages: list[dict[str, str]], **_: object) -> str:
            return "".join(one["content"].replace("circuitfind", "x") + "|" for one in messages)

    made = render(Loud(), turns("a", "b", "a"))
    assert made == "a|b|a|" and made.contents == ((0, 1), (2, 3), (4, 5)) and made.asks is None


# -------------------------------------------------------------------- answers of several tokens
def test_the_default_names_both_ways(tiny: cf.Model) -> None:
    with pytest.raises(TaskError, match=r"one token each.*3 tokens.*Give answer='first' .* or answer='all'"):
        plain(**LONG).on(tiny)
    left = plain(
        **{**LONG, "answers": ["Mary", "Luke and a friend"], "wrong_answers": ["John", "Anna"]}, unusable="drop"
    )
    with pytest.warns(UserWarning, match="1 of 2 pairs left out, such as row 1: ' Luke and a friend' is 4 tokens"):
        assert len(left.on(tiny)) == 1


def ids_of(model: cf.Model, *texts: str) -> list[list[int]]:
    return model.tokenizer(list(texts))["input_ids"]


@pytest.mark.parametrize("chat", [False, True])
def test_first_is_the_first_token_that_differs(tiny: cf.Model, chat: bool) -> None:
    task = plain(**LONG, answer="first", chat=chat, spelling="space")
    bound = task.on(tiny)
    assert bound.answer_texts == ("Kate / Paul", "Luke / Anna") and bound.prompts[0].endswith(" Mary and")
    assert bound.prompts[1].endswith("assistant:" if chat else "to") and bound.appended == (2, 0)
    assert any(
        "in 1 of 2 pairs it is not the first one, and the tokens before it end both" in one for one in bound.notes
    )
    prompts = plain(chat=chat).on(tiny)
    sides = [
        [row[keep].tolist() for row, keep in zip(*side[:2], strict=True)]
        for side in (prompts.batch.clean, prompts.batch.corrupted)
    ]
    for side in sides:
        side[0] = side[0] + ids_of(tiny, " Mary and")[0]
    right, wrong = ([row[0] for row in ids_of(tiny, *words)] for words in ((" Kate", " Luke"), (" Paul", " Anna")))
    same(tiny, task, of_ids(*sides, right, wrong))
    assert cf.diagnose(tiny, task).summary is not None


def test_first_of_sets_and_without_wrong_answers(tiny: cf.Model) -> None:
    sets = plain(answers=[["Mary and Kate", "Mary and Anna"], "Luke"], wrong_answers=[["Mary and Paul"], "Mary"])
    assert replace(sets, answer="first").on(tiny).answer_texts == ("Kate, Anna / Paul", "Luke / Mary")
    bare = plain(answers=LONG["answers"], wrong_answers=None, metric="logprob", answer="first").on(tiny)
    assert bare.answer_texts == ("Mary", "Luke") and bare.appended == (0, 0)
    assert "answers are read at their first token" in bare.notes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"answers": ["Mary", "Luke"], "wrong_answers": ["Mary and Kate", "Anna"]},
            "row 0: one of .* is the beginning of all others",
        ),
        (
            {"answers": [["Mary and Kate", "Luke"], "Luke"]},
            "row 0: some right and wrong answers begin alike, others do not",
        ),
        ({"answers": None}, "answer='first' is for answers as text, and the task has none"),
        ({"answers": [5, 6], "wrong_answers": [7, 8]}, r"with ids give positions=, \[batch, reads\]"),
        ({"positions": -1}, "answer='first' and positions= both say where the logits are read"),
        ({"answer": "last"}, "answer is 'last': use 'first' .* or 'all'"),
        (
            {"answer": "all", "wrong_answers": ["Mary and Paul", "Anna"]},
            "row 1: the right answer has 4 tokens and the wrong",
        ),
        ({"answer": "all", "answers": [["Mary and", "Kate"], "Luke"]}, "row 0: answer='all' needs one right answer"),
        ({"answer": "all", "wrong_answers": LONG["answers"]}, "row 0: the right and the wrong answer are the same"),
        (
            {"answers": ["Mary and Kate", " "], "spelling": "none"},
            "answers must be text that adds tokens.*row 1, '' is 0 tokens",
        ),
    ],
)
def test_what_cannot_be_read(tiny: cf.Model, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(TaskError, match=words):
        plain(**{**LONG, "answer": "first", "spelling": "text", **changes}).on(tiny)


def test_rows_that_cannot_be_read_are_dropped(tiny: cf.Model) -> None:
    task = plain(**{**LONG, "wrong_answers": ["Mary and Paul", "Anna"]}, answer="all", unusable="drop")
    with pytest.warns(UserWarning, match="such as row 1: the right answer has 4 tokens and the wrong one 1"):
        assert task.on(tiny).answer_texts == ("Mary and Kate / Mary and Paul",)


def teacher_forced(model: cf.Model, prompt: str, answer: str, wrong: str | None = None) -> float:
    """The sum over an answer's tokens of log probabilities (of logits, minus those of the wrong one), one run each."""
    (ids,), (own,) = ids_of(model, prompt), ids_of(model, answer)
    other = own if wrong is None else ids_of(model, wrong)[0]
    total = 0.0
    for at, (token, twin) in enumerate(zip(own, other, strict=True)):
        logits = model.hf(torch.tensor([ids + own[:at]])).logits[0, -1].double()
        total += float(logits.log_softmax(-1)[token] if wrong is None else logits[token] - logits[twin])
    return total


@torch.no_grad()
def test_all_is_the_sum_over_the_answers_tokens(tiny: cf.Model) -> None:
    """Answers of three and four tokens, so that one row is padded; the first two tokens of one are shared."""
    for metric, wrongs in (("logprob", [None, None]), ("logit_diff", LONG["wrong_answers"])):
        task = plain(**LONG, answer="all", metric=metric)
        for texts, side in ((TEXTS, "clean"), (TWINS, "corrupted")):
            rows = zip(texts, LONG["answers"], wrongs, strict=True)
            expected = [teacher_forced(tiny, text, f" {a}", w and f" {w}") for text, a, w in rows]
            found = getattr(cf.summarise(tiny, task, warn=False), side)
            assert found == pytest.approx(np.mean(expected), rel=1e-4)
            for row, value in enumerate(expected):
                alone = cf.summarise(tiny, task.on(tiny).subset([row]), warn=False)
                assert getattr(alone, side) == pytest.approx(value, rel=1e-4)
    bound = task.on(tiny)
    assert bound.answer_texts[0] == "Mary and Kate / Mary and Paul" and bound.batch.summed.sum(1).tolist() == [3, 4]
    assert "the whole answer is read by teacher forcing, the metric summed over its tokens" in bound.notes


@pytest.mark.parametrize("metric", ["logprob", "kl", "logit_diff", "prob_diff"])
def test_all_equals_ids_read_at_several_positions(tiny: cf.Model, metric: str) -> None:
    """Of answers of one length: there the same is asked for by positions, where a metric is their mean."""
    words = {"answers": ["Mary and Kate", "Luke and Anna"], "wrong_answers": ["John and Paul", "Mary and Kate"]}
    right, wrong = (ids_of(tiny, *(f" {one}" for one in words[side])) for side in words)
    wrong[1][1] = right[1][1] + 1  # ids refuse the same token on both sides of a place
    sides = [[ids + own[:-1] for ids, own in zip(ids_of(tiny, *texts), right, strict=True)] for texts in (TEXTS, TWINS)]
    places = {"positions": [[-3, -2, -1]] * 2, "metric": metric}
    task = plain(**words, answer="all", metric=metric, chat=False)
    if metric in ("logprob", "kl"):
        as_ids = of_ids(*sides, right, None, **places)
        if metric == "logprob":
            same(tiny, task, as_ids, times=3)
        scores = [cf.patch(tiny, one, "heads").effects for one in (task, as_ids)]
        rounded = np.spacing(np.float32(36))  # of the sum of three log probabilities
        np.testing.assert_allclose(scores[0], scores[1] * 3, rtol=1e-4, atol=rounded)
        return
    shared = (
        task.on(tiny).subset([0]),
        of_ids(sides[0][:1], sides[1][:1], right[:1], wrong[:1], positions=[[-3, -1]], metric=metric),
    )
    shared[1].answers, shared[1].wrong_answers = [[right[0][0], right[0][2]]], [[wrong[0][0], wrong[0][2]]]
    same(tiny, shared[0], shared[1], times=2)  # " and" on both sides counts for nothing


def test_the_parts_that_look_at_reads_themselves(tiny: cf.Model) -> None:
    """Direct contributions add up; accuracy, guessing, and a run of the whole circuit hold."""
    ioi = cf.task("ioi", tiny, n=6)
    ends = (" and Kate", " and a friend")
    words = [[f"{row[0]}{ends[n % 2]}" for n, row in enumerate(side)] for side in (ioi.answers, ioi.wrong_answers)]
    task = replace(ioi, answers=words[0], wrong_answers=words[1], answer="all", spelling="space")
    direct = cf.direct_effects(tiny, task)
    measured = cf.summarise(tiny, task, warn=False)
    assert float(direct.logit_diff.mean()) == pytest.approx(measured.clean, rel=1e-4)
    added = direct.per_example.sum(0) + direct.constant
    np.testing.assert_allclose(added, direct.logit_diff, rtol=1e-3, atol=1e-3)
    whole = cf.evaluate(tiny, task, tiny.graph.names(tiny.graph.real))
    assert whole.faithfulness == pytest.approx(1, abs=1e-4) and whole.metric == pytest.approx(measured.clean, rel=1e-4)
    plain_ioi = cf.summarise(tiny, ioi, warn=False)  # what follows the names is the same on both sides
    assert (measured.accuracy, measured.clean) == (plain_ioi.accuracy, pytest.approx(plain_ioi.clean, rel=1e-4))
    assert measured.chance == pytest.approx(0.5) and measured.accuracy == 1 > measured.top1
    assert cf.evaluate(tiny, task, ["input->logits"]).kl > cf.evaluate(tiny, ioi, ["input->logits"]).kl


def test_wrong_answers_of_other_lengths(tiny: cf.Model) -> None:
    task = plain(answers=LONG["answers"], wrong_answers=["Paul", "Anna"], answer="all", metric="logprob")
    bound = task.on(tiny)
    assert bound.batch.wrong.shape[-1] == 0 and any(
        "wrong answers of other lengths are left out" in n for n in bound.notes
    )
    with pytest.raises(
        TaskError, match="compares answers token by token, and this task has no wrong answers with equally many"
    ):
        bound.with_metric("logit_diff")


def test_a_prompt_that_ends_otherwise(tiny: cf.Model) -> None:
    """The tokens that are appended must be those of the text after the corrupted prompt, too."""
    task = cf.Task(["Then Jo"], ["Then L"], ["hn and Kate"], ["hn and Paul"], answer="first", spelling="given")
    ids = PromptTokenizer(tiny.tokenizer, None)(["Then Jo", "Then L"])
    assert len(ids[0]) == len(ids[1]), "the test needs prompts of one length"
    with pytest.raises(TaskError):
        task.on(tiny)


# -------------------------------------------------------------------- spelling
YEARS = {
    "clean": ["The war lasted from the year 1732 to the year"],
    "corrupted": ["The war lasted from the year 1746 to the year"],
}


def years(**changes: Any) -> cf.Task:
    return cf.Task(**{**YEARS, "answers": ["17"], "wrong_answers": ["13"], **changes})


@torch.no_grad()
@pytest.mark.parametrize("end", ["", " the", ", and", " ("])
def test_the_model_prefers_a_spelling(tiny: cf.Model, end: str) -> None:
    """Both " 17" and "17" are tokens, as are " 13" and "13": the spelling to which the model gives more is taken."""
    task = years(clean=[YEARS["clean"][0] + end], corrupted=[YEARS["corrupted"][0] + end])
    chances = tiny.hf(torch.tensor(ids_of(tiny, task.clean[0]))).logits[0, -1].softmax(-1)
    masses = [
        float(chances[[row[0] for row in ids_of(tiny, *words)]].sum()) for words in ((" 17", " 13"), ("17", "13"))
    ]
    bound = task.on(tiny)
    shown = tiny.tokenizer.decode([int(bound.batch.answers)])
    assert shown == (" 17" if masses[0] > masses[1] else "17")
    assert percent(max(masses)) in bound.notes[0] and "which the model prefers" in bound.notes[0]
    assert bound.notes == task.on(tiny).notes and torch.equal(bound.batch.answers, task.on(tiny).batch.answers)


def test_a_spelling_that_is_asked_for(tiny: cf.Model, tmp_path: Path) -> None:
    for spelling, token in (("space", " 17"), ("none", "17"), ("given", "17"), ("text", " 17"), (["space"], " 17")):
        bound = years(spelling=spelling).on(tiny)
        assert tiny.tokenizer.decode([int(bound.batch.answers)]) == token and "prefers" not in bound.notes[0]
    both = cf.Task(YEARS["clean"] * 2, YEARS["corrupted"] * 2, ["17", "17"], ["13", "13"], spelling=["none", "space"])
    bound = cf.Task.from_file(both.save(tmp_path / "a.jsonl")).on(tiny)
    assert [tiny.tokenizer.decode([one]) for one in bound.batch.answers.flatten().tolist()] == ["17", " 17"]
    assert bound.notes[0] == "answers spelled without a leading space or with a leading space"
    mixed = replace(both, spelling=["none", None])
    assert cf.Task.from_file(mixed.save(tmp_path / "a.jsonl")).spelling == ["none", None]
    assert mixed.subset([1]).spelling == [None]
    for wrong, words in (
        ("spaces", "spelling is 'spaces': use 'space' "),
        (["none", 3], "row 1: spelling is 3"),
        (["none"], "the lists differ in length"),
    ):
        with pytest.raises(TaskError, match=words):
            replace(both, spelling=wrong)


def test_without_weights_the_text_decides() -> None:
    class Both(Stub):
        """Letters, and a space with its letter is one token."""

        def __call__(self, texts: list[str], add_special_tokens: bool, **_: object) -> dict[str, list[list[int]]]:
            return {"input_ids": [[sum(map(ord, one)) for one in re.findall(" ?.", text)] for text in texts]}

        def convert_ids_to_tokens(self, ids: Any) -> Any:
            return ids

        def decode(self, ids: Any) -> str:
            return str(ids)

    task = cf.Task(["ab"], ["ac"], ["d"], ["e"])
    for model in (WithTokenizer(Both(), vocabulary=999), WithTokenizer(Both(), vocabulary=999, remote=True)):
        bound = task.on(model)
        assert bound.batch.answers.tolist() == [[[ord(" ") + ord("d")]]]
        assert (
            bound.notes[0]
            == "answers spelled with a leading space, by the text: the model's weights are not here to ask"
        )


def test_one_pass_and_only_where_there_is_a_choice(tiny: cf.Model) -> None:
    for task, forwards in ((years(), 1), (years(spelling="text"), 0), (plain(), 0), (cf.task("ioi", tiny, n=3), 0)):
        with measuring() as costs:
            task.on(tiny)
        assert costs.forwards == forwards
    rows = [70, 3, 150]
    many = cf.Task(*(side * sum(rows) for side in YEARS.values()), ["17"] * sum(rows), ["13"] * sum(rows))
    assert many.on(tiny).notes[0] == years().on(tiny).notes[0]


def test_inside_only_the_whole_model_is_asked(tiny: cf.Model) -> None:
    outside = years().on(tiny).notes
    with cf.only(tiny, ["input->logits"], plain()) as circuit:
        assert years().on(tiny).notes == outside
        assert circuit.run(years()).shape[:2] == (1, 1)


def test_answers_that_the_model_would_not_say(tiny: cf.Model) -> None:
    task = years(clean=["John gave it to"], corrupted=["Luke gave it to"])
    with pytest.warns(
        CircuitfindWarning, match=r"the model gives the answers \S+% of its probability on average, and wou"
    ):
        task.on(tiny)
    found = cf.diagnose(tiny, task.on(tiny))
    assert any(line.startswith("the model gives the answers") for line in found.warnings)
    assert "in 1 of 1 pairs (rows 0) neither answer is among the model's 10 most likely tokens" in found.warnings
    chances = tiny.hf(torch.tensor(ids_of(tiny, task.clean[0]))).logits[0, -1].softmax(-1).detach()
    (said,) = found.said
    assert said.tokens == tuple(tiny.tokenizer.decode([one]) for one in chances.topk(5).indices)
    np.testing.assert_allclose(said.probabilities, chances.topk(5).values, rtol=1e-4)
    assert f"pair 0: the model answers {said.tokens[0]!r} {percent(said.probabilities[0])}, " in str(found)
    assert cf.Diagnosis.from_dict(json.loads(json.dumps(found.to_dict()))).said == found.said


def test_a_likely_token_in_another_spelling(tiny: cf.Model) -> None:
    spelled = years().on(tiny)
    other = "none" if " 17" in tiny.tokenizer.decode(spelled.batch.answers.flatten().tolist()) else "space"
    found = cf.diagnose(tiny, years(spelling=other))
    assert any(
        re.search(r"; in row 0, ' ?17' is among them, the answer ' ?17' in another spelling: use spelling=", one)
        for one in found.warnings
    )


def test_what_is_said_without_a_tokenizer_or_answers(tiny: cf.Model) -> None:
    model = wrapped("gpt2")
    ids = torch.tensor([[3, 4, 5]])
    said = cf.diagnose(model, cf.Task(ids, ids + 1, metric="kl")).said
    assert all(token.isdigit() for token in said[0].tokens) and str(said[0]).count("%") == 5
    bare = cf.diagnose(tiny, plain(wrong_answers=None, metric="logprob"))
    assert "; right " in str(bare.said[0]) and "wrong" not in str(bare.said[0])


# -------------------------------------------------------------------- the command line
def test_the_command_line_has_them(tiny: cf.Model, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cf, "load", lambda *_, **__: tiny)
    monkeypatch.setenv("COLUMNS", "200")
    plain(**LONG).save("long.jsonl")
    words = ["doctor", "tiny", "--data", "long.jsonl"]
    assert main(words) == 2 and "Give answer='first'" in capsys.readouterr().err
    assert main([*words, "--answer", "first", "--chat", "--spelling", "space"]) == 0
    out = capsys.readouterr().out
    assert (
        "answers    pair 0: '" in out and "answers spelled with a leading space; answers are read at the first" in out
    )
    assert "BOS token: in the prompt's text" in " ".join(out.split())
    assert main([*words, "--answer", "all", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["task"]["said"]) == 2 and document["task"]["summary"]["metric"] == "logit_diff"
    assert main([*words, "--unusable", "drop"]) == 2 and "none of the 2 pairs can be used" in capsys.readouterr().err
    assert main(["patch", "tiny", "--task", "ioi", "--n", "2", "--chat", "--what", "attn", "--verbose"]) == 0
    assert "in the prompt's text" in capsys.readouterr().out
    assert main([*words, "--answer", "fist"]) == 2 and "--answer 'fist' is unknown" in capsys.readouterr().err
    Path("mixed.jsonl").write_text(json.dumps({"clean": turns("a"), "corrupted": "b", "answer": "c"}) + "\n")
    assert main(["doctor", "tiny", "--data", "mixed.jsonl"]) == 2
    assert "mixed.jsonl: row 0: some prompts are text" in capsys.readouterr().err
