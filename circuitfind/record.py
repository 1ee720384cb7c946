"""What a result says of its own making: model, task, method, sign, seed, versions. Kept in every file."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from circuitfind.version import __version__

SIGN = "effect: metric without ablation - metric with the edge ablated; positive = the edge supports the behaviour"
LIBRARIES = ("torch", "transformers", "nnsight", "numpy")


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that a result depends on."""
    versions = {"python": platform.python_version(), "circuitfind": __version__}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


@dataclass(frozen=True)
class Record:
    """Where a number comes from. `settings` holds what only some methods have (steps, rule, tolerance, ...)."""

    model: str = ""
    task: str = ""
    n_examples: int = 0
    metric: str = ""
    method: str = ""
    ablation: str = "corrupted"
    direction: str = "noising"
    sign: str = SIGN
    seed: int = 0
    bos: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=library_versions)

    def with_settings(self, **more: Any) -> Record:
        """A copy with further settings."""
        return replace(self, settings={**self.settings, **more})
