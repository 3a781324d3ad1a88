"""Comparison of functions and classes of other projects with those of `transformers` that they derive from or copy.

Projects copy classes of `transformers` into modules of their own, or derive from them and override some methods. What
they have left as it was can be replaced there, too. Functions are compared by their syntax: layout, comments,
annotations and docstrings are free, a different number or another function called is a difference. A function whose
source cannot be read is equal to itself alone.
"""

from __future__ import annotations

import ast
import builtins
import dis
import inspect
import textwrap
from collections.abc import Callable, Iterable
from functools import cache
from types import CodeType, FunctionType
from typing import Any


def _same_function(first: Any, second: Any) -> bool:
    return _same(first, second, frozenset())


#: True if two functions are one, or say the same in the same words, and so does what they call.
same_function: Callable[[Any, Any], bool] = cache(_same_function)


def _same(first: Any, second: Any, assumed: frozenset[tuple[int, int]]) -> bool:
    if first is second or (id(first), id(second)) in assumed:
        return True
    first, second = _innermost(first), _innermost(second)
    if not (isinstance(first, FunctionType) and isinstance(second, FunctionType)):
        return False
    syntax = _syntax(first)
    if syntax is None or syntax != _syntax(second):
        return False
    # Functions that call each other are the same if nothing else differs.
    assumed |= {(id(first), id(second))}
    return all(_same(_global(first, x), _global(second, x), assumed) for x in _globals(first.__code__))


def _syntax(function: FunctionType) -> str | None:
    """The syntax of a function, its decorators and defaults included; None where there is no source."""
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, ValueError, SyntaxError):
        return None
    return ast.dump(_Plain().visit(tree))


class _Plain(ast.NodeTransformer):
    """Takes annotations and docstrings away."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        if node.value is None:
            return None
        return self.generic_visit(ast.Assign([node.target], node.value))


def _globals(code: CodeType) -> set[str]:
    """The global names that a function and those inside it read."""
    own = {x.argval for x in dis.get_instructions(code) if x.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return own.union(*(_globals(x) for x in code.co_consts if isinstance(x, CodeType)))


def _global(function: FunctionType, name: str) -> Any:
    names = function.__globals__
    return names[name] if name in names else getattr(builtins, name, None)


def methods_of(published: type) -> dict[str, Any]:
    """The methods that a class itself has, without the special ones."""
    return {k: v for k, v in vars(published).items() if isinstance(v, FunctionType) and not k.startswith("__")}


def changed_methods(mro: Iterable[type], published: type) -> frozenset[str]:
    """The methods of `published` that a class has otherwise or lacks.

    Args:
        mro: the classes that its methods are looked up in, of which the last ones may be `published` and its bases.
    """
    mro = list(mro)
    changed = set()
    for name, method in methods_of(published).items():
        found = next((vars(x)[name] for x in mro if name in vars(x)), None)
        if not same_function(found, method):
            changed.add(name)
    return frozenset(changed)


def calls_super(function: Any) -> bool:
    """True if a method names `super()`, by which it may call what it overrides."""
    function = _innermost(function)
    return isinstance(function, FunctionType) and "__class__" in function.__code__.co_freevars


def parameters(function: Any) -> tuple[str, ...]:
    """The names of a function's positional parameters; none of anything else."""
    function = _innermost(function)
    if not isinstance(function, FunctionType):
        return ()
    return function.__code__.co_varnames[: function.__code__.co_argcount]


def _innermost(function: Any) -> Any:
    while (inner := getattr(function, "__wrapped__", None)) is not None:
        function = inner
    return function
