"""The embedded model: a GPT-2 class model of about a million parameters that does all built-in behaviours.

Made by `training/train_tiny.py` of the repository; loads offline with transformers from the folder `PATH`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PATH: Path = Path(__file__).resolve().parent
"""The Hugging Face folder: config, weights, tokenizer."""


def figures() -> dict[str, Any]:
    """Its score on held-out combinations of every behaviour (`behaviours`), and its making (`training`)."""
    return json.loads((PATH / "figures.json").read_text(encoding="utf-8"))
