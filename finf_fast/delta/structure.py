"""Rules that move numbers without changing them: shapes, slices, joins, casts. They act on the whole stack at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finf_fast.delta.brackets import as_index, splits
from finf_fast.delta.integers import collapse
from finf_fast.delta.stack import Carried, Changed, NotCarried, Stack, align, lift, untouched, values_of
from finf_fast.delta.table import assign, rule, words


def behind(dim: int) -> int:
    """Where a logical dimension lies in the stacked tensor; a negative one counts from the end in both."""
    return dim + 1 if dim >= 0 else dim


def sizes(args: Sequence[Any]) -> tuple[int, ...]:
    """Sizes given one by one or as one sequence."""
    return tuple(args[0]) if len(args) == 1 and isinstance(args[0], (tuple, list, torch.Size)) else tuple(args)


def count_of(*things: Any) -> int:
    """1 + Q of the first carried among these."""
    for x in things:
        if isinstance(x, Carried):
            return len(x.stacked) if isinstance(x, Stack) else 1 + x.queries
    raise NotCarried("nothing carried among the arguments")


@rule("view", "reshape")
def view(x, *shape, **kwargs):
    shape = kwargs.get("shape", kwargs.get("size", sizes(shape)))
    if isinstance(shape[0] if shape else None, torch.dtype) or isinstance(shape, torch.dtype):
        raise NotCarried("the model reinterprets the bytes of a changed tensor")
    s = x.stacked
    if s.numel() == 0 and -1 in shape:  # -1 cannot be told from an empty tensor: take it from the logical shape
        return Stack(s.reshape(len(s), *torch.empty(s.shape[1:], device="meta").reshape(shape).shape))
    return Stack(s.reshape(len(s), *shape))


@rule("view_as", "reshape_as")
def view_as(x, other):
    return view(x, tuple(other.shape)) if isinstance(x, Carried) else x.reshape(tuple(other.shape))


@rule("flatten")
def flatten(x, start_dim=0, end_dim=-1):
    s = x.stacked
    if s.dim() == 1:
        return Stack(s.unsqueeze(1))
    return Stack(s.flatten(behind(start_dim), behind(end_dim)))


@rule("unflatten")
def unflatten(x, dim, sizes):
    return Stack(x.stacked.unflatten(behind(dim), sizes))


@rule("transpose", "swapaxes", "swapdims")
def transpose(x, dim0, dim1):
    if isinstance(x, Changed) and x.base.dim() == 2 and {dim0 % 2, dim1 % 2} == {0, 1}:
        return x.transposed()
    return Stack(x.stacked.transpose(behind(dim0), behind(dim1)))


@rule("t", "mT", "adjoint", "mH", "H")
def last_two(x):
    return transpose(x, -2, -1) if x.dim() > 1 else x


@rule("T")
def reversed_dims(x):
    return transpose(x, 0, 1) if x.dim() == 2 else permute(x, *reversed(range(x.dim())))


@rule("permute")
def permute(x, *dims, **kwargs):
    dims = kwargs.get("dims", sizes(dims))
    return Stack(x.stacked.permute(0, *(d % len(dims) + 1 for d in dims)))


@rule("movedim", "moveaxis")
def movedim(x, source, destination):
    one = isinstance(source, int)
    source, destination = ([source], [destination]) if one else (source, destination)
    return Stack(x.stacked.movedim(list(map(behind, source)), list(map(behind, destination))))


@rule("unsqueeze")
def unsqueeze(x, dim):
    return Stack(x.stacked.unsqueeze(behind(dim)))


@rule("squeeze")
def squeeze(x, *dim, **kwargs):
    s = x.stacked
    dims = sizes(dim) if dim else kwargs.get("dim")
    dims = range(s.dim() - 1) if dims is None else (dims,) if isinstance(dims, int) else dims
    place = [d % (s.dim() - 1) + 1 for d in dims] if s.dim() > 1 else []
    return Stack(s.squeeze(place))


@rule("expand", "broadcast_to")
def expand(x, *shape, **kwargs):
    shape = kwargs.get("size", sizes(shape))
    s = align(x.stacked, len(shape))
    return Stack(s.expand(len(s), *shape))


@rule("expand_as")
def expand_as(x, other):
    return expand(x, tuple(other.shape)) if isinstance(x, Carried) else x.expand(tuple(other.shape))


@rule("repeat", "tile")
def repeat(x, *times, **kwargs):
    times = kwargs.get("repeats", kwargs.get("dims", sizes(times)))
    times = (1,) * (x.dim() - len(times)) + tuple(times)
    return Stack(align(x.stacked, len(times)).repeat(1, *times))


@rule("repeat_interleave")
def repeat_interleave(x, repeats, dim=None, *, output_size=None):
    if isinstance(repeats, Carried):
        raise NotCarried("repeat_interleave by changed counts: a shape that depends on values")
    s = x.stacked if dim is not None else x.stacked.flatten(1)
    return Stack(s.repeat_interleave(repeats, behind(dim) if dim is not None else 1, output_size=output_size))


@rule("contiguous")
def contiguous(x, memory_format=torch.contiguous_format):
    with untouched():  # as torch sees it: a copy where torch gives x itself would miss what is later written into x
        if memory_format is torch.preserve_format or x.is_contiguous(memory_format=memory_format):
            return x
    s = x.stacked
    if memory_format is torch.contiguous_format:
        return Stack(s.clone(memory_format=memory_format))
    flat = s.flatten(0, 1).contiguous(memory_format=memory_format)
    return Stack(flat.unflatten(0, s.shape[:2]))


@rule("clone")
def clone(x, *, memory_format=torch.preserve_format):
    if memory_format is torch.preserve_format:
        return Stack(x.stacked.clone())
    found = contiguous(x, memory_format)
    return Stack(x.stacked.clone()) if found is x else found


@rule("detach", "alias", "data", "cpu", "lift_fresh", "real", "resolve_conj", "resolve_neg")
def same(x, *args, **kwargs):
    return x if isinstance(x, Changed) else Stack(x.stacked)


@rule("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout", "feature_alpha_dropout")
def dropout(input, p=0.5, training=True, inplace=False, *, train=True):
    if training and train and p > 0:
        raise NotCarried("dropout is on")
    return input


@rule("native_dropout")
def native_dropout(input, p, train):
    return dropout(input, p, bool(train)), torch.ones(input.shape, dtype=torch.bool, device=input.device)


@rule("to")
def to(x, *args, **kwargs):
    if args and isinstance(args[0], Tensor):
        args = (args[0].dtype, *args[1:])
    if not isinstance(x, Carried):  # only what gives the type is carried
        return x.to(args[0])
    dtype = kwargs.get("dtype", next((a for a in args if isinstance(a, torch.dtype)), None))
    format = kwargs.get("memory_format")
    moved = cast(x, dtype) if dtype is not None else x
    if kwargs.get("copy") and moved is x:
        moved = clone(x)
    return moved if format in (None, torch.preserve_format) else contiguous(moved, format)


def cast(x: Any, dtype: torch.dtype) -> Any:
    """A stack in another type. From numbers to integers it turns into values, the other way into changes."""
    if x.dtype == dtype:
        return x
    if x.dtype.is_floating_point and dtype.is_floating_point:
        return Stack(x.in_type(dtype))
    values = values_of(x).to(dtype)
    if not dtype.is_floating_point:
        return collapse(values)
    values[1:] -= values[:1].clone()
    return Stack(values)


@rule("type", "type_as")
def type_as(x, dtype=None, non_blocking=False):
    if not isinstance(x, Carried):
        return x.to(dtype.dtype)
    if isinstance(dtype, str):
        raise NotCarried("type() by name: use .to(dtype)")
    return str(x.dtype) if dtype is None else cast(x, dtype if isinstance(dtype, torch.dtype) else dtype.dtype)


def _caster(name: str, dtype: torch.dtype) -> None:
    rule(name)(lambda x, memory_format=None: cast(x, dtype))


for _name, _dtype in (
    ("float", torch.float32),
    ("double", torch.float64),
    ("half", torch.float16),
    ("bfloat16", torch.bfloat16),
    ("long", torch.int64),
    ("int", torch.int32),
    ("bool", torch.bool),
):
    _caster(_name, _dtype)


@rule("select")
def select(x, dim, index):
    return Stack(x.stacked.select(behind(dim), index))


@rule("narrow")
def narrow(x, dim, start, length):
    return Stack(x.stacked.narrow(behind(dim), int(start), length))


@rule("flipud")
def flipud(x):
    return flip(x, 0)


@rule("fliplr")
def fliplr(x):
    return flip(x, 1)


@rule("flip")
def flip(x, *dims, **kwargs):
    return Stack(x.stacked.flip(tuple(map(behind, kwargs.get("dims", sizes(dims))))))


@rule("roll")
def roll(x, shifts, dims=None):
    if dims is None:
        return view(roll(flatten(x), shifts, 0), tuple(x.shape))
    dims = (dims,) if isinstance(dims, int) else dims
    return Stack(x.stacked.roll(shifts, tuple(map(behind, dims))))


@rule("diagonal")
def diagonal(x, offset=0, dim1=0, dim2=1):
    return Stack(x.stacked.diagonal(offset, behind(dim1), behind(dim2)))


@rule(torch.linalg.diagonal)
def linalg_diagonal(A, *, offset=0, dim1=-2, dim2=-1):
    return diagonal(A, offset, dim1, dim2)


def _triangle(name: str) -> None:
    function = getattr(torch, name)
    rule(name)(lambda x, diagonal=0: Stack(function(x.stacked, diagonal)))


for _name in ("tril", "triu"):
    _triangle(_name)


@rule("pad")
def pad(input, pad, mode="constant", value=None):
    s = input.stacked
    if mode == "constant":
        out = F.pad(s, pad, value=0.0)
        if value:
            out[0] = F.pad(s[0], pad, value=value)
            if not s.is_floating_point():
                out = F.pad(s, pad, value=value)
        return Stack(out)
    return Stack(F.pad(s.flatten(0, 1), pad, mode=mode).unflatten(0, s.shape[:2]))


def folded(function: Any, s: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A function of (batch, …) that is linear and knows no query, on all rows of the stack in one call."""
    return function(s.flatten(0, 1), *args, **kwargs).unflatten(0, s.shape[:2])


FOLDED = words(
    "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
    "interpolate channel_shuffle"
)


def _fold(name: str) -> None:
    function = getattr(F, name)

    def run(input, *args, **kwargs):
        return Stack(folded(function, input.stacked, *args, **kwargs))

    rule(name)(run)


for _name in FOLDED:
    _fold(_name)


@rule("pixel_shuffle")
def pixel_shuffle(input, upscale_factor):
    return Stack(F.pixel_shuffle(input.stacked, upscale_factor))


@rule("pixel_unshuffle")
def pixel_unshuffle(input, downscale_factor):
    return Stack(F.pixel_unshuffle(input.stacked, downscale_factor))


@rule(F.unfold)
def image_to_columns(input, *args, **kwargs):
    if input.dim() == 3:
        return image_to_columns(input.unsqueeze(0), *args, **kwargs).squeeze(0)
    return Stack(folded(F.unfold, input.stacked, *args, **kwargs))


@rule(F.fold)
def columns_to_image(input, *args, **kwargs):
    if input.dim() == 2:
        return columns_to_image(input.unsqueeze(0), *args, **kwargs).squeeze(0)
    return Stack(folded(F.fold, input.stacked, *args, **kwargs))


@rule(Tensor.unfold)
def windows(x, dimension, size, step):
    return Stack(x.stacked.unfold(behind(dimension), size, step))


def like(name: str) -> None:
    """A new tensor shaped like a stack: it depends on no value."""
    function = getattr(torch, name, None) or getattr(Tensor, name)

    def run(x, *args, **kwargs):
        kwargs.setdefault("dtype", x.dtype)
        kwargs.setdefault("device", x.device)
        return function(torch.empty(x.shape, dtype=x.dtype, device=x.device), *args, **kwargs)

    rule(name)(run)


for _name in words("zeros_like ones_like empty_like full_like new_zeros new_ones new_empty new_full new_tensor"):
    like(_name)


@rule("__setitem__")
def setitem(x, index, value):
    index = as_index(index)
    if any(isinstance(i, Carried) for i in index):
        raise NotCarried("the model writes at places that changed values point to")
    from finf_fast.delta.table import current

    if not isinstance(x, Stack):
        x = current().adopt(x, count_of(value))
    current().settle()
    s = x.stacked
    source = lift(value, len(s), s).to(s.dtype)
    if splits(index):
        for row, part in zip(s, source, strict=True):
            row[index] = part
        return
    room = s[(slice(None), *index)]
    s[(slice(None), *index)] = align(source, room.dim() - 1)


@rule("copy_")
def copy_(x, source, non_blocking=False):
    return assign(x, source)
