# SPDX-License-Identifier: Apache-2.0
"""How one launch serves many layers, whose tensors lie anywhere: their addresses and strides are rows of an int64 table.

The table is in the device's memory, a row a layer. A kernel takes the tensors of one layer as ordinary arguments as well: the
table's addresses have their types. ``ALIGNED`` promises what a launch otherwise learns from its arguments: addresses that are
multiples of 16 bytes, strides that are multiples of 16 elements.
"""

import triton
import triton.language as tl


@triton.jit
def table_row(Table, layer, COLUMNS: tl.constexpr):
    return Table + layer.to(tl.int64) * COLUMNS


@triton.jit
def table_pointer(row, column: tl.constexpr, like, ALIGNED: tl.constexpr):
    """The address in a column, as a pointer of ``like``'s type."""
    pointer = tl.load(row + column).to(like.dtype)
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def table_stride(row, column: tl.constexpr, ALIGNED: tl.constexpr):
    """The stride in a column, in elements, 64-bit."""
    stride = tl.load(row + column)
    if ALIGNED:
        stride = tl.multiple_of(stride, 16)
    return stride
