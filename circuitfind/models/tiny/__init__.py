"""The embedded model: a GPT-2 class model of about a million parameters, trained on five of the built-in tasks.

`training/train_tiny.py` in the repository trained it. transformers loads it offline from the folder `PATH`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PATH: Path = Path(__file__).resolve().parent
"""The Hugging Face folder: config, weights, tokenizer."""


def figures() -> dict[str, Any]:
    """Return how well the model does each task on held-out word combinations (`behaviours`), and how it was trained
    (`training`)."""
    found: dict[str, Any] = json.loads((PATH / "figures.json").read_text(encoding="utf-8"))
    return found
