"""What circuitfind raises on bad input: one line that names the offending thing and the remedy."""

from __future__ import annotations


class CircuitfindError(Exception):
    """Base of all errors that are the input's fault; the command line prints them without a traceback."""


class TaskError(CircuitfindError):
    """A behaviour, prompt, answer or metric cannot be used as given."""


class ModelError(CircuitfindError):
    """A model cannot be loaded, is not covered, or failed its self-check."""


class FileError(CircuitfindError):
    """A file is missing, is of another kind, or holds something illegal."""


class ScoreError(CircuitfindError):
    """Scores cannot be computed or used: NaN values, a vanishing gradient, a graph that does not fit."""
