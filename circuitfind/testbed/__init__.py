"""Models whose circuit is known, because they were made to compute it: to see which method is right, and where.

    known = circuitfind.testbed.build("ioi-backup")
    scores = circuitfind.attribute(known.model, known.task)
    circuitfind.agreement(scores, known.reference)

Each is a model of an ordinary class (GPT-2, or Llama with grouped queries), compiled from a drawing of the circuit
(`blueprint.py`, `circuits.py`), or trained to it (`trained.py`), with prompts and the exact set of true edges. `prove`
holds the truth against the model: each true edge is needed, every other one does nothing.
"""

from circuitfind.testbed.blueprint import Blueprint as Blueprint, Offset as Offset
from circuitfind.testbed.build import build as build, names as names
from circuitfind.testbed.known import Drawing as Drawing, Known as Known, Proof as Proof, prove as prove
