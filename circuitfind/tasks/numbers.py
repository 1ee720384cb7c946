"""Tasks of numbers: greater-than and addition, adapted to how the tokenizer splits numbers.

A number after a space is split in one of three ways (`SingleTokens.pieces`): GPT-2 has " 17" + "32" and " 68"; Llama 3
has " " + "173" + "2" and " " + "68"; Gemma, Qwen and SmolLM2 have " " + "1" + "7" + "3" + "2" and " " + "6" + "8". A
prompt ends before the first piece that tells right from wrong, and that piece is the answer. So the answer is one
token, and all tokens are those of running text.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from circuitfind.errors import TaskError
from circuitfind.tasks import lexicon
from circuitfind.tasks.builder import REMEDY, Choice, Draw, Pair, SingleTokens, TaskBuilder, numbered

CENTURIES = tuple(str(century) for century in range(10, 19))
_YEARS = "The {event} lasted from the year {century}{start} to the year"
_LEAST = 60  # the least of a century's years (or of the numbers of two digits) that must be split alike
_TENS = 3  # index of the decade's digit in " 1732"
_SHOWN = "{shown}"


def alike(words: SingleTokens, numbers: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return number -> its pieces after a space, for the numbers that are split in the most common way."""
    pieces = {number: words.pieces(f" {number}") for number in numbers}
    shapes = Counter(tuple(map(len, split)) for split in pieces.values() if split)
    common = shapes.most_common(1)[0][0] if shapes else None
    return {number: split for number, split in pieces.items() if tuple(map(len, split)) == common}


class _Century(NamedTuple):
    """How the years of one century are shown and answered.

    shown: the part of the last year that the prompt shows. read: ending ("00" to "99") -> the piece that is the answer.
    whole: whether the piece holds all remaining digits; the start year's own piece is then a wrong answer.
    """

    shown: str
    read: dict[str, str]
    whole: bool

    def sides(self, ending: str) -> tuple[list[str], list[str]]:
        """Return right and wrong answers after a start year with this ending."""
        answers, own = dict.fromkeys(self.read.values()), self.read[ending]
        right = [answer for answer in answers if answer > own]
        return right, [answer for answer in answers if answer < own or (self.whole and answer == own)]


def _century(words: SingleTokens, century: str) -> _Century:
    years = alike(words, (f"{century}{ending:02d}" for ending in range(100)))
    if not years:
        return _Century("", {}, False)
    cuts = [0]
    for piece in next(iter(years.values())):
        cuts.append(cuts[-1] + len(piece))
    end = next(cut for cut in cuts if cut > _TENS)
    begin = max(cut for cut in cuts if cut <= _TENS)
    read = {year[2:]: f" {year}"[begin:end].lstrip() for year in years}
    return _Century(f" {century}"[:begin], read, end == _TENS + 2)


def _greater_than(words: SingleTokens, choice: Choice) -> Draw:
    """The answers are all years that are greater than the start year.

    The answer's token depends on the tokenizer. If two digits are one piece, all endings above the start year's are
    right and the others are wrong, as in the paper. If the piece ends with the decade ("3", "173"), greater decades are
    right, smaller ones are wrong, and the start year's own decade is neither, because the next digit decides; start
    years are then not of the first or the last decade. Years that are split in a less common way are left out, as in
    the paper.

    Spans, with the paper's names: the start year's century XX and ending YY, and the noun. Corruptions: `01`, the start
    year ends in 01, after which nearly every year is greater (the paper's corruption); `random-year`, another start
    year of the same century with another answer piece.
    """
    events = words.need(lexicon.EVENTS, 2, "greater-than", "nouns for events")
    found = {century: _century(words, century) for century in CENTURIES}
    usable = {name: one for name, one in found.items() if len(one.read) >= _LEAST and "01" in one.read}
    if not usable:
        best = max(len(one.read) for one in found.values())
        raise TaskError(
            f"greater-than: 0 of {len(CENTURIES)} centuries can be used: this tokenizer splits at most {best} years of"
            f" a century alike, as ' 17' + '32' or ' ' + '1' + '7' + '3' + '2', {_LEAST} are needed; {REMEDY}"
        )
    starts = {
        name: [ending for ending in one.read if "02" <= ending <= "98" and all(one.sides(ending))]
        for name, one in usable.items()
    }

    def draw(rng: random.Random, number: int) -> Pair:
        event, century = rng.choice(events), rng.choice(list(usable))
        read, start = usable[century].read, rng.choice(starts[century])
        others = [ending for ending in starts[century] if read[ending] != read[start]]
        other = "01" if choice.corruption == "01" else rng.choice(others)
        said = {"event": event, "century": century, "start": start, "shown": usable[century].shown}
        spans = {"event": ["noun"], "century": ["XX"], "start": ["YY"]}
        return Pair.filled(_YEARS + _SHOWN, said, {"start": other}, *usable[century].sides(start), spans=spans)

    return draw


_EXAMPLES = ((12, 25), (41, 14))
_SUM = "{a} + {b} ="
_SUMS = "".join(f"{_SUM.format(a=a, b=b)} {a + b}\n" for a, b in _EXAMPLES) + _SUM
_TWO_DIGITS = [str(number) for number in range(10, 100)]


def _addition(words: SingleTokens, choice: Choice) -> Draw:
    """The answer is a sum below 100, after two worked examples, without which small models do not add.

    The answer's token is the first piece in which the sums of the clean and the corrupted prompt differ: the whole sum
    if two digits are one piece; else the tens, or the ones if both sums have the same tens, which the prompt then
    shows. The wrong answer is right after the corrupted prompt. Spans: operand1, operand2. Corruptions:
    `other-operand`, another first operand; `random`, another pair of operands (the default for MIB's rows).
    """
    numbers = alike(words, _TWO_DIGITS)
    if len(numbers) < _LEAST:
        raise TaskError(
            f"arithmetic-addition: {len(numbers)} of {len(_TWO_DIGITS)} numbers are split alike by this"
            f" tokenizer, as ' 68' or ' ' + '6' + '8', {_LEAST} are needed; {REMEDY}"
        )
    sums = {(a, b): str(int(a) + int(b)) for a in numbers for b in numbers if (int(a), int(b)) not in _EXAMPLES}
    by_second: dict[str, list[tuple[str, str]]] = {}
    for (a, b), total in sums.items():
        if total in numbers:
            by_second.setdefault(b, []).append((a, b))
    terms = [pair for pairs in by_second.values() if len(pairs) > 1 for pair in pairs]

    def draw(rng: random.Random, number: int) -> Pair:
        pattern, (a, b) = rng.choice(choice.patterns), rng.choice(terms)
        pool = by_second[b] if choice.corruption == "other-operand" else terms
        x, y = rng.choice([pair for pair in pool if sums[pair] != sums[a, b]])
        right, wrong = numbers[sums[a, b]], numbers[sums[x, y]]
        at = next(at for at, pair in enumerate(zip(right, wrong, strict=True)) if pair[0] != pair[1])
        said = {"a": a, "b": b, "shown": "".join(right[:at])}
        answers = [right[at].lstrip()], [wrong[at].lstrip()]
        spans = {"a": ["operand1"], "b": ["operand2"]}
        return Pair.filled(pattern + _SHOWN, said, {"a": x, "b": y}, *answers, flips=True, spans=spans)

    return draw


GREATER_THAN = TaskBuilder(
    "greater-than",
    _greater_than,
    ("01", "random-year"),
    metric="prob_diff",
    templates=numbered(_YEARS),
    summary="a period ends after it starts: The war lasted from the year 1732 to the year 17 -> 33 to 99 (or 4 to 9)",
    source="Hanna et al. 2023, How does GPT-2 compute greater-than? (arXiv:2305.00586)",
)
ADDITION = TaskBuilder(
    "arithmetic-addition",
    _addition,
    ("other-operand", "random"),
    templates=numbered(_SUMS),
    summary="the sum of two numbers, after two worked examples: 12 + 25 = 37 ... 23 + 45 = -> 68 (or its first digit)",
    source="Mueller et al. 2025, MIB: A Mechanistic Interpretability Benchmark (arXiv:2504.13151)",
)
