"""`circuitfind attention`: what heads attend to."""

from __future__ import annotations

from dataclasses import MISSING, dataclass

import circuitfind as cf
from circuitfind.cli import inputs, options, tables
from circuitfind.cli.options import option
from circuitfind.cli.output import Output
from circuitfind.errors import FileError


@dataclass(frozen=True)
class HeadOptions:
    head: str = option("Such as a0.h1.", MISSING, metavar=options.NAMES)
    example: int = option("Which of the pairs, counted from 0.", 0, least=0)
    corrupted: bool = option("The corrupted prompt, not the clean one.", False)


def attention(model: options.Model, task: options.Task, which: HeadOptions, place: options.Out, out: Output) -> None:
    """Show what heads attend to on one prompt of a task.

    Writes attention-HEAD.json with the whole pattern of each head (queries down, keys across), and a page that shows
    them: attention-HEAD.html, or of several heads attention.html.

    Example: circuitfind attention tiny --task ioi --head a0.h1,a3.h2
    """
    folder = inputs.folder(place.out, out)
    loaded, bound = inputs.load(model, task, out)
    heads = inputs.names_in(which.head)
    found = cf.attention(loaded, bound, heads, example=which.example, corrupted=which.corrupted)
    described = {**inputs.described(loaded, bound, out), "example": which.example}
    files = [one.save(folder / f"attention-{one.head}.json", **described) for one in found]
    page = files[0].with_suffix(".html") if len(files) == 1 else folder / "attention.html"
    try:
        files.append(cf.save_page(cf.plot(found), page, f"Attention on {bound.name}"))
    except FileError as error:
        out.warn(str(error))
    for one in found:
        tables.attention(one, out)
    out.finish({**described, "patterns": [one.to_dict() for one in found]}, files)
