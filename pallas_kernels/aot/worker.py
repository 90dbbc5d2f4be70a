"""Compiles cases one after another and prints a line of JSON for each: `worker.py CASE@CHIP ...`.

A process of its own, because an error inside LLVM ends it.
"""

import json
import re
import sys
import time

import jax

from pallas_kernels.aot import report
from pallas_kernels.aot.cases import Case, collect


def main(jobs):
    """Compiles `jobs`, strings "case@chip", in order."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # a cached program leaves no PTX
    folder, cases = report.dumping(), collect()
    for job in jobs:
        name, chip = job.rsplit("@", 1)
        print(json.dumps({"job": job, **compiled(cases[name], chip, folder)}), flush=True)


def compiled(case: Case, chip: str, folder) -> dict[str, object]:
    """Registers, spill, seconds and what is wrong with one case on one chip."""
    from pallas_kernels.aot import topology

    started = time.perf_counter()
    report.take(folder)
    try:
        program = topology.compile_for(*case.make(), chip)
        modules = report.take(folder)
        if topology.find(chip).platform == "gpu" and modules:
            found = report.assemble(modules)
        else:
            found = report.Report(0, 0, program.as_text() or "")
    except Exception as error:  # noqa: BLE001
        # Whatever a compiler says is a line of the table.
        return {"wrong": f"{type(error).__name__}: {str(error)[-400:]}"}
    missing = [text for text in case.expect if text not in found.code]
    wrong = [f"no {text} in the machine code" for text in missing]
    wrong += [f"nothing like {p}" for p in case.patterns if not re.search(p, found.code)]
    wrong += found.complaints
    count = report.launches(program.as_text() or "") if case.launches is not None else 0
    if count > (case.launches or 0):
        wrong.append(f"launches {count} kernels, more than {case.launches}")
    if found.registers > case.registers:
        wrong.append(f"takes {found.registers} registers, more than {case.registers}")
    if found.spill > case.max_spill:
        wrong.append(f"spills {found.spill} bytes, more than {case.max_spill}")
    return {
        "registers": found.registers,
        "spill": found.spill,
        "seconds": time.perf_counter() - started,
        "wrong": "; ".join(wrong),
    }


if __name__ == "__main__":
    main(sys.argv[1:])
