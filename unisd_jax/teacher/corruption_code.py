"""Bugs in Python code: one small change at a place that the syntax tree names, every other character kept.

The text is edited, not printed anew from the tree: that would lose comments and layout, and the form of a wrong reply
must not tell it from a good one.
"""

import ast
import re
import warnings
from collections.abc import Iterator
from typing import NamedTuple

COMPARISONS: dict[type[ast.cmpop], tuple[str, str]] = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}
ARITHMETIC: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "+"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "/"),
    ast.Mod: ("%", "//"),
    ast.Pow: ("**", "*"),
}
FENCE = re.compile(r"```[^\n]*\n(.*?)```", re.DOTALL)


class Edit(NamedTuple):
    """`new` in place of the bytes from `start` to `end`."""

    start: int
    end: int
    new: str


def code_mutations(completion: str) -> list[list[str]]:
    """Replies with one bug each, by kind: off by one, wrong operator, edge case, return value; empty if not Python.

    The code is the first fenced block, or the whole reply.
    """
    fenced = FENCE.search(completion)
    start, end = fenced.span(1) if fenced else (0, len(completion))
    code = completion[start:end]
    tree = parse_python(code)
    if tree is None:
        return []
    source = Source(code)
    original = ast.dump(tree)
    kinds = []
    for find in (_off_by_one, _wrong_operators, _missed_edge_cases, _wrong_returns):
        mutants = [source.with_edit(edit) for edit in find(tree, source)]
        kinds.append([completion[:start] + code + completion[end:] for code in mutants if _is_bug(code, original)])
    return kinds


class Source:
    """Code with the byte offsets that the tree's positions stand for."""

    def __init__(self, code: str):
        self.data = code.encode()
        # As Python's own parser counts lines: form feeds and Unicode separators do not end one.
        self.starts = [0, *(match.end() for match in re.finditer(rb"\r\n|\r|\n", self.data))]

    def span(self, node: ast.expr) -> tuple[int, int]:
        """First byte and the byte behind the last one."""
        return (
            self.starts[node.lineno - 1] + node.col_offset,
            self.starts[node.end_lineno - 1] + node.end_col_offset,
        )

    def text(self, node: ast.expr) -> str:
        """The node as it is written."""
        start, end = self.span(node)
        return self.data[start:end].decode()

    def with_edit(self, edit: Edit) -> str:
        """The code after one change."""
        return (self.data[: edit.start] + edit.new.encode() + self.data[edit.end :]).decode()

    def operator(self, left: ast.expr, right: ast.expr, old: str, new: str) -> Iterator[Edit]:
        """`old` between two operands turned into `new`; not where a comment stands there, which may hold it too."""
        start, end = self.span(left)[1], self.span(right)[0]
        token = r"\s+".join(re.escape(word) for word in old.split())
        found = re.fullmatch(rb"[\s)\\]*(%b)[\s(\\]*" % token.encode(), self.data[start:end])
        if found:
            yield Edit(start + found.start(1), start + found.end(1), new)


def parse_python(code: str) -> ast.Module | None:
    """The syntax tree; None if the text is not Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as one on an invalid escape, for code that is not ours
        try:
            return ast.parse(code)
        except (SyntaxError, ValueError, RecursionError):
            return None


def _is_bug(code: str, original: str) -> bool:
    tree = parse_python(code)
    return tree is not None and ast.dump(tree) != original


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes in order of the text, without the inside of f-strings: before Python 3.12 their positions are wrong."""
    yield node
    if not isinstance(node, ast.JoinedStr):
        for child in ast.iter_child_nodes(node):
            yield from _walk(child)


def _off_by_one(tree: ast.AST, source: Source) -> Iterator[Edit]:
    for node in _walk(tree):
        if isinstance(node, ast.Constant) and type(node.value) is int:
            for value in (node.value + 1, node.value - 1):
                yield Edit(*source.span(node), str(value) if value >= 0 else f"({value})")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range" and node.args:
            stop = node.args[min(1, len(node.args) - 1)]
            yield Edit(*source.span(stop), f"{source.text(stop)} - 1")


def _wrong_operators(tree: ast.AST, source: Source) -> Iterator[Edit]:
    for node in _walk(tree):
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
            for operator, left, right in zip(node.ops, operands, operands[1:], strict=False):
                if type(operator) in COMPARISONS:
                    yield from source.operator(left, right, *COMPARISONS[type(operator)])
        elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC and not _is_text(node.left):
            yield from source.operator(node.left, node.right, *ARITHMETIC[type(node.op)])
        elif isinstance(node, ast.AugAssign) and type(node.op) in ARITHMETIC:
            old, new = ARITHMETIC[type(node.op)]
            yield from source.operator(node.target, node.value, f"{old}=", f"{new}=")
        elif isinstance(node, ast.BoolOp):
            old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
            for left, right in zip(node.values, node.values[1:], strict=False):
                yield from source.operator(left, right, old, new)


def _is_text(node: ast.expr) -> bool:
    """A literal string, whose % is formatting."""
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _missed_edge_cases(tree: ast.AST, source: Source) -> Iterator[Edit]:
    """A condition that is never met."""
    for node in _walk(tree):
        if isinstance(node, ast.If | ast.IfExp):
            yield Edit(*source.span(node.test), "False")


def _wrong_returns(tree: ast.AST, source: Source) -> Iterator[Edit]:
    for function in _walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        names = [argument.arg for argument in function.args.args]
        for node in _walk(function):
            if isinstance(node, ast.Return) and node.value is not None:
                value = source.text(node.value)
                truth = isinstance(node.value, ast.Compare | ast.BoolOp) or value in ("True", "False")
                opposite = {"True": "False", "False": "True"}.get(value, f"not ({value})")
                # Unchanged input first: it looks more like a mistake than None does.
                for new in [opposite] if truth else [*names[:1], "None"]:
                    if new != value:
                        yield Edit(*source.span(node.value), new)
