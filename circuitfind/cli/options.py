"""Every option of the command line, declared once, in groups that verbs pick from.

Meanings and defaults are those of the Python API. Values that the library checks itself are plain text here, so that
its own one-line errors are what the user sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

MODEL, TASK, SCORING, SEARCH, JUDGING = "Model", "Behaviour", "Scoring", "Search", "Verification"
PATHS = "Path patching"
MODEL_HELP = 'The embedded model "tiny", a Hugging Face id, or a folder.'


class By(StrEnum):
    """How edges are ranked."""

    absolute = "absolute"
    signed = "signed"


class Level(StrEnum):
    """What is scored."""

    edge = "edge"
    node = "node"


class What(StrEnum):
    """What is patched, or estimated: the places of a sweep."""

    resid = "resid"
    resid_mid = "resid-mid"
    attn = "attn"
    mlp = "mlp"
    heads = "heads"
    q = "q"
    k = "k"
    v = "v"
    pattern = "pattern"
    neurons = "neurons"


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and where it runs."""

    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)] = "tiny"
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Precision, such as float32 or bfloat16. By default what the weights are stored in.",
            rich_help_panel=MODEL,
        ),
    ] = None
    device: Annotated[
        str | None,
        typer.Option(
            help="Such as cpu or cuda:1. By default the accelerator if there is one.",
            rich_help_panel=MODEL,
        ),
    ] = None
    remote: Annotated[
        str | None,
        typer.Option(metavar="HOST", help='Run on an NDIF server: "ndif", or its URL.', rich_help_panel=MODEL),
    ] = None
    backend: Annotated[
        str, typer.Option(help="What single passes run through: nnsight or hooks.", rich_help_panel=MODEL)
    ] = "nnsight"


@dataclass(frozen=True)
class CheckedModelOptions(ModelOptions):
    """A model that is checked when it is loaded."""

    check: Annotated[
        bool,
        typer.Option("--check/--no-check", help="Check on loading that all is computed right.", rich_help_panel=MODEL),
    ] = True


@dataclass(frozen=True)
class TaskOptions:
    """The behaviour: built in, or pairs from a file."""

    task: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help='A built-in behaviour; see "circuitfind tasks". Default: ioi.', rich_help_panel=TASK
        ),
    ] = None
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Your own pairs: jsonl, csv, or data of other tools.", rich_help_panel=TASK),
    ] = None
    n: Annotated[
        int | None,
        typer.Option("--n", min=1, help="Number of pairs. Default: 64, or all of a file.", rich_help_panel=TASK),
    ] = None
    seed: Annotated[
        int, typer.Option(min=0, help="Of the pairs, the split, intervals, random circuits.", rich_help_panel=TASK)
    ] = 0
    corruption: Annotated[
        str | None, typer.Option(help="One of the behaviour's named corruptions.", rich_help_panel=TASK)
    ] = None
    template: Annotated[
        str | None,
        typer.Option(help="Only sentences of this name, such as abba or abba-3 for ioi.", rich_help_panel=TASK),
    ] = None
    counterfactual: Annotated[
        str | None,
        typer.Option(help="Of MIB data: which counterfactual is the corrupted prompt.", rich_help_panel=TASK),
    ] = None
    align: Annotated[
        str | None,
        typer.Option(help="spans: a file's pairs of unequal length, by its columns of spans.", rich_help_panel=TASK),
    ] = None
    metric: Annotated[
        str | None,
        typer.Option(help="logit_diff, prob_diff, logprob or kl. Default: the behaviour's own.", rich_help_panel=TASK),
    ] = None
    bos: Annotated[
        bool | None,
        typer.Option(
            "--bos/--no-bos", help="Force a BOS token or none. Default: the tokenizer's way.", rich_help_panel=TASK
        ),
    ] = None


@dataclass(frozen=True)
class RunOptions:
    """How circuits and scores are computed."""

    ablation: Annotated[
        str | None,
        typer.Option(
            help="What an edge outside carries: corrupted, zero, mean, mean-position or resample."
            " Default: what the given scores or circuit were made with, else corrupted.",
            rich_help_panel=SCORING,
        ),
    ] = None
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Pairs at a time. Default: what fits in memory.", rich_help_panel=SCORING),
    ] = None


@dataclass(frozen=True)
class ScoringOptions:
    """How edges are scored."""

    method: Annotated[
        str | None,
        typer.Option(
            help="eap-ig-inputs (default), eap-ig-activations, eap, relp, clean-corrupted or exact; nodes: atp"
            " (default), relp, eap-ig-inputs, eap-ig-activations, clean-corrupted, exact; --what q or k: atp-qk, too."
            " No effects: ifr, activation, weights, random; nodes: atp-star, direct (contribution to the logit"
            " difference), hisp, activation, random.",
            rich_help_panel=SCORING,
        ),
    ] = None
    steps: Annotated[int | None, typer.Option(help="Of integrated gradients. Default: 5.", rich_help_panel=SCORING)] = (
        None
    )
    rule: Annotated[
        str | None,
        typer.Option(help="Of eap-ig-inputs: left (default), right or midpoint.", rich_help_panel=SCORING),
    ] = None
    direction: Annotated[
        str | None,
        typer.Option(help="noising or denoising. Default: the given scores', else noising.", rich_help_panel=SCORING),
    ] = None


@dataclass(frozen=True)
class PlacesOptions:
    """Which places of a kind."""

    by_position: Annotated[
        bool | None,
        typer.Option(
            "--by-position/--all-positions",
            help="Each position on its own; equal lengths only. Default: for resid, resid-mid, attn, mlp.",
            rich_help_panel=SCORING,
        ),
    ] = None
    by_span: Annotated[
        bool,
        typer.Option("--by-span", help="By the named spans of the prompts, of any lengths.", rich_help_panel=SCORING),
    ] = False
    layers: Annotated[
        str | None,
        typer.Option(metavar="N,N,...", help="Only these; neurons need it. Default: all.", rich_help_panel=SCORING),
    ] = None


@dataclass(frozen=True)
class RankOptions:
    """How edges are ranked."""

    by: Annotated[By, typer.Option(help="Rank by |effect|, or positive effects first.", rich_help_panel=SEARCH)] = (
        By.absolute
    )


@dataclass(frozen=True)
class SearchOptions(RankOptions):
    """What the search aims at."""

    tolerance: Annotated[
        float, typer.Option(min=0, help="How far from 1 the faithfulness may be.", rich_help_panel=SEARCH)
    ] = 0.15
    one_sided: Annotated[
        bool, typer.Option("--one-sided", help="Only below 1 counts as too far.", rich_help_panel=SEARCH)
    ] = False
    prune: Annotated[
        bool, typer.Option("--prune/--no-prune", help="Drop single edges at the end.", rich_help_panel=SEARCH)
    ] = True
    prune_tolerance: Annotated[
        float,
        typer.Option(min=0, help="How much |1 - faithfulness| may grow by dropping edges.", rich_help_panel=SEARCH),
    ] = 0.05


@dataclass(frozen=True)
class JudgeOptions:
    """What is verified, on which pairs."""

    scores: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Take these scores (scores.safetensors) instead of computing.", rich_help_panel=JUDGING
        ),
    ] = None
    holdout: Annotated[
        float, typer.Option(help="Part of the pairs that the search does not see.", rich_help_panel=JUDGING)
    ] = 0.5
    top: Annotated[
        int, typer.Option(min=0, help="How many of the strongest edges to measure exactly.", rich_help_panel=JUDGING)
    ] = 50
    random: Annotated[
        int, typer.Option(min=0, help="How many random circuits to compare with.", rich_help_panel=JUDGING)
    ] = 20


@dataclass(frozen=True)
class OutOptions:
    """Where files go."""

    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the files.")] = Path("circuitfind-out")
