"""Infer the family's row for a `model_type` that has none, from the model's modules and their values in a short pass.

1. *Names.* A row of the table fits if the model has one list of as many blocks as the config says, and every block has
   the row's projections and MLP modules.
2. *Values*, from a pass of a few random tokens through the last block: the norms before and after attention and MLP,
   whether the MLP reads the same stream as attention, the factor on what a block adds, the modules that can be skipped,
   and the norm that reads the last block's stream.
3. *Layout* of a fused projection: the one under which each head acts on its own (`heads.py`).

The inferred row may still be wrong, so the identities are always checked when such a model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from circuitfind.errors import ModelError
from circuitfind.models.adapter import Adapter, graph_of
from circuitfind.models.backends import observe, undisturbed
from circuitfind.models.families import FAMILIES, LAYOUTS, Family, named
from circuitfind.models.heads import HEADS, reader_errors
from circuitfind.models.layer import module_at
from circuitfind.models.norms import Norm
from circuitfind.models.placement import device_of

TOKENS = 5
OFF = 1e-2  # an error of `reader_errors` that rounding cannot cause in any precision


def row_of(model: Any, family: Family | str | None = None) -> tuple[Family | None, str]:
    """Return the row for a model, and how it was found. For the table's own row: (None, "").

    `family`: a row, its name in the table, or "package.module:NAME"; None to use the table's row, or else infer one.
    ModelError if there is no such row, or none fits.
    """
    own = FAMILIES.get(getattr(model.config.get_text_config(), "model_type", ""))
    if isinstance(family, str):
        return named(family), f"as {family}"
    if family is not None or own is not None:
        return family, "" if family in (None, own) else "as given"
    found = _Found(model, *matching(model)).family()
    return found, f"inferred as {_told(found)}"


def matching(model: nn.Module) -> tuple[str, Family]:
    """Return the path of the list of blocks, and the first row whose modules every block has; shapes and values are not
    read. ModelError if no row fits; it names the projections of a block that does not fit."""
    config: Any = model.config
    kind, depth = config.get_text_config().model_type, getattr(config.get_text_config(), "num_hidden_layers", 0)
    lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    if getattr(config, "is_encoder_decoder", False) or any(map(_crosses, lists.values())):
        raise _refused(kind, "it has cross-attention")
    fitting: dict[str, Family] = {}
    holds = ""
    for path, blocks in lists.items():
        if depth and len(blocks) == depth and len([*blocks[0].children()]) > 1:
            there = [{path for path, _ in block.named_modules()} for block in blocks]
            rows = [row for row in FAMILIES.values() if all(_needed(row) <= names for names in there)]
            fitting |= {path: rows[0]} if rows else {}
            none = (at for at, names in enumerate(there) if not any(_needed(row) <= names for row in FAMILIES.values()))
            odd = next(none, 0)
            holds = holds or f"the projections of '{path}.{odd}' are {_projections(blocks[odd])}"
    if len(fitting) > 1:
        raise _refused(kind, f"it has several lists of blocks: {', '.join(fitting)}")
    if not fitting:
        found = f"it has no list of {depth} blocks" if depth else "its config has no num_hidden_layers"
        remedy = "; a pre-norm model of attention and MLPs can be described with family=circuitfind.Family(...)"
        raise _refused(kind, f"no row of the family table fits its blocks: {holds}{remedy}" if holds else found)
    return next(iter(fitting.items()))


def _crosses(blocks: nn.ModuleList) -> bool:
    names = {name for path, _ in blocks.named_modules() for name in path.split(".")}
    return any("cross" in name or name == "encoder_attn" for name in names)


def _projections(block: nn.Module) -> str:
    names = [path for path, module in block.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _needed(row: Family) -> set[str]:
    return {getattr(row, name) for name in (*row.projections, "o", "mlp_in", "mlp_out")}


def _refused(kind: str, why: str) -> ModelError:
    return ModelError(f"model family '{kind}' is not covered: {why}")


def _told(family: Family) -> str:
    """Describe a row by the most similar row of the table: "llama", "opt with parallel=True"."""
    names = [one.name for one in fields(Family) if one.name not in ("layers", "final_norm", "variants", "refuse")]

    def differing(row: Family) -> list[str]:
        differ = [name for name in names if getattr(row, name) != getattr(family, name)]
        return [name for name in differ if not (family.qkv and name in "qkv" and row.qkv)]

    forms = [
        (name, form)
        for name, row in FAMILIES.items()
        for form in (row, *(replace(row, **changes) for _, _, changes in row.variants))
    ]
    name, near = min(forms, key=lambda form: len(differing(form[1])))
    changes = [f"{name}={getattr(family, name)!r}" for name in differing(near)]
    return name + (f" with {', '.join(changes)}" if changes else "")


@dataclass
class _Found:
    """A model, the path of its blocks, the row that fits their names, and values recorded in one pass.

    `given`, `wrote`: first argument and first output of the last block's modules, by path from the block. `after`:
    (path, first argument) of the modules outside the blocks.
    """

    model: Any
    layers: str
    row: Family
    given: dict[str, Tensor] = field(default_factory=dict)
    wrote: dict[str, Tensor] = field(default_factory=dict)
    after: list[tuple[str, Tensor]] = field(default_factory=list)

    def family(self) -> Family:
        """Return the inferred row."""
        self.kind = self.model.config.get_text_config().model_type
        self.width = self.model.config.get_text_config().hidden_size
        self.blocks = module_at(self.model, self.layers)
        self.block = self.blocks[-1]
        self._run()
        row = self.row
        read, stream, wrote = self.given[row.q_latent or row.qkv or row.q], self.given[""], self.wrote[row.mlp_out]
        attn_norm = self._norm_between(stream, read)
        post_attn_norm = self._norm_of(self.wrote[row.o])
        mlp_norm = self._norm_that_gives(self.given[row.mlp_in])
        enters = self.given[row.mlp_in] if mlp_norm is None else self.given[mlp_norm]
        found = replace(
            row,
            layers=self.layers,
            final_norm=self._final_norm(),
            attn_norm=attn_norm,
            post_attn_norm=post_attn_norm,
            mlp_norm=mlp_norm,
            post_mlp_norm=self._norm_of(wrote),
            parallel=_same(enters, stream),
            attn=self._whole(row.o),
            mlp=self._whole(row.mlp_out),
            down=self._down(wrote),
            variants=(),
            refuse=(),
        )
        found = replace(found, residual_multiplier=self._multiplier(found))
        return self._laid_out(found) if found.qkv else found

    # ---------------------------------------------------------------- one pass
    def _run(self) -> None:
        tokens = self.model.get_input_embeddings().weight
        ids = torch.randint(len(tokens), (1, TOKENS), generator=torch.Generator().manual_seed(0))
        ids = ids.to(device_of(self.model.get_input_embeddings()))
        with ExitStack() as hooks, torch.no_grad(), undisturbed(self.model):
            for path, module in self.block.named_modules():
                _note(hooks, module, partial(self.given.setdefault, path), partial(self.wrote.setdefault, path))
            for path, module in self.model.named_modules():
                if path and not path.startswith(f"{self.layers}."):
                    _note(hooks, module, partial(self._note_after, path))
            self.model(input_ids=ids, use_cache=False)
        if missing := [path for path in self._named() if path not in self.given or path not in self.wrote]:
            raise _refused(self.kind, f"'{missing[0]}' of its last block does not run with a tensor")

    def _note_after(self, path: str, value: Tensor) -> None:
        self.after.append((path, value))

    def _named(self) -> list[str]:
        row = self.row
        return ["", *(getattr(row, name) for name in (*row.projections, "o", "mlp_in", "mlp_out"))]

    # ---------------------------------------------------------------- what it says
    def _norms(self) -> Iterator[str]:
        """Yield the paths of the block's norms of width d_model, outer modules first."""
        for path, module in self.block.named_modules():
            if (
                path
                and path in self.given
                and self.given[path].shape[-1] == self.width
                and _is_norm(module, self.width)
            ):
                yield path

    def _norm_that_gives(self, value: Tensor) -> str | None:
        return next((path for path in self._norms() if _same(self.wrote[path], value)), None)

    def _norm_between(self, stream: Tensor, read: Tensor) -> str | None:
        if _same(stream, read):
            return None
        norm = self._norm_that_gives(read)
        if norm is None or not _same(self.given[norm], stream):
            what = "the stream through something other than one norm"
            raise _refused(self.kind, f"'{self.row.qkv or self.row.q}' reads {what}")
        return norm

    def _norm_of(self, value: Tensor) -> str | None:
        return next((path for path in self._norms() if _same(self.given[path], value)), None)

    def _final_norm(self) -> str:
        last = self.wrote[""]
        for path, value in self.after:
            if _same(value, last) and _is_norm(module_at(self.model, path), self.width):
                return path
        raise _refused(self.kind, "no norm reads the stream after the last block, as in post-LN models")

    def _whole(self, part: str) -> str | None:
        """Return the outermost module around a part that returns the same value, as the module that can be skipped."""
        keys = part.split(".")
        around = (".".join(keys[: length + 1]) for length in range(len(keys)))
        found = next(
            (path for path in around if path in self.wrote and _same(self.wrote[path], self.wrote[part])), None
        )
        return found if found != part or found == self.row.mlp_in else None

    def _down(self, wrote: Tensor) -> str | None:
        """Return the output projection of the MLP, or None if some block's is not a linear module."""
        for path, value in self.wrote.items():
            ends = isinstance(module_at(self.block, path), (nn.Linear, Conv1D)) if path else False
            if ends and _same(value, wrote) and path != self.row.o:
                types = [dict(block.named_modules()).get(path) for block in self.blocks]
                return path if all(isinstance(one, (nn.Linear, Conv1D)) for one in types) else None
        return None

    def _multiplier(self, found: Family) -> str | None:
        """Return the config's attribute that scales what a block adds, or None."""

        def added(output: Tensor, norm: str | None) -> Tensor:
            return (output if norm is None else self.wrote[norm]).reshape(self.given[""].shape).double()

        whole = added(self.wrote[found.o], found.post_attn_norm) + added(self.wrote[found.mlp_out], found.post_mlp_norm)
        change = (self.wrote[""].double() - self.given[""].double()).flatten()
        factor = float(change @ whole.flatten() / (whole.flatten() @ whole.flatten()).clamp_min(1e-30))
        config = self.model.config.get_text_config().to_dict()
        if abs(factor - 1) < 1e-2:
            own = self.row.residual_multiplier
            return own if own and config.get(own) == 1 else None
        names = [name for name, value in config.items() if isinstance(value, float) and abs(value - factor) < 1e-3]
        return next((name for name in names if "residual" in name), None)

    def _laid_out(self, found: Family) -> Family:
        errors, graph = {}, graph_of(self.model, found)
        for layout in LAYOUTS if graph.n_kv_heads == graph.n_heads else ("concat", "grouped"):
            row = replace(found, layout=layout)
            adapter = Adapter(self.model, row)
            observe(adapter)
            errors[layout] = reader_errors(adapter)[HEADS]
        layout = min(errors, key=lambda one: errors[one])
        if not errors[layout] < OFF:
            raise _refused(self.kind, f"the features of '{found.qkv}' are in none of the orders {', '.join(LAYOUTS)}")
        return replace(found, layout=layout)


Note = Callable[[Tensor], object]


def _note(hooks: ExitStack, module: nn.Module, given: Note, wrote: Note | None = None) -> None:
    """Record copies of a module's first argument and first output, if they are tensors."""

    def note(values: Any, into: Note) -> None:
        value = next(iter(values), None) if isinstance(values, (tuple, list)) else values
        if isinstance(value, Tensor):
            into(value.detach().clone())

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        note((*args, *kwargs.values()), given)

    hooks.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
    if wrote is not None:
        hooks.callback(module.register_forward_hook(lambda _, __, output: note(output, wrote)).remove)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.numel() == other.numel() and torch.equal(one.flatten().float(), other.flatten().float())


def _is_norm(module: nn.Module, width: int) -> bool:
    try:
        Norm.of(module, width, "", device_of(module))
    except Exception:  # a module of another kind may raise anything when given a vector
        return False
    return True
