"""Products of adapted 4-bit layers in C++: the fast twin of `fused.PLAIN`.

Knows products.cpp, layers and tensors. Invariant: what products.cpp does not know, its twin computes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_float, c_int64, c_void_p, pointer

import torch
from torch import Tensor

from qlora_cli.model.fused import Pairs, Products, bias_of, plain_backward, plain_forward
from qlora_cli.model.lora import LoraLinear
from qlora_cli.model.native.build import NotBuiltError, library, run, why_not
from qlora_cli.model.nf4 import Stored, is_four_bit, stored

BLOCK = 32
"""Rows and columns of a block: outputs and inputs of a layer must be whole ones."""


def native_products() -> Products:
    """`NotBuiltError` where there is no library, or the processor has no use for it."""
    if reason := why_not():
        raise NotBuiltError(reason)
    if not library().products_ready():
        raise NotBuiltError("the processor has no AMX")
    return Products(_forward, _backward)


def _forward(layer: LoraLinear, x: Tensor, h: Tensor) -> Tensor:
    weight = _known(layer, x)
    if weight is None:
        return plain_forward(layer, x, h)
    up = (layer.lora_b.detach() * layer.scaling).to(x.dtype)
    terms = [_Term.of(x, weight, turned=True), _Term.of(h, up, turned=True)]
    return _multiply(x, weight.shape[0], terms, bias_of(layer, x.dtype))


def _backward(pairs: Pairs, dhidden: Tensor | None, downs: Tensor | None) -> Tensor:
    known = [(dy, _known(layer, dy)) for layer, dy in pairs]
    terms = [_Term.of(dy, weight) for dy, weight in known if weight is not None]
    if len(terms) < len(pairs):
        return plain_backward(pairs, dhidden, downs)
    if dhidden is not None and downs is not None:
        terms.append(_Term.of(dhidden, downs))
    dy, weight = known[0]
    assert weight is not None
    return _multiply(dy, weight.shape[1], terms, None)


def _known(layer: LoraLinear, x: Tensor) -> Stored | None:
    """The layer's weight, if it and its input are of a kind that products.cpp knows."""
    if x.dtype is not torch.bfloat16 or x.device.type != "cpu" or not is_four_bit(layer.base):
        return None
    found = stored(layer.base, x.dtype)
    return None if found is None or any(size % BLOCK for size in (*found.shape, found.blocksize)) else found


def _multiply(like: Tensor, columns: int, terms: Sequence[_Term], bias: Tensor | None) -> Tensor:
    """[T, columns], for `like` [T, ...]."""
    result = like.new_empty(len(like), columns)
    places = None if bias is None else bias.contiguous()
    listed = (_Term * len(terms))(*terms)
    product = _Product(
        result.data_ptr(), columns, len(result), columns, 0 if places is None else places.data_ptr(), listed, len(terms)
    )
    run("multiply", product)
    return result


class _Weight(ctypes.Structure):
    _fields_ = (
        ("codes", c_void_p),
        ("table", c_void_p),
        ("constants", c_void_p),
        ("nested", c_void_p),
        ("meaning", c_void_p),
        ("offset", c_float),
        ("inputs", c_int64),
        ("shift", c_int64),
    )

    @classmethod
    def of(cls, weight: Stored) -> _Weight:
        tensors = (weight.codes, weight.table, weight.constants, weight.nested, weight.meaning)
        pointers = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
        return cls(*pointers, weight.offset, weight.shape[1], weight.blocksize.bit_length() - 1)


class _Term(ctypes.Structure):
    """As in products.cpp; it holds on to the tensors whose places it names."""

    _fields_ = (
        ("a", c_void_p),
        ("a_stride", c_int64),
        ("b", c_void_p),
        ("b_stride", c_int64),
        ("b_turned", c_int64),
        ("inner", c_int64),
        ("weight", POINTER(_Weight)),
    )

    @classmethod
    def of(cls, a: Tensor, b: Tensor | Stored, turned: bool = False) -> _Term:
        """a [T, inner] times b [inner, columns], or if `turned` [columns, inner]."""
        a = a if a.stride(1) == 1 else a.contiguous()
        term = cls(a=a.data_ptr(), a_stride=a.stride(0), b_turned=turned, inner=a.shape[1])
        if isinstance(b, Stored):
            term.weight = pointer(_Weight.of(b))
        else:
            b = b if b.stride(1) == 1 else b.contiguous()
            term.b, term.b_stride = b.data_ptr(), b.stride(0)
        term.held = (a, b)
        return term


class _Product(ctypes.Structure):
    _fields_ = (
        ("c", c_void_p),
        ("c_stride", c_int64),
        ("rows", c_int64),
        ("columns", c_int64),
        ("bias", c_void_p),
        ("terms", POINTER(_Term)),
        ("count", c_int64),
    )
