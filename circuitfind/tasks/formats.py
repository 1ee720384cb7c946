"""Rows of data in our own columns and those of other tools, as pairs of prompts with answers.

The columns of the first row tell the format. The first format of this list that fits is used:

1. EAP-IG csv: `clean, corrupted, correct_idx[, incorrect_idx]`. Answers are token ids, of the tokenizer that the file
   was made for.
2. Edge-Pruning jsonl: `clean, corrupted`, each with an answer inside `<predict>...</predict>`. The answer in the
   corrupted prompt is the wrong answer. Spaces before the tag belong to the answer. `split` names the part of the data.
3. auto-circuit json: `clean, corrupt, answers, wrong_answers`.
4. MIB: `prompt` and `*_counterfactual` columns (Mueller et al. 2025). The counterfactual's prompt is the corrupted
   prompt. IOI has names to choose from (`choices` is a list, or `metadata` has `indirect_object` and `subject`),
   multiple choice and ARC have `choices.label` and `answerKey`, arithmetic has `label`. As in MIB, the wrong answer is
   the counterfactual's answer; if that equals the right answer, all other choices are wrong. Rows without the
   counterfactual are left out.
5. Our own: `clean, corrupted, answer | answers, wrong | wrong_answers, spelling` and, in jsonl, `spans` and
   `corrupted_spans` (name -> text). A prompt is text or a list of messages (`chat.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

from circuitfind.errors import plain, unknown, warn
from circuitfind.tasks.chat import are_messages, check_messages

NAMES = {name: name for name in ("clean", "corrupted", "answers", "wrong_answers", "spans", "corrupted_spans")}
NAMES |= {"answer": "answers", "wrong": "wrong_answers", "wrong_answer": "wrong_answers", "spelling": "spelling"}
TOKEN_IDS = {"correct_idx": "answers", "incorrect_idx": "wrong_answers"}

Columns = Mapping[str, Any]  # one row of data
Fields = dict[str, Any]  # fields of a `Task` by name: clean, corrupted, and those that the data have


class BadRow(Exception):
    """A row that cannot be read as a pair; `at` is its number, counted from 0."""

    def __init__(self, at: int, text: str) -> None:
        super().__init__(text)
        self.at = at


class Format(NamedTuple):
    """One format of rows.

    fits: whether the first row is in this format. read: takes a row and, for MIB, the name of a counterfactual; returns
    a pair, or None if the row lacks that counterfactual; raises ValueError if the row is wrong. drops: whether pairs
    that the model cannot use are left out, as the format's own tool does.
    """

    name: str
    fits: Callable[[Columns], bool]
    read: Callable[[Columns, str | None], Fields | None]
    drops: bool = False


def pairs_of(rows: Sequence[Any], counterfactual: str | None, split: str | None) -> Fields:
    """Return fields of a `Task`, each a list with one entry per pair; with MIB's rows also `unusable`.

    Args:
        counterfactual: which of a MIB row's counterfactuals is the corrupted prompt.
        split: read only rows whose column `split` has this value.

    Raises:
        BadRow: naming the column and how to fix it.
    """
    for at, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise BadRow(at, f"a row is a mapping from column to value, not {str(row)[:40]!r}")
    form = next(form for form in FORMATS if form.fits(rows[0]))
    if counterfactual is not None and form.name != "MIB":
        raise BadRow(0, f"counterfactual={counterfactual!r} is for rows of MIB, these are of {form.name}")
    chosen = _of_split(rows, split)
    pairs: dict[int, Fields] = {}
    for at in chosen:
        try:
            pair = form.read(rows[at], counterfactual)
        except ValueError as error:
            raise BadRow(at, str(error)) from None
        if pair is not None:
            pairs[at] = pair
    if not pairs:
        raise BadRow(chosen[0], "this counterfactual is empty in every row: choose another with counterfactual=")
    if missing := len(chosen) - len(pairs):
        warn(f"{missing} of {len(chosen)} rows lack this counterfactual and are left out")
    if any("spelling" in pair for pair in pairs.values()):  # rows without it leave the spelling to the model
        pairs = {at: {"spelling": None, **pair} for at, pair in pairs.items()}
    first = next(iter(pairs))
    columns = set(pairs[first])
    for at, pair in pairs.items():
        if differing := sorted(set(pair) ^ columns):
            names = [_column(name, (rows[first], rows[at])) for name in differing]
            raise BadRow(at, f"column '{', '.join(names)}' is in some rows only")
    fields: Fields = {column: [pair[column] for pair in pairs.values()] for column in sorted(columns)}
    return fields | ({"unusable": "drop"} if form.drops else {})


def _column(name: str, rows: Sequence[Columns]) -> str:
    """Return the column name of a field in whichever of these rows has it."""
    fields = NAMES | TOKEN_IDS
    own = [key for row in rows for key, value in row.items() if fields.get(key) == name and value not in (None, "")]
    return own[0] if own else "<predict> in corrupted"  # Edge-Pruning's wrong answer has no column


def _of_split(rows: Sequence[Columns], split: str | None) -> list[int]:
    if split is None:
        return list(range(len(rows)))
    there = {str(row.get("split")): None for row in rows if row.get("split") is not None}
    if not there:
        raise BadRow(0, f"split={split!r}, but no row has a column 'split'")
    if split not in there:
        raise BadRow(0, unknown("split", split, there))
    return [at for at, row in enumerate(rows) if row.get("split") == split]


def _text(row: Columns, column: str) -> str:
    value = row.get(column)
    if value is None:
        raise ValueError(f"no '{column}'")
    if value == "":
        raise ValueError(f"'{column}' is empty: give its text")
    if not isinstance(value, str):
        raise ValueError(f"'{column}' must be text, not {value!r}")
    return value


def _own(row: Columns, _: str | None) -> Fields:
    pair: Fields = {}
    for key, value in row.items():
        name = NAMES.get(key)
        if name is None or value is None or value == "":
            continue
        if name in pair:
            raise ValueError(f"'{name}' is given twice")
        if name in ("clean", "corrupted") and are_messages(value):
            try:
                check_messages(value)
            except ValueError as error:
                raise ValueError(f"'{name}': {error}") from None
            pair[name] = value
            continue
        texts = value if isinstance(value, list) and name.endswith("answers") else [value]
        if name.endswith("spans") and not isinstance(value, Mapping):
            raise ValueError(f"'{name}' must be an object, name -> text, not {value!r}")
        if not name.endswith("spans") and not (texts and all(isinstance(text, str) for text in texts)):
            raise ValueError(f"'{key}' must be text, not {value!r}")
        pair[name] = value
    for key in row:
        if (name := _near(key)) is not None and NAMES.get(name, TOKEN_IDS.get(name)) not in pair:
            raise ValueError(f"column '{key}' is unknown: did you mean '{name}'?")
    for needed in ("clean", "corrupted"):
        if needed not in pair:
            if row.get(needed) == "":
                raise ValueError(f"'{needed}' is empty: give its text")
            others = "(or those of auto-circuit, Edge-Pruning, EAP-IG or MIB)"
            raise ValueError(f"no '{needed}'; columns are clean, corrupted, answer(s), wrong or wrong_answers {others}")
    return pair


def _near(column: object) -> str | None:
    """Return the known column name that an unknown one resembles, or None."""
    known = {**NAMES, **TOKEN_IDS}
    close = get_close_matches(str(column).strip().lower().replace(" ", "_"), known, n=1, cutoff=0.8)
    return close[0] if close and column not in known else None


def _auto_circuit(row: Columns, _: str | None) -> Fields:
    return _own({"corrupted" if key == "corrupt" else key: value for key, value in row.items()}, None)


def _eap_ig(row: Columns, _: str | None) -> Fields:
    pair: Fields = {side: _text(row, side) for side in ("clean", "corrupted")}
    for column, side in TOKEN_IDS.items():
        if row.get(column) not in (None, ""):
            pair[side] = _token_ids(column, row[column])
    if "answers" not in pair:
        raise ValueError("no 'correct_idx': give the answer's token id")
    return pair


def _token_ids(column: str, value: Any) -> list[int]:
    try:
        given = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError:
        given = None
    ids = given if isinstance(given, list) else [given]
    if not ids or not all(isinstance(one, int) and not isinstance(one, bool) for one in ids):
        raise ValueError(f"'{column}' must be a token id or a list of them, not {value!r}")
    return ids


_MARKED = re.compile(r"(?P<prompt>.*?)(?P<answer>\s*<predict>.*?)</predict>", re.DOTALL)


def _edge_pruning(row: Columns, _: str | None) -> Fields:
    clean, answer = _marked(_text(row, "clean"))
    corrupted, wrong = _marked(_text(row, "corrupted"))
    if answer is None:
        raise ValueError("'clean' has no <predict>...</predict> around the answer")
    pair: Fields = {"clean": clean, "corrupted": corrupted, "answers": answer}
    return pair if wrong is None else {**pair, "wrong_answers": wrong}


def _marked(text: str) -> tuple[str, str | None]:
    """Return the text before the <predict> tag, and its content with the spaces before it (None without a tag)."""
    found = _MARKED.match(text)
    if found is None:
        return text.rstrip(), None
    answer = found["answer"].replace("<predict>", "")
    if not answer.strip():
        raise ValueError("<predict></predict> holds no answer")
    return found["prompt"], answer


_DEFAULTS = ("s2_io_flip_counterfactual", "symbol_counterfactual", "random_counterfactual")


def _mib(row: Columns, counterfactual: str | None) -> Fields | None:
    column = _counterfactual(row, counterfactual)
    twin = row[column]
    if twin is None or (isinstance(twin, Mapping) and twin.get("prompt", "") is None):
        return None
    if not isinstance(twin, Mapping) or not isinstance(twin.get("prompt"), str):
        raise ValueError(f"'{column}' must be an object with a 'prompt', not {str(twin)[:40]!r}")
    right, wrong = _mib_answers(row, twin, column)
    return {"clean": _text(row, "prompt"), "corrupted": twin["prompt"], "answers": right, "wrong_answers": wrong}


def _counterfactual(row: Columns, name: str | None) -> str:
    there = [column for column in row if column.endswith("_counterfactual")]
    names = [column.removesuffix("_counterfactual") for column in there]
    if name is None:
        found = [column for column in _DEFAULTS if column in there] or (there if len(there) == 1 else [])
        if not found:
            raise ValueError(f"several counterfactuals: choose with counterfactual=; there are {', '.join(names)}")
        return found[0]
    known = {_bare(column): column for column in there}
    key = _bare(name).removesuffix("counterfactual") + "counterfactual"
    for one in (key, key.replace("ioflip", "ioiflip")):
        if one in known:
            return known[one]
    raise ValueError(unknown("counterfactual", name, names))


def _bare(name: str) -> str:
    """Drop what spellings differ in, so that "answerPosition" and "answer-position" are equal."""
    return plain(name).replace("-", "")


def _mib_answers(row: Columns, twin: Columns, column: str) -> tuple[list[str], list[str]]:
    choices, metadata = row.get("choices"), row.get("metadata")
    if isinstance(metadata, Mapping) and {"indirect_object", "subject"} <= set(metadata):  # IOI
        return [str(metadata["indirect_object"])], [str(metadata["subject"])]
    if choices is None:  # arithmetic
        if row.get("label") is None or twin.get("label") is None:
            raise ValueError(f"no 'label' in the row or in its '{column}'")
        return [str(row["label"])], [str(twin["label"])]
    right, others = _choice(row, "")
    if isinstance(choices, Mapping) and twin.get("choices") is not None:  # multiple choice
        theirs = _choice(twin, f" of '{column}'")[0]
        others = others if theirs == right else [theirs]
    return [right], others


def _choice(row: Columns, where: str) -> tuple[str, list[str]]:
    """Return the right choice's label and the labels of all others. `where`: for errors, whose choices these are."""
    choices, key = row.get("choices"), row.get("answerKey")
    labels = choices.get("label") if isinstance(choices, Mapping) else choices
    if not isinstance(labels, Sequence) or isinstance(labels, str) or len(labels) < 2:
        raise ValueError(f"'choices'{where} must hold at least two labels, not {choices!r}")
    if isinstance(key, bool) or not isinstance(key, int) or not 0 <= key < len(labels):
        counted = f"an index into the {len(labels)} choices, counted from 0"
        raise ValueError(f"'answerKey'{where} must be {counted}, not {key!r}")
    return str(labels[key]), [str(label) for at, label in enumerate(labels) if at != key]


FORMATS = (
    Format("EAP-IG", lambda row: "correct_idx" in row, _eap_ig),
    Format("Edge-Pruning", lambda row: "<predict>" in str(row.get("clean")), _edge_pruning),
    Format("auto-circuit", lambda row: "corrupt" in row and "corrupted" not in row, _auto_circuit),
    Format("MIB", lambda row: any(str(column).endswith("_counterfactual") for column in row), _mib, drops=True),
    Format("circuitfind", lambda row: True, _own),
)
