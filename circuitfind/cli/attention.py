"""`circuitfind attention`: what heads attend to."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from typing import Any

import circuitfind as cf
from circuitfind.cli import inputs, options, tables
from circuitfind.cli.options import option
from circuitfind.cli.output import Output
from circuitfind.errors import FileError, ScoreError

TOKEN = "its position, its text, or the name of a span such as IO"


@dataclass(frozen=True)
class HeadOptions:
    head: str = option("Heads, such as a0.h1.", MISSING, metavar=options.NAMES)
    key: str | None = option(f"Explain the attention to this token: {TOKEN}.", metavar="TOKEN")
    query: str = option("Query token. Default: the last.", "-1", metavar="TOKEN")
    against: str | None = option("Key to compare with. Default: the mean of all other keys.", metavar="TOKEN")
    example: int | None = option("Number of the pair, from 0. Default: 0; with --key, the mean of all.", least=0)
    corrupted: bool = option("Use the corrupted prompt instead of the clean one.", False)


def attention(model: options.Model, task: options.Task, which: HeadOptions, place: options.Out, out: Output) -> None:
    """Show what heads attend to on a prompt of a task and, with --key, why.

    Writes attention-HEAD.json with the whole pattern of each head (queries down, keys across), and a page
    that shows them: attention-HEAD.html, or attention.html for several heads. With --key, writes
    attention-HEAD-why.json instead: the attention score of that key, split into pairs of a node on the query side and
    a node on the key side.

    Example: circuitfind attention tiny --task ioi --head a0.h1,a3.h2
    """
    if which.key is None and which.against is not None:
        raise ScoreError("--against needs --key: the token whose score is compared")
    folder = inputs.folder(place.out, out)
    loaded, bound = inputs.load(model, task, out)
    heads = inputs.names_in(which.head)
    example = 0 if which.example is None and which.key is None else which.example
    described = {**inputs.described(loaded, bound, out), "example": example}
    if which.key is not None:
        key, query = _token(which.key), _token(which.query)
        against = None if which.against is None else _token(which.against)
        asked: dict[str, Any] = {"against": against, "example": example, "corrupted": which.corrupted}
        whys = [cf.attention_attribution(loaded, bound, head, key, query, **asked) for head in heads]
        files = [one.save(folder / f"attention-{one.head}-why.json", **described) for one in whys]
        for why in whys:
            tables.attention_attribution(why, out)
        return out.finish({**described, "scores": [why.to_dict() for why in whys]}, files)
    found = cf.attention(loaded, bound, heads, example=example or 0, corrupted=which.corrupted)
    files = [one.save(folder / f"attention-{one.head}.json", **described) for one in found]
    page = files[0].with_suffix(".html") if len(files) == 1 else folder / "attention.html"
    try:
        files.append(cf.save_page(cf.plot(found), page, f"Attention on {bound.name}"))
    except FileError as error:
        out.warn(str(error))
    for one in found:
        tables.attention(one, out)
    return out.finish({**described, "patterns": [one.to_dict() for one in found]}, files)


def _token(text: str) -> int | str:
    """The position as an integer, if it is one."""
    return int(text) if text.removeprefix("-").isdecimal() else text
