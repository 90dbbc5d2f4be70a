"""What the compiler made of a kernel: registers, spills and machine code."""

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from pallas_kernels.aot import alignment

REGISTERS = 65536  # of a multiprocessor
DUMP = ("MOSAIC_GPU_DUMP_PTX", "MOSAIC_GPU_DUMP_TO", "JAX_TRITON_DUMP_DIR")


class Report(NamedTuple):
    """A compiled case.

    Attributes:
      registers: per thread, the most of its kernels; 0 where that is not known (TPU).
      spill: bytes stored to local memory per thread, the most of its kernels.
      code: SASS of all kernels; a TPU's compiled module.
      complaints: what the assembler lets pass and a GPU would suffer from; spills among products.
    """

    registers: int
    spill: int
    code: str
    complaints: tuple[str, ...] = ()


def dumping() -> Path:
    """Makes this process write the PTX of each GPU kernel to the folder that is returned.

    Must be called before the first compilation.
    """
    folder = Path(tempfile.mkdtemp(prefix="aot-"))
    os.environ |= {DUMP[0]: "1", DUMP[1]: str(folder), DUMP[2]: str(folder)}
    return folder


def take(folder: Path) -> list[str]:
    """The PTX modules in a folder, which is emptied."""
    modules = [path.read_text() for path in sorted(folder.rglob("*.ptx"))]
    for path in folder.iterdir():
        path.unlink() if path.is_file() else shutil.rmtree(path)
    return modules


def assemble(modules: list[str]) -> Report:
    """Machine code of PTX modules.

    Raises:
      RuntimeError: ptxas or nvdisasm is missing, or refuses a module.
    """
    registers, spill, code, wrong = 0, 0, [], []
    with tempfile.TemporaryDirectory() as folder:
        for module in modules:
            source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
            source.write_text(module)
            target = re.search(r"^\.target (\w+)", module, re.MULTILINE)
            if target is None:
                raise RuntimeError("a PTX module names no target")
            said = run("ptxas", "-v", f"-arch={target[1]}", str(source), "-o", str(binary))
            registers = max(registers, *map(int, re.findall(r"Used (\d+) registers", said)))
            spill = max(spill, *map(int, re.findall(r"(\d+) bytes spill stores", said)))
            code.append(run("nvdisasm", str(binary)))
            wrong += complaints(module, said) + spills_among_products(code[-1])
    return Report(registers, spill, "\n".join(code), tuple(wrong))


def spills_among_products(code: str) -> list[str]:
    """A line for each loop of products of the tensor core that also moves spilled registers, which
    costs at every turn; elsewhere it costs once a block.

    The loop of a product is the shortest that it is in: waits stand behind the code and jump back
    into it, over nearly all.

    Args:
      code: SASS of nvdisasm.
    """
    labels, loops, products, spills, i = {}, [], [], [], 0
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = i
        if not re.search(r"/\*[0-9a-f]{4,}\*/", line):
            continue
        i += 1
        products += [i] if "GMMA" in line else []
        spills += [i] if "SpillRefill" in line else []
        jump = re.search(r"\bBRA\b.*\((\.L_x_\d+)\)", line)
        if jump and jump[1] in labels:  # backwards
            loops.append((labels[jump[1]], i))
    around = [[loop for loop in loops if loop[0] < p <= loop[1]] for p in products]
    innermost = {min(found, key=lambda loop: loop[1] - loop[0]) for found in around if found}
    counts = [sum(first < s <= last for s in spills) for first, last in sorted(innermost)]
    return [f"{count} moves of spilled registers among products" for count in counts if count]


FREE = ("parameter", "constant", "bitcast", "get-tuple-element", "tuple", "iota")


def launches(program: str) -> int:
    """Kernels that a compiled program launches on a GPU: what its entry holds beside names.

    Args:
      program: XLA's text of it.
    """
    entry = program[program.index("\nENTRY ") :].split("\n}")[0].splitlines()[2:]
    operations = [re.search(r"(?:\}|\]|\)) ([a-z][\w-]*)\(", line) for line in entry]
    return sum(found is not None and found[1] not in FREE for found in operations)


def complaints(module: str, said: str) -> list[str]:
    """What the assembler lets pass and a GPU would suffer from.

    Args:
      module: PTX.
      said: what ptxas printed.
    Returns:
      a line for each: products of the tensor core that wait for each other, warp groups that ask
      for more registers than the block has, for which the last one waits for ever, or tensor copies
      at places of shared memory where they fault.
    """
    found = [line.strip() for line in said.splitlines() if "serialized" in line]
    threads = re.search(r"\.(?:req|max)ntid (\d+)", module)
    asked = {
        way: max(map(int, re.findall(rf"setmaxnreg\.{way}\S* (\d+)", module)), default=0)
        for way in ("inc", "dec")
    }
    if threads and all(asked.values()):
        groups = int(threads[1]) // 128
        pool = groups * (REGISTERS // int(threads[1]) // 8 * 8)
        wanted = (groups - 1) * asked["inc"] + asked["dec"]
        if wanted > pool:
            found.append(f"warp groups ask for {wanted} registers of each thread of {pool}")
    return found + alignment.misplaced(module)


def run(tool: str, *arguments: str) -> str:
    """Output of one of CUDA's tools, from NVIDIA's Python packages or the search path."""
    spec = importlib.util.find_spec("nvidia")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    found = [p for folder in folders for p in Path(folder).glob(f"c*/bin/{tool}")]
    command = [str(found[0]) if found else tool, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except FileNotFoundError as error:
        packages = "nvidia-cuda-nvcc nvidia-cuda-nvdisasm"
        raise RuntimeError(f"{tool} is missing: pip install {packages}") from error
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{tool} refuses the kernel: {error.stderr[-500:]}") from error
    return done.stdout + done.stderr
