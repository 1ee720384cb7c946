"""Models that were trained to a drawing's circuit instead of compiled from it.

1. `training/train_testbed.py` trains them. Whatever set of edges is ablated, the model must give the answer of the
   compiled model with the same edges ablated: interchange interventions (Geiger et al. 2022) on the circuit's edges,
   and strictness (SIIT, Gupta et al. 2024) on all other edges, which do nothing in the compiled model.
2. The models have ordinary classes and norms. The circuit's variables are in superposed directions, and all other heads
   and MLPs are free to compute anything, but have nearly no effect on the answer.
3. The weights are part of the package, one folder per model as transformers saves it. `figures.json` records how each
   model was trained, and measurements.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

SUFFIX = "-trained"
WEIGHTS = Path(__file__).with_name("weights")


def folder_of(circuit: str, form: str) -> Path:
    """Return the folder of a model's weights. `circuit`: the name of its drawing."""
    return WEIGHTS / f"{circuit}-{form}"


def trained(form: str) -> list[str]:
    """Return the names of the drawings for which there is a trained model of this form."""
    return sorted(folder.name.removesuffix(f"-{form}") for folder in WEIGHTS.glob(f"*-{form}"))


def load_trained(circuit: str, form: str) -> Any:
    """Return the trained model in float32, in evaluation mode."""
    folder = folder_of(circuit, form)
    hf = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))  # type: ignore[no-untyped-call]
    hf.load_state_dict(load_file(folder / "model.safetensors"))
    return hf.eval()
