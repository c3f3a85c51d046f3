"""The presence contract: from (inputs, mask, present) to one checked view per modality.

Every module that takes a dict of modalities goes through `gather_modalities`, so "absent" means the same
thing everywhere: a key missing from the dict, `present` False for a sample, or a mask with no real token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Modality:
    """One modality of a batch, safe to compute with.

    tokens:  (B, N, d); 0 at padded tokens and absent samples whatever the caller put there, so that not even
             the weight gradient of a Linear (input times 0) can meet a NaN. N is 0 if the key was missing.
    mask:    (B, N) bool, True at real tokens; None if the caller gave no mask.
    present: (B,) bool; False also where the mask leaves no token.
    """

    tokens: Tensor
    mask: Tensor | None
    present: Tensor

    @property
    def visible(self) -> Tensor:
        """(B, N) bool: True at the real tokens of present samples."""
        present = self.present[:, None].expand(self.tokens.shape[:2])
        return present if self.mask is None else self.mask & present

    def pooled(self) -> Tensor:
        """(B, d): the mean over visible tokens, 0 where absent."""
        return masked_mean(self.tokens, self.visible)


def masked_mean(tokens: Tensor, visible: Tensor) -> Tensor:
    """Mean of `tokens` (B, N, d), 0 where not `visible` (B, N), over the visible ones; 0 if there is none."""
    return tokens.sum(1) / visible.sum(1).clamp_min(1)[:, None].to(tokens.dtype)


def positive(size: int, argument: str) -> int:
    """`size`, checked to be a positive int."""
    if not isinstance(size, int) or isinstance(size, bool):
        raise TypeError(f"{argument} must be an int, got {type(size).__name__}")
    if size <= 0:
        raise ValueError(f"{argument} must be positive, got {size}")
    return size


def check_dims(dims: Mapping[str, int], argument: str = "dims") -> dict[str, int]:
    """A copy of `dims`, checked: at least one modality, usable names, positive sizes."""
    if not isinstance(dims, Mapping):
        raise TypeError(f"{argument} must be a dict of modality name to size, got {type(dims).__name__}")
    if not dims:
        raise ValueError(f"{argument} must name at least one modality, got an empty dict")
    taken = nn.ModuleDict()
    for name, size in dims.items():
        if not isinstance(name, str):
            raise TypeError(f"{argument} must have str keys, got {name!r} of type {type(name).__name__}")
        if not name or "." in name or hasattr(taken, name):
            raise ValueError(
                f"{argument} has the modality name {name!r}; a name must not be empty, hold a dot, or be an "
                "attribute of torch.nn.ModuleDict, because parameters are named after it"
            )
        positive(size, f"{argument}[{name!r}]")
    return dict(dims)


def gather_modalities(
    inputs: Mapping[str, Tensor],
    dims: Mapping[str, int],
    mask: Mapping[str, Tensor | None] | None = None,
    present: Tensor | Mapping[str, Tensor] | None = None,
    *,
    like: Tensor | None = None,
    vectors_only: bool = False,
    argument: str = "inputs",
) -> dict[str, Modality]:
    """One `Modality` for every name in `dims`, in that order.

    inputs:  name -> (B, N, d) tokens, or (B, d), which is one token; any name of `dims` may be missing.
    mask:    name -> (B, N) bool, True at real tokens, or (B,) integer lengths; missing or None: all real.
    present: (B, S) bool with columns in the order of `dims`, or name -> (B,) bool; what is not said is
             present if the input is there. A modality missing from `inputs` is absent, `present` or not.
    like:    a tensor to take batch, device and dtype from; without one they come from the inputs, or from
             `present` if there are no inputs at all.

    Raises TypeError or ValueError, in one sentence naming the argument.
    """
    if not isinstance(inputs, Mapping):
        raise TypeError(f"{argument} must be a dict of modality name to tensor, got {type(inputs).__name__}")
    _check_names(argument, inputs, dims)
    for name, value in inputs.items():
        _check_input(f"{argument}[{name!r}]", value, dims[name], vectors_only)

    anchor = _anchor(argument, inputs, present, like)
    batch, device = anchor.shape[0], anchor.device
    for name, value in inputs.items():
        if value.shape[0] != batch:
            raise ValueError(f"{argument}[{name!r}] has batch size {value.shape[0]}, expected {batch}")
    dtype = anchor.dtype if anchor.is_floating_point() else torch.get_default_dtype()

    columns = _presence_columns(present, dims, batch)
    masks = _check_masks(mask, inputs, dims, batch)
    views = {}
    for name, dim in dims.items():
        if name not in inputs:
            nothing = torch.zeros(batch, 0, dim, device=device, dtype=dtype)
            views[name] = Modality(nothing, None, torch.zeros(batch, device=device, dtype=torch.bool))
        else:
            views[name] = _view(inputs[name], masks.get(name), columns.get(name))
    return views


def presence_matrix(views: Mapping[str, Modality]) -> Tensor:
    """(B, S) bool: who is present, columns in the order of `views`."""
    return torch.stack([view.present for view in views.values()], dim=1)


def _view(value: Tensor, mask: Tensor | None, present: Tensor | None) -> Modality:
    tokens = value[:, None] if value.dim() == 2 else value
    if mask is not None:
        any_token = mask.any(1)
        present = any_token if present is None else present.to(tokens.device) & any_token
    if present is None:
        # An empty sequence holds nothing to attend to; otherwise everybody is here and nothing needs filling.
        here = torch.full(tokens.shape[:1], tokens.shape[1] > 0, device=tokens.device)
        return Modality(tokens, None, here)
    view = Modality(tokens, mask, present.to(tokens.device))
    return Modality(tokens.masked_fill(~view.visible[..., None], 0.0), mask, view.present)


def _anchor(
    argument: str,
    inputs: Mapping[str, Tensor],
    present: Tensor | Mapping[str, Tensor] | None,
    like: Tensor | None,
) -> Tensor:
    if like is not None:
        return like
    if inputs:
        return next(iter(inputs.values()))
    if isinstance(present, Tensor) and present.dim() == 2:
        return present
    if isinstance(present, Mapping) and present:
        return next(iter(present.values()))
    raise ValueError(f"{argument} is empty and present is not given, so the batch size is unknown")


def _check_names(argument: str, given: Iterable[str], dims: Mapping[str, int]) -> None:
    unknown = [name for name in given if name not in dims]
    if unknown:
        raise ValueError(f"{argument} has unknown modalities {unknown}, accepted are {list(dims)}")


def _check_input(argument: str, value: Tensor, dim: int, vectors_only: bool) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument} must be a tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{argument} must have a floating-point dtype, got {value.dtype}")
    accepted = (2,) if vectors_only else (2, 3)
    if value.dim() not in accepted or value.shape[-1] != dim:
        shapes = f"(B, {dim})" if vectors_only else f"(B, {dim}) or (B, N, {dim})"
        raise ValueError(f"{argument} must have shape {shapes}, got {tuple(value.shape)}")


def _presence_columns(
    present: Tensor | Mapping[str, Tensor] | None, dims: Mapping[str, int], batch: int
) -> dict[str, Tensor]:
    if present is None:
        return {}
    if isinstance(present, Tensor):
        if present.dtype != torch.bool:
            raise TypeError(f"present must have dtype torch.bool, got {present.dtype}")
        if present.shape != (batch, len(dims)):
            raise ValueError(
                f"present must have shape (B, S) = {(batch, len(dims))} with columns {list(dims)}, "
                f"got {tuple(present.shape)}"
            )
        return dict(zip(dims, present.unbind(1), strict=True))
    if not isinstance(present, Mapping):
        raise TypeError(
            f"present must be a (B, S) bool tensor or a dict of (B,), got {type(present).__name__}"
        )
    _check_names("present", present, dims)
    for name, column in present.items():
        if not isinstance(column, Tensor) or column.dtype != torch.bool:
            got = column.dtype if isinstance(column, Tensor) else type(column).__name__
            raise TypeError(f"present[{name!r}] must be a bool tensor, got {got}")
        if column.shape != (batch,):
            raise ValueError(f"present[{name!r}] must have shape {(batch,)}, got {tuple(column.shape)}")
    return dict(present)


def _check_masks(
    mask: Mapping[str, Tensor | None] | None,
    inputs: Mapping[str, Tensor],
    dims: Mapping[str, int],
    batch: int,
) -> dict[str, Tensor]:
    """name -> (B, N) bool on the input's device. Masks of missing inputs are dropped."""
    if mask is None:
        return {}
    if not isinstance(mask, Mapping):
        raise TypeError(f"mask must be a dict of modality name to tensor, got {type(mask).__name__}")
    _check_names("mask", mask, dims)
    masks = {}
    for name, entry in mask.items():
        if entry is None or name not in inputs:
            continue
        value = inputs[name]
        if value.dim() == 2:
            raise ValueError(
                f"mask[{name!r}] was given for a vector input (B, d); use present to leave it out, "
                "or give (B, N, d)"
            )
        masks[name] = key_mask(entry, batch, value.shape[1], f"mask[{name!r}]").to(value.device)
    return masks


def key_mask(mask: Tensor, batch: int, length: int, argument: str = "mask") -> Tensor:
    """(B, N) bool, True at real tokens, from such a mask or from (B,) integer lengths."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{argument} must be a tensor, got {type(mask).__name__}")
    if mask.dtype == torch.bool:
        if mask.shape != (batch, length):
            raise ValueError(f"{argument} must have shape {(batch, length)}, got {tuple(mask.shape)}")
        return mask
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(f"{argument} must be bool (True = real token) or integer lengths, got {mask.dtype}")
    if mask.shape != (batch,):
        raise ValueError(f"{argument} holds lengths and must have shape {(batch,)}, got {tuple(mask.shape)}")
    return torch.arange(length, device=mask.device) < mask[:, None]
