"""Models trained to a drawing's circuit, not compiled from it.

1. `training/train_testbed.py` makes them. Under any set of cut edges the model is to answer what the compiled model
   answers under the same cuts: interchange interventions (Geiger et al. 2022) on the circuit's edges, and strictness
   (SIIT, Gupta et al. 2024) on all others, which do nothing in the compiled model.
2. Classes and norms are ordinary ones. What the circuit carries lies in superposed directions, and the other heads and
   MLPs do as they like, as long as next to nothing of theirs reaches the answer.
3. The weights are shipped, a folder a model as transformers saves it; `figures.json` says how each was trained and what
   was measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

SUFFIX = "-trained"
WEIGHTS = Path(__file__).with_name("weights")


def folder_of(circuit: str, form: str) -> Path:
    """Where the weights of a circuit lie, by the name of its drawing."""
    return WEIGHTS / f"{circuit}-{form}"


def trained(form: str) -> list[str]:
    """Names of the drawings to whose circuit a model of this form was trained."""
    return sorted(folder.name.removesuffix(f"-{form}") for folder in WEIGHTS.glob(f"*-{form}"))


def load_trained(circuit: str, form: str) -> Any:
    """The model in float32, in evaluation mode."""
    folder = folder_of(circuit, form)
    hf = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))  # type: ignore[no-untyped-call]
    hf.load_state_dict(load_file(folder / "model.safetensors"))
    return hf.eval()
