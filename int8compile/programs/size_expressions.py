"""Sizes that depend on inputs, as text in a program's file: ``Mul(Integer(32), Symbol('s27', integer=True))``.

torch reads such a text by ``sympy.sympify``, which runs it as Python. So it is first compared with the one form that
torch writes, sympy's ``srepr``: calls of a few functions, down to numbers and symbols. sympy evaluates at once,
so expressions that could exhaust memory, such as ``Pow(Integer(9), Integer(99999))``, are refused.
"""

from __future__ import annotations

import ast
import functools
import re

_FUNCTIONS = {
    # sympy's
    *("Add", "Mul", "Mod", "Rational", "Max", "Min", "Abs", "floor", "ceiling", "And", "Or", "Not", "ITE"),
    *("Eq", "Ne", "Lt", "Le", "Gt", "Ge", "Equality", "Unequality", "StrictLessThan", "StrictGreaterThan"),
    *("LessThan", "GreaterThan", "Piecewise", "ExprCondPair", "Tuple"),
    # torch's
    *("FloorDiv", "CleanDiv", "CeilDiv", "FloatTrueDiv", "IntTrueDiv", "PythonMod", "ModularIndexing", "Where"),
    *("CeilToInt", "FloorToInt", "TruncToFloat", "TruncToInt", "RoundToInt", "RoundDecimal", "ToFloat", "Identity"),
    "IsNonOverlappingAndDenseIndicator",
}
_POWERS = ("Pow", "PowByNatural", "FloatPow")
_CONSTANTS = ("true", "false", "oo", "int_oo", "zoo", "nan")
_SYMBOL = re.compile(r"[a-z]{1,8}\d{1,6}")  # torch counts up to the number in a symbol's name
_NUMBER = re.compile(r"-?\d{1,40}(\.\d{0,40})?(e[-+]?\d{1,3})?")
_ASSUMPTION = re.compile(r"[a-z_]{1,40}")
_LONGEST, _MOST_BITS = 20_000, 20_000


def is_symbol(name: str) -> bool:
    """Whether this may be the name of a symbol: ``s27``, ``u0``."""
    return _SYMBOL.fullmatch(name) is not None


@functools.lru_cache(maxsize=4096)
def is_size_expression(text: str) -> bool:
    """Whether a text is an expression such as torch writes, which can be run without harm."""
    if len(text) > _LONGEST or not text.isascii():
        return False
    try:
        return _bits(ast.parse(text, mode="eval").body) <= _MOST_BITS
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last from ast.parse, of deep nesting
        return False


def _bits(node: ast.expr) -> int:
    """At most how many bits the expression's numbers have together, once worked out.

    Raises:
        ValueError: it is none of torch's.
    """
    if isinstance(node, ast.Name) and node.id in _CONSTANTS:
        return 1
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return _bits(node.operand)
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value.bit_length() + 1
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise ValueError("neither a number nor a call")
    name, arguments, keywords = node.func.id, node.args, node.keywords
    if name == "Symbol":
        assumptions = all(_ASSUMPTION.fullmatch(k.arg or "") and _is_boolean(k.value) for k in keywords)
        if len(arguments) != 1 or not is_symbol(_text(arguments[0])) or not assumptions:
            raise ValueError("no symbol")
        return 64
    if name == "Float":
        precision = all(k.arg in ("precision", "dps") and 0 < _integer(k.value) <= 200 for k in keywords)
        if len(arguments) != 1 or not _NUMBER.fullmatch(_text(arguments[0])) or not precision:
            raise ValueError("no number")
        return 64
    if any(k.arg != "evaluate" or not _is_boolean(k.value) for k in keywords):
        raise ValueError("an argument by name")
    if name == "Integer" and len(arguments) == 1:
        return abs(_integer(arguments[0])).bit_length() + 1
    if name in _POWERS and len(arguments) == 2:
        exponent = arguments[1]
        if isinstance(exponent, ast.Call) and isinstance(exponent.func, ast.Name) and exponent.func.id == "Integer":
            return _bits(arguments[0]) * max(1, abs(_integer(exponent.args[0])))
        if name == "Pow" and ast.unparse(exponent) in ("Rational(1, 2)", "Rational(-1, 2)"):
            return _bits(arguments[0])
        raise ValueError("a power without a number")
    if name in _FUNCTIONS and arguments:
        return sum(map(_bits, arguments))
    raise ValueError("an unknown function")


def _text(node: ast.expr) -> str:
    if not isinstance(node, ast.Constant) or type(node.value) is not str:
        raise ValueError("no text")
    return node.value


def _integer(node: ast.expr) -> int:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_integer(node.operand)
    if not isinstance(node, ast.Constant) or type(node.value) is not int:
        raise ValueError("no integer")
    return node.value


def _is_boolean(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) is bool
