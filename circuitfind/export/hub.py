"""A circuit on the Hugging Face hub: a dataset repository with `circuit.json` and a card made from its record.

All requests use `huggingface_hub`, with its login, mirror (`HF_ENDPOINT`), cache and offline mode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from circuitfind.errors import FileError
from circuitfind.record import Record

FILE = "circuit.json"
STRONGEST = 10
MADE = ("model", "task", "metric", "method", "ablation", "direction", "sign")
MEASURED = ("faithfulness", "interval", "pair_error", "accuracy", "kl", "unseen_pairs", "search_pairs")
HEAD = "---\ntags:\n- circuitfind\n- circuit\n- mechanistic-interpretability\n---\n"


def push(repo: str, file: Path, card: str, message: str, private: bool | None, token: str | None) -> str:
    """Create the repository if needed, commit both files, and return the commit's URL; raise FileError if refused."""
    from huggingface_hub import CommitOperationAdd, HfApi

    parts = [CommitOperationAdd(FILE, file), CommitOperationAdd("README.md", card.encode())]
    try:
        api = HfApi(token=token, library_name="circuitfind")
        name = api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True).repo_id
        return str(api.create_commit(name, parts, commit_message=message, repo_type="dataset").commit_url)
    except Exception as error:
        raise _refused(repo, error) from error


def pull(repo: str, revision: str | None, token: str | None) -> Path:
    """Download the repository's `circuit.json`, and return its path in the hub's cache; raise FileError on failure."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, FILE, repo_type="dataset", revision=revision, token=token))
    except Exception as error:
        raise _refused(repo, error) from error


def _refused(repo: str, error: Exception) -> FileError:
    """Return the first line of any error of `huggingface_hub`, which has some twenty error classes, as a FileError."""
    said = str(error).strip().partition("\n")[0] or type(error).__name__
    return FileError(f"{repo} at the Hugging Face hub: {said}")


def card(repo: str, size: str, record: Record, facts: Mapping[str, Any], strongest: Sequence[Sequence[Any]]) -> str:
    """Return the dataset card as Markdown. `strongest`: rows of an edge's name, estimated and exact effect."""
    made = {name: getattr(record, name) for name in MADE}
    made |= {"pairs": record.n_examples, "seed": record.seed, "circuit": size}
    made |= {name.replace("_", " "): facts[name] for name in MEASURED if facts.get(name) is not None}
    made |= {"versions": ", ".join(f"{name} {value}" for name, value in record.versions.items())}
    edges = [("edge", "estimate", "exact"), ("---",) * 3, *strongest]
    return "\n".join(
        [
            f"{HEAD}# A circuit for {_cell(record.task or 'a task')} in {_cell(record.model or 'a model')}\n",
            "Which heads, MLPs and connections do the task: edges of the model's computation graph, found and measured",
            "with circuitfind.\n",
            f'```python\nimport circuitfind as cf\n\ncircuit = cf.Circuit.from_hub("{repo}")\n```\n',
            *_rows([("", ""), ("---", "---"), *((name, value) for name, value in made.items() if value != "")]),
            "\nThe strongest edges, effects in units of the metric, positive = supports the task:\n",
            *_rows(edges),
            "",
        ]
    )


def _rows(rows: Sequence[Sequence[Any]]) -> list[str]:
    return [f"| {' | '.join(_cell(value) for value in row)} |" for row in rows]


def _cell(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " to ".join(map(_cell, value))
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")
