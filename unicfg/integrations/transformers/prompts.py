"""Prompts as rows of one length, padded on the left: ids with a mask, or both in one tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

HIDDEN = -1  # in a condition that is one tensor: a place that no token attends to


@dataclass(frozen=True)
class Prompts:
    """Token ids of a branch, one row a sequence.

    Attributes:
        ids: (R, T), int64.
        mask: (R, T), int64; 0 at the padding, which is on the left.
    """

    ids: Tensor
    mask: Tensor

    def padded(self, length: int) -> Prompts:
        """The same with ``length`` tokens a row, filled up on the left."""
        missing = length - self.ids.shape[1]
        ids = torch.nn.functional.pad(self.ids, (missing, 0))
        return Prompts(ids, torch.nn.functional.pad(self.mask, (missing, 0)))

    def to(self, device: torch.device) -> Prompts:
        """The same on another device."""
        return Prompts(self.ids.to(device), self.mask.to(device))

    def for_rows(self, rows: int, name: str) -> Prompts:
        """One prompt for all rows, or each one repeated for its returned sequences.

        Raises:
            ValueError: if ``rows`` is no multiple of their number.
        """
        own = len(self.ids)
        if rows % own:
            raise ValueError(
                f"{name} holds {own} prompts for {rows} sequences, expected one, or one a prompt"
            )
        times = rows // own
        return Prompts(
            self.ids.repeat_interleave(times, dim=0), self.mask.repeat_interleave(times, dim=0)
        )


def as_prompts(
    given: Any,
    name: str,
    device: torch.device,
    mask: Any = None,
) -> Prompts:
    """What a caller may give for the prompts of a branch.

    Args:
        given: ids (T,) or (R, T); a list of ids of different lengths; or what a tokenizer returns, with "input_ids" and
            "attention_mask".
        name: of the argument, for errors.
        device: where the rows belong.
        mask: of ids (R, T), 0 at the padding; without one every token counts, whatever its id.

    Raises:
        TypeError: if it is something else.
        ValueError: if it is empty, or mask and ids differ in shape, or a row is padded on the right.
    """
    if isinstance(given, Mapping) or hasattr(given, "input_ids"):
        if mask is not None:
            raise ValueError(f"{name} brings an attention mask and another is given, expected one")
        own = {key: given[key] for key in given}
        return as_prompts(own["input_ids"], name, device, own.get("attention_mask"))
    if isinstance(given, (list, tuple)):
        if given and all(isinstance(row, (list, tuple, Tensor)) for row in given):
            return _ragged(given, mask, name, device)
        given = torch.as_tensor(given, dtype=torch.long)
    if isinstance(mask, (list, tuple)):
        mask = torch.as_tensor(mask)
    if not isinstance(given, Tensor) or given.dtype not in (torch.int64, torch.int32):
        kind = given.dtype if isinstance(given, Tensor) else type(given).__name__
        raise TypeError(
            f"{name} is {kind}, expected token ids (T,) or (R, T), a list of these, or a tokenizer's output"
        )
    ids = given.to(device).long()
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.ndim != 2 or ids.shape[1] == 0 or len(ids) == 0:
        raise ValueError(
            f"{name} has shape {tuple(ids.shape)}, expected at least one token a row, such as the one that begins a text"
        )
    known = torch.ones_like(ids) if mask is None else mask.to(device).long()
    known = known[None] if known.ndim == 1 else known
    if known.shape != ids.shape:
        raise ValueError(
            f"the attention mask of {name} has shape {tuple(known.shape)}, expected {tuple(ids.shape)}"
        )
    if bool((known[:, -1] == 0).any()):
        raise ValueError(
            f"{name} has a row whose last token is masked, expected padding on the left, as from "
            "tokenizer(..., padding_side='left')"
        )
    return Prompts(ids, known)


def _ragged(rows: Sequence[Any], masks: Any, name: str, device: torch.device) -> Prompts:
    parts = []
    for i, row in enumerate(rows):
        ids = torch.as_tensor(row, dtype=torch.long)
        if ids.ndim != 1:
            raise ValueError(f"{name}[{i}] has shape {tuple(ids.shape)}, expected ids (T,)")
        mask = None if masks is None else torch.as_tensor(masks[i])
        parts.append(as_prompts(ids, f"{name}[{i}]", device, mask))
    return together(parts)


def together(prompts: Sequence[Prompts]) -> Prompts:
    """Several groups of rows as one, all as long as the longest."""
    length = max(part.ids.shape[1] for part in prompts)
    padded = [part.padded(length) for part in prompts]
    return Prompts(torch.cat([part.ids for part in padded]), torch.cat([p.mask for p in padded]))


def as_condition(input_ids: Tensor, attention_mask: Tensor | None, device: torch.device) -> Tensor:
    """Prompts as one tensor: the token ids, and -1 where the mask hides a place.

    Args:
        input_ids: (B, T), int64.
        attention_mask: (B, T), 0 at the padding; None hides nothing.
        device: where the model is.

    Returns:
        (B, T), int64.

    Raises:
        TypeError: if ``input_ids`` is no tensor of integers.
        ValueError: if shapes differ.
    """
    if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
        kind = input_ids.dtype if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise TypeError(f"input_ids is {kind}, expected token ids (B, T), int64")
    if input_ids.ndim != 2 or input_ids.numel() == 0:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}, expected (B, T)")
    ids = input_ids.to(device).long()
    if attention_mask is None:
        return ids
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, expected that of input_ids, "
            f"{tuple(input_ids.shape)}"
        )
    return ids.masked_fill(attention_mask.to(device) == 0, HIDDEN)
