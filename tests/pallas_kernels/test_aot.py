"""Compiling without a device: descriptions, the list of cases, and the report's bookkeeping."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import backend
from pallas_kernels.aot import (
    CHIPS,
    __main__,
    alignment,
    collect,
    lower_for,
    report,
    table,
    topology,
    worker,
)
from pallas_kernels.aot.cases import Case, named, too_old
from pallas_kernels.backend import Backend, named_capability


def test_chips_are_found_by_the_name_their_driver_gives():
    for chip in CHIPS.values():
        assert chip.platform == "tpu" or named_capability(chip.kind) == chip.capability
    with pytest.raises(ValueError, match="chip='h201' is unknown; accepted: 'h200'"):
        topology.find("h201")


def test_every_case_names_known_chips_and_can_be_made():
    for name, case in collect().items():
        assert case.name == name and case.chips and set(case.chips) <= set(CHIPS)
        function, arguments = case.make()
        assert callable(function) and jax.tree.leaves(arguments) and case.backends


NEWER = Backend("mosaic", abs, ("gpu",), at_least=(8, 0), below=(9, 0), jax=(0, 11, 2))
ANY = NEWER._replace(at_least=(9, 0), below=None, jax=())


def test_a_case_waits_for_the_jax_that_its_backend_needs(monkeypatch):
    case = Case("sparse", lambda: (abs, ()), ("h200", "l4"), backends=(ANY, NEWER))
    monkeypatch.setattr(backend, "JAX_VERSION", (0, 10, 2))
    needs = f"needs jax 0.11.2, this is {jax.__version__}"
    assert too_old(case, "h200") is None and too_old(case, "l4") == needs
    assert __main__.refused({"sparse": case}) == {"sparse@l4": needs}
    monkeypatch.setattr(backend, "JAX_VERSION", (0, 11, 2))
    assert too_old(case, "l4") is None
    with pytest.raises(ValueError, match="'sparse' lists 't4': needs compute capability 9.0"):
        too_old(case, "t4")
    with pytest.raises(ValueError, match="no backend is called 'sm90'; accepted: 'mosaic'"):
        named((ANY, NEWER), "sm90")


def test_every_case_is_served_by_its_backend(monkeypatch):
    monkeypatch.setattr(backend, "JAX_VERSION", (99,))
    assert __main__.refused(collect()) == {}


@pytest.mark.parametrize("chip", ["h200", "v5e"])
def test_lowering_needs_no_device(chip):
    text = lower_for(lambda x: x + 1, (jax.ShapeDtypeStruct((4,), jnp.float32),), chip)
    assert "stablehlo.add" in text


def test_a_failed_compilation_is_a_row(tmp_path):
    def broken():
        raise ValueError("cannot be made")

    row = worker.compiled(Case("none", broken, ("h200",)), "h200", tmp_path)
    assert row == {"wrong": "ValueError: cannot be made"}
    line = __main__.describe({"job": "none@h200", **row})
    assert line == "FAILED none@h200: ValueError: cannot be made"


def test_a_run_replaces_the_column_of_its_jax(tmp_path, monkeypatch):
    results = tmp_path / "RESULTS.md"
    results.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    case = Case("w4a8", lambda: (abs, ()), ("h200", "l4"), expect=("QGMMA", "LDS.128"))
    cases = {"w4a8": case, "tpu": Case("tpu", lambda: (abs, ()), ("v5e",))}

    def write(version, *rows):
        monkeypatch.setattr(table.jax, "__version__", version)
        table.write(results, cases, list(rows))
        return results.read_text()

    good = {"job": "w4a8@h200", "registers": 168, "spill": 0, "wrong": ""}
    late = {"job": "w4a8@l4", "wrong": "", "absent": "needs jax 0.11.2, this is 0.10.2"}
    write("0.12.0.1", good | {"registers": 170}, {"job": "w4a8@l4", "wrong": "no | at\nall"})
    write("0.10.2", good, late, {"job": "tpu@v5e", "registers": 0, "spill": 0, "wrong": ""})
    text = write("0.12.1", good | {"registers": 169})
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert text.splitlines()[2:-2] == [
        "| kernel | chip | instructions found | jax 0.10.2 | jax 0.12.1 |",
        "| --- | --- | --- | --- | --- |",
        "| w4a8 | h200 | QGMMA, LDS.128 | 168 / 0 | 169 / 0 |",
        "| w4a8 | l4 | QGMMA, LDS.128 | needs jax 0.11.2 | not compiled |",
        "| tpu | v5e |  | yes | not compiled |",
    ]


def test_a_failure_stays_one_cell():
    wrong = {"job": "w4a8@l4", "wrong": "no | at\nall"}
    assert table.cell(wrong) == "FAILED: no / at all"


def test_complaints_about_what_the_assembler_lets_pass():
    module = ".maxntid 384, 1, 1\nsetmaxnreg.dec.sync.aligned.u32 40;\n"
    more = module + "setmaxnreg.inc.sync.aligned.u32 240;\n"
    assert report.complaints(module, "") == []
    assert report.complaints(more.replace("240", "232"), "ptxas info : Used 168 registers") == []
    found = report.complaints(more, "Potential Performance Loss: wgmma are serialized due to")
    assert [line.split(" ")[0] for line in found] == ["Potential", "warp"] and "520" in found[1]


COPIES = """.entry kernel(.param .u64 kernel_param_0)
\tmov.b64 \t%rd1, __dynamic_shmem__0;
\tadd.s64 \t%rd2, %rd1, {first};
\tmov.b32 \t%r1, %tid.x;
\tbra.uni \t$L__BB0_2;
$L__BB0_1:
\tadd.s64 \t%rd2, %rd2, {slot};
\tadd.s64 \t%rd1, %rd1, 8;
$L__BB0_2:
\tmul.wide.u32 \t%rd3, %r1, {turn};
\tsub.s64 \t%rd4, %rd2, %rd3;
\tcvt.u32.u64 \t%r2, %rd4;
\t@%p1 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r2], [%rd9, {{%r1,%r1}}], [%r5];
\t@%p2 bra \t$L__BB0_1;
\tmov.b64 \t%rd5, __dynamic_shmem__0;
\tcvt.u32.u64 \t%r3, %rd5;
\tcp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd9, {{%r1, %r1}} ], [%r3+{out}];
\tret;
"""  # noqa: E501


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({}, []),
        ({"slot": 64}, ["(2d) at a multiple of 64 bytes"]),
        ({"turn": 96}, ["(2d) at a multiple of 32 bytes"]),
        ({"first": 4104, "out": 16}, ["(2d) at a multiple of 8 bytes", "a multiple of 16 bytes"]),
    ],
)
def test_tensor_copies_off_128_bytes_are_refused(change, wrong):
    """A pointer that a loop moves, and one that moves by 8 and is not copied to."""
    module = COPIES.format(**{"first": 4096, "slot": 128, "turn": 768, "out": 256} | change)
    found = report.complaints(module, "")
    assert len(found) == len(wrong)
    assert all(text in line for text, line in zip(wrong, found, strict=True))


PROGRAM = """HloModule jit_run

%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %n = f32[8]{0} negate(%p)
}

ENTRY %main (x: f32[8]) -> bf16[8] {
  %x = f32[8]{0} parameter(0), metadata={op_name="x"}
  %a = (f32[8]{0}, f32[2,4]{1,0}) fusion(%x), kind=kInput, calls=%fused, metadata={op_name="f(y)"}
  %b = f32[8]{0} get-tuple-element(%a), index=0
  %c = f32[1,8]{1,0} bitcast(%b)
  ROOT %d = bf16[8]{0} custom-call(%c), custom_call_target="mosaic_gpu_v2"
}
"""


SASS = """
        /*0010*/                   {before} ;
.L_x_1:
        /*0020*/                   {outer} ;
.L_x_2:
        /*0030*/                   QGMMA.64x64x32.F32.E4M3.E4M3 R24, gdesc[UR4], R24 ;
        /*0040*/                   {inner} ;
        /*0050*/              @P2  BRA `(.L_x_2) ;
        /*0060*/                   {outer} ;
        /*0070*/              @!P1 BRA `(.L_x_3) ;
        /*0080*/                   BRA `(.L_x_1) ;
.L_x_3:
        /*0090*/                   {before} ;
"""
MOVE, SPILL = "MOV R1, R2", 'LDL R2, [R1+0x20]   (*"SpillRefill"*)'


def test_spills_count_where_products_turn():
    places = ("before", "outer", "inner")
    for place in places:
        code = SASS.format(**{name: SPILL if name == place else MOVE for name in places})
        wrong = ["1 moves of spilled registers among products"] if place == "inner" else []
        assert report.spills_among_products(code) == wrong
    straight = SASS.replace(".L_x_2)", ".L_x_3)").replace(".L_x_1)", ".L_x_3)")
    assert not report.spills_among_products(straight.format(**dict.fromkeys(places, SPILL)))


def test_launches_are_counted_in_the_entry_alone():
    assert report.launches(PROGRAM) == 2
    program = PROGRAM.replace("bitcast(%b)", "copy(%b)")
    assert report.launches(program) == 3


def test_what_an_unknown_instruction_computes_is_not_trusted():
    module = COPIES.format(first=4096, slot=128, turn=768, out=256)
    for other in ("mul.hi.u32 \t%r2, %r1, 1024", "ld.global.b32 \t%r2, [%rd9]"):
        changed = module.replace("cvt.u32.u64 \t%r2, %rd4", other)
        assert alignment.misplaced(changed) == [
            "a tensor copy (2d) at a multiple of 1 bytes of shared memory, not of 128"
        ]


def test_a_missing_tool_says_what_to_install(monkeypatch):
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="ptxas is missing: pip install nvidia-cuda-nvcc"):
        report.run("ptxas", "--version")


def test_the_readme_runs():
    readme = Path(topology.__file__).parent.parent / "README.md"
    blocks = re.findall(r"```python\n(.*?)```", readme.read_text(), flags=re.DOTALL)
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert blocks
