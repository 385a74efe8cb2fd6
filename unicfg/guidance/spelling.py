"""Guidance written as text: for the command line, for study files and for the page.

The text is Python, but it is read, never run: numbers, ``+ - * /``, lists, ``inf``, and calls of what
``unicfg.guidance.schedules`` and ``unicfg.guidance.mitigations`` offer. In a scale the letter s stands for the scale that
is being studied; mitigations are joined by ``+``, in order, and one without arguments needs no brackets:

    interval(linear(1, 2 * s), 0.3, 1.0)
    tcfg + mimic_scale(3)

In the place of a scale there can be the weights of several branches, by the names of ``unicfg.guidance.branches``:

    weak(linear(1, s))

What a schedule or a mitigation prints about itself can be read back.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_type_hints

from unicfg.guidance import branches as _branches
from unicfg.guidance import mitigations as _mitigations
from unicfg.guidance import schedules as _schedules
from unicfg.guidance.core import (
    Combination,
    Guidance,
    Mitigation,
    Scale,
    Schedule,
    check_scale_value,
)

__all__ = [
    "COMBINATIONS",
    "MITIGATIONS",
    "SCHEDULES",
    "as_python",
    "read_guidance",
    "read_mitigations",
    "read_scale",
]

Maker = Callable[..., Any]
# at_levels makes no schedule: it fits one to the noise levels of a sampling
SCHEDULES: Mapping[str, Maker] = {
    name: getattr(_schedules, name) for name in _schedules.__all__ if name != "at_levels"
}
MITIGATIONS: Mapping[str, Maker] = {
    name: getattr(_mitigations, name) for name in _mitigations.__all__
}
COMBINATIONS: Mapping[str, Maker] = {
    name: maker
    for name in _branches.__all__
    if inspect.isfunction(maker := getattr(_branches, name))
}
LONGEST, DEEPEST = 1000, 50  # far beyond what a person writes, well within what Python can parse


def read_scale(text: str, s: float) -> Scale | Schedule:
    """A scale or schedule from text such as "s", "4.0", "interval(s, 0.2, 0.8)" or "linear(1, 2 * s)".

    Args:
        text: an expression of numbers, ``s`` and calls of schedules, see ``SCHEDULES``.
        s: what the letter s stands for, finite.

    Raises:
        ValueError: if ``text`` is no such expression, or a schedule refuses an argument; names the text and what is wrong
            in it. If ``s`` is not finite.
        TypeError: if ``s`` is no number, or ``text`` no str.
    """
    scale: Scale | Schedule = _strength(text, s, SCHEDULES)
    return scale


def _strength(text: str, s: float, makers: Mapping[str, Maker]) -> Any:
    """A scale, a schedule, or what else ``makers`` make of branches."""
    s = float(check_scale_value(s, "s"))
    with _naming("scale", text):
        value = _value(_parsed(text), _Words(makers, {"s": s, "inf": math.inf}))
        if not _is_scale(value) and not _is_combination(value):
            more = " or weights of branches" if makers.keys() & COMBINATIONS.keys() else ""
            raise ValueError(f"it is {value!r}, expected a finite number or a schedule{more}")
        return value


def read_mitigations(text: str) -> tuple[Mitigation, ...]:
    """Mitigations from text such as "", "rescale(0.7)" or "tcfg + mimic_scale(3)", in that order.

    Args:
        text: calls of mitigations, see ``MITIGATIONS``, joined by ``+``; a name alone is a call without arguments.

    Raises:
        ValueError: if ``text`` is no such expression, or a mitigation refuses an argument; names the text and what is
            wrong in it.
        TypeError: if ``text`` is no str.
    """
    words = _Words(MITIGATIONS, {"inf": math.inf})
    with _naming("mitigations", text):
        return tuple(_called(call, words) for call in _calls(text))


def read_guidance(scale: str, s: float, mitigations: str = "") -> Guidance:
    """The guidance that two texts describe.

    Args:
        scale: see :func:`read_scale`; or weights of branches, see ``COMBINATIONS``, whose arguments are scales.
        s: what the letter s stands for in ``scale``, finite.
        mitigations: see :func:`read_mitigations`.

    Raises:
        ValueError: see :func:`read_scale` and :func:`read_mitigations`.
        TypeError: if ``s`` is no number, or a text no str.
    """
    strength: Scale | Schedule | Combination = _strength(scale, s, {**SCHEDULES, **COMBINATIONS})
    return Guidance(strength, read_mitigations(mitigations))


def as_python(scale: str, s: float, mitigations: str = "") -> str:
    """Python code, imports included, whose last statement sets ``guidance`` to what :func:`read_guidance` returns.

    Args:
        scale: see :func:`read_guidance`.
        s: what the letter s stands for in ``scale``; the number takes its place.
        mitigations: see :func:`read_mitigations`.

    Raises:
        ValueError: see :func:`read_scale` and :func:`read_mitigations`.
        TypeError: if ``s`` is no number, or a text no str.
    """
    read_guidance(scale, s, mitigations)
    spelled = _Spelled(float(s))
    strength = spelled.visit(_parsed(scale))
    calls = [spelled.visit(call) for call in _calls(mitigations)]
    nodes = [node for tree in (strength, *calls) for node in ast.walk(tree)]
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    names = ", ".join(sorted(used & SCHEDULES.keys()))
    combined = isinstance(strength, ast.Call) and not used.isdisjoint(COMBINATIONS)
    modules = (["branches"] if combined else []) + (["mitigations"] if calls else [])
    imports = [
        "from math import inf\n" if "inf" in used else "",
        "from unicfg import Guidance",
        f"from unicfg.guidance import {', '.join(modules)}" if modules else "",
        f"from unicfg.guidance.schedules import {names}" if names else "",
    ]
    arguments = [f"branches.{ast.unparse(strength)}" if combined else ast.unparse(strength)]
    if calls:
        reined = ", ".join(f"mitigations.{ast.unparse(call)}" for call in calls)
        arguments.append(f"({reined},)" if len(calls) == 1 else f"({reined})")
    head = "\n".join(line for line in imports if line)
    return f"{head}\n\nguidance = Guidance({', '.join(arguments)})\n"


class _Spelled(ast.NodeTransformer):
    """What was read, for Python itself: s as a number, and tuples, which is what lists are read as."""

    def __init__(self, s: float) -> None:
        self.s = s

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(self.s) if node.id == "s" else node

    def visit_List(self, node: ast.List) -> ast.expr:
        return ast.Tuple([self.visit(entry) for entry in node.elts], node.ctx)


@dataclass(frozen=True)
class _Words:
    """What a text may name: what it may call, and numbers."""

    makers: Mapping[str, Maker]
    numbers: Mapping[str, float]


@contextmanager
def _naming(argument: str, text: str) -> Iterator[None]:
    """Say in every error which text it is about.

    Raises:
        TypeError: if ``text`` is no str.
    """
    if not isinstance(text, str):
        raise TypeError(f"{argument} is {text!r}, expected a str")
    try:
        yield
    except (ValueError, ArithmeticError) as error:
        shown = text if len(text) <= LONGEST else f"{text[:40]}..."
        raise ValueError(f"{argument} {shown!r}: {error}") from error


def _parsed(text: str) -> ast.expr:
    """The tree of an expression.

    Raises:
        ValueError: if it is none, or so large that reading it could take long.
    """
    if not text.strip():
        raise ValueError("it is empty, expected an expression")
    if len(text) > LONGEST:
        raise ValueError(f"it has {len(text)} characters, expected at most {LONGEST}")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(error.msg) from error
    except (RecursionError, MemoryError) as error:
        raise ValueError(f"it is nested more than {DEEPEST} deep") from error
    if _depth(tree) > DEEPEST:
        raise ValueError(f"it is nested more than {DEEPEST} deep")
    return tree


def _depth(tree: ast.AST) -> int:
    depth, level = 0, [tree]
    while level:
        level = [child for node in level for child in ast.iter_child_nodes(node)]
        depth += 1
    return depth


def _calls(text: str) -> list[ast.Call]:
    """The calls that ``+`` joins, a name alone being one."""
    return _joined(_parsed(text)) if text.strip() else []


def _joined(node: ast.expr) -> list[ast.Call]:
    match node:
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _joined(left) + _joined(right)
        case ast.Name():
            return [ast.Call(node, [], [])]
        case ast.Call():
            return [node]
    raise ValueError(f"found {ast.unparse(node)!r}, expected mitigations, joined by +")


_OPERATIONS: Mapping[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def _value(node: ast.expr, words: _Words) -> Any:
    """What an expression stands for; lists become tuples, so that nothing can change them."""
    match node:
        case ast.Constant(value=value) if type(value) in (int, float):
            return value
        case ast.Name(id=name) if name in words.numbers:
            return words.numbers[name]
        case ast.Name(id=name) if name in words.makers:
            raise ValueError(f"{name} has no brackets, expected {_usage(name, words)}")
        case ast.Name(id=name):
            raise _unknown("name", name, [*words.numbers, *words.makers])
        case ast.Tuple(elts=entries) | ast.List(elts=entries):
            return tuple(_value(entry, words) for entry in entries)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_number(operand, words)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
            result = _OPERATIONS[type(op)](_number(left, words), _number(right, words))
            if not math.isfinite(result):
                raise ValueError(f"{ast.unparse(node)!r} is {result}, expected a finite number")
            return result
        case ast.Call(func=ast.Name()):
            return _called(node, words)
    names = ", ".join([*words.numbers, *words.makers])
    raise ValueError(
        f"found {ast.unparse(node)!r}, expected an expression of numbers, + - * /, lists and {names}"
    )


def _number(node: ast.expr, words: _Words) -> float:
    value = _value(node, words)
    if not _is_number(value):
        raise ValueError(f"{ast.unparse(node)!r} is no number, and + - * / are for numbers")
    number: float = value
    return number


def _called(node: ast.Call, words: _Words) -> Any:
    """What a call makes.

    Raises:
        ValueError: if the name is unknown, or the arguments are not those that are expected there.
    """
    if not isinstance(node.func, ast.Name):
        raise ValueError(f"found {ast.unparse(node)!r}, expected a name before the brackets")
    name = node.func.id
    if name not in words.makers:
        raise _unknown("function", name, list(words.makers))
    given = [_value(entry, words) for entry in node.args]
    named: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ValueError(f"found {ast.unparse(keyword)!r}, expected {_usage(name, words)}")
        if keyword.arg in named:
            raise ValueError(f"{name}: {keyword.arg} is given twice, expected it once")
        named[keyword.arg] = _value(keyword.value, words)
    maker = words.makers[name]
    try:
        arguments = inspect.signature(maker).bind(*given, **named).arguments
    except TypeError as error:
        raise ValueError(f"{name}: {error}, expected {_usage(name, words)}") from error
    hints = get_type_hints(maker)
    for argument, value in arguments.items():
        wanted, fits = _KINDS[hints[argument]]
        # "**scales" holds several
        each = value if isinstance(value, dict) else {argument: value}
        for own, one in each.items():
            if not fits(one):
                raise ValueError(f"{name}: {own} is {one!r}, expected {wanted}")
    return maker(*given, **named)


def _is_number(value: object) -> bool:
    # float() refuses integers that only look like numbers to work with
    return isinstance(value, (int, float)) and not math.isnan(float(value))


def _is_combination(value: object) -> bool:
    return hasattr(value, "branches_at")


def _is_scale(value: object) -> bool:
    return callable(value) or (isinstance(value, (int, float)) and math.isfinite(value))


# schedules and mitigations check ranges, and leave types to the type checker, which a text does not pass;
# one with an argument of another type needs a line here
_KINDS: Mapping[Any, tuple[str, Callable[[Any], bool]]] = {
    float: ("a number", _is_number),
    int: ("a number", _is_number),
    Scale | Schedule: ("a finite number or a schedule", _is_scale),
    tuple[float, ...]: (
        "a list of numbers",
        lambda value: isinstance(value, tuple) and all(map(_is_number, value)),
    ),
    Sequence[Scale | Schedule]: (
        "a list of finite numbers or schedules",
        lambda value: isinstance(value, tuple) and all(map(_is_scale, value)),
    ),
}


def _usage(name: str, words: _Words) -> str:
    """How a call looks, with its defaults."""
    parameters = inspect.signature(words.makers[name]).parameters.values()
    shown = [str(own.replace(annotation=own.empty)).replace(" ", "") for own in parameters]
    return f"{name}({', '.join(shown)})"


def _unknown(kind: str, name: str, known: Sequence[str]) -> ValueError:
    close = difflib.get_close_matches(name, known) or known
    return ValueError(f"unknown {kind} {name!r}, expected {' or '.join(close)}")
