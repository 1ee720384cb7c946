"""`build`: a known circuit by its name, or from a drawing of one's own."""

from __future__ import annotations

import re
from collections.abc import Callable
from inspect import getdoc

from circuitfind.calls import own_arithmetic
from circuitfind.errors import ScoreError, unknown
from circuitfind.setting import check_seed
from circuitfind.testbed import circuits
from circuitfind.testbed.known import FORMS, NORMS, Drawing, Known, make
from circuitfind.testbed.layered import layered

CIRCUITS: dict[str, Callable[[], Drawing]] = {
    "induction": circuits.induction,
    "saturated": circuits.saturated,
    "ioi": circuits.ioi,
    "ioi-negative": circuits.ioi_negative,
    "ioi-backup": circuits.ioi_backup,
    "backup": circuits.backup,
    "and": circuits.both,
    "or": circuits.either,
    "cancelling": circuits.cancelling,
    "copy-suppression": circuits.copy_suppression,
    "greater-than": circuits.greater_than,
    "frac-prevs": circuits.frac_prevs,
    "histogram": circuits.histogram,
    "reverse": circuits.reverse,
    "sort": circuits.sort,
}
_LAYERED = re.compile(r"layered-(\d{1,5})")


def names() -> list[str]:
    """Names for `build`. Beside these, "layered-N" is a random circuit with N true edges, 10 to 10,000."""
    return list(CIRCUITS)


def summary_of(name: str) -> str:
    """What a circuit computes, in one line."""
    return (getdoc(CIRCUITS.get(name, layered)) or "").splitlines()[0].rstrip(".")


@own_arithmetic()
def build(circuit: str | Drawing, *, n: int = 64, seed: int = 0, form: str = "gpt2", norm: str = "identity") -> Known:
    """A model with a known circuit, its task and its true edges.

    Args:
        circuit: one of `names()`, "layered-N", or a `Drawing` of your own.
        n: number of pairs.
        seed: decides the pairs, and of "layered-N" the circuit.
        form: "gpt2", or "llama": grouped queries, rotary positions, gated MLPs.
        norm: "identity": norms that change nothing, so that what is inert does exactly nothing; "real" (GPT-2 only):
            LayerNorms that scale, so that everything written moves everything else a little.

    Raises:
        ScoreError: there is no such circuit, or not in this form.
    """
    check_seed(seed)
    if form not in FORMS:
        raise ScoreError(unknown("testbed form", form, FORMS))
    if norm not in NORMS:
        raise ScoreError(unknown("testbed norm", norm, NORMS))
    if norm == "real" and form != "gpt2":
        raise ScoreError(f"norm='real' is for form='gpt2': the norms of form='{form}' change nothing")
    if isinstance(circuit, Drawing):
        return make("drawing", "a drawing of your own", circuit, n, seed, norm, form)
    if isinstance(circuit, str) and (found := _LAYERED.fullmatch(circuit)):
        return make(circuit, summary_of(circuit), layered(int(found[1]), seed), n, seed, norm, form)
    if circuit not in CIRCUITS:
        raise ScoreError(unknown("testbed circuit", circuit, [*CIRCUITS, "layered-100"]))
    return make(circuit, summary_of(circuit), CIRCUITS[circuit](), n, seed, norm, form)
