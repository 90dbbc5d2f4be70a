"""Where a kernel's tensor copies (TMA) begin in shared memory, by what its PTX computes.

A tensor copy faults unless its address in shared memory is a multiple of 128 bytes. Addresses are
sums of the buffer's base, constants, and slots times their size. What is known of a register is the
largest power of two that divides it, whichever way the program came: blocks of instructions are
walked until nothing changes. An operation that is not named below yields 1.
"""

import re

NEEDED = 7  # log2 of 128 bytes
BASE = 10  # shared memory begins at a multiple of 1024 bytes: a GPU keeps the first 1024 for itself
MOST = 64  # log2 of what divides 0
ASSIGNED = re.compile(r"\s*(@\S+ +)?([a-z][\w.:]*)\s+(%r[ds]?\d+), ([^;{]+);")
LABEL, BRANCH = re.compile(r"(\$L\w+):"), re.compile(r"\s*(@\S+\s+)?bra(?:\.uni)?\s+(\$L\w+);")
COPY = re.compile(r"cp\.(?:reduce\.)?async\.bulk\.tensor\.(\S+)([^;]*);")
PLACE = re.compile(r"\[([^],{]+)\]")
# A result that is divided by what divides every operand.
LIKE_SUMS = ("mov", "cvt", "add", "sub", "or", "xor", "min", "max")


def misplaced(module):
    """The tensor copies of a PTX module that may begin off a multiple of 128 bytes.

    Args:
      module: PTX of one kernel.
    Returns:
      a line for each.
    """
    if not COPY.search(module):
        return []
    blocks, following = split(module)
    # What other instructions assign, a load of several registers for one, is not listed: 1.
    matches = (ASSIGNED.match(line) for line in module.splitlines())
    listed = {found[3]: MOST for found in matches if found}
    first = next(iter(blocks))
    entry, wrong, waiting = {first: listed}, {}, [first]
    while waiting:
        name = waiting.pop()
        powers, wrong[name] = dict(entry[name]), []
        for line in blocks[name]:
            wrong[name] += check(line, powers)
            assign(line, powers)
        for after in following[name]:
            old = entry.get(after, powers)
            new = {register: min(old[register], powers[register]) for register in powers}
            if after not in entry or new != old:
                entry[after] = new
                waiting.append(after)
    return [line for lines in wrong.values() for line in lines]


def split(module):
    """Blocks of lines by name, in order, and the names of the blocks that may follow each."""
    name, blocks, following, ended, open_ = "", {"": []}, {"": []}, False, True
    for line in module.splitlines():
        label, branch = LABEL.match(line), BRANCH.match(line)
        if label or ended:
            new = label[1] if label else f"{name}'"
            if open_:
                following[name].append(new)
            name, open_ = new, True
            blocks[name], following[name] = [], []
        blocks[name].append(line)
        ended = branch is not None or line.strip() == "ret;"
        if branch:
            following[name].append(branch[2])
        open_ = not ended or (branch is not None and branch[1] is not None)
    return blocks, following


def assign(line, powers):
    """Notes what a line assigns to a register, if it does."""
    found = ASSIGNED.match(line)
    if found is None:
        return
    predicate, op, to, operands = found.groups()
    new = result(op, operands.split(", "), powers)
    powers[to] = min(new, powers[to]) if predicate else new


def check(line, powers):
    """What is wrong with the tensor copy that a line holds, if any: no line, or one."""
    copy = COPY.search(line)
    if copy is None:
        return []
    places = PLACE.findall(copy[2])
    # A load names shared memory first and its barrier last, a store shared memory last.
    where = places[-1] if ".global.shared" in copy[1] else places[0]
    least = min(power(term.strip(), powers) for term in where.split("+"))
    if least >= NEEDED:
        return []
    said = f"a tensor copy ({copy[1].split('.')[0]}) at a multiple of {1 << least} bytes"
    return [f"{said} of shared memory, not of {1 << NEEDED}"]


def result(op, operands, powers):
    """log2 of what divides the result of one instruction."""
    kind, known = op.split(".")[0], [power(operand.strip(), powers) for operand in operands]
    if kind in LIKE_SUMS:
        return min(known)
    if kind == "and":
        return max(known)
    if kind == "selp":
        return min(known[:2])
    if kind == "mul" and ".hi" not in op:
        return min(MOST, sum(known))
    if kind == "mad" and ".hi" not in op:
        return min(MOST, known[0] + known[1], known[2])
    if kind == "shl":
        shift = operands[1].strip()
        return min(MOST, known[0] + (int(shift) if shift.isdigit() else 0))
    return 0


def power(operand, powers):
    """log2 of what divides an operand: a register, a number, or the name of shared memory."""
    if operand in powers:
        return powers[operand]
    if operand.lstrip("-").isdigit():
        value = abs(int(operand))
        return (value & -value).bit_length() - 1 if value else MOST
    return BASE if "shmem" in operand else 0
