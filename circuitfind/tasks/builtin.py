"""The registry of tasks, and the built-in tasks, except those with files of their own (`ioi.py`, `mcqa.py`, ...).

`TASKS` holds each `TaskBuilder` by its name. A new built-in task is a record in the list at the end of this file. A
task from outside the package is passed to `circuitfind.task`, or added with `register`.
"""

from __future__ import annotations

import random
from functools import partial

from circuitfind.errors import TaskError, entered, imported, plain, unknown
from circuitfind.tasks import ioi, lexicon, mcqa, numbers
from circuitfind.tasks.builder import REMEDY, Choice, Draw, Pair, SingleTokens, TaskBuilder, numbered


def _gendered_pronoun(words: SingleTokens, choice: Choice) -> Draw:
    """The pronoun agrees with the gender that the name usually has; female and male names alternate.

    Corruption `other-gender`: a name of the other gender, after which the other pronoun is right.
    """
    need = partial(words.need, task="gendered-pronoun")
    she, he = need(("she", "he"), 2, what="pronouns (she, he)")
    female, male = need(lexicon.FEMALE_NAMES, 3, what="female names"), need(lexicon.MALE_NAMES, 3, what="male names")
    adjectives = need(lexicon.ADJECTIVES, 2, what="adjectives")
    people, places = need(lexicon.PEOPLE, 2, what="nouns for people"), need(lexicon.PLACES, 2, what="places")

    def draw(rng: random.Random, number: int) -> Pair:
        pattern = rng.choice(choice.patterns)
        hers, his = (rng.choice(female), she), (rng.choice(male), he)
        rest = {"adjective": rng.choice(adjectives), "person": rng.choice(people), "place": rng.choice(places)}
        (name, answer), (other, wrong) = (his, hers) if number % 2 else (hers, his)
        said, spans = {"name": name, **rest}, {"name": ["name"]}
        return Pair.filled(pattern, said, {"name": other}, [answer], [wrong], flips=True, spans=spans)

    return draw


_PRESENT, _PAST = ("is", "are"), ("was", "were")
_VERBS = {
    "The {subject} near the {attractor}": _PRESENT,
    "The {subject} next to the {attractor}": _PRESENT,
    "Today the {subject} behind the {attractor}": _PRESENT,
    "I know that the {subject} with the {attractor}": _PRESENT,
    "Yesterday the {subject} near the {attractor}": _PAST,
    "Last week the {subject} behind the {attractor}": _PAST,
    "Long ago the {subject} that the {attractor} had": _PAST,
}


def _agreement(words: SingleTokens, choice: Choice) -> Draw:
    """The verb agrees with its subject, and a noun nearer to the verb (the attractor) has the other number.

    Corruptions: `other-number`, the subject in the other number, after which the other verb is right;
    `attractor-number`, the attractor in the subject's number: the answer stays the same and becomes easier.
    """
    name, flips = "subject-verb-agreement", choice.corruption == "other-number"
    nouns = words.need_pairs(lexicon.NOUNS, 6, name, "nouns (singular and plural)")
    tenses = words.need_pairs((_PRESENT, _PAST), 1, name, "verbs (is and are, was and were)")
    patterns = [pattern for pattern, verbs in _VERBS.items() if verbs in tenses and pattern in choice.patterns]
    if not patterns:
        chosen = f"the verbs of template {', '.join(choice.templates)}"
        raise TaskError(f"{name}: {chosen} are not one token each with this tokenizer; choose another template")

    def draw(rng: random.Random, number: int) -> Pair:
        pattern = rng.choice(patterns)
        subject, attractor = rng.sample(nouns, 2)
        own, other = number % 2, 1 - number % 2
        said = {"subject": subject[own], "attractor": attractor[other]}
        corrupted = {"subject": subject[other]} if flips else {"attractor": attractor[own]}
        verbs, spans = _VERBS[pattern], {field: [field] for field in said}
        return Pair.filled(pattern, said, corrupted, [verbs[own]], [verbs[other]], flips=flips, spans=spans)

    return draw


DOCSTRING = '''def {method}(self, {before}, {a}, {b}, {c}, {after}):
    """{about}

    :param {a_doc}: {of_a}
    :param {b_doc}: {of_b}
    :param'''
_ARGUMENTS = {"a": ["A_def"], "b": ["B_def"], "c": ["C_def"], "a_doc": ["A_doc"], "b_doc": ["B_doc"]}


def _docstring(words: SingleTokens, choice: Choice) -> Draw:
    """The answer is the next argument of a Python method that its docstring has to describe.

    A method has six arguments, and its docstring describes the third (A) and the fourth (B), so the fifth (C) comes
    next; the other five are the wrong answers. Spans, with the paper's names: A_def, B_def and C_def in the definition,
    A_doc and B_doc in the docstring.

    Corruptions, with ACDC's names (Conmy et al. 2023), replace arguments by names that the clean prompt does not have:

    * `random-random`: A, B and C in the definition, and A and B in the docstring by two further names.
    * `random-def`: A and B in the definition, so that nothing links the docstring to C.
    * `random-doc`: A and B in the docstring.
    * `random-answer`: C in the definition. The new name is the only wrong answer, and the metric's sign flips.
    """
    identifiers = words.need(lexicon.IDENTIFIERS, 16, "docstring", "names of arguments")
    nouns = words.need(lexicon.DESCRIPTIONS, 8, "docstring", "nouns")
    if not words.keeps(DOCSTRING):
        raise TaskError(f"docstring: this tokenizer loses line breaks, spaces or punctuation of code; {REMEDY}")
    flips = choice.corruption == "random-answer"

    def draw(rng: random.Random, number: int) -> Pair:
        method, *names = rng.sample(identifiers, 14)
        before, (a, b, answer), after, others = names[:2], names[2:5], names[5], names[6:]
        about, of_a, of_b = (" ".join(rng.sample(nouns, size)) for size in (3, 2, 2))
        said = {"method": method, "before": ", ".join(before), "a": a, "b": b, "c": answer, "after": after}
        said |= {"about": about, "a_doc": a, "of_a": of_a, "b_doc": b, "of_b": of_b}
        corrupted = {
            "random-random": dict(zip(("a", "b", "c", "a_doc", "b_doc"), others, strict=False)),
            "random-def": {"a": others[0], "b": others[1]},
            "random-doc": {"a_doc": others[0], "b_doc": others[1]},
            "random-answer": {"c": others[0]},
        }[choice.corruption]
        wrong = others[:1] if flips else [*before, a, b, after]
        return Pair.filled(DOCSTRING, said, corrupted, [answer], wrong, flips=flips, spans=_ARGUMENTS)

    return draw


LIST_WORDS = tuple(dict.fromkeys(lexicon.OBJECTS + lexicon.PLACES + lexicon.ADJECTIVES + lexicon.EVENTS))
LIST_PREFIX = "Words:"
_SHORTEST, _LONGEST = 6, 10


def _induction(words: SingleTokens, choice: Choice) -> Draw:
    """A list of different words starts again: the answer is the word that followed the last word the first time.

    In the list ... A B ... A -> B, the first A and the first B are the spans A1 and B1; the second A is the last token.

    Corruptions: `next-swap`, in the first half the answer changes places with a later word, which is the wrong answer;
    `no-repeat`, the first half has other words, so that nothing is repeated.
    """
    pool, flips = words.need(LIST_WORDS, 2 * _LONGEST, "induction", "common words"), choice.corruption == "next-swap"

    def draw(rng: random.Random, number: int) -> Pair:
        length = rng.randint(_SHORTEST, _LONGEST)
        drawn = rng.sample(pool, 2 * length)
        first, twin = drawn[:length], drawn[length:]
        # neither the answer, at `at`, nor the word with which it changes places may lie in the repeated part
        at = rng.randint(2, length - 2)
        other = rng.randint(at + 1, length - 1)
        if flips:
            twin = list(first)
            twin[at], twin[other] = first[other], first[at]
        fields = [f"w{i}" for i in range(length)]
        pattern = " ".join([LIST_PREFIX, *(f"{{{field}}}" for field in fields), *first[:at]])
        said, corrupted = (dict(zip(fields, listed, strict=True)) for listed in (first, twin))
        spans = {fields[at - 1]: ["A1"], fields[at]: ["B1"]}
        return Pair.filled(pattern, said, corrupted, [first[at]], [first[other]], flips=flips, spans=spans)

    return draw


def _capital(words: SingleTokens, choice: Choice) -> Draw:
    """The answer is a country's capital. Corruption `other-country`: another country, whose capital is then right."""
    pairs = words.need_pairs(lexicon.CAPITALS, 5, "country-capital", "countries and capitals")

    def draw(rng: random.Random, number: int) -> Pair:
        pattern = rng.choice(choice.patterns)
        (country, capital), (other, elsewhere) = rng.sample(pairs, 2)
        said, corrupted, spans = {"country": country}, {"country": other}, {"country": ["subject"]}
        return Pair.filled(pattern, said, corrupted, [capital], [elsewhere], flips=True, spans=spans)

    return draw


def _copy(words: SingleTokens, choice: Choice) -> Draw:
    """The answer is a name from earlier in the text. Three names are enough, so that small story models can be used.

    Corruption `other-name`: another name, which is then right.
    """
    names = words.need(lexicon.FEMALE_NAMES + lexicon.MALE_NAMES + lexicon.STORY_NAMES, 3, "copy", "names")

    def draw(rng: random.Random, number: int) -> Pair:
        pattern = rng.choice(choice.patterns)
        name, other = rng.sample(names, 2)
        spans = {"name": ["name1", "name2", "name3"]}
        return Pair.filled(pattern, {"name": name}, {"name": other}, [name], [other], flips=True, spans=spans)

    return draw


_TASKS = (
    ioi.TASK,
    numbers.GREATER_THAN,
    TaskBuilder(
        "gendered-pronoun",
        _gendered_pronoun,
        ("other-gender",),
        templates=numbered(
            "So {name} is a really {adjective} {person}, isn't",
            "Everyone knows that {name} is a very {adjective} {person}, because",
            "Yesterday {name} went to the {place} with a {adjective} {person} because",
            "When {name} came home from the {place},",
            "I think {name} was at the {place} when",
            "The {adjective} {person} said that {name} would come if",
        ),
        summary="the pronoun agrees with the name: So Mary is a really great friend, isn't -> she",
        source="Mathwin, Corlouer et al. 2023, A Preliminary Circuit for Predicting Gendered Pronouns in GPT-2",
    ),
    TaskBuilder(
        "subject-verb-agreement",
        _agreement,
        ("other-number", "attractor-number"),
        templates=numbered(*_VERBS),
        summary="the verb agrees with its subject, not with the nearer noun: The keys near the cabinet -> are",
        source="Linzen et al. 2016, Assessing the Ability of LSTMs ... (arXiv:1611.01368); Finlayson et al. 2021",
    ),
    TaskBuilder(
        "induction",
        _induction,
        ("next-swap", "no-repeat"),
        summary="continue a list of random words that starts again: Words: cup river old map cup river -> old",
        source="Olsson et al. 2022, In-context Learning and Induction Heads (arXiv:2209.11895)",
    ),
    TaskBuilder(
        "docstring",
        _docstring,
        ("random-random", "random-def", "random-doc", "random-answer"),
        templates=numbered(DOCSTRING),
        summary="the next argument to describe: def f(self, size, files, last): ... :param size: ... :param -> files",
        source="Heimersheim & Janiak 2023, A circuit for Python docstrings in a 4-layer attention-only transformer",
    ),
    TaskBuilder(
        "country-capital",
        _capital,
        ("other-country",),
        templates=numbered(
            "The capital of {country} is the city of",
            "Everyone knows that the capital of {country} is",
            "When you travel to {country}, you will visit its capital,",
            "The government of {country} sits in its capital city,",
        ),
        summary="recall a country's capital: The capital of France is the city of -> Paris",
        source="Meng et al. 2022, Locating and Editing Factual Associations in GPT (arXiv:2202.05262)",
    ),
    TaskBuilder(
        "copy",
        _copy,
        ("other-name",),
        templates=numbered(
            "There was a little child named {name}. One day,",
            "Once upon a time, there was a child named {name}. {name} was happy. One day,",
            "His friend was named {name}. His friend was named",
            "The friends said: {name}, {name}, {name},",
            "The child was named {name}. Everyone said: {name}, {name},",
            "One day, {name} saw a cat. The cat saw {name}. Then,",
            "So {name} was happy. {name} was big. {name} was little.",
            "Once upon a time, there was a child named {name}.",
        ),
        summary="a name from earlier in the text is repeated: There was a little child named Lily. One day, -> Lily",
        source="Olsson et al. 2022, In-context Learning and Induction Heads (arXiv:2209.11895)",
    ),
    numbers.ADDITION,
    mcqa.TASK,
)
TASKS: dict[str, TaskBuilder] = {builder.name: builder for builder in _TASKS}
_BUILT_IN = frozenset(TASKS)


def register(builder: TaskBuilder) -> TaskBuilder:
    """Add a task, which replaces an earlier one of the same name; raise TaskError for the name of a built-in task."""
    taken = "'{}' is a built-in task: give yours another name"
    return entered(builder, TaskBuilder, TASKS, TaskError, taken, fixed=_BUILT_IN)


def builder_of(task: str | TaskBuilder) -> TaskBuilder:
    """Return a task by its name (underscores count as hyphens) or by "package.module:name".

    Raises:
        TaskError: there is no such task.
    """
    if isinstance(task, TaskBuilder):
        return task
    if not isinstance(task, str):
        kind = type(task).__name__
        raise TaskError(f"a task is named by text such as 'ioi' or given as a TaskBuilder, not as a {kind}")
    known = {plain(name): builder for name, builder in TASKS.items()}
    name, _, corruption = task.partition(":")
    if corruption and plain(name) in known:
        raise TaskError(f"task '{task}': give the corruption on its own, as corruption='{corruption}'")
    if corruption:
        return imported("task", task, TaskBuilder, TaskError)
    if plain(task) not in known:
        raise TaskError(unknown("task", task, TASKS))
    return known[plain(task)]
