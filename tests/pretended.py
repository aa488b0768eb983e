"""A device that is not there, for tests of what a GPU would refuse and of what the host would wait for.

Its tensors compute on the CPU, and say `meta` where they are asked for their device. They refuse what tensors of a GPU
refuse: to meet a tensor of the CPU, unless that is a number by itself or an index into theirs, and to become an array.
Whatever makes the host wait for a GPU, reading a number or a size that depends on values, is counted.
"""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default}
INDEXED = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
    aten._unsafe_index_put.default,
}
# Beside what works number by number: those that take a number of the CPU's.
WITH_NUMBERS = {
    aten.masked_fill.Tensor,
    aten.masked_fill_.Tensor,
    aten.index_fill.int_Tensor,
    aten.index_fill_.int_Tensor,
}
# Views whose values are only marked as other ones; the marks are not looked at below this level.
WRITTEN_DOWN = {aten._conj.default: aten.conj_physical.default, aten._neg_view.default: aten.neg.default}
# What tells the host a number, or makes as much as values say.
READ = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.equal.default,
    aten.bincount.default,
    aten.is_nonzero.default,
}


class Pretended(Tensor):
    """A tensor of the device; `near` holds its values."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> Pretended:
        strided = near.layout == torch.strided  # else sparse: it has no strides, and nobody asks for them
        places = {"strides": near.stride(), "storage_offset": near.storage_offset()} if strided else {}
        made = Tensor._make_wrapper_subclass(cls, near.shape, dtype=near.dtype, device=DEVICE, **places)
        made.near = near
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} meets a tensor of the pretended device outside of `PretendedDevice`")


class _FromNumbers(TorchFunctionMode):
    """`torch.tensor` makes what it is asked for by itself, so it is asked for it on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and device is not None and torch.device(device) == DEVICE:
            return func(*args, **{**kwargs, "device": None}).to(DEVICE)
        if func is Tensor.new_tensor:
            return torch.tensor(*args[1:], **{"dtype": args[0].dtype, **kwargs}).to(args[0].device)
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], Pretended):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            args = args[0], tuple(torch.tensor(i).to(DEVICE) if isinstance(i, list) else i for i in index), *args[2:]
        if func is Tensor.tolist:
            return func(args[0].cpu())
        return func(*args, **kwargs)


def _of_cpu(function: Any) -> Any:
    return lambda device, *rest, **options: function("cpu" if device == DEVICE.type else device, *rest, **options)


# Where PyTorch lists the devices that it knows of.
_INSTEAD = (
    (sys.modules["torch.optim.optimizer"], "_get_fused_kernels_supported_devices", lambda: [DEVICE.type, "cpu"]),
    (torch, "autocast", _of_cpu(torch.autocast)),
    (torch, "is_autocast_enabled", _of_cpu(torch.is_autocast_enabled)),
    (torch, "get_autocast_dtype", _of_cpu(torch.get_autocast_dtype)),
)


class PretendedDevice(TorchDispatchMode):
    """While it is entered, `meta` is the device; `waits` counts what the host waited for, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __enter__(self) -> PretendedDevice:
        self.entered = ExitStack()
        self.entered.enter_context(_FromNumbers())
        for place, name, instead in _INSTEAD:
            self.entered.enter_context(patch.object(place, name, instead))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.entered.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = [x for x in given if isinstance(x, Pretended)]
        _require_one_device(func, args, given)
        if func is aten.copy_.default:
            lands = isinstance(args[0], Pretended)
        elif (asked := kwargs.get("device")) is not None:
            lands = torch.device(asked).type == DEVICE.type
            kwargs["device"] = torch.device("cpu")
        else:
            lands = bool(there)
        if there and (func in READ or _reads_index(func, args)):
            self.waits[str(func)] += 1
        elif there and not lands:
            self.waits[f"{func} to the host"] += 1
        elif (
            lands
            and func in COPIES
            and len(there) < len(given)
            and not (kwargs.get("non_blocking") or True in args[2:])
        ):
            self.waits[f"{func} from the host"] += 1
        if func is aten._fused_sdp_choice.default and there:
            return 0  # plain products: what else it may choose depends on the device
        if func is aten.histc.default and not args[0].is_floating_point():
            args = args[0].near.float(), *args[1:]  # of whole numbers it is there on a GPU only
        by_near = {id(x.near): x for x in there}
        acts: Any = WRITTEN_DOWN.get(func, func)
        out = acts(*tree_map(_near, args), **tree_map(_near, kwargs))
        if there and torch.Tag.inplace_view in func.tags:
            with no_dispatch():  # the shape that the tensor itself has changes too
                func(*args, **kwargs)
        return tree_map(lambda x: _far(x, by_near), out) if lands else out


def _near(x: Any) -> Any:
    return x.near if isinstance(x, Pretended) else x


def _far(x: Any, by_near: dict[int, Pretended]) -> Any:
    if not isinstance(x, Tensor):
        return x
    return by_near[id(x)] if id(x) in by_near else Pretended(x)


def _reads_index(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an index is a mask, whose marks must be counted first, or must be brought there."""
    if func not in INDEXED:
        return False
    given = [x for x in args[1] if x is not None]
    here = isinstance(args[0], Pretended) and not all(isinstance(x, Pretended) for x in given)
    return here or any(x.dtype in (torch.bool, torch.uint8) for x in given)


def _require_one_device(func: Any, args: tuple[Any, ...], given: list[Tensor]) -> None:
    if empty := [x for x in given if x.device == DEVICE and not isinstance(x, Pretended)]:
        raise AssertionError(
            f"{func}: {tuple(empty[0].shape)} was made behind the pretended device's back, and is empty"
        )
    if func in COPIES:
        return
    if func in INDEXED:
        at_home = isinstance(args[0], Pretended)
        wrong = [x for x in args[1] if isinstance(x, Pretended)] if not at_home else []
        wrong += [x for x in args[2:3] if isinstance(x, Tensor) and isinstance(x, Pretended) != at_home and x.dim()]
    else:
        there = any(isinstance(x, Pretended) for x in given)
        numbers = torch.Tag.pointwise in func.tags or func in WITH_NUMBERS
        changed = args[0] if func._schema.is_mutable and args else None  # a number of the CPU's must not be that
        taken = [x for x in given if isinstance(x, Pretended) or (numbers and x.dim() == 0 and x is not changed)]
        wrong = [x for x in given if there and all(x is not one for one in taken)]
    if wrong:
        devices = ", ".join(f"{tuple(x.shape)} on {x.device}" for x in given)
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found {devices}")
