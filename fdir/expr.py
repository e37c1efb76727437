"""Boolean expressions over rows of the FDIR table: `a.b and not (c.d or e.f)`. Parsed, never run as code.

Grammar, from the weakest: `or`, `xor`, `and`, `not`, parentheses and ids of rows. A value may be unknown
(stale, unreadable, unchecked): a result that does not depend on it is known all the same (Kleene's logic).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

MAX_TOKENS = 200
"""Longest expression, in words and parentheses (assumed: a person can no longer follow a longer one)."""
_WORDS = frozenset({"and", "or", "xor", "not"})
_ID_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789_.-")


class ExprError(ValueError):
    """An expression that does not follow the grammar; says where."""


@dataclass(frozen=True)
class Name:
    """The watch result of a row."""

    id: str


@dataclass(frozen=True)
class Not:
    """True when the operand is false."""

    operand: Expr


@dataclass(frozen=True)
class Both:
    """`and`, `or` or `xor` of two."""

    word: str
    left: Expr
    right: Expr


Expr: TypeAlias = Name | Not | Both


def parse(text: str) -> Expr:
    """Return the tree of an expression.

    Raises
    ------
    ExprError
        It does not follow the grammar, or is longer than `MAX_TOKENS`.
    """
    tokens = list(_tokens(text))
    if not tokens:
        raise ExprError("it is empty")
    if len(tokens) > MAX_TOKENS:
        raise ExprError(f"it has {len(tokens)} words and parentheses, {MAX_TOKENS} are allowed")
    parser = _Parser(tokens)
    tree = parser.either()
    if (rest := parser.peek()) is not None:
        raise ExprError(f"{rest!r} is not expected there (word {parser.at + 1})")
    return tree


def names(expr: Expr) -> set[str]:
    """Return the ids an expression names."""
    match expr:
        case Name(id):
            return {id}
        case Not(operand):
            return names(operand)
        case Both(_, left, right):
            return names(left) | names(right)


def evaluate(expr: Expr, values: Mapping[str, bool | None]) -> bool | None:
    """Return the value of an expression, None when it depends on an unknown one.

    Raises
    ------
    KeyError
        `values` lacks a name of the expression.
    """
    match expr:
        case Name(id):
            return values[id]
        case Not(operand):
            inner = evaluate(operand, values)
            return None if inner is None else not inner
        case Both(word, left, right):
            return _OPERATORS[word](evaluate(left, values), evaluate(right, values))


def _and(a: bool | None, b: bool | None) -> bool | None:
    if a is False or b is False:
        return False
    return None if a is None or b is None else True


def _or(a: bool | None, b: bool | None) -> bool | None:
    if a is True or b is True:
        return True
    return None if a is None or b is None else False


def _xor(a: bool | None, b: bool | None) -> bool | None:
    return None if a is None or b is None else a is not b


_OPERATORS: Mapping[str, Callable[[bool | None, bool | None], bool | None]] = {
    "and": _and,
    "or": _or,
    "xor": _xor,
}


def _tokens(text: str) -> Iterator[str]:
    at = 0
    while at < len(text):
        if text[at].isspace():
            at += 1
        elif text[at] in "()":
            yield text[at]
            at += 1
        else:
            end = at
            while end < len(text) and text[end] in _ID_CHARACTERS:
                end += 1
            if end == at:
                raise ExprError(f"character {text[at]!r} at {at + 1} belongs to no id, word or parenthesis")
            yield text[at:end]
            at = end


class _Parser:
    """Recursive descent; `MAX_TOKENS` bounds the recursion."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens = tokens
        self.at = 0

    def peek(self) -> str | None:
        return self._tokens[self.at] if self.at < len(self._tokens) else None

    def either(self) -> Expr:
        return self._chain("or", lambda: self._chain("xor", lambda: self._chain("and", self._unary)))

    def _chain(self, word: str, inner: Callable[[], Expr]) -> Expr:
        tree = inner()
        while self.peek() == word:
            self.at += 1
            tree = Both(word, tree, inner())
        return tree

    def _unary(self) -> Expr:
        token = self.peek()
        if token is None:
            raise ExprError("it ends where an id is expected")
        self.at += 1
        if token == "not":  # noqa: S105 - a word of the grammar
            return Not(self._unary())
        if token == "(":  # noqa: S105
            tree = self.either()
            if self.peek() != ")":
                raise ExprError("a parenthesis is not closed")
            self.at += 1
            return tree
        if token in _WORDS or token == ")":  # noqa: S105
            raise ExprError(f"{token!r} stands where an id is expected (word {self.at})")
        return Name(token)
