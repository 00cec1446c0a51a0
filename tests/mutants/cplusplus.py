"""Mutants of C++ and CUDA sources by rules over their tokens.

The sources are formatted, which the rules rely on: a binary operator has a space on both sides, the `<` of a template,
the `&` of a reference and the `*` of a pointer have not. What a compiler will not accept all the same says so.
Mutated are the bodies of functions; not declarations, checks of the callers' mistakes, and what no build of the tests
sees: the instructions of a GPU.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tests.mutants.mutant import Mutant

_TOKEN = re.compile(
    r"""(?P<space>\s+|//[^\n]*|/\*.*?\*/)
    |(?P<directive>^[ \t]*\#(?:\\\n|[^\n])*)
    |(?P<string>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])')
    |(?P<number>0[xX][\da-fA-F.]+(?:p[+-]?\d+)?[uUlLfF]*|\d[\d.]*(?:e[+-]?\d+)?[uUlLfF]*)
    |(?P<name>[A-Za-z_]\w*)
    |(?P<operator><<=|>>=|->|\+\+|--|::|&&|\|\||<<|>>|[-+*/%&|^<>=!]=|.)""",
    re.VERBOSE | re.MULTILINE | re.DOTALL,
)
_UNSEEN = ("__CUDACC__", "__CUDA_ARCH__", "__clang__")  # macros that no build of the tests defines
_CHECKS = {"static_assert", "STD_TORCH_CHECK", "TORCH_ERROR_CODE_CHECK"}
_TYPES = re.compile(r"(template <.*> )?(inline )?(struct|class|enum|union|namespace|extern)\b")
_OPEN, _CLOSE = {"(": ")", "[": "]", "{": "}"}, {")", "]", "}"}
_PRECEDENCE = {
    name: level
    for level, names in enumerate(
        (
            "= += -= *= /= |= &= ^= %= <<= >>=",
            "? :",
            "||",
            "&&",
            "|",
            "^",
            "&",
            "== !=",
            "< <= > >=",
            "<< >>",
            "+ -",
            "* / %",
        )
    )
    for name in names.split()
}


class Token(NamedTuple):
    kind: str
    text: str
    start: int
    stop: int
    function: str  # "" outside of every body
    binary: bool


class Edit(NamedTuple):
    """The tokens [first, last] become `text`."""

    kind: str
    first: int
    last: int
    text: str


def _seen(directive: str, hidden: list[bool]) -> None:
    """Follow a directive: `hidden` says of each open #if whether its present branch is left out."""
    words = directive.replace("#", " ").split()
    condition = " ".join(words[1:])
    unseen = any(f"defined({name})" in condition and f"!defined({name})" not in condition for name in _UNSEEN)
    if words[0].startswith("if"):
        hidden.append(unseen)
    elif words[0] in ("elif", "else"):
        hidden[-1] = not hidden[-1]
    elif words[0] == "endif":
        hidden.pop()


def tokens_of(source: str) -> list[Token]:
    """Return the tokens that a build of the tests sees, each with the function whose body it stands in."""
    tokens: list[Token] = []
    hidden: list[bool] = []
    bodies: list[str | None] = []  # of each open brace: the function, or None for a namespace or type
    head = 0  # the first token of the statement
    for match in _TOKEN.finditer(source):
        kind, text = match.lastgroup, match[0]
        if kind == "directive":
            _seen(text, hidden)
        if kind in ("space", "directive") or any(hidden):
            continue
        function = next((name for name in reversed(bodies) if name), "")
        binary = source[match.start() - 1].isspace() and source[match.end() : match.end() + 1].isspace()
        tokens.append(Token(kind, text, *match.span(), function, kind == "operator" and binary))
        if text == "{":
            words = [token.text for token in tokens[head:-1]]
            bodies.append(None if not function and _TYPES.match(" ".join(words)) else function or _named(words))
            head = len(tokens)
        elif text == "}":
            bodies.pop()
            head = len(tokens)
        elif text == ";":
            head = len(tokens)
    return tokens


def _named(words: list[str]) -> str:
    """Return the name of the function whose head this is, without its attributes."""
    for before, word in zip(words, words[1:], strict=False):
        if word == "(" and before not in ("__attribute__", "(", "target"):
            return "operator" if before in ("]", ")") else before
    return "initialiser"


def _matching(tokens: list[Token], opening: int) -> int:
    """Return the index of the bracket that closes this one."""
    depth = 0
    for i in range(opening, len(tokens)):
        depth += (tokens[i].text in _OPEN) - (tokens[i].text in _CLOSE)
        if depth == 0:
            return i
    raise ValueError(f"nothing closes {tokens[opening]}")


def _end(tokens: list[Token], operator: int, level: int, step: int = 1) -> int:
    """Return the last token of an operator's operand: up to an operator of no higher level or the expression's end."""
    inner, outer = (_OPEN, _CLOSE) if step == 1 else (_CLOSE, _OPEN)
    depth, i = 0, operator + step
    while True:
        token = tokens[i]
        if depth == 0:
            ends = token.text in outer or token.text in (",", ";", "return")
            if ends or (token.binary and _PRECEDENCE.get(token.text, 99) <= level):
                return i - step
        depth += (token.text in inner) - (token.text in outer)
        i += step


# ------------------------------------------------------------------------------------------------------ rules

_COMPARISONS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}
_OTHER = {"&&": "||", "||": "&&", "<<": ">>", ">>": "<<", "^": "|", "&": "|", "|": "&"}
_FUNCTIONS = {"min": "max", "max": "min", "ceil_div": "std::min", "countr_zero": "popcount"}
_NAMES = ("rows columns", "row column", "width height", "begin end", "start stop", "first last", "left right", "a b")
_PAIRS = {a: b for pair in _NAMES for a, b in (pair.split(), reversed(pair.split()))}
_FLOATS = {"float", "double"}


def _binary(tokens: list[Token], i: int) -> Iterator[Edit]:
    text = tokens[i].text
    if not tokens[i].binary or text not in _PRECEDENCE or (text == "*" and tokens[i + 1].text == ")"):
        return
    level = _PRECEDENCE[text]
    if text in _COMPARISONS:
        yield Edit("comparison", i, i, _COMPARISONS[text])
    if text in "+-":
        yield Edit("sign", i, i, "-" if text == "+" else "+")
        yield Edit("term dropped", i, _end(tokens, i, level), "")
    if text in "*/%":
        yield Edit("factor dropped", i, _end(tokens, i, level), "")
    if text in _OTHER:
        yield Edit("other operator", i, i, _OTHER[text])
        if text in ("&&", "||", "&"):
            yield Edit("condition term dropped", i, _end(tokens, i, level), "")
            yield Edit("condition term dropped", _end(tokens, i, level, -1), i, "")
    if text in ("+=", "-=", "*=", "|="):
        yield Edit("accumulate dropped", i, i, "=")
    if text == "?":
        middle = _end(tokens, i, level) + 1
        if tokens[middle].text == ":":
            yield Edit("branches swapped", i + 1, _end(tokens, middle, level), f"\0{middle}")


def _unary(tokens: list[Token], i: int) -> Iterator[Edit]:
    before, text = tokens[i - 1], tokens[i].text
    if text in "-!" and not tokens[i].binary and (before.text in "([{,=?:" or before.binary or before.text == "return"):
        yield Edit("negation dropped", i, i, "")


def _condition(tokens: list[Token], i: int) -> Iterator[Edit]:
    if tokens[i].text == "if" and tokens[i + 1].text == "(":
        yield Edit("condition negated", i + 1, _matching(tokens, i + 1), "(!\0)")


def _constant(tokens: list[Token], i: int) -> Iterator[Edit]:
    declared = tokens[i - 1].text == "[" and (tokens[i - 3].kind == "name" or tokens[i - 3].text in "&*>)")
    if tokens[i].kind == "number" and not declared:
        yield Edit("constant", i, i, {"0": "1", "1": "0"}.get(tokens[i].text, "(\0 + 1)"))


def _name(tokens: list[Token], i: int) -> Iterator[Edit]:
    if tokens[i].kind != "name":
        return
    before, text, after = tokens[i - 1], tokens[i].text, tokens[i + 1].text
    if text in _FUNCTIONS and (after == "(" or after == "<"):
        qualified = before.text == "::" and _FUNCTIONS[text].startswith("std")
        yield Edit("other function", i - 2 if qualified else i, i, _FUNCTIONS[text])
    if text == "static_cast" and tokens[i + 2].text in _FLOATS:
        yield Edit("cast dropped", i, i + 3, "")
    elif text == "double" and not (before.text == "<" and tokens[i - 2].text == "mutable_data_ptr"):
        yield Edit("float for double", i, i, "float")


def _subscript(tokens: list[Token], i: int) -> Iterator[Edit]:
    if tokens[i].text != "[" or tokens[i - 1].text not in (")", "]") and tokens[i - 1].kind != "name":
        return
    declared = tokens[i - 2].kind == "name" and tokens[i - 2].text != "return" or tokens[i - 2].text in "&*>"
    last = _matching(tokens, i)
    constant = last == i + 2 and tokens[i + 1].kind == "number"  # another rule's
    if last > i + 1 and not constant and (not declared or tokens[i - 2].binary):
        yield Edit("index off by one", i + 1, last - 1, "(\0) + 1")


def _loop(tokens: list[Token], i: int) -> Iterator[Edit]:
    if tokens[i].text != "for" or tokens[i + 1].text != "(":
        return
    last = _matching(tokens, i + 1)
    semicolons = [j for j in range(i, last) if tokens[j].text == ";"]
    if len(semicolons) != 2:
        return
    for j in range(i, semicolons[1]):
        if tokens[j].binary and tokens[j].text == "=" and j < semicolons[0]:
            yield Edit("first round dropped", j + 1, _end(tokens, j, _PRECEDENCE["="]), "(\0) + 1")
        if tokens[j].binary and tokens[j].text == "<" and j > semicolons[0]:
            yield Edit("last round dropped", j + 1, _end(tokens, j, _PRECEDENCE["<"]), "(\0) - 1")


def _statement(tokens: list[Token], i: int) -> Iterator[Edit]:
    """Drop a call that is a statement of its own, above all barriers and what fills memory."""
    if tokens[i - 1].text not in (";", "{", "}", ")") or tokens[i].kind != "name" or tokens[i].text in ("return", "if"):
        return
    j = i
    while tokens[j].text not in ("(", ";", "{", "}") and not tokens[j].binary:
        if tokens[j].kind == "name" and tokens[j + 1].kind == "name":
            return  # a declaration
        j += 1
    if tokens[j].text == "(" and j > i and tokens[_matching(tokens, j) + 1].text == ";":
        yield Edit("call dropped", i, _matching(tokens, j), "")


RULES: tuple[Callable[[list[Token], int], Iterator[Edit]], ...] = (
    _binary,
    _unary,
    _condition,
    _constant,
    _name,
    _subscript,
    _loop,
    _statement,
)


def _other_names(tokens: list[Token]) -> Iterator[Edit]:
    """Replace each use of a name by its counterpart, and of a stride by the next, where its function has both."""
    uses: dict[tuple[str, str], dict[str, list[int]]] = {}
    names: dict[str, set[str]] = {}
    for token in tokens:
        names.setdefault(token.function, set()).add(token.text)
    for i in range(1, len(tokens) - 1):
        before, token, after = tokens[i - 1 : i + 2]
        declared = before.kind == "name" and before.text != "return" or not before.binary and before.text in "&*>"
        if not token.function or token.kind != "name" or declared:
            continue
        if _PAIRS.get(token.text) in names[token.function]:
            yield Edit("other name", i, i, _PAIRS[token.text])
        if re.search("stride|_row$|_step$|^step$", token.text):
            used_as = after.text if after.text in "([" else ""
            uses.setdefault((token.function, used_as), {}).setdefault(token.text, []).append(i)
    for strides in uses.values():
        order = list(strides)
        for name, places in strides.items():
            other = order[(order.index(name) + 1) % len(order)]
            yield from (Edit("stride swapped", i, i, other) for i in places if other != name)


def _checked(tokens: list[Token]) -> set[int]:
    """Return the tokens of checks and registrations."""
    left_out: set[int] = set()
    for i, token in enumerate(tokens):
        if token.text in _CHECKS and tokens[i + 1].text == "(":
            left_out.update(range(i, _matching(tokens, i + 1) + 1))
        if token.function == "STABLE_TORCH_LIBRARY_IMPL":
            left_out.add(i)
    return left_out


def mutants_of(path: Path, file: str) -> list[Mutant]:
    """Return every mutant of a file, in the order of its text; `file` is what they call it."""
    source = path.read_text(encoding="utf-8")
    tokens = tokens_of(source)
    left_out = _checked(tokens)
    edits = [
        edit for i in range(1, len(tokens) - 3) if tokens[i].function for rule in RULES for edit in rule(tokens, i)
    ]
    found = {}
    for kind, first, last, text in [*edits, *_other_names(tokens)]:
        if not left_out.isdisjoint(range(first, last + 1)):
            continue
        start, stop = tokens[first].start, tokens[last].stop
        old = source[start:stop]
        if text.startswith("\0") and kind == "branches swapped":
            middle = tokens[int(text[1:])]
            text = f"{source[middle.stop : stop].strip()} : {source[start : middle.start].strip()}"
        text = text.replace("\0", old)
        line = source.count("\n", 0, start) + 1
        mutant = Mutant(file, tokens[first].function, kind, start, stop, text, line)
        found.setdefault((start, stop, text), mutant)
    return sorted(found.values(), key=lambda m: (m.start, m.stop, m.text))
