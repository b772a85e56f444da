"""Counts the ways in which Python's `re` may try a pattern on a name, without trying them.

`re` tries one way of matching after the other, and `(a+)+b` has 2^n of them in a name of n letters. A sum over
positions counts them, and never tries them one by one:

    ways(part, v)_j = number of ways in which `part` leads from the positions counted in v to position j

Back references count as anything; atomic groups as plain ones. So the count is the most that `re` can try.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

if sys.version_info >= (3, 11):
    from re import _constants as sre_constants  # type: ignore[attr-defined]
    from re import _parser as sre_parse  # type: ignore[attr-defined]
else:
    import sre_constants
    import sre_parse

# Ways that `re` may try on one name: parts of a second.
MAX_WAYS = 100_000
# Work of the count itself, in positions looked at.
MAX_COUNTED = 400_000
# A pattern that needs no counting: few parts of varying length, none inside another.
FEW_REPEATS, FEW_BRANCHES = 2, 32
# Letters of a name that is made of a pattern's own.
PROBE_LENGTH = 64


class TooManyWaysError(Exception):
    """The count went beyond what is allowed."""


def count_ways(parsed: Any, name: str) -> float:
    """Most ways that `re.match` may try of a parsed pattern on a name.

    Args:
        parsed: What `re`'s parser makes of the pattern.
        name: The name.

    Returns:
        The sum over the pattern's parts of the ways to get through each.
    """
    counter = _Counter(name)
    counter.sequence(parsed, [1.0] + [0.0] * len(name))
    return counter.ways


class _Counter:
    """Counts ways on one name; vectors have an entry for each position, 0 to its length."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.ways = 0.0
        self.counted = 0

    def sequence(self, parts: Any, v: list[float]) -> list[float]:
        """Ways through one part after the other."""
        for op, argument in parts:
            if not any(v):
                break
            v = self.part(op, argument, v)
            self.ways += sum(v)
            self.counted += len(v)
            if self.ways > MAX_WAYS or self.counted > MAX_COUNTED:
                raise TooManyWaysError
        return v

    def part(self, op: Any, argument: Any, v: list[float]) -> list[float]:
        """Ways through one part."""
        if op in (sre_constants.MAX_REPEAT, sre_constants.MIN_REPEAT) or str(op) == "POSSESSIVE_REPEAT":
            least, most, body = argument
            return self.repeat(least, most, body, v)
        if op is sre_constants.BRANCH:
            return _added([self.sequence(branch, v) for branch in argument[1]])
        if op is sre_constants.SUBPATTERN:
            return self.sequence(argument[-1], v)
        if str(op) == "ATOMIC_GROUP":
            return self.sequence(argument, v)
        if op in (sre_constants.ASSERT, sre_constants.ASSERT_NOT):
            self.look(argument, v)
            return v
        if op is sre_constants.AT:
            return v
        if op is sre_constants.GROUPREF:
            return _anywhere_behind(v)
        if op is sre_constants.GROUPREF_EXISTS:
            both = [part for part in argument[1:] if part is not None]
            return _added([v, *(self.sequence(part, v) for part in both)])
        return self.letter(op, argument, v)

    def letter(self, op: Any, argument: Any, v: list[float]) -> list[float]:
        """Ways through a part that matches one letter."""
        moved = (count if count and _matches(op, argument, c) else 0.0 for count, c in zip(v, self.name, strict=False))
        return [0.0, *moved]

    def repeat(self, least: int, most: int, body: Any, v: list[float]) -> list[float]:
        """Ways through a repeated part; beyond the rounds asked for, one that moves nowhere ends it, as in `re`."""
        rounds = 0
        while rounds < least and any(v):
            v = self.sequence(body, v)
            rounds += 1
        result = v
        while rounds < most and any(v):
            v = self.round(body, v)
            result = _added([result, v])
            rounds += 1
        return result

    def advances(self, body: Any) -> bool:
        """Whether every match of a part has at least one letter."""
        return bool(body.getwidth()[0] > 0)

    def round(self, body: Any, v: list[float]) -> list[float]:
        if self.advances(body):
            return self.sequence(body, v)
        parts = []
        for position, count in enumerate(v):
            if count:
                one = [0.0] * len(v)
                one[position] = count
                moved = self.sequence(body, one)
                moved[position] = 0.0
                parts.append(moved)
        return _added(parts)

    def look(self, argument: Any, v: list[float]) -> None:
        """Count what is tried by looking ahead or behind from each position; the position stays."""
        direction, body = argument
        for position, count in enumerate(v):
            start = position if direction > 0 else position - body.getwidth()[0]
            if count and start >= 0:
                one = [0.0] * len(v)
                one[start] = count
                self.sequence(body, one)


def _added(vectors: list[list[float]]) -> list[float]:
    return [sum(counts) for counts in zip(*vectors, strict=True)]


def _anywhere_behind(v: list[float]) -> list[float]:
    total, result = 0.0, []
    for count in v:
        total += count
        result.append(total)
    return result


def _matches(op: Any, argument: Any, letter: str) -> bool:
    """Whether a part that stands for one letter may match this one, in any case of letters."""
    if op is sre_constants.LITERAL:
        return chr(argument).lower() == letter.lower()
    if op is sre_constants.NOT_LITERAL:
        return chr(argument) != letter
    if op is not sre_constants.IN:
        return True
    negated = bool(argument) and argument[0][0] is sre_constants.NEGATE
    found = any(_in_set(kind, value, letter) for kind, value in (argument[1:] if negated else argument))
    return found != negated


def _in_set(kind: Any, value: Any, letter: str) -> bool:
    if kind is sre_constants.LITERAL:
        return chr(value).lower() == letter.lower()
    if kind is sre_constants.RANGE:
        return any(
            value[0] <= ord(form) <= value[1] for form in {letter, letter.lower(), letter.upper()} if len(form) == 1
        )
    digit, space, word = letter.isdecimal(), letter.isspace(), letter.isalnum() or letter == "_"
    return {
        sre_constants.CATEGORY_DIGIT: digit,
        sre_constants.CATEGORY_NOT_DIGIT: not digit,
        sre_constants.CATEGORY_SPACE: space,
        sre_constants.CATEGORY_NOT_SPACE: not space,
        sre_constants.CATEGORY_WORD: word,
        sre_constants.CATEGORY_NOT_WORD: not word,
    }.get(value, True)


def _parts(parsed: Any, depth: int = 0) -> Iterator[tuple[Any, Any, int]]:
    """Every part of a pattern, and inside how many repeated parts it stands."""
    for op, argument in parsed:
        yield op, argument, depth
        inner = depth
        if "REPEAT" in str(op):
            inner += argument[1] > 1
        for piece in argument if isinstance(argument, (tuple, list)) else [argument]:
            for nested in piece if op is sre_constants.BRANCH and isinstance(piece, list) else [piece]:
                if isinstance(nested, sre_parse.SubPattern):
                    yield from _parts(nested, inner)


def is_simple(parsed: Any) -> bool:
    """Whether a pattern has so few ways that nobody need count them."""
    repeats, branches = 0, 1
    for op, argument, depth in _parts(parsed):
        if "REPEAT" in str(op) and argument[0] != argument[1]:
            repeats += 1
            if depth:
                return False
        elif op is sre_constants.BRANCH:
            branches *= len(argument[1])
            if depth:
                return False
        elif op in (sre_constants.ASSERT, sre_constants.ASSERT_NOT, sre_constants.GROUPREF):
            return False
    return repeats <= FEW_REPEATS and branches <= FEW_BRANCHES


def probes(parsed: Any) -> list[str]:
    """Names made of the letters of a pattern: each of them over and over, and all of them."""
    letters: dict[str, None] = {}
    for op, argument, _ in _parts(parsed):
        if op is sre_constants.LITERAL:
            letters[chr(argument)] = None
        elif op is sre_constants.IN:
            for kind, value in argument:
                if kind is sre_constants.LITERAL:
                    letters[chr(value)] = None
                elif kind is sre_constants.RANGE:
                    letters[chr(value[0])] = None
                elif kind is sre_constants.CATEGORY:
                    letters["0" if value is sre_constants.CATEGORY_DIGIT else "a"] = None
    few = list(letters)[:16] or ["a"]
    whole = "".join(few)
    return [*(letter * PROBE_LENGTH for letter in few), (whole * PROBE_LENGTH)[:PROBE_LENGTH]]
