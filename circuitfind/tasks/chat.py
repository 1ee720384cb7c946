"""Prompts as lists of messages, rendered with the tokenizer's chat template.

1. The template's text is taken as it is, so that its ids are those of `tokenizer.apply_chat_template`: no BOS token is
   added to the one that it writes (`bos=True` adds one that it lacks).
2. After a last message of the user (or of the system, or a tool) the template asks for the answer
   (`add_generation_prompt`); a last message of the assistant is the beginning of the answer and is left open
   (`continue_final_message`).
3. Where the messages' contents stand in the text is found by rendering marks in their place. A span's text is looked
   for within the contents only, never in the template's own words. What asks for the answer is the span "generation".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

Message = Mapping[str, Any]
ROLES = ("system", "user", "assistant", "tool", "developer")
GENERATION = "generation"
_MARK = "circuitfind0message{}0"
_FORMS: tuple[Callable[[str], str], ...] = (str, str.strip, str.lstrip, str.rstrip)  # templates trim


class Rendered(str):
    """A prompt made by a chat template.

    Attributes:
        contents: (start, stop) of each message's content in the text.
        asks: where the template begins to ask for the answer; None if it does not.
    """

    contents: tuple[tuple[int, int], ...]
    asks: int | None

    @classmethod
    def of(cls, text: str, contents: Sequence[tuple[int, int]], asks: int | None) -> Rendered:
        made = cls(text)
        made.contents, made.asks = tuple(contents), asks
        return made

    def holds(self, start: int, stop: int) -> bool:
        """Whether this part of the text lies within one message's content."""
        return any(first <= start and stop <= last for first, last in self.contents)


def are_messages(prompt: object) -> bool:
    """Whether it is meant as messages, right or wrong (a list of numbers is meant as ids)."""
    if isinstance(prompt, (list, tuple)):
        return not prompt or not all(isinstance(one, int) for one in prompt)
    return isinstance(prompt, Mapping)


def one_turn(prompt: Any) -> Any:
    """A text as one turn of the user; messages as they are."""
    return [{"role": "user", "content": str(prompt)}] if isinstance(prompt, str) else prompt


def check_messages(messages: Any) -> None:
    """Raises a ValueError that says which message is wrong, and how."""
    if isinstance(messages, Mapping):
        raise ValueError("one message is not a list of them: put it in brackets, [{'role': ..., 'content': ...}]")
    if not messages:
        raise ValueError("the list of messages is empty: give at least one of the user")
    for number, message in enumerate(messages):
        which = f"message {number}"
        if not isinstance(message, Mapping):
            raise ValueError(f"{which} is {_shown(message)}: a message is {{'role': ..., 'content': ...}}")
        for needed in ("role", "content"):
            if needed not in message:
                raise ValueError(f"{which} has no '{needed}': it has {', '.join(map(str, message)) or 'nothing'}")
        if message["role"] not in ROLES:
            raise ValueError(f"{which}: role {message['role']!r} is unknown: use {', '.join(ROLES)}")
        if not isinstance(message["content"], str):
            raise ValueError(f"{which}: its content must be text, not {_shown(message['content'])}")
    if messages[-1]["role"] == "assistant" and not messages[-1]["content"].strip():
        raise ValueError("the last message is the assistant's and empty: leave it out, the template asks for an answer")


def render(tokenizer: Any, messages: Sequence[Message]) -> Rendered:
    """The text of messages; a ValueError says why there is none."""
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "the tokenizer has no chat template: take the model's chat (instruct) version, set its template"
            " (model.tokenizer.chat_template = ...), or give prompts as text"
        )
    text = _applied(tokenizer, messages)
    marks = [_MARK.format(number) for number in range(len(messages))]
    marked = [{**message, "content": mark} for message, mark in zip(messages, marks, strict=True)]
    asks = None
    if messages[-1]["role"] != "assistant":
        silent = _applied(tokenizer, messages, asking=False)
        asks = len(silent) if text.startswith(silent) and text != silent else None
    return Rendered.of(text, _places(text, _applied(tokenizer, marked), marks, messages), asks)


def _places(text: str, marked: str, marks: Sequence[str], messages: Sequence[Message]) -> list[tuple[int, int]]:
    """Where the contents stand: as the marks do, with the content, trimmed or not, in place of each."""
    around, rest = [], marked
    for mark in marks:
        before, _, rest = rest.partition(mark)
        around.append(before)
    found, at = [], len(around[0])
    for message, after in zip(messages, [*around[1:], rest], strict=True):
        forms = [form(message["content"]) for form in _FORMS]
        own = next((form for form in forms if text.startswith(form + after, at)), None)
        if own is None:
            break
        found.append((at, at + len(own)))
        at += len(own) + len(after)
    if at == len(text) and len(found) == len(messages):
        return found
    found, at = [], 0  # the template makes something else of them: one after the other, where they are
    for message in messages:
        content = message["content"].strip()
        start = text.find(content, at)
        if content and start >= 0:
            at = start + len(content)
            found.append((start, at))
    return found


def _applied(tokenizer: Any, messages: Sequence[Message], asking: bool = True) -> str:
    goes_on = messages[-1]["role"] == "assistant"
    try:
        asked = {"add_generation_prompt": asking and not goes_on, "continue_final_message": goes_on}
        text = tokenizer.apply_chat_template([dict(message) for message in messages], tokenize=False, **asked)
    except (TemplateError, ValueError, TypeError, LookupError) as error:
        said = str(error).strip().partition("\n")[0]
        raise ValueError(f"the tokenizer's chat template does not take these messages: {said}") from None
    return str(text)


def _shown(value: object) -> str:
    return repr(value) if len(repr(value)) <= 40 else f"{repr(value)[:40]}..."
