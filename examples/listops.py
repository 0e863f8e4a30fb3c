"""ListOps: nested lists of digits under MAX, MIN, MED and SM, to be evaluated; drawn as Long Range Arena draws them.

`[MAX 2 9 [MIN 4 7 ] 0 ]` is 9. The rules are those of Tay et al. 2020 (arXiv:2011.04006), after Nangia and Bowman 2018
(arXiv:1804.06028): a node of the tree is an operator with probability 1/4, unless it lies at the greatest depth, and
else a digit; operators and digits are equally likely among themselves; trees of another length are thrown away. The
parentheses that LRA writes and its tokenizer drops are not written.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

OPERATORS: dict[str, Callable[[list[int]], int]] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: median(values),
    "[SM": lambda values: sum(values) % 10,
}
END = "]"
CLASSES = 10
VOCABULARY = ["<pad>", "<class>", *map(str, range(CLASSES)), *OPERATORS, END]
PAD, CLASS = 0, 1
IDS = {token: number for number, token in enumerate(VOCABULARY)}


@dataclass(frozen=True)
class Bounds:
    """What expressions are drawn; the defaults are LRA's.

    Attributes:
        shortest, longest: tokens of an expression, both included; operators, digits and ends count.
        depth: levels of the tree at most, that of the deepest digits included.
        arguments: of an operator at most; two at least.
        operator_share: the probability that a node above the greatest depth is an operator.
    """

    shortest: int = 501
    longest: int = 1999
    depth: int = 10
    arguments: int = 10
    operator_share: float = 0.25

    def __post_init__(self) -> None:
        if not 4 <= self.shortest <= self.longest:
            raise ValueError(
                f"shortest={self.shortest}, longest={self.longest}: an expression has at least 4 tokens, and shortest "
                "must not exceed longest"
            )
        if self.depth < 2 or self.arguments < 2:
            raise ValueError(f"depth={self.depth}, arguments={self.arguments}: both must be at least 2")
        if not 0 < self.operator_share <= 1:
            raise ValueError(f"operator_share={self.operator_share} must lie in (0, 1]")


def median(values: Sequence[int]) -> int:
    """The middle value; of an even number the mean of the two in the middle, rounded down."""
    ordered, middle = sorted(values), len(values) // 2
    return ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) // 2


def evaluate(tokens: Sequence[str]) -> int:
    """The digit that an expression comes to.

    Raises:
        ValueError: the tokens are not one expression.
    """
    open_lists: list[tuple[str, list[int]]] = [("", [])]
    for token in tokens:
        if token in OPERATORS:
            open_lists.append((token, []))
        elif token == END and len(open_lists) > 1 and open_lists[-1][1]:
            operator, values = open_lists.pop()
            open_lists[-1][1].append(OPERATORS[operator](values))
        elif token.isdigit():
            open_lists[-1][1].append(int(token))
        else:
            raise ValueError(f"{token!r} is out of place in {' '.join(tokens)!r}")
    (_, values), *unclosed = open_lists
    if unclosed or len(values) != 1:
        raise ValueError(f"{' '.join(tokens)!r} is not one expression")
    return values[0]


def draw(source: random.Random, bounds: Bounds) -> list[str]:
    """One expression within the bounds."""
    while True:
        tokens: list[str] = []
        if _append_node(source, bounds, 1, tokens) and bounds.shortest <= len(tokens):
            return tokens


def _append_node(source: random.Random, bounds: Bounds, depth: int, tokens: list[str]) -> bool:
    """False as soon as the expression is too long."""
    # A tree that is one digit is shorter than any bound, so the root is always an operator.
    if depth == bounds.depth or (depth > 1 and source.random() > bounds.operator_share):
        tokens.append(str(source.randrange(10)))
        return len(tokens) <= bounds.longest
    tokens.append(source.choice(list(OPERATORS)))
    for _ in range(source.randint(2, bounds.arguments)):
        if not _append_node(source, bounds, depth + 1, tokens):
            return False
    tokens.append(END)
    return len(tokens) <= bounds.longest


def draw_dataset(
    count: int, bounds: Bounds, seed: int, progress: Callable[[], object] = lambda: None
) -> tuple[Tensor, Tensor]:
    """Expressions that all differ, padded, behind a <class> token: uint8 [count, longest + 1]; values int64 [count]."""
    source = random.Random(seed)
    expressions: dict[tuple[str, ...], int] = {}
    while len(expressions) < count:
        tokens = draw(source, bounds)
        if expressions.setdefault(tuple(tokens), -1) < 0:
            expressions[tuple(tokens)] = evaluate(tokens)
            progress()
    ids = torch.full((count, bounds.longest + 1), PAD, dtype=torch.uint8)
    ids[:, 0] = CLASS
    for row, tokens in zip(ids, expressions, strict=True):
        row[1 : len(tokens) + 1] = torch.tensor([IDS[token] for token in tokens], dtype=torch.uint8)
    return ids, torch.tensor(list(expressions.values()))
