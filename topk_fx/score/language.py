"""The text of a score function.

A top-k op takes its score function as a string of steps, applied from left to right to `scale * q_i.k_j`:

    "add($0)"                               an additive mask or bias, the op's operand 0
    "div(50.0) tanh mul(50.0) add($0)"      Gemma-2: soft cap, then mask
    "keep(and(le(j, i), $0), -inf)"         causal, and the keys that operand 0 allows
    "mul(0.125) sink($1) softmax mul($2)"   a sink logit, and probabilities multiplied by a head mask

Text, because it is visible in a printed graph, is part of every compile cache's key, survives `torch.export.save`, and
reads the same to each lowering.

A step `name(x, ...)` replaces the scores s by `name(s, x, ...)`, where name is an operation of `operations.OPERATIONS`.
An argument is a number, an operand `$n`, or an expression of them: an operation's name with arguments of its own. The
names `i` and `j` are the positions of the query and of the key (int64), `s` is the scores, and `%n` what a binding
`%n = expression` named before. Operands broadcast against the scores [B, H, Lq, Lk]; one that `lookup` reads is a
table [B|1, H|1, 1, N]. Some steps are no operations:

| step           | meaning                                                                                        |
|----------------|------------------------------------------------------------------------------------------------|
| `set(x)`       | the scores become x, an expression of `s`                                                      |
| `causal`       | `keep(le(j, i), -inf)`                                                                         |
| `sink($n)`     | one logit more in the denominator of the softmax, which is never kept; the last before it      |
| `softmax`      | parts the steps on the scores from those on the probabilities; may be left out if none follows |

Numbers and expressions that do not read the scores keep their own dtypes, as in the model; a step computes in that of
the scores.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, DTypeError
from .operations import OPERATIONS


@dataclasses.dataclass(frozen=True)
class Operand:
    """The op's operand number `index`, written `$index`."""

    index: int

    def __str__(self) -> str:
        return f"${self.index}"


@dataclasses.dataclass(frozen=True)
class Name:
    """`i`, `j`, `s`, or a bound `%n`."""

    text: str

    def __str__(self) -> str:
        return self.text


@dataclasses.dataclass(frozen=True)
class Call:
    """An operation applied to arguments."""

    name: str
    arguments: tuple[Expression, ...]

    @property
    def operands(self) -> tuple[Operand, ...]:
        return tuple(x for x in self.arguments if isinstance(x, Operand))

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(_text, self.arguments))})"


Expression = Any
"""A bool, int or float, an Operand, a Name or a Call. While a graph is read, its leaves may be nodes."""

SCORES = Name("s")
QUERY_POSITION, KEY_POSITION = Name("i"), Name("j")
_POSITIONS = ("i", "j")


def reads_scores(expression: Expression) -> bool:
    """Whether an expression depends on the scores."""
    if isinstance(expression, Call):
        return any(map(reads_scores, expression.arguments))
    return bool(expression == SCORES)


@dataclasses.dataclass(frozen=True)
class Step:
    """The scores become `name(scores, *arguments)`."""

    name: str
    arguments: tuple[Expression, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(_text, self.arguments))})" if self.arguments else self.name


@dataclasses.dataclass(frozen=True)
class Binding:
    """`%index` is an expression from here on."""

    index: int
    expression: Expression

    def __str__(self) -> str:
        return f"%{self.index} = {_text(self.expression)}"


Statement = Step | Binding


@dataclasses.dataclass(frozen=True)
class Program:
    """Steps as a list of operations, each on numbers, operands, positions, the scores and earlier results.

    `Name("%n")` is the result of operation n, `s` the scores that the program is given. `result` is what they become.
    """

    operations: tuple[Call, ...]
    result: Name
    score_dependent: frozenset[Name]

    def __bool__(self) -> bool:
        return self.result != SCORES

    @functools.cached_property
    def last_uses(self) -> tuple[tuple[Name, ...], ...]:
        """For each operation, the results that nothing after it reads."""
        seen = {self.result}
        found: list[tuple[Name, ...]] = []
        for call in reversed(self.operations):
            names = {x for x in call.arguments if isinstance(x, Name)} - seen
            seen |= names
            found.append(tuple(names))
        return tuple(reversed(found))

    def depends_on(self, operands: Collection[int]) -> frozenset[Name]:
        """The names whose gradient reaches the scores or one of `operands`."""
        found = {SCORES}
        for number, call in enumerate(self.operations):
            rule = OPERATIONS[call.name]
            for argument, derivative in zip(call.arguments, rule.derivatives, strict=True):
                is_table = call.name == "lookup" and argument is call.arguments[0]
                is_reached = argument in found if isinstance(argument, Name) else _is_one_of(argument, operands)
                if is_reached and (derivative is not None or is_table):
                    found.add(Name(f"%{number}"))
        return frozenset(found)

    @functools.cached_property
    def needs_scores_in_backward(self) -> bool:
        """Whether a derivative reads a value that depends on the scores, and not only numbers and operands."""
        differentiable = self.depends_on({x.index for call in self.operations for x in call.operands})
        for call in self.operations:
            rule = OPERATIONS[call.name]
            for position, argument in enumerate(call.arguments):
                reads = [call.arguments[n] for n in rule.reads_of(position)]
                is_wanted = isinstance(argument, Operand) or argument in differentiable
                if is_wanted and any(map(self._is_score_dependent, reads)):
                    return True
        return False

    @functools.cached_property
    def read_in_backward(self) -> frozenset[int]:
        """The operands whose values, and not their shapes alone, a derivative may read."""
        pending: list[Expression] = []
        for call in self.operations:
            rule = OPERATIONS[call.name]
            reads = {n for position in range(len(call.arguments)) for n in rule.reads_of(position)}
            reads |= {1} if call.name == "lookup" else set()  # the index, at which the table has its gradient
            pending += [call.arguments[n] for n in reads]
        found: set[int] = set()
        seen: set[Expression] = set()
        while pending:
            argument = pending.pop()
            if isinstance(argument, Operand):
                found.add(argument.index)
            elif isinstance(argument, Name) and argument.text.startswith("%") and argument not in seen:
                seen.add(argument)
                pending += self.operations[int(argument.text[1:])].arguments
        return frozenset(found)

    def _is_score_dependent(self, x: Expression) -> bool:
        return isinstance(x, Name) and x in self.score_dependent


def _is_one_of(argument: Expression, operands: Collection[int]) -> bool:
    return isinstance(argument, Operand) and argument.index in operands


@dataclasses.dataclass(frozen=True)
class Score:
    """A score function: the statements in the order in which they are applied."""

    statements: tuple[Statement, ...] = ()

    def __str__(self) -> str:
        return " ".join(map(str, self.statements))

    @functools.cached_property
    def before(self) -> Program:
        """What becomes of the products before the softmax."""
        return _flatten(self._parts[0])

    @functools.cached_property
    def after(self) -> Program:
        """What becomes of the probabilities of the kept keys."""
        return _flatten(self._parts[1])

    @functools.cached_property
    def sink(self) -> Operand | None:
        """The logit that is in the denominator and is no key."""
        return next((x.arguments[0] for x in self.statements if isinstance(x, Step) and x.name == "sink"), None)

    @functools.cached_property
    def tables(self) -> frozenset[int]:
        """The operands that are tables, which have another axis than keys."""
        calls = (*self.before.operations, *self.after.operations)
        return frozenset(call.arguments[0].index for call in calls if call.name == "lookup")

    @functools.cached_property
    def read_in_backward(self) -> frozenset[int]:
        """The operands whose values the backward reads; of the others it needs the shapes alone."""
        after = {x.index for call in self.after.operations for x in call.operands}  # the probabilities are made anew
        return self.before.read_in_backward | after

    @functools.cached_property
    def only_after(self) -> frozenset[int]:
        """The operands that the probabilities alone meet."""
        before, after = ({x.index for call in p.operations for x in call.operands} for p in (self.before, self.after))
        return frozenset(after - before - ({self.sink.index} if self.sink is not None else set()))

    @functools.cached_property
    def is_causal(self) -> bool:
        """Whether query i certainly keeps no key beyond i."""
        steps = [x for x in self._parts[0] if isinstance(x, Step) and x.name != "sink"]
        masks = []
        for step in reversed(steps):
            if not _masks_out(step):
                break
            masks.append(step)
        return any(_allows_past_only(step) for step in masks)

    @property
    def _parts(self) -> tuple[tuple[Statement, ...], tuple[Statement, ...]]:
        for position, statement in enumerate(self.statements):
            if statement == Step("softmax"):
                return self.statements[:position], self.statements[position + 1 :]
        return self.statements, ()

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def parse(text: str) -> Score:
        """The Score that `text` describes; ConfigError if it is not one."""
        return _Parser(text).score()


def _masks_out(step: Step) -> bool:
    return step.name == "causal" or (step.name == "keep" and step.arguments[1] == -math.inf)


def _allows_past_only(step: Step) -> bool:
    if step.name == "causal":
        return True
    pending = [step.arguments[0]]
    while pending:
        condition = pending.pop()
        if isinstance(condition, Call) and condition.name == "and":
            pending += condition.arguments
        elif condition in (Call("le", (KEY_POSITION, QUERY_POSITION)), Call("ge", (QUERY_POSITION, KEY_POSITION))):
            return True
    return False


def _flatten(statements: Sequence[Statement]) -> Program:
    """Steps as operations, in order; equal ones are done once."""
    operations: dict[str, tuple[Name, Call]] = {}  # by text, which tells 1 from 1.0
    bound: dict[Name, Expression] = {}
    score_dependent = {SCORES}
    scores: Expression = SCORES

    def lower(expression: Expression) -> Expression:
        if expression == SCORES:
            return scores
        if isinstance(expression, Name):
            return bound.get(expression, expression)
        if not isinstance(expression, Call):
            return expression
        call = Call(expression.name, tuple(map(lower, expression.arguments)))
        name, _ = operations.setdefault(str(call), (Name(f"%{len(operations)}"), call))
        if any(isinstance(x, Name) and x in score_dependent for x in call.arguments):
            score_dependent.add(name)
        return name

    for statement in statements:
        if isinstance(statement, Binding):
            bound[Name(f"%{statement.index}")] = lower(statement.expression)
        elif statement.name == "set":
            scores = lower(statement.arguments[0])
        elif statement.name == "causal":
            is_past = Call("le", (KEY_POSITION, QUERY_POSITION))
            scores = lower(Call("keep", (SCORES, is_past, -math.inf)))
        elif statement.name != "sink":
            scores = lower(Call(statement.name, (SCORES, *statement.arguments)))
    return Program(tuple(call for _, call in operations.values()), scores, frozenset(score_dependent))


def _text(expression: Expression) -> str:
    return repr(expression) if isinstance(expression, (bool, int, float)) else str(expression)


_TOKEN = re.compile(r"\s*([$%]\d+|[a-zA-Z_]\w*|[-+]?(?:\d[\d.]*(?:[eE][-+]?\d+)?|\.\d+|inf|nan)|[(),=])")
_CONSTANTS: dict[str, bool | float] = {"True": True, "False": False, "inf": math.inf, "nan": math.nan}


class _Parser:
    """Recursive descent over the tokens of a score's text."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = list(self._read_tokens())
        self.position = 0
        self.bound: set[str] = set()

    def score(self) -> Score:
        statements: list[Statement] = []
        while self.position < len(self.tokens):
            statements.append(self._statement())
        names = [x.name for x in statements if isinstance(x, Step)]
        for name in ("softmax", "sink"):
            if names.count(name) > 1:
                raise self._error(f"{name} stands there twice")
        if "sink" in names:
            following = names[names.index("sink") + 1 :]
            if following[:1] not in ([], ["softmax"]):
                raise self._error("sink is the last step before the softmax")
        return Score(tuple(statements))

    def _read_tokens(self) -> Iterator[str]:
        position = 0
        end = len(self.text.rstrip())
        while position < end:
            match = _TOKEN.match(self.text, position)
            if match is None:
                raise self._error(f"cannot read it from {self.text[position:].strip()!r}")
            yield match.group(1)
            position = match.end()

    def _statement(self) -> Statement:
        token = self._next()
        if token.startswith("%"):
            self._expect("=")
            binding = Binding(int(token[1:]), self._expression())
            self.bound.add(token)
            return binding
        arguments = self._arguments() if self._peek() == "(" else ()
        if token in _STEPS:
            is_known = _STEPS[token] == len(arguments)
        else:
            is_known = token in OPERATIONS and token != "lookup" and len(arguments) + 1 in OPERATIONS[token].arities
        if not is_known:
            raise self._error(f"no step {token} with {len(arguments)} arguments")
        is_operand = bool(arguments) and isinstance(arguments[0], Operand)
        if token in ("sink", "mask") and not is_operand:
            raise self._error(f"{token} takes an operand $i")
        if token in ("keep", "fill") and not isinstance(arguments[0], (Operand, Name, Call)):
            raise self._error(f"{token} takes a condition first: an operand $i or an expression")
        if token == "set" and not isinstance(arguments[0], Call):
            raise self._error("set takes an operation")
        if token == "softmax":
            self.bound.clear()
        return Step(token, arguments)

    def _arguments(self) -> tuple[Expression, ...]:
        self._expect("(")
        found: list[Expression] = []
        while self._peek() != ")":
            found.append(self._expression())
            if self._peek() != ")":
                self._expect(",")
        self._expect(")")
        return tuple(found)

    def _expression(self) -> Expression:
        token = self._next()
        if self._peek() == "(":
            arguments = self._arguments()
            if token not in OPERATIONS or len(arguments) not in OPERATIONS[token].arities:
                raise self._error(f"no operation {token} of {len(arguments)} arguments")
            if token == "lookup" and not isinstance(arguments[0], Operand):
                raise self._error("lookup takes an operand $i as its table")
            return Call(token, arguments)
        if re.fullmatch(r"\$\d+", token):
            return Operand(int(token[1:]))
        if token in (*_POSITIONS, str(SCORES)) or token in self.bound:
            return Name(token)
        if token in _CONSTANTS:
            return _CONSTANTS[token]
        for number in (int, float):
            try:
                return number(token)
            except ValueError:
                pass
        raise self._error(f"{token!r} is neither a number nor an operand $i")

    def _peek(self) -> str:
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def _next(self) -> str:
        token = self._peek()
        if not token:
            raise self._error("it ends too early")
        self.position += 1
        return token

    def _expect(self, token: str) -> None:
        if self._peek() != token:
            rest = " ".join(self.tokens[self.position :])
            raise self._error(f"cannot read it from {rest!r}: {token!r} is missing")
        self.position += 1

    def _error(self, message: str) -> ConfigError:
        return ConfigError(f"score={self.text!r} is not accepted: {message}")


_STEPS = {"set": 1, "causal": 0, "sink": 1, "softmax": 0}
"""Steps that are no operations, and how many arguments they take."""


def check_operands(score: Score, operands: Sequence[Tensor]) -> None:
    """ConfigError or DTypeError unless the operands are those which the score function reads."""
    calls = (*score.before.operations, *score.after.operations)
    named = {x.index for call in calls for x in call.operands}
    if score.sink is not None:
        named.add(score.sink.index)
    if named != set(range(len(operands))):
        raise ConfigError(f"score={str(score)!r} names operands {sorted(named)}, but {len(operands)} were given")
    for index, operand in enumerate(operands):
        if operand.dtype.is_complex:
            raise DTypeError(f"operand ${index} of {score} has dtype {operand.dtype}; accepted: a real dtype")
    for call in calls:
        for position, argument in enumerate(call.arguments):
            if not isinstance(argument, Operand) or position not in OPERATIONS[call.name].conditions:
                continue
            dtype = operands[argument.index].dtype
            if dtype != torch.bool:
                raise DTypeError(f"operand {argument} of {score} has dtype {dtype}; accepted: torch.bool")
