"""INT4 codes to e4m3 in a Hopper lane's registers: the part of the kernel that is PTX.

Each function returns a callable for the body of a Mosaic GPU kernel. A thread holds 8 words of a
tile (`packed`); each becomes two registers of the wgmma A operand, four e4m3 bytes for column g and
four for column g + 8.
"""

from typing import cast

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

SHAPE = (64, 128)
WORDS = plgpu.Layout.WG_STRIDED((8, 128), 4)
COLUMN = plgpu.Layout.WGMMA.reduce(1)  # one value per column of w: of g and g + 8 in a thread
OPERAND = plgpu.ShapeDtypeStruct(SHAPE, jnp.float8_e4m3fn, layout=plgpu.Layout.WGMMA_8BIT)
SUBNORMAL = 2.0**9  # "sm" values come out as q * 2**-9

# Bytes e4m3(0..3), (4..7), (-8..-5), (-4..-1); prmt picks by the low three bits of each nibble.
POSITIVE, NEGATIVE = (0x44403800, 0x4E4C4A48), (0xCACCCED0, 0xB8C0C4C8)
PICK = (
    "{{ .reg .b32 p, n; prmt.b32 p, {}, {}, $1; prmt.b32 n, {}, {}, $1; prmt.b32 $0, p, n, $2; }}"
)


def plain(encoding):
    """words -> e4m3 q, times 2**-9 where `encoding` is "sm"."""

    @plgpu.inline_mgpu(arg_types=(WORDS,), return_type=OPERAND)
    def decode(_, words):
        both = sign_magnitude if encoding == "sm" else twos_complement
        return operand([register for word in lanes(words) for register in both(word)])

    return decode


def table(encoding):
    """words and scales (float32 of each column) -> e4m3(q * scale), FireQ's table.

    The bytes of -8..7 times the scale are made once per tile and column; then a code costs what
    "tc" costs. Rounding to e4m3 is to nearest even and saturates at 448.
    """
    if encoding != "tc":
        raise ValueError(f"a table is indexed by two's complement, encoding={encoding!r}; use 'tc'")

    @plgpu.inline_mgpu(arg_types=(WORDS, COLUMN), return_type=OPERAND)
    def decode(_, words, scales):
        tables = [products(scale) for scale in scales.registers.flat]
        return operand([r for word in lanes(words) for r in twos_complement(word, tables)])

    return decode


def lanes(words):
    """The 8 words of a thread."""
    return [vector.extract(r, [], [lane]) for r in words.registers.flat for lane in range(4)]


def operand(registers):
    """The A operand of a wgmma from its 16 registers of four bytes."""
    layout = fragmented_array.WGMMA_LAYOUT_8BIT
    held = np.empty(layout.registers_shape(SHAPE), dtype=object)
    byte = ir.VectorType.get((4,), ir.IntegerType.get_signless(8))
    narrow = ir.VectorType.get((4,), ir.Float8E4M3FNType.get())
    for index, register in zip(np.ndindex(held.shape), registers, strict=True):
        held[index] = utils.bitcast(utils.bitcast(register, byte), narrow)
    return fragmented_array.FragmentedArray(_registers=held, _layout=layout, _is_signed=None)


def sign_magnitude(word):
    """Bytes of columns g and g + 8 of one word: an AND each, after a rotation for the second."""
    mask = constant(0x87878787)
    turned = assembly("shf.r.wrap.b32 $0, $1, $1, 4;", word)
    return arith.andi(word, mask), arith.andi(turned, mask)


def twos_complement(word, tables=None):
    """Bytes of columns g and g + 8 of one word, picked from tables of 16 bytes."""
    sign = arith.shrui(arith.andi(word, constant(0x88888888)), constant(1))
    index = arith.andi(word, constant(0x77777777))
    found = []
    for half in range(2):
        if half:
            sign, index = arith.shrui(sign, constant(16)), arith.shrui(index, constant(16))
        pattern = arith.ori(sign, constant(0x32103210))
        if tables is None:
            text = PICK.format(*(f"{value:#x}" for value in (*POSITIVE, *NEGATIVE)))
            found.append(assembly(text, index, pattern))
        else:
            found.append(
                assembly(PICK.format("$3", "$4", "$5", "$6"), index, pattern, *tables[half])
            )
    return found


def products(scale):
    """Four registers: the bytes e4m3(scale * (0..3)), (4..7), (-8..-5), (-4..-1)."""
    f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
    scale = vector.extract(scale, [], [0]) if scale.type != f32 else scale
    found = []
    for first in (0, 4, -8, -4):
        values = [arith.mulf(scale, arith.constant(f32, float(first + i))) for i in range(4)]
        text = (
            "{ .reg .b16 l, h; cvt.rn.satfinite.e4m3x2.f32 l, $2, $1; "
            "cvt.rn.satfinite.e4m3x2.f32 h, $4, $3; mov.b32 $0, {l, h}; }"
        )
        found.append(llvm.inline_asm(i32, values, text, "=r,f,f,f,f"))
    return found


def assembly(text, *operands):
    """One 32-bit result of PTX over 32-bit operands."""
    result = ir.IntegerType.get_signless(32)
    given = ",".join(["=r", *"r" * len(operands)])
    return cast(ir.Value, llvm.inline_asm(result, list(operands), text, given))


def constant(value):
    """A 32-bit constant."""
    i32 = ir.IntegerType.get_signless(32)
    return arith.constant(i32, ir.IntegerAttr.get(i32, value - (1 << 32) if value >> 31 else value))
