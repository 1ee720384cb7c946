"""Prompts as lists of messages, rendered with the tokenizer's chat template.

1. A prompt's ids are those of `tokenizer.apply_chat_template`. No BOS token is added, unless `bos=True` and the
   template writes none.
2. If the last message is the assistant's, it is the beginning of the answer and is left open
   (`continue_final_message`). After any other last message the template begins the assistant's turn
   (`add_generation_prompt`); these tokens are the span "generation".
3. To find the messages' contents in the rendered text, the template is rendered a second time with a marker in place of
   each content. The texts of spans are searched for within the contents only, not in the template's own words.
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
        asks: index in the text where the template begins the assistant's turn; None if it does not.
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
    """Whether a prompt is meant as messages, valid or not; a list of numbers is meant as ids."""
    if isinstance(prompt, (list, tuple)):
        return not prompt or not all(isinstance(one, int) for one in prompt)
    return isinstance(prompt, Mapping)


def one_turn(prompt: Any) -> Any:
    """Return a text as a chat with one message of the user; return anything else unchanged."""
    return [{"role": "user", "content": str(prompt)}] if isinstance(prompt, str) else prompt


def check_messages(messages: Any) -> None:
    """Raise a ValueError that says which message is wrong and why."""
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
    """Return the text of messages; raise ValueError if the tokenizer has no chat template or it refuses them."""
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
    """Return (start, stop) of each message's content in `text`.

    The text should equal `marked` with each marker replaced by its content, trimmed or not. If it does not, because the
    template changes the contents, those that stand in the text unchanged are searched for one after the other.
    """
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
    found, at = [], 0
    for message in messages:
        content = message["content"].strip()
        start = text.find(content, at)
        if content and start >= 0:
            at = start + len(content)
            found.append((start, at))
    return found


def _applied(tokenizer: Any, messages: Sequence[Message], asking: bool = True) -> str:
    """Return the rendered text; `asking=False` leaves out what begins the assistant's turn."""
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
