"""INT4 codes to e4m3 or float16 in a lane's registers: the part of the kernels that is PTX.

Each function returns a callable for the body of a Mosaic GPU kernel. A thread holds 8 words of a
tile (`packed`); each becomes two registers of the tensor core's A operand, four e4m3 bytes for
column g and four for column g + 8. Hopper's wgmma and Ada's mma want the same bytes. Ampere has no
e4m3: there a word becomes four registers of two float16, whose order along k is not the tokens';
`half_order` gives them the same.
"""

from typing import cast

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels import _compat

SHAPE = (64, 128)
WORDS = plgpu.Layout.WG_STRIDED((8, 128), 4)
COLUMN = plgpu.Layout.WGMMA.reduce(1)  # one value per column of w: of g and g + 8 in a thread
E4M3, HALF = jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float16)
OPERAND = plgpu.ShapeDtypeStruct(SHAPE, E4M3, layout=plgpu.Layout.WGMMA_8BIT)
SUBNORMAL = 2.0**9  # "sm" values come out as q * 2**-9
HALF_SUBNORMAL = 2.0**17  # and as float16 q * 2**-17

# Bytes e4m3(0..3), (4..7), (-8..-5), (-4..-1); prmt picks by the low three bits of each nibble.
POSITIVE, NEGATIVE = (0x44403800, 0x4E4C4A48), (0xCACCCED0, 0xB8C0C4C8)
PICK = (
    "{{ .reg .b32 p, n; prmt.b32 p, {}, {}, $1; prmt.b32 n, {}, {}, $1; prmt.b32 $0, p, n, $2; }}"
)


def plain(encoding, ada=False):
    """words -> e4m3 q, times 2**-9 where `encoding` is "sm"; for mma, not wgmma, with `ada`."""
    layout = _compat.mma_layouts(E4M3)[0] if ada else plgpu.Layout.WGMMA_8BIT
    result = plgpu.ShapeDtypeStruct(SHAPE, E4M3, layout=layout)

    @plgpu.inline_mgpu(arg_types=(WORDS,), return_type=result)
    def decode(_, words):
        both = sign_magnitude if encoding == "sm" else twos_complement
        registers = [register for word in lanes(words) for register in both(word)]
        return operand(registers, layout.to_mgpu(), 4, ir.Float8E4M3FNType.get())

    return decode


def half(encoding):
    """words -> float16 q, times 2**-17 where `encoding` is "sm", in `half_order` along k."""
    layout = _compat.mma_layouts(HALF)[0]
    result = plgpu.ShapeDtypeStruct(SHAPE, HALF, layout=layout)

    @plgpu.inline_mgpu(arg_types=(WORDS,), return_type=result)
    def decode(_, words):
        four = half_sign_magnitude if encoding == "sm" else half_twos_complement
        registers = [register for word in lanes(words) for register in four(word)]
        return operand(registers, layout.to_mgpu(), 2, ir.F16Type.get())

    return decode


def half_order(x):
    """Columns of x [m, k] in the order of k that `half` gives the weights."""
    m, k = x.shape
    return x.reshape(m, k // 16, 4, 2, 2).swapaxes(2, 3).reshape(m, k)


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
        registers = [r for word in lanes(words) for r in twos_complement(word, tables)]
        layout = plgpu.Layout.WGMMA_8BIT.to_mgpu()
        return operand(registers, layout, 4, ir.Float8E4M3FNType.get())

    return decode


def lanes(words):
    """The 8 words of a thread."""
    return [vector.extract(r, [], [lane]) for r in words.registers.flat for lane in range(4)]


def operand(registers, layout, count, element):
    """The A operand of a tensor core from its registers of `count` elements."""
    held = np.empty(layout.registers_shape(SHAPE), dtype=object)
    bits = ir.VectorType.get((count,), ir.IntegerType.get_signless(32 // count))
    values = ir.VectorType.get((count,), element)
    for index, register in zip(np.ndindex(held.shape), registers, strict=True):
        held[index] = utils.bitcast(utils.bitcast(register, bits), values)
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


def half_sign_magnitude(word):
    """Float16 pairs of one word: codes 0 and 1 of columns g and g + 8, then codes 2 and 3."""
    found = []
    for pick in (0x4140, 0x4342):  # two bytes, spread to 16 bits
        for bytes4 in sign_magnitude(word):
            pair = assembly(f"prmt.b32 $0, $1, 0, {pick:#x};", bytes4)
            size = arith.shli(arith.andi(pair, constant(0x00070007)), constant(7))
            sign = arith.shli(arith.andi(pair, constant(0x00800080)), constant(8))
            found.append(arith.ori(size, sign))
    return found


def half_twos_complement(word):
    """The same: the nibbles with 8 added are the last bits of 1024 + 8 + q, which loses 1032."""
    code = []
    for j in range(4):
        nibbles = arith.andi(arith.shrui(word, constant(4 * j)), constant(0x000F000F))
        biased = arith.ori(arith.xori(nibbles, constant(0x00080008)), constant(0x64006400))
        code.append(assembly("sub.f16x2 $0, $1, $2;", biased, constant(0x64086408)))
    return [
        assembly(f"prmt.b32 $0, $1, $2, {pick:#x};", code[first], code[first + 1])
        for first in (0, 2)
        for pick in (0x5410, 0x7632)  # both low halves are column g's, both high g + 8's
    ]


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
