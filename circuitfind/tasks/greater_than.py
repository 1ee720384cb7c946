"""Greater-than: "The war lasted from the year 1732 to the year 17" -> any two digits above 32.

Hanna et al. 2023, "How does GPT-2 compute greater-than?". The answers are all endings greater than the start
year's, the wrong answers all endings not greater, and the metric is their difference in summed probability.
The year has to be two tokens, the century and two digits; endings for which the tokenizer has the whole year
as one token are left out, as in the paper. Spans, in the paper's letters: the start year's century XX and its ending
YY, and the noun; the last token is the century again.

Corruptions:
* `01`: the start year ends in 01, after which nearly every ending is greater (the paper's corruption).
* `random-year`: another start year of the same century.
"""

from __future__ import annotations

import random

from circuitfind.errors import TaskError
from circuitfind.tasks.behaviour import Behaviour, Choice, Draw, numbered
from circuitfind.tasks.filled import filled
from circuitfind.tasks.lexicon import EVENTS
from circuitfind.tasks.rows import Row
from circuitfind.tasks.words import SingleTokens

NAME = "greater-than"
CORRUPTIONS = ("01", "random-year")
TEMPLATE = "The {event} lasted from the year {century}{start} to the year {century}"
SPANS = {"event": ["noun"], "century": ["XX"], "start": ["YY"]}
CENTURIES: tuple[str, ...] = tuple(str(century) for century in range(10, 19))

_LEAST_ENDINGS, _LEAST_EVENTS = 60, 2
_FIRST, _LAST = "02", "98"


def _prepare(words: SingleTokens, choice: Choice) -> Draw:
    events = words.need(EVENTS, _LEAST_EVENTS, NAME, "nouns for events")
    endings = {century: words.century_endings(century) for century in CENTURIES}
    usable = [century for century, found in endings.items() if len(found) >= _LEAST_ENDINGS and "01" in found]
    if not usable:
        best = max(len(found) for found in endings.values())
        raise TaskError(
            f"{NAME}: 0 of {len(CENTURIES)} centuries can be used: their years must be two tokens,"
            f" as ' 17' + '32', for at least {_LEAST_ENDINGS} of 100 endings (this tokenizer's best"
            f" century: {best}); choose a model with GPT-2's kind of tokenizer or another behaviour, or bring"
            " your own pairs in a file"
        )

    def draw(rng: random.Random, number: int) -> Row:
        event, century = rng.choice(events), rng.choice(usable)
        starts = [ending for ending in endings[century] if _FIRST <= ending <= _LAST]
        start = rng.choice(starts)
        other = "01" if choice.corruption == "01" else rng.choice([ending for ending in starts if ending != start])
        clean, spans = filled(TEMPLATE, SPANS, event=event, century=century, start=start)
        return Row(
            clean=clean,
            corrupted=TEMPLATE.format(event=event, century=century, start=other),
            answers=tuple(ending for ending in endings[century] if ending > start),
            wrong=tuple(ending for ending in endings[century] if ending <= start),
            spans=spans,
        )

    return draw


BEHAVIOUR = Behaviour(
    name=NAME,
    summary="a period ends after it starts: The war lasted from the year 1732 to the year 17 -> 33 to 99",
    source="Hanna et al. 2023, How does GPT-2 compute greater-than? (arXiv:2305.00586)",
    metric="prob_diff",
    corruptions=CORRUPTIONS,
    prepare=_prepare,
    templates=numbered([TEMPLATE]),
)
