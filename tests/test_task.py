"""Tasks: strings and ids become padded batches, and every bad row is refused by its number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from toys import id_task, wrapped
from transformers import PreTrainedTokenizerFast

import circuitfind as cf
from circuitfind.errors import TaskError
from circuitfind.metrics import METRICS
from circuitfind.tasks.tokens import PromptTokenizer

IOI = ["When Mary and John went to the store, John gave it to", "When Luke and Aaron met, Luke gave it to"]
TWINS = ["When Mary and John went to the store, Mary gave it to", "When Luke and Aaron met, Aaron gave it to"]


@pytest.fixture(scope="module")
def tiny() -> cf.Model:
    return cf.load("tiny", check=False)


@pytest.fixture(scope="module")
def ids_only() -> cf.Model:
    return wrapped("gpt2")


def pairs_of_ids(**changes: Any) -> cf.Task:
    """Three pairs of five ids each, one answer and one wrong answer."""
    clean = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 11, 12], [13, 14, 15, 16, 17]])
    fields = {"clean": clean, "corrupted": clean + 40, "answers": [20, 21, 22], "wrong_answers": [30, 31, 32]}
    return cf.Task(**{**fields, **changes})


def pairs_of_text(**changes: Any) -> cf.Task:
    fields = {"clean": IOI, "corrupted": TWINS, "answers": ["Mary", "Aaron"], "wrong_answers": ["John", "Luke"]}
    return cf.Task(**{**fields, **changes})


# -------------------------------------------------------------------- strings
def test_strings_become_padded_ids(tiny: cf.Model) -> None:
    bound, tokenizer = pairs_of_text(name="mine").on(tiny), tiny.tokenizer
    ids = [tokenizer(text)["input_ids"] for text in IOI]
    lengths = [len(row) for row in ids]
    assert lengths[0] > lengths[1], "the test needs prompts of two lengths"
    for row, length in enumerate(lengths):
        assert bound.batch.clean.ids[row, :length].tolist() == ids[row]
        assert bound.batch.clean.mask[row].tolist() == [at < length for at in range(lengths[0])]
        assert bound.batch.corrupted.ids[row, :length].tolist() == tokenizer(TWINS[row])["input_ids"]
    assert bound.batch.clean.read.tolist() == bound.batch.corrupted.read.tolist() == [[n - 1] for n in lengths]
    expected = [[tokenizer.convert_tokens_to_ids(f"Ġ{name}")] for name in ("Mary", "Aaron")]
    assert bound.batch.answers[:, 0].tolist() == expected and bound.batch.wrong.shape == (2, 1, 1)
    assert (bound.name, len(bound), bound.metric.name) == ("mine", 2, "logit_diff")
    assert bound.prompts == tuple(IOI) and bound.corrupted_prompts == tuple(TWINS)
    assert bound.answer_texts == ("Mary / John", "Aaron / Luke")
    assert ["".join(row) for row in bound.tokens] == IOI
    assert bound.notes == ("answers spelled with a leading space", "BOS token: none")


def test_answer_sets_of_unequal_size(tiny: cf.Model) -> None:
    bound = pairs_of_text(answers=[["Mary"], ["Aaron", "Mary"]], wrong_answers=["John", ["Luke"]]).on(tiny)
    mary, aaron = (tiny.tokenizer.convert_tokens_to_ids(f"Ġ{name}") for name in ("Mary", "Aaron"))
    assert bound.batch.answers.tolist() == [[[mary, -1]], [[aaron, mary]]]
    assert bound.batch.wrong.shape == (2, 1, 1)


@pytest.mark.parametrize(
    ("prompt", "answers", "spelling", "tokens"),
    [
        ("Then Mary gave it to", ["John", "Luke"], "with a leading space", ["ĠJohn", "ĠLuke"]),
        ("Then Mary gave it to", [" John", " Luke"], "as given", ["ĠJohn", "ĠLuke"]),
        ("The war lasted from the year 1732 to the year 17", ["33", "45"], "as given", ["33", "45"]),
        ("Then Mary gave it to John", [".", "!"], "as given", [".", "!"]),  # " ." is two tokens here
        ("Then Mary met (", ["A", "B"], "as given", ["A", "B"]),
    ],
)
def test_answers_are_spelled_as_they_follow_the_prompt(
    tiny: cf.Model, prompt: str, answers: list[str], spelling: str, tokens: list[str]
) -> None:
    corrupted = [prompt.replace("Mary", "Luke").replace("1732", "1701")]
    bound = cf.Task([prompt], corrupted, [answers[0]], [answers[1]], spelling="text").on(tiny)
    found = [int(bound.batch.answers[0, 0, 0]), int(bound.batch.wrong[0, 0, 0])]
    assert tiny.tokenizer.convert_ids_to_tokens(found) == tokens
    assert bound.notes[0] == f"answers spelled {spelling}"


def test_one_spelling_serves_all_rows(tiny: cf.Model) -> None:
    """After digits a number goes on without a space; a row that ends with a word settles it for all rows."""
    digits, word = ("the year 1732 to the year 17", "32"), ("the year 1732 to the", "17")
    spelled = []
    for rows in ([digits], [word], [digits, word]):
        prompts, answers = zip(*rows, strict=True)
        corrupted = [prompt.replace("1732", "1701") for prompt in prompts]
        bound = cf.Task(list(prompts), corrupted, list(answers), metric="logprob", spelling="text").on(tiny)
        spelled.append(tiny.tokenizer.convert_ids_to_tokens(bound.batch.answers.flatten().tolist()))
    assert spelled == [["32"], ["Ġ17"], ["32", "17"]], "' 32' is no token, so the last task is spelled as given"


@pytest.mark.shared
def test_sentencepiece_answers(shared: Path) -> None:
    model = cf.load(str(shared / "models/stories260K"), check=False)
    task = cf.Task(["Lily was happy."], ["Tim was happy."], ["She"], ["He"])
    for answers in (["She"], ["He"]), ([" She"], [" He"]):
        bound = cf.Task(["Lily was happy."], ["Tim was happy."], *answers).on(model)
        found = torch.cat([bound.batch.answers, bound.batch.wrong]).flatten().tolist()
        assert model.tokenizer.convert_ids_to_tokens(found) == ["▁She", "▁He"]
    assert bound.tokens[0][0] == "<s>" and task.on(model).bos == "added by the tokenizer"
    with pytest.raises(TaskError, match=r"row 0, ' were' is 2 tokens \['▁we', 're'\]"):
        cf.Task(["They"], ["Lily"], ["were"], ["was"]).on(model)


# -------------------------------------------------------------------- BOS
def test_bos_is_forced_left_out_or_the_tokenizers_own(tiny: cf.Model) -> None:
    first = tiny.tokenizer.bos_token_id
    own, forced, without = (pairs_of_text(bos=bos).on(tiny) for bos in (None, True, False))
    assert torch.equal(own.batch.clean.ids, without.batch.clean.ids)
    assert forced.batch.clean.ids[:, 0].tolist() == forced.batch.corrupted.ids[:, 0].tolist() == [first] * 2
    assert forced.batch.clean.ids[0, 1:].tolist() == own.batch.clean.ids[0].tolist()
    assert torch.equal(forced.batch.answers, own.batch.answers)
    assert (own.bos, forced.bos, without.bos) == ("none", "forced", "left out")
    assert cf.attribute(tiny, pairs_of_text(bos=True), "eap").record.bos == "forced"


class Stub:
    """A tokenizer of letters that adds its own BOS 1 and, where `closes`, EOS 2."""

    def __init__(self, closes: bool = False, bos: int | None = 1) -> None:
        self.bos_token_id, self.eos_token_id, self.eos_token, self.closes = bos, 2, "</s>", closes
        self.bos_token = bos and "<s>"

    def __call__(self, texts: list[str], add_special_tokens: bool, **_: object) -> dict[str, list[list[int]]]:
        rows = [[ord(letter) for letter in text] for text in texts]
        if add_special_tokens:
            rows = [[*([1] if self.bos_token_id else []), *row, *([2] if self.closes else [])] for row in rows]
        return {"input_ids": rows}


def test_special_tokens_of_the_tokenizer() -> None:
    a, b = ord("a"), ord("b")
    assert PromptTokenizer(Stub(), None)(["ab"]) == [[1, a, b]]
    assert PromptTokenizer(Stub(), True)(["ab"]) == [[1, a, b]]  # not twice
    assert PromptTokenizer(Stub(), False)(["ab"]) == [[a, b]]
    closing = PromptTokenizer(Stub(closes=True), None)
    assert closing(["a", "ab"]) == [[1, a], [1, a, b]]  # a prompt is continued: no EOS behind it
    assert closing.added("a", [1, a], ["b", "ab"]) == [[b], [a, b]]
    assert PromptTokenizer(Stub(bos=None), None).describe(["a"], [[a]]) == "none"
    with pytest.raises(TaskError, match="bos=True, but the tokenizer has no BOS token"):
        PromptTokenizer(Stub(bos=None), True)


def starting_with(first: str) -> PreTrainedTokenizerFast:
    """A tokenizer of words that puts these special tokens before every text."""
    words = ["[UNK]", "<s>", "[gMASK]", "<sop>", "Paris", "Rome", "is", "in", "France", "Italy"]
    core = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = WhitespaceSplit()
    specials = [("<s>", 1), ("[gMASK]", 2), ("<sop>", 3)]
    core.post_processor = TemplateProcessing(single=f"{first} $A", special_tokens=specials)
    bos = "<s>" if "<s>" in first else None
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, unk_token="[UNK]")
    tokenizer.add_special_tokens({"additional_special_tokens": ["[gMASK]", "<sop>"]})
    return tokenizer


@pytest.mark.parametrize("bos", [None, True, False])
def test_a_text_that_begins_with_bos_gets_no_second_one(bos: bool | None) -> None:
    """As a rendered chat prompt does."""
    make = PromptTokenizer(starting_with("<s>"), bos)
    own = ["<s>Paris is in", "<s>Rome is in"]
    assert make(own) == [[1, 4, 6, 7], [1, 5, 6, 7]] and make.describe(own, make(own)) == "in the prompt's text"
    assert make.added("<s>Paris is in", make(own)[0], [" France", " Italy"]) == [[8], [9]]
    assert make(["<s><s>Paris"]) == [[1, 1, 4]]  # two of them, as the text says
    mixed = ["<s>Paris", "Paris Paris"]
    rule = {None: "added by the tokenizer", True: "forced", False: "left out"}[bos]
    assert make.describe(mixed, make(mixed)) == f"{rule}, but in the text of 1 of 2 prompts"
    assert make(mixed) == [[1, 4], [4, 4] if bos is False else [1, 4, 4]]


def test_no_special_token_at_the_beginning_comes_twice() -> None:
    """Of a tokenizer that puts two of them there, GLM's."""
    make = PromptTokenizer(starting_with("[gMASK] <sop>"), None)
    assert make(["[gMASK]<sop>Paris is", "Paris is", "Paris Paris Paris Paris"]) == [
        [2, 3, 4, 6],
        [2, 3, 4, 6],
        [2, 3, 4, 4, 4, 4],
    ]
    assert PromptTokenizer(starting_with("[gMASK] <sop>"), False)(["Paris Paris"]) == [[4, 4]]


# -------------------------------------------------------------------- ids
def test_ids_are_taken_as_they_are(ids_only: cf.Model) -> None:
    bound = pairs_of_ids().on(ids_only)
    assert bound.batch.clean.ids.tolist() == pairs_of_ids().clean.tolist() and not bound.batch.clean.padded
    assert bound.batch.answers.tolist() == [[[20]], [[21]], [[22]]]
    assert bound.batch.wrong.tolist() == [[[30]], [[31]], [[32]]]
    assert bound.bos == "ids given" and bound.prompts[0] == "3 4 5 6 7" and bound.tokens[0] == ("3", "4", "5", "6", "7")
    for answers in ([[20], [21, 23], [22]], [[20, 20], [21, 23], [22, 22]]):
        assert pairs_of_ids(answers=answers).on(ids_only).batch.answers[1].tolist() == [[21, 23]]
    for answers in (torch.tensor([20, 21, 22]), np.array([20, 21, 22]), np.array([[20], [21], [22]])):
        assert torch.equal(pairs_of_ids(answers=answers).on(ids_only).batch.answers, bound.batch.answers)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_given_by_the_user_is_repacked_to_the_right(ids_only: cf.Model, side: str) -> None:
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])
    mask = mask if side == "left" else mask.flip(1)
    bound = pairs_of_ids(attention_mask=mask).on(ids_only)
    kept = [row[keep].tolist() for row, keep in zip(pairs_of_ids().clean, mask.bool(), strict=True)]
    assert [len(row) for row in kept] == [5, 3, 4]
    for row, real in enumerate(kept):
        assert bound.batch.clean.ids[row].tolist() == real + [0] * (5 - len(real))
        assert bound.batch.clean.mask[row].tolist() == [True] * len(real) + [False] * (5 - len(real))
    assert bound.batch.clean.read.tolist() == [[4], [2], [3]]
    assert torch.equal(bound.batch.clean.mask, bound.batch.corrupted.mask)


def test_the_corrupted_prompts_may_be_padded_otherwise(ids_only: cf.Model) -> None:
    left, right = torch.tensor([[0, 1, 1, 1, 1]] * 3), torch.tensor([[1, 1, 1, 1, 0]] * 3)
    bound = pairs_of_ids(attention_mask=left, corrupted_attention_mask=right).on(ids_only)
    assert bound.batch.clean.ids[0].tolist() == [4, 5, 6, 7] and bound.batch.corrupted.ids[0].tolist() == [
        43,
        44,
        45,
        46,
    ]


def test_left_padded_ids_score_like_right_padded_ones(ids_only: cf.Model) -> None:
    right = id_task((7, 4, 5))
    shift = [7 - n for n in (7, 4, 5)]
    turned = {
        name: torch.stack([row.roll(by) for row, by in zip(getattr(right, name), shift, strict=True)])
        for name in ("clean", "corrupted", "attention_mask")
    }
    left = cf.Task(**turned, answers=right.answers, wrong_answers=right.wrong_answers)
    scores = [cf.attribute(ids_only, task, "eap").values for task in (left, right)]
    np.testing.assert_array_equal(*scores)


# -------------------------------------------------------------------- positions
@pytest.mark.parametrize(
    ("positions", "read"),
    [
        (None, [[4], [4], [4]]),
        (2, [[2], [2], [2]]),
        (-2, [[3], [3], [3]]),
        ([0, 1, -1], [[0], [1], [4]]),
        (torch.tensor([[0], [1], [2]]), [[0], [1], [2]]),
    ],
)
def test_one_read_position(ids_only: cf.Model, positions: Any, read: list[list[int]]) -> None:
    bound = pairs_of_ids(positions=positions).on(ids_only)
    assert bound.batch.clean.read.tolist() == bound.batch.corrupted.read.tolist() == read
    assert bound.batch.answers.tolist() == [[[20]], [[21]], [[22]]]


def test_positions_count_a_prompts_own_tokens(ids_only: cf.Model, tiny: cf.Model) -> None:
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])
    bound = pairs_of_ids(attention_mask=mask, positions=-1).on(ids_only)
    assert bound.batch.clean.read.tolist() == [[4], [2], [3]]
    lengths = pairs_of_text().on(tiny).batch.clean.mask.sum(1).tolist()
    assert pairs_of_text(positions=[[1, -1], [0, -2]]).on(tiny).batch.clean.read.tolist() == [
        [1, lengths[0] - 1],
        [0, lengths[1] - 2],
    ]


def test_several_read_positions_with_answers_of_their_own(ids_only: cf.Model) -> None:
    several = {"positions": [[1, 2], [3, 4], [-1, 0]]}
    bound = pairs_of_ids(**several, answers=[[5, 6], [7, 8], [9, 5]], wrong_answers=[[8, 8], [9, 9], [6, 6]]).on(
        ids_only
    )
    assert bound.batch.clean.read.tolist() == [[1, 2], [3, 4], [4, 0]]
    assert bound.batch.answers.tolist() == [[[5], [6]], [[7], [8]], [[9], [5]]]
    sets = pairs_of_ids(**several, answers=[[[5, 6], [7, -1]]] * 3, wrong_answers=[[8, 9]] * 3).on(ids_only)
    assert sets.batch.answers[2].tolist() == [[5, 6], [7, -1]] and sets.batch.wrong.shape == (3, 2, 1)
    assert (
        pairs_of_ids(**several, answers=None, wrong_answers=None, metric="kl").on(ids_only).batch.answers.numel() == 0
    )
    same = {"answers": [[5, 6]] * 3, "wrong_answers": [[6, 5]] * 3}  # right at one position, wrong at the other
    assert pairs_of_ids(**several, **same).on(ids_only).batch.wrong[0].tolist() == [[6], [5]]


# -------------------------------------------------------------------- refusals: the lists
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corrupted": TWINS[:1]}, "the lists differ in length: clean 2, corrupted 1, answers 2, wrong_answers 2"),
        ({"answers": ["Mary"]}, "the lists differ in length: clean 2, corrupted 2, answers 1, wrong_answers 2"),
        ({"clean": IOI[0]}, "clean is one string: give a list with one entry per pair"),
        ({"corrupted": TWINS[0]}, "corrupted is one string"),
        ({"answers": "Mo"}, "answers is one string"),  # as long as the list, and still no list
        ({"wrong_answers": "Mo"}, "wrong_answers is one string"),
        ({"clean": [], "corrupted": [], "answers": None, "wrong_answers": None}, "the task holds no pairs"),
        ({"corrupted": torch.ones(2, 5, dtype=torch.long)}, "both be strings or both be id tensors"),
        (
            {"clean": [[1, 2], [3, 4]], "corrupted": [[1, 5], [3, 6]]},
            r"row 0: prompts are strings, lists of messages, or all of them one",
        ),
        ({"corrupted": [TWINS[0], None]}, "row 1: prompts are strings"),
        ({"metric": "accuracy"}, "metric 'accuracy' is unknown. Known: logit_diff, prob_diff, logprob, kl"),
    ],
)
def test_lists_that_do_not_fit_are_refused_at_once(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        pairs_of_text(**changes)


# -------------------------------------------------------------------- refusals: rows of text
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"corrupted": [TWINS[0], TWINS[1] + " Mary"]},
            r"row 1: the clean prompt has \d+ tokens, the corrupted one \d+",
        ),
        ({"corrupted": [IOI[0], TWINS[1]]}, "row 0: the clean and the corrupted prompt are identical"),
        ({"answers": ["Mary", "xylophone"]}, r"row 1, ' xylophone' is 6 tokens .*as given: row 0, 'Mary' is 2 tokens"),
        ({"wrong_answers": ["qqq", "Luke"]}, r"row 0, ' qqq' is \d tokens"),
        ({"answers": ["Mary", ""]}, r"row 1: answers must be a non-empty string or a list of them, not \[''\]"),
        ({"answers": [[], "Aaron"]}, r"row 0: answers must be a non-empty string"),
        ({"answers": [5, 6]}, r"row 0: answers must be a non-empty string or a list of them, not \[5\]"),
        ({"wrong_answers": [["John"], ["Luke", 3]]}, "row 1: wrong_answers must be a non-empty string"),
        (
            {"answers": ["Mary", ["Aaron", "Luke"]]},
            r"row 1: token \d+ \(' Luke'\) is among both the answers and the wrong answers",
        ),
        ({"answers": None}, "metric 'logit_diff' needs answers, the task has none: give them, or use metric='kl'"),
        ({"wrong_answers": None}, "metric 'logit_diff' needs wrong_answers"),
        ({"wrong_answers": None, "metric": "prob_diff"}, "metric 'prob_diff' needs wrong_answers"),
        ({"answers": None, "metric": "logprob"}, "metric 'logprob' needs answers"),
        ({"positions": 40}, r"row 0: position \[40\] lies outside its \d+ tokens"),
        ({"clean": [IOI[0], ""], "corrupted": [TWINS[0], ""]}, "row 1: the prompt is empty"),
        ({"clean": [IOI[0] * 12, IOI[1]], "corrupted": [TWINS[0] * 12, TWINS[1]]}, "row 0: .*context holds 128"),
    ],
)
def test_rows_of_text_that_cannot_be_used(tiny: cf.Model, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        pairs_of_text(**changes).on(tiny)


def test_an_answer_that_merges_with_the_prompt(tiny: cf.Model) -> None:
    tokenizer = PromptTokenizer(tiny.tokenizer, None)
    prompt, answer = "Mary gave it to Jo", "hn"
    ids = tokenizer([prompt])[0]
    assert tokenizer.added(prompt, ids, [answer]) == [None], "the test needs a merge"
    task = cf.Task([prompt], [prompt.replace("Mary", "Luke")], [answer], [" Luke"])
    with pytest.raises(TaskError, match="row 0, 'hn' merges with the prompt's last token"):
        task.on(tiny)


def test_metrics_that_need_no_answers(tiny: cf.Model) -> None:
    bare = {"answers": None, "wrong_answers": None}
    assert pairs_of_text(**bare, metric="kl").on(tiny).batch.answers.shape == (2, 1, 0)
    assert pairs_of_text(**bare, metric=lambda logits, batch: logits[:, 0]).on(tiny).metric.name == "<lambda>"
    assert pairs_of_text(wrong_answers=None, metric="logprob").on(tiny).batch.wrong.shape == (2, 1, 0)
    bound = pairs_of_text(**bare, metric="kl").on(tiny)
    with pytest.raises(TaskError, match="metric 'logit_diff' needs answers"):
        bound.with_metric("logit_diff")
    assert bound.with_metric(None) is bound and pairs_of_text(metric=METRICS["kl"]).on(tiny).metric.name == "kl"


def test_text_needs_a_tokenizer(ids_only: cf.Model) -> None:
    with pytest.raises(TaskError, match=r"no tokenizer: give token ids, or wrap it with one: cf.wrap"):
        pairs_of_text().on(ids_only)
    with pytest.raises(TaskError, match="'ioi' is made of words, and this model has no tokenizer"):
        cf.task("ioi", ids_only)


# -------------------------------------------------------------------- refusals: rows of ids
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
TWO = {"positions": [[1, 2], [3, 4], [0, 1]], "wrong_answers": [[8, 9]] * 3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corrupted_attention_mask": MASK}, "row 1: the clean prompt has 5 tokens, the corrupted one 4"),
        ({"attention_mask": MASK * torch.tensor([[1], [1], [0]])}, "row 2: the prompt is empty"),
        ({"attention_mask": MASK[:2]}, r"attention_mask has shape \[2, 5\], the prompts \[3, 5\]"),
        ({"answers": [20, 128, 22]}, "row 1: token id 128 is outside the model's vocabulary of 128"),
        ({"wrong_answers": [30, 31, -7]}, "row 2: token id -7 is outside the model's vocabulary"),
        ({"corrupted": pairs_of_ids().clean + 115}, "row 2: token id 128 is outside"),
        ({"answers": ["Mary", 21, 22]}, r"row 0: answers must be token ids, as the prompts are, not \['Mary'\]"),
        ({"answers": [20, [], 22]}, r"row 1: answers must be token ids, as the prompts are, not \[\]"),
        ({"answers": [20, 128, 22], "wrong_answers": [30, 128, 32]}, "row 1: token id 128 is outside"),
        ({"answers": [20, 31, 22]}, "row 1: token 31 is among both the answers and the wrong answers"),
        ({"positions": [0, 5, 0]}, r"row 1: position \[5\] lies outside its 5 tokens"),
        ({"positions": [0, 0, -6]}, r"row 2: position \[-6\] lies outside"),
        ({"attention_mask": MASK, "positions": 4}, r"row 1: position \[4\] lies outside its 4 tokens"),
        ({"positions": [0, 1]}, r"positions have shape \[2, 1\]: give one number, one per pair, or \[batch, reads\]"),
        ({"positions": [[1], [2, 3], [4]]}, "positions are whole numbers"),
        ({"positions": [0.5, 1, 2]}, "positions are whole numbers"),
        ({**TWO, "answers": [20, 21, 22]}, r"answers must be token ids for each read position.*= \[3, 2\]"),
        ({**TWO, "answers": [[[1, 2], [3]]] * 3}, "answers must be token ids for each read position"),
        ({**TWO, "answers": [[5, 6], [7, 500], [9, 5]]}, r"row 1: answers \[500\] hold no id, or one outside"),
        ({**TWO, "answers": [[5, 6], [7, 1], [9, -1]]}, r"row 2: answers \[-1\] hold no id"),
        (
            {**TWO, "answers": [[5, 6], [7, 9], [1, 5]]},
            "row 1: a token is among both the answers and the wrong answers",
        ),
    ],
)
def test_rows_of_ids_that_cannot_be_used(ids_only: cf.Model, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        pairs_of_ids(**changes).on(ids_only)


def test_ids_of_the_wrong_rank(ids_only: cf.Model) -> None:
    row = torch.tensor([3, 4, 5])
    with pytest.raises(TaskError, match=r"prompts as ids have shape \[3\]: \[batch, pos\] is needed"):
        cf.Task(row, row + 1, metric="kl").on(ids_only)


def test_prompts_longer_than_the_context(ids_only: cf.Model) -> None:
    ids = torch.full((1, 65), 5)
    with pytest.raises(TaskError, match="row 0: the prompt has 65 tokens, the model's context holds 64"):
        cf.Task(ids, ids + 1, metric="kl").on(ids_only)
    assert len(cf.Task(ids[:, 1:], ids[:, 1:] + 1, metric="kl").on(ids_only)) == 1


# -------------------------------------------------------------------- parts of a task
def test_splits_are_disjoint_and_seeded(ids_only: cf.Model) -> None:
    bound = id_task((5, 7, 6, 7, 4, 5, 6, 7, 5)).on(ids_only)
    first, second = bound.split(0.5, seed=1)
    assert (len(first), len(second)) == (4, 5)
    assert sorted(first.prompts + second.prompts) == sorted(bound.prompts)
    assert not set(first.prompts) & set(second.prompts)
    assert bound.split(0.5, seed=1)[0].prompts == first.prompts
    assert len({bound.split(0.5, seed=seed)[0].prompts for seed in range(8)}) > 1
    for fraction in (0.0, 0.01, 0.99, 1.0):
        with pytest.raises(TaskError, match="9 pairs cannot be split at"):
            bound.split(fraction)


def test_a_subset_keeps_rows_together(ids_only: cf.Model) -> None:
    bound = id_task((7, 4, 5)).on(ids_only)
    part = bound.subset([2, 1])
    assert part.batch.clean.ids.shape == (2, 5)  # trimmed to what is left
    assert part.prompts == (bound.prompts[2], bound.prompts[1]) and part.tokens == (bound.tokens[2], bound.tokens[1])
    assert part.answer_texts == (bound.answer_texts[2], bound.answer_texts[1])
    for name in ("answers", "wrong"):
        assert torch.equal(getattr(part.batch, name), getattr(bound.batch, name)[[2, 1]])
    assert torch.equal(part.batch.clean.read, bound.batch.clean.read[[2, 1]])
    assert torch.equal(part.batch.corrupted.ids, bound.batch.corrupted.ids[[2, 1], :5])


# -------------------------------------------------------------------- built in
def test_built_in_tasks_bind(tiny: cf.Model) -> None:
    bound = cf.task("greater-than", tiny, n=6).on(tiny)
    assert bound.notes[0] == "answers spelled as given" and bound.metric.name == "prob_diff"
    for row, prompt in enumerate(bound.prompts):
        start = prompt.split(" to ")[0][-2:]
        right = tiny.tokenizer.convert_ids_to_tokens([i for i in bound.batch.answers[row, 0].tolist() if i >= 0])
        assert all(len(ending) == 2 and ending > start for ending in right)
    assert cf.task("ioi", tiny, n=4, metric="kl").on(tiny).metric.name == "kl"
    assert cf.task("ioi", tiny, n=4, seed=1).clean != cf.task("ioi", tiny, n=4).clean
    assert cf.task("ioi", tiny, n=4).flips and cf.task("ioi", tiny, n=4).name == "ioi"
    with pytest.raises(TaskError, match="did you mean 'ioi'"):
        cf.task("io", tiny)


# -------------------------------------------------------------------- exchanged
def test_noising_of_the_exchanged_task_is_denoising(tiny: cf.Model) -> None:
    task = cf.task("ioi", tiny, n=6)
    denoised = cf.patch(tiny, task, "heads", direction="denoising")
    noised = cf.patch(tiny, task.exchanged(), "heads")
    np.testing.assert_allclose(noised.per_example, denoised.per_example, atol=1e-5)
    assert np.abs(denoised.effects).max() > 1


def test_exchanging_twice_changes_nothing(tiny: cf.Model) -> None:
    spans, others = [{"who": "Mary"}], [{"who": "the old man"}]
    prompts = {"clean": ["Mary saw John and"], "corrupted": ["the old man saw John and"]}
    answers = {"answers": [" John"], "wrong_answers": [" Mary"]}
    task = cf.Task(**prompts, **answers, spans=spans, corrupted_spans=others, align="spans")
    once = task.exchanged()
    assert once != task and once.exchanged() == task
    assert once.spans == others and once.answers == [" Mary"]


@pytest.mark.parametrize("masked", ["both", "clean", "corrupted"])
def test_masks_go_with_their_prompts(tiny: cf.Model, masked: str) -> None:
    ids = torch.arange(5, 35).view(2, 3, 5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1], [0, 0, 1, 1, 1]]).bool()
    if masked == "corrupted":
        mask = torch.ones_like(mask)
    masks = {"attention_mask": None if masked == "corrupted" else mask}
    masks |= {"corrupted_attention_mask": None if masked == "clean" else mask}
    task = cf.Task(clean=ids[0], corrupted=ids[1], answers=[50] * 3, wrong_answers=[60] * 3, **masks)
    once, twice = task.exchanged().on(tiny).batch, task.exchanged().exchanged().on(tiny).batch
    assert torch.equal(once.clean.ids, task.on(tiny).batch.corrupted.ids)
    assert torch.equal(once.corrupted.ids, task.on(tiny).batch.clean.ids)
    assert torch.equal(twice.clean.mask, task.on(tiny).batch.clean.mask)


def test_positions_of_prompts_that_differ_in_length_are_not_exchanged() -> None:
    spans = {"spans": [{"who": "Mary"}], "corrupted_spans": [{"who": "the old man"}], "align": "spans"}
    task = cf.Task(["Mary saw"], ["the old man saw"], ["a"], ["b"], positions=[1], **spans)
    with pytest.raises(TaskError, match="positions= counts in the clean prompts"):
        task.exchanged()


def test_corrupted_prompts_without_answers_of_their_own(tiny: cf.Model) -> None:
    task = cf.Task(clean=["a b"], corrupted=["a c"], answers=[" d"], metric="logprob")
    with pytest.raises(TaskError, match="give the task wrong_answers"):
        task.exchanged()
