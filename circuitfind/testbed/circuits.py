"""The drawings of the compiled circuits.

Lower-case letters stand for words, capital letters for names of people. The clean and the corrupted prompt of a pair
differ in everything that the circuit uses, so that each of its edges carries a difference.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from string import ascii_lowercase, ascii_uppercase

import torch

from circuitfind.tasks.builder import Pair
from circuitfind.testbed.blueprint import SHARP, Blueprint, Match, Offset, Variable
from circuitfind.testbed.distractors import distract
from circuitfind.testbed.known import Drawing

START = "<s>"
GAIN = 6.0  # by how much a moved word's logit rises
LETTERS, NAMES = tuple(ascii_lowercase[:10]), tuple(ascii_uppercase[:8])
DIGITS = tuple("0123456789")

Contexts = tuple[tuple[str, ...], ...]


def _drawn(plan: Blueprint, draw: Callable[[random.Random], Pair], contexts: Contexts = ((),)) -> Drawing:
    """Return a drawing of the circuit with distractors."""
    distract(plan)
    return Drawing(plan, draw, contexts)


def induction(sharp: float = SHARP) -> Drawing:
    """A head attends to the word after an earlier copy of its word, through keys that a previous-token head wrote."""
    plan = Blueprint([START, *LETTERS], 8)
    before = plan.variable("before")
    plan.head(0, [Offset(1)], plan.word(), {before: 1})
    plan.head(1, [plan.match(plan.token, before, sharp), plan.resting(sharp / 2)], plan.word(), {plan.output: GAIN})

    def draw(rng: random.Random) -> Pair:
        drawn = rng.sample(LETTERS, 10)
        own, other = drawn[:5], drawn[5:]
        at = rng.randrange(4)
        return Pair(" ".join([*own, own[at]]), " ".join([*other, other[0]]), (own[at + 1],), (own[at - 1],))

    return _drawn(plan, draw)


def saturated() -> Drawing:
    """Induction with attention so close to 0 and 1 that the softmax has practically no gradient."""
    return induction(5 * SHARP)


def _ioi() -> tuple[Blueprint, list[Match], Callable[[random.Random], Pair]]:
    """Draw the duplicate-token head and the S-inhibition head.

    Return the blueprint, the matches of a name mover's attention, and the function that draws pairs.
    """
    plan = Blueprint([START, *NAMES, "and", "met", "gave", "to"], 8)
    people = plan.select(*NAMES)
    twice, inhibited = plan.variable("twice"), plan.variable("inhibited")
    same = plan.match(plan.token, plan.token, 8 * SHARP * torch.diag(people))
    # with rotary positions a penalty also lowers the scores of tokens nearby, so all terms are large
    earlier: list[Match | Offset] = [same, Offset(0, -6 * SHARP), plan.resting(7 * SHARP)]
    plan.head(0, earlier, plan.word(*NAMES), {twice: 1})
    plan.head(1, [plan.towards(twice, SHARP * people), plan.resting()], {twice: torch.eye(twice.width)}, {inhibited: 1})
    not_the_subject = SHARP * torch.outer(people, people) - 2 * SHARP * torch.diag(people)

    def draw(rng: random.Random) -> Pair:
        first, second, *others = rng.sample(NAMES, 5)
        subject = rng.choice([first, second])
        drawn = ((first, second, subject), others)
        clean, corrupted = (f"{one} and {two} met {three} gave to" for one, two, three in drawn)
        return Pair(clean, corrupted, (second if subject == first else first,), (subject,))

    return plan, [plan.match(inhibited, plan.token, not_the_subject), plan.resting()], draw


def ioi() -> Drawing:
    """Indirect object identification: the name mover attends to the name that S-inhibition does not suppress."""
    plan, looks, draw = _ioi()
    plan.head(2, looks, plan.word(*NAMES), {plan.output: GAIN})
    return _drawn(plan, draw)


def ioi_negative() -> Drawing:
    """IOI with a negative name mover, which attends as the name mover does and lowers the name's logit."""
    plan, looks, draw = _ioi()
    plan.head(2, looks, plan.word(*NAMES), {plan.output: GAIN})
    plan.head(3, looks, plan.word(*NAMES), {plan.output: -GAIN / 3})
    return _drawn(plan, draw)


def ioi_backup() -> Drawing:
    """IOI with a backup name mover, which does nothing if the name mover has written, and else takes over."""
    plan, looks, draw = _ioi()
    done = plan.variable("done")
    plan.head(2, looks, plan.word(*NAMES), {plan.output: GAIN, done: 1})
    quiet = plan.match(done, plan.start, 4 * SHARP * plan.select(*NAMES))
    plan.head(3, [*looks, quiet], plan.word(*NAMES), {plan.output: GAIN})
    return _drawn(plan, draw, ((), ("a2.h0->logits", "a2.h0->a3.h0<q>"), ("a3.h0->logits",)))


def backup() -> Drawing:
    """A head copies a word, and a second head copies it if the first has not."""
    plan = Blueprint([START, *LETTERS], 4)
    done = plan.variable("done")
    copied, ignored = LETTERS[:5], LETTERS[5:]
    plan.head(0, [Offset(1)], plan.word(*copied), {plan.output: GAIN, done: 1})
    quiet = plan.match(done, plan.start, 4 * SHARP * plan.select(*copied))
    plan.head(1, [Offset(1), quiet], plan.word(*copied), {plan.output: GAIN})

    def draw(rng: random.Random) -> Pair:
        own, wrong = rng.sample(copied, 2)
        other, end, another = rng.sample(ignored, 3)
        return Pair(f"{own} {end}", f"{other} {another}", (own,), (wrong,))

    return _drawn(plan, draw, ((), ("a0.h0->logits", "a0.h0->a1.h0<q>"), ("a1.h0->logits",)))


def _last_but_one(rng: random.Random) -> Pair:
    own, end, other, wrong, another = rng.sample(LETTERS, 5)
    return Pair(f"{own} {end}", f"{other} {another}", (own,), (wrong,))


def _switches(both: bool) -> Drawing:
    """Return the AND or OR of two switches, each seen by one head, computed by an MLP."""
    plan = Blueprint([START, "on", "off", "up", "down", *LETTERS[:6], "yes", "no"], 6)
    first, second = plan.variable("first", 1), plan.variable("second", 1)
    plan.head(0, [Offset(2)], {plan.token: plan.select("on")[:, None]}, {first: 1})
    plan.head(0, [Offset(1)], {plan.token: plan.select("up")[:, None]}, {second: 1})
    verdict = GAIN * (plan.select("yes") - plan.select("no"))
    if both:
        takes, bias, gives = torch.ones(1, 1), torch.tensor([-1.0]), verdict[None]
    else:  # min(1, a + b)
        takes, bias, gives = torch.ones(1, 2), torch.tensor([0.0, -1.0]), torch.stack([verdict, -verdict])
    plan.table(1, {first: takes, second: takes}, bias, {plan.output: gives})

    def draw(rng: random.Random) -> Pair:
        one, two = rng.sample(LETTERS[:6], 2)
        three, four = rng.sample(LETTERS[:6], 2)
        return Pair(f"{one} on up {two}", f"{three} off down {four}", ("yes",), ("no",))

    contexts = ((),) if both else ((), ("a0.h0->m1",), ("a0.h1->m1",))
    return _drawn(plan, draw, contexts)


def both() -> Drawing:
    """AND: an MLP says yes if two heads have both found their switch on."""
    return _switches(both=True)


def either() -> Drawing:
    """OR: an MLP says yes if at least one of two heads has found its switch on."""
    return _switches(both=False)


def cancelling() -> Drawing:
    """Two MLPs cancel the gradient of a head's direct effect, but not the whole effect."""
    plan = Blueprint([START, *LETTERS], 4)
    seen, size = plan.variable("seen"), len(LETTERS) + 1
    plan.head(0, [Offset(1)], plan.word(), {plan.output: GAIN, seen: 1})
    for layer in (0, 1):  # above 1/2, each MLP cancels half of the head's slope
        plan.table(layer, {seen: torch.eye(size)}, -0.5, {plan.output: -GAIN / 2 * torch.eye(size)})
    plan.head(1, [Offset(1)], plan.word(), {plan.output: GAIN})
    return _drawn(plan, _last_but_one)


def copy_suppression() -> Drawing:
    """A head finds the word about to be said in the prompt, and lowers its logit."""
    plan = Blueprint([START, *LETTERS], 6)
    plan.head(0, [Offset(1)], plan.word(), {plan.output: GAIN})
    seeks = plan.match(plan.output, plan.token, SHARP / GAIN * torch.eye(plan.token.width))
    plan.head(1, [seeks, plan.resting()], plan.word(), {plan.output: -GAIN / 2})

    def draw(rng: random.Random) -> Pair:
        said, *others = rng.sample(LETTERS, 9)
        return Pair(f"{said} {others[0]} {said} {others[1]}", " ".join(others[2:6]), (said,), (others[7],))

    return _drawn(plan, draw)


def greater_than() -> Drawing:
    """An MLP raises the logits of all digits above the one that a head has moved, and lowers the others."""
    plan = Blueprint([START, *DIGITS, "from", "to", *LETTERS[:4]], 6)
    year = plan.variable("year")
    plan.head(0, [Offset(1)], plan.word(*DIGITS), {year: 1})
    above = torch.stack([plan.select(*DIGITS[i + 1 :]) - plan.select(*DIGITS[: i + 1]) for i in range(10)])
    takes = torch.eye(year.width)[:, 1:11]
    plan.table(1, {year: takes}, 0.0, {plan.output: GAIN / 2 * above})

    def draw(rng: random.Random) -> Pair:
        year = rng.randrange(3, 9)
        one, two = rng.sample(LETTERS[:4], 2)
        clean, corrupted = f"{one} from {year} to", f"{two} from {rng.randrange(0, 2)} to"
        return Pair(clean, corrupted, DIGITS[year + 1 :], DIGITS[: year + 1])

    return _drawn(plan, draw)


def _add_steps(plan: Blueprint, number: Variable, limits: list[float], words: list[str]) -> None:
    """Add an MLP that says `words[i]` if a number lies between `limits[i - 1]` and `limits[i]`."""
    steep, said = 40.0, GAIN * torch.stack([plan.select(word) for word in words])
    rises = said[1:] - said[:-1]  # each step, relu(s + 1/2) - relu(s - 1/2), replaces a word by the next one
    bias = torch.cat([half - steep * torch.tensor(limits) for half in (0.5, -0.5)])
    gives = torch.cat([rises, -rises])
    plan.table(1, {number: torch.full((1, len(bias)), steep)}, bias, {plan.output: gives})
    plan.table(1, {number: torch.zeros(1, 1)}, 1.0, {plan.output: said[:1]})


def frac_prevs() -> Drawing:
    """The fraction of words that are x: a head computes the mean, and an MLP decides between few, half and many."""
    plan = Blueprint([START, "x", *LETTERS[:6], "few", "half", "many"], 8)
    part = plan.variable("part", 1)
    plan.head(0, [], {plan.token: plan.select("x")[:, None]}, {part: 1})
    _add_steps(plan, part, [2.5 / 8, 4.5 / 8], ["few", "half", "many"])

    def draw(rng: random.Random) -> Pair:
        def prompt(count: int) -> str:
            words = ["x"] * count + rng.choices(LETTERS[:6], k=7 - count)
            rng.shuffle(words)
            return " ".join(words)

        kinds = {"few": (0, 2), "half": (3, 4), "many": (5, 7)}
        right, wrong = rng.sample(sorted(kinds), 2)
        return Pair(prompt(rng.randint(*kinds[right])), prompt(rng.randint(*kinds[wrong])), (right,), (wrong,), True)

    return _drawn(plan, draw)


def histogram() -> Drawing:
    """How often the last word occurs: a head divides its attention among all its copies, and an MLP reads the count."""
    plan = Blueprint([START, *LETTERS, "1x", "2x", "3x", "4x"], 8)
    share = plan.variable("share", 1)
    same = plan.match(plan.token, plan.token, 2 * SHARP * torch.diag(plan.select(*LETTERS)))
    plan.head(0, [same, plan.resting(2 * SHARP)], {plan.start: torch.ones(1, 1)}, {share: 1})  # 1 / (1 + count)
    _add_steps(plan, share, [0.225, 0.29, 0.41], ["4x", "3x", "2x", "1x"])

    def draw(rng: random.Random) -> Pair:
        def prompt(count: int) -> str:
            own, *others = rng.sample(LETTERS, 8)
            words = [own] * (count - 1) + others[: 7 - count]
            rng.shuffle(words)
            return " ".join([*words, own])

        right, wrong = rng.sample(range(1, 5), 2)
        return Pair(prompt(right), prompt(wrong), (f"{right}x",), (f"{wrong}x",), True)

    return _drawn(plan, draw)


def reverse() -> Drawing:
    """The word at a place counted from the end, where the last word says which place."""
    places = DIGITS[1:6]
    plan = Blueprint([START, *LETTERS, *places], 7)
    by = torch.zeros(plan.token.width, plan.length)
    for number, place in enumerate(places, 1):
        by[plan.words.index(place), 6 - number] = 2 * SHARP
    plan.head(0, [plan.match(plan.token, plan.position, by)], plan.word(*LETTERS), {plan.output: GAIN})

    def draw(rng: random.Random) -> Pair:
        drawn, place, other = rng.sample(LETTERS, 10), *rng.sample(range(1, 6), 2)
        own, twin = drawn[:5], drawn[5:]
        clean, corrupted = " ".join([*own, str(place)]), " ".join([*twin, str(other)])
        return Pair(clean, corrupted, (own[5 - place],), (own[5 - other],))

    return _drawn(plan, draw)


def sort() -> Drawing:
    """The word at a place in sorted order: a head counts words, and an MLP finds where the count reaches the place."""
    letters, places = LETTERS[:6], DIGITS[1:5]
    plan = Blueprint([START, *letters, *places], 6)
    counts = plan.variable("counts")
    words = torch.tensor([0.0, 1, 1, 1, 1, 0])
    plan.head(0, [plan.towards(plan.position, 2 * SHARP * words)], plan.word(*letters), {counts: 4})
    up_to = torch.stack([plan.select(*letters[: i + 1]) for i in range(5)], 1)  # counts the words up to the i-th
    asked = torch.stack([plan.select(place, strength=number) for number, place in enumerate(places, 1)]).sum(0)
    steps = torch.stack([plan.select(letters[i]) - plan.select(letters[i + 1]) for i in range(5)]) * GAIN
    takes = {counts: up_to.repeat(1, 2), plan.token: -asked[:, None].repeat(1, 10)}
    bias = torch.tensor([1.0] * 5 + [0.0] * 5)  # steps where the count of the words up to the i-th reaches the place
    plan.table(1, takes, bias, {plan.output: torch.cat([steps, -steps])})
    otherwise = plan.select(letters[5], strength=GAIN)[None]
    plan.table(1, {counts: torch.zeros(counts.width, 1)}, 1.0, {plan.output: otherwise})

    def draw(rng: random.Random) -> Pair:
        own, twin = rng.sample(letters, 4), rng.sample(letters, 4)
        place, other = rng.sample(range(1, 5), 2)
        clean, corrupted = " ".join([*own, str(place)]), " ".join([*twin, str(other)])
        return Pair(clean, corrupted, (sorted(own)[place - 1],), (sorted(own)[other - 1],))

    return _drawn(plan, draw)
