"""Eight prompts of indirect object identification, four sentences in both name orders, as tutorials use them.

Each prompt is the clean side of one pair and the corrupted side of its neighbour, so the clean and the corrupted mean
logit difference are each other's negative. The published values for GPT-2 small, without a BOS token, are
2.8138 and -2.8138.
"""

from __future__ import annotations

import circuitfind as cf

SENTENCES = [
    ("When John and Mary went to the shops,{} gave the bag to", " Mary", " John"),
    ("When Tom and James went to the park,{} gave the ball to", " Tom", " James"),
    ("When Dan and Sid went to the shops,{} gave an apple to", " Dan", " Sid"),
    ("After Martin and Amy went to the park,{} gave a drink to", " Martin", " Amy"),
]
PUBLISHED = 2.8138


def eight_prompts(model: cf.Model) -> cf.Task:
    """The tutorials' prompts, or four built-in pairs in both orders where the tokenizer splits one of these names."""
    rows = [(one.format(b), one.format(a), a, b) for one, first, second in SENTENCES for a, b in both(first, second)]
    published = cf.Task(*map(list, zip(*rows, strict=True)), name="ioi, the tutorials' eight prompts", flips=True)
    try:
        published.on(model)
        return published
    except cf.TaskError:
        built_in = cf.task("ioi", model, n=4, template="abba-3")
        return both_orders(built_in)


def both_orders(task: cf.Task) -> cf.Task:
    """Return a task with each pair followed by the same pair with its sides exchanged."""
    return cf.Task(
        clean=[prompt for pair in zip(task.clean, task.corrupted, strict=True) for prompt in pair],
        corrupted=[prompt for pair in zip(task.corrupted, task.clean, strict=True) for prompt in pair],
        answers=[words for pair in zip(task.answers, task.wrong_answers, strict=True) for words in pair],
        wrong_answers=[words for pair in zip(task.wrong_answers, task.answers, strict=True) for words in pair],
        name=f"{task.name}, both orders",
        flips=True,
    )


def report(model: cf.Model, task: cf.Task) -> None:
    """Print the mean logit differences, and for GPT-2 small on these prompts the published value."""
    ends = cf.summarise(model, task)
    print(f"{model}\n{task.name}: mean logit difference {ends.clean:+.4f} clean, {ends.corrupted:+.4f} corrupted")
    if task.name.endswith("eight prompts") and model.name.split("/")[-1] == "gpt2":
        print(f"published for GPT-2 small: {PUBLISHED:+.4f} clean; difference {abs(ends.clean - PUBLISHED):.4f}")


def both(first: str, second: str) -> tuple[tuple[str, str], tuple[str, str]]:
    return (first, second), (second, first)
