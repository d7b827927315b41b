"""Tensors that were read, held against what a module asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adapterkit.errors import (
    DtypeMismatchError,
    MissingKeysError,
    NonFiniteError,
    ShapeMismatchError,
    UnexpectedKeysError,
)
from adapterkit.kernels.finite import not_finite
from adapterkit.mapping.model import MappedModel


@dataclass(frozen=True)
class Target:
    """Where tensors are put, what they are named after in errors, whether they are finite for sure, and ours alone."""

    mapped: MappedModel
    source: object
    notes: list[str]
    finite: bool
    fresh: bool = False


def fitting(
    expected: Mapping[str, Tensor],
    key: str,
    tensors: Mapping[str, Tensor],
    placement: tuple[torch.device, torch.dtype],
    target: Target,
) -> dict[str, Tensor]:
    """The tensors, if they are just those that the module asks for, in place."""
    if target.fresh and target.finite and _are_just(tensors, expected, placement[0]):
        return dict(tensors)
    check_fit(expected, key, tensors, target.source, finite=target.finite)
    return {name: _placed(tensor, *placement, target, f"{key}/{name}") for name, tensor in tensors.items()}


def _are_just(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], device: torch.device) -> bool:
    """Whether they can be used as they are: the usual case, and quick."""
    if tensors.keys() != expected.keys():
        return False
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or tensor.shape != expected[name].shape or tensor.device != device:
            return False
        if not expected[name].is_floating_point():
            return False
    return True


def check_fit(
    expected: Mapping[str, Tensor], key: str, tensors: Mapping[str, Tensor], source: object, *, finite: bool = False
) -> None:
    """Whether these are just the tensors that a module asks for.

    Args:
        expected: Name -> a tensor of the right shape and dtype.
        key: The module's point, for errors.
        tensors: What there is.
        source: Named in errors.
        finite: Whether NaN and infinity have been refused already.

    Raises:
        CheckpointError: They are not.
    """
    if lacking := [name for name in expected if name not in tensors]:
        raise MissingKeysError(f"missing; the config asks for {', '.join(expected)}", source, f"{key}/{lacking[0]}")
    if left := [name for name in tensors if name not in expected]:
        asked = ", ".join(expected) or "none"
        raise UnexpectedKeysError(f"nothing receives it; the config asks for {asked}", source, f"{key}/{left[0]}")
    for name, tensor in tensors.items():
        _check_tensor(tensor, expected[name], source, f"{key}/{name}", finite)


def _check_tensor(tensor: Tensor, expected: Tensor, source: object, key: str, finite: bool) -> None:
    if tensor.shape != expected.shape:
        hint = " (transposed?)" if tensor.ndim == expected.ndim == 2 and tensor.shape == expected.mT.shape else ""
        raise ShapeMismatchError(
            f"shape {tuple(tensor.shape)}, but config and base require {tuple(expected.shape)}{hint}",
            source,
            key,
        )
    if tensor.is_floating_point() != expected.is_floating_point():
        raise DtypeMismatchError(f"dtype {tensor.dtype} cannot hold what should be {expected.dtype}", source, key)
    if not finite and (bad := not_finite(tensor)):
        raise NonFiniteError(f"{bad} of {tensor.numel()} values are NaN or infinite", source, key)


def _placed(tensor: Tensor, device: torch.device, base_dtype: torch.dtype, target: Target, key: str) -> Tensor:
    """The tensor on the base's device: a copy where it is the caller's."""
    dtype = tensor.dtype
    if target.fresh and tensor.device == device and not _is_cast(dtype, base_dtype):
        return tensor
    if _is_cast(dtype, base_dtype):
        dtype = torch.float32
        note = f"{str(tensor.dtype).removeprefix('torch.')} tensors were cast to float32"
        if note not in target.notes:
            target.notes.append(note)
    placed = torch.empty_like(tensor, device=device, dtype=dtype).copy_(tensor)
    if dtype != tensor.dtype and (bad := not_finite(placed)):
        raise NonFiniteError(f"{bad} of {tensor.numel()} values are beyond {dtype}", target.source, key)
    return placed


def _is_cast(dtype: torch.dtype, base_dtype: torch.dtype) -> bool:
    """Whether a dtype is wider than is of use beside the base, or too narrow to be computed with."""
    return dtype == torch.float64 != base_dtype or (dtype.is_floating_point and dtype.itemsize == 1)
