"""`build`: a known circuit by its name, or from a user's own drawing."""

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
from circuitfind.testbed.trained import SUFFIX, load_trained, trained

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
OF_GPT2 = ("reverse", "sort")  # these read positions, which Llama's residual stream does not contain
_LAYERED = re.compile(r"layered-(\d{1,5})")


def names(form: str = "gpt2") -> list[str]:
    """Return the names that `build` knows in a form, "gpt2" or "llama".

    Names that end in "-trained" are models that were trained to the circuit instead of compiled from it. `build` also
    takes "layered-N", a random circuit with N true edges, 10 to 10,000.

    Raises:
        ScoreError: there is no such form.
    """
    check_form(form)
    compiled = [name for name in CIRCUITS if form == "gpt2" or name not in OF_GPT2]
    return [*compiled, *(name + SUFFIX for name in trained(form))]


def check_form(form: str) -> None:
    if form not in FORMS:
        raise ScoreError(unknown("testbed form", form, FORMS))


def summary_of(name: str) -> str:
    """Return one line on what a circuit computes."""
    return (getdoc(CIRCUITS.get(name.removesuffix(SUFFIX), layered)) or "").splitlines()[0].rstrip(".")


@own_arithmetic()
def build(circuit: str | Drawing, *, n: int = 64, seed: int = 0, form: str = "gpt2", norm: str = "identity") -> Known:
    """Return a model with a known circuit, its task and its true edges.

    Args:
        circuit: one of `names()`, "layered-N", or a `Drawing` of your own.
        n: number of pairs.
        seed: of the pairs and, for "layered-N", of the circuit.
        form: "gpt2", or "llama": grouped queries, rotary positions, gated MLPs.
        norm: "identity": norms that change nothing, so that edges outside the circuit have no effect; "real" (GPT-2
            only): LayerNorms that scale, so that everything written changes everything else a little. Trained models
            always have real norms.

    Raises:
        ScoreError: there is no such circuit, or not in this form.
    """
    check_seed(seed)
    check_form(form)
    if norm not in NORMS:
        raise ScoreError(unknown("testbed norm", norm, NORMS))
    if norm == "real" and form != "gpt2":
        raise ScoreError(f"norm='real' is for form='gpt2': the norms of form='{form}' change nothing")
    if isinstance(circuit, Drawing):
        return make("drawing", "a drawing of your own", circuit, n, seed, norm, form)
    if isinstance(circuit, str) and (found := _LAYERED.fullmatch(circuit)):
        return make(circuit, summary_of(circuit), layered(int(found[1]), seed), n, seed, norm, form)
    base = circuit.removesuffix(SUFFIX) if isinstance(circuit, str) else circuit
    if base not in CIRCUITS or (base != circuit and circuit not in names(form)):
        raise ScoreError(unknown("testbed circuit", circuit, [*names(form), "layered-100"]))
    hf = None if base == circuit else load_trained(base, form)
    return make(circuit, summary_of(circuit), CIRCUITS[base](), n, seed, norm, form, hf)
