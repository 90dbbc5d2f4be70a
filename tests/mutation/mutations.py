"""Small wrong changes of a Python source: one operator, number, condition or call at a time.

Left alone are docstrings, annotations, decorators, imports, messages of errors and other strings.
"""

import ast
import collections
import re
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["Mutation", "applied", "mutations"]

COMPARED = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}
COMPUTED = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "/"),
    ast.Mod: ("%", "//"),
    ast.Pow: ("**", "*"),
    ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
}
OPPOSITES = [
    ("max", "min"),
    ("maximum", "minimum"),
    ("argmax", "argmin"),
    ("all", "any"),
    ("floor", "ceil"),
    ("zeros", "ones"),
    ("zeros_like", "ones_like"),
    ("sin", "cos"),
    ("mean", "sum"),
]
RENAMED = dict(OPPOSITES) | {b: a for a, b in OPPOSITES}
# Without them nothing runs, or nothing changes: conversions, and what makes other types.
NEEDED_CALLS = frozenset(
    "array asarray bfloat16 bool bytes callable dict dtype enumerate float float16 float32 float64 "
    "frozenset getattr hash id int int32 int64 int8 isinstance issubdtype issubclass iter key len "
    "list map next open print range repr set str super tuple type uint32 uint8 zip".split()
)
METHODS = frozenset({"astype", "clip", "copy", "lower", "resolve", "round", "sort", "strip"})
UNTOUCHED_KEYWORDS = frozenset({"strict", "stacklevel"})


class Mutation(NamedTuple):
    """One change.

    Attributes:
      scope: qualified name of the function or class it is in; "" in the module.
      old, new: the changed piece, as it is and as it becomes.
      line: where, from 1.
      start, end: of the piece in the source, in bytes.
      number: among the same changes in this scope, from 0.
    """

    scope: str
    old: str
    new: str
    line: int
    start: int
    end: int
    number: int = 0

    @property
    def name(self) -> str:
        """What it is called; other lines may change around it."""
        again = f" #{self.number}" if self.number else ""
        piece = " ".join(self.old.split())
        return f"{self.scope or 'module'}: {piece} -> {' '.join(self.new.split())}{again}"


def mutations(source: bytes) -> list[Mutation]:
    """All changes of a source, in its order."""
    seen, found = collections.Counter(), []
    for change in sorted(set(Finder(source).found(ast.parse(source))), key=place):
        found.append(change._replace(number=seen[change.name]))
        seen[change.name] += 1
    return found


def place(change: Mutation) -> tuple[int, int, str]:
    """Where a change is, and which one of several there."""
    return change.start, change.end, change.new


def applied(source: bytes, change: Mutation) -> bytes:
    """The source with the change."""
    return source[: change.start] + change.new.encode() + source[change.end :]


class Finder:
    """Walks a tree with its source beside it."""

    def __init__(self, source: bytes):
        self.source = source
        self.lines = [0, *(m.end() for m in re.finditer(rb"\n", source))]
        self.modules = imported(ast.parse(source))

    def found(self, node: ast.AST, scope: str = "") -> Iterator[Mutation]:
        """The changes in a node, those of its parts included."""
        yield from self.here(node, scope)
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            scope = f"{scope}.{node.name}".lstrip(".")
        for part in parts(node):
            yield from self.found(part, scope)

    def here(self, node: ast.AST, scope: str) -> Iterator[Mutation]:
        """The changes of a node itself."""
        for start, end, new in self.edits(node, scope):
            old, line = self.source[start:end].decode(), node.lineno
            yield Mutation(scope, old, new, line, start, end)

    def edits(self, node: ast.AST, scope: str) -> Iterator[tuple[int, int, str]]:
        match node:
            case ast.Compare():
                sides = [node.left, *node.comparators]
                for left, op, right in zip(sides, node.ops, sides[1:], strict=False):
                    yield self.between(left, right, *COMPARED[type(op)])
            case ast.BinOp() if type(node.op) in COMPUTED and not is_text(node):
                if scope or not isinstance(node.op, ast.BitOr):  # a union of types
                    yield self.between(node.left, node.right, *COMPUTED[type(node.op)])
            case ast.BoolOp():
                old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
                for left, right in zip(node.values, node.values[1:], strict=False):
                    yield self.between(left, right, old, new)
            case ast.AugAssign() if type(node.op) in COMPUTED and not is_text(node):
                old, new = COMPUTED[type(node.op)]
                yield self.between(node.target, node.value, f"{old}=", f"{new}=")
            case ast.UnaryOp() if not isinstance(node.op, ast.UAdd):
                yield *self.span(node), f"({self.text(node.operand)})"
            case ast.Constant() if type(node.value) in (bool, int, float):
                yield *self.span(node), other_value(node.value)
            case ast.Call():
                yield from self.of_call(node)
            case ast.Expr() if isinstance(node.value, ast.Call):
                yield *self.span(node), "pass"
            case ast.Break() | ast.Continue():
                yield *self.span(node), "break" if isinstance(node, ast.Continue) else "continue"
            case ast.If() | ast.While() | ast.IfExp():
                if not isinstance(node.test, ast.Compare | ast.BoolOp | ast.UnaryOp):
                    yield *self.span(node.test), f"(not {self.text(node.test)})"

    def of_call(self, node: ast.Call) -> Iterator[tuple[int, int, str]]:
        """Another function, or none: f(x) becomes x, and x.astype(...) too."""
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if name in RENAMED:
            end = self.span(node.func)[1]
            yield end - len(name.encode()), end, RENAMED[name]
        one = len(node.args) == 1 and not node.keywords
        if self.is_function(node.func):
            if one and not isinstance(node.args[0], ast.Starred | ast.GeneratorExp):
                yield *self.span(node), f"({self.text(node.args[0])})"
        elif name in METHODS and isinstance(node.func, ast.Attribute):
            yield *self.span(node), self.text(node.func.value)

    def is_function(self, node: ast.AST) -> bool:
        """Whether a name is that of a function, of this module or another; no method, no class."""
        name, root = getattr(node, "attr", getattr(node, "id", "")), node
        while isinstance(root, ast.Attribute):
            root = root.value
        known = isinstance(node, ast.Name) or getattr(root, "id", "") in self.modules
        return known and name not in NEEDED_CALLS and not name[:1].isupper()

    def between(self, left: ast.AST, right: ast.AST, old: str, new: str) -> tuple[int, int, str]:
        """The operator between two operands."""
        start, end = self.span(left)[1], self.span(right)[0]
        words = r"\s+".join(re.escape(word) for word in old.split())
        place = re.search(words.encode(), re.sub(rb"#[^\n]*", blank, self.source[start:end]))
        return start + place.start(), start + place.end(), new

    def span(self, node: ast.AST) -> tuple[int, int]:
        """Where a node begins and ends, in bytes."""
        start = self.lines[node.lineno - 1] + node.col_offset
        return start, self.lines[node.end_lineno - 1] + node.end_col_offset

    def text(self, node: ast.AST) -> str:
        start, end = self.span(node)
        return self.source[start:end].decode()


def imported(module: ast.Module) -> set[str]:
    """Names of modules, as far as an import tells: `import` ones, and those from a package."""
    nodes = [node for node in ast.walk(module) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [alias for node in nodes for alias in node.names]
    return {(alias.asname or alias.name).partition(".")[0] for alias in names}


def blank(comment: re.Match) -> bytes:
    """As many spaces."""
    return b" " * len(comment.group())


def parts(node: ast.AST) -> Iterator[ast.AST]:
    """What of a node is looked at."""
    match node:
        case ast.FunctionDef():
            yield from (d for d in (*node.args.defaults, *node.args.kw_defaults) if d is not None)
            yield from node.body
        case ast.ClassDef():
            yield from node.body
        case ast.AnnAssign():
            yield from [node.value] if node.value is not None else []
        case ast.Lambda():
            yield from (d for d in (*node.args.defaults, *node.args.kw_defaults) if d is not None)
            yield node.body
        case ast.Raise() | ast.Import() | ast.ImportFrom() | ast.JoinedStr() | ast.Assert():
            return
        case ast.keyword() if node.arg in UNTOUCHED_KEYWORDS:
            return
        case ast.UnaryOp() if isinstance(node.operand, ast.Constant):  # -1 is one number
            return
        case _:
            yield from ast.iter_child_nodes(node)


def is_text(node: ast.BinOp | ast.AugAssign) -> bool:
    """Whether strings are put together, or a text is filled in."""
    sides = (node.left, node.right) if isinstance(node, ast.BinOp) else (node.value,)
    return any(
        isinstance(side, ast.JoinedStr)
        or (isinstance(side, ast.Constant) and isinstance(side.value, str | bytes))
        for side in sides
    )


def other_value(value: bool | int | float) -> str:
    """A number or truth value close by."""
    if isinstance(value, bool):
        return str(not value)
    return str(value + 1) if isinstance(value, int) or value == 0 else repr(value * 2)
