"""`circuitfind testbed`: run methods on known circuits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.text import Text

import circuitfind as cf
from circuitfind.cli import inputs, options, tables
from circuitfind.cli.cells import Cell, count, fixed
from circuitfind.cli.options import option
from circuitfind.cli.output import Output


@dataclass(frozen=True)
class TestbedOptions:
    circuits: str | None = option(
        'Known circuits, by name, separated by commas; "layered-N" is a random one with N edges. Default: all.',
        metavar="A,B,...",
    )
    methods: str | None = option(
        "Names of methods, separated by commas, find and find-complete included. Default: all.", metavar="A,B,..."
    )
    n: int = option("Number of pairs.", 32, least=2)
    seed: int = option("Random seed of the pairs and of layered-N.", 0, least=0)
    form: str = option("Class of the models.", "gpt2", words=("gpt2", "llama"))
    norm: str = option(
        "Norms of the models: identity, or LayerNorms that rescale.", "identity", words=("identity", "real")
    )
    show: bool = option("List the known circuits and their true edges, and run nothing.", False, names=("--list",))
    pictures: bool = option(
        "Draw each found circuit against the true one (CIRCUIT-METHOD.svg): missing edges red, spurious edges grey.",
        False,
    )
    prove: bool = option("Check each true circuit on its model by exact patching, and run no method.", False)


def testbed(what: TestbedOptions, place: options.Out, out: Output) -> None:
    """Run methods on models with a known circuit, and measure which find it and at what cost.

    Writes recovery.json and recovery.csv, with a row for each method and circuit, and pictures with --pictures.

    Example: circuitfind testbed --circuits or,induction --methods eap,eap-ig-inputs,find-complete
    """
    circuits = None if what.circuits is None else inputs.names_in(what.circuits)
    if what.show or what.prove:
        _truths(circuits, what, out)
        return
    folder = inputs.folder(place.out, out)
    methods = None if what.methods is None else inputs.names_in(what.methods)
    with out.progress():
        found = cf.recovery(circuits, methods, n=what.n, seed=what.seed, form=what.form, norm=what.norm)
    files = [found.save(folder / f"recovery.{ending}") for ending in ("json", "csv")]
    if what.pictures:
        for row in found.recovered:
            if not row.refused:
                files.append(folder / f"{row.circuit}-{row.method}.svg")
                found.picture(row.circuit, row.method, files[-1])
    tables.recovery(found, out)
    out.finish(found.to_dict(), files)


def _truths(circuits: list[str] | None, what: TestbedOptions, out: Output) -> None:
    """List circuits, with their proofs if asked for."""
    rows: list[list[Cell]] = []
    document: dict[str, dict[str, Any]] = {}
    with out.progress():
        for name in circuits or cf.testbed.names(what.form):
            known = cf.testbed.build(name, n=what.n, seed=what.seed, form=what.form, norm=what.norm)
            row: list[Cell] = [Text(name, style="bold"), count(len(known.truth), "true edge"), known.summary]
            document[name] = {"summary": known.summary, "edges": known.truth.edges}
            if what.prove:
                proof = cf.testbed.prove(known)
                row += [fixed(proof.weakest[0], 4), f"{proof.strongest[0]:.1e}"]
                document[name] |= {"weakest": proof.weakest, "strongest": proof.strongest}
            rows.append(row)
    more = ("weakest true edge", "strongest other") if what.prove else ()
    title = "Known circuits; effects of ablating an edge, of the whole effect" if what.prove else "Known circuits"
    out.table(title, ("name", "size", "what it computes", *more), rows)
    out.document({"circuits": document})
