"""Models with known circuits, to test circuit discovery methods against the truth.

    known = circuitfind.testbed.build("ioi-backup")
    scores = circuitfind.attribute(known.model, known.task)
    circuitfind.agreement(scores, known.reference)

Each model has an ordinary class (GPT-2, or Llama with grouped queries) and comes with prompts and the exact set of true
edges. It is compiled from a drawing of the circuit (`blueprint.py`, `circuits.py`) or trained to compute that circuit
(`trained.py`). `prove` verifies on the model that each true edge is needed and that every other edge does nothing.
"""

from circuitfind.testbed.blueprint import Blueprint as Blueprint, Offset as Offset
from circuitfind.testbed.build import build as build, names as names
from circuitfind.testbed.known import Drawing as Drawing, Known as Known, Proof as Proof, prove as prove
