"""`circuitfind attention`: heads' attention patterns on one prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from circuitfind.cli import inputs, tables
from circuitfind.cli.options import CheckedModelOptions, Option, OutOptions, TaskOptions
from circuitfind.cli.output import Output
from circuitfind.errors import FileError


@dataclass(frozen=True)
class HeadOptions:
    """Which heads, on which prompt."""

    head: Annotated[str, Option("Such as a0.h1.", metavar="NAME,NAME,...")]
    example: Annotated[int, Option("Which of the pairs, counted from 0.", least=0)] = 0
    corrupted: Annotated[bool, Option("The corrupted prompt, not the clean one.")] = False


def attention(
    model: CheckedModelOptions, task: TaskOptions, given: HeadOptions, place: OutOptions, out: Output
) -> None:
    """Show what heads attend to on one prompt of a task.

    Writes attention-HEAD.json with the whole pattern of each head (queries down, keys across), and a page that shows
    them: attention-HEAD.html, or of several heads attention.html.

    Example: circuitfind attention tiny --task ioi --head a0.h1,a3.h2
    """
    folder = inputs.folder(place.out)
    loaded, bound = inputs.load(model, task, out, model.check)
    import circuitfind as cf

    heads = [name.strip() for name in given.head.split(",") if name.strip()]
    found = cf.attention(loaded, bound, heads, example=given.example, corrupted=given.corrupted)
    described = {**inputs.described(loaded, bound, out), "example": given.example}
    files = [one.save(folder / f"attention-{one.head}.json", **described) for one in found]
    page = files[0].with_suffix(".html") if len(files) == 1 else folder / "attention.html"
    try:
        files.append(cf.save_page(cf.plot(found), page, f"Attention on {bound.name}"))
    except FileError as error:
        out.warn(str(error))
    for one in found:
        tables.attention(one, out)
    out.written(files)
    out.document({**described, "patterns": [one.to_dict() for one in found], "files": [str(path) for path in files]})
