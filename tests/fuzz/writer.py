"""Draws programs: attention, FFNs and what looks like them, as Python source composed of random spellings.

An axis has a letter: b batch, h heads, g heads of keys and r queries to each, n batch and heads joined, i queries,
j keys, d and e the features of keys and values; of FFNs t tokens, c channels, f hidden units, o outputs; N the rows of
a table. The writer knows the letters of every tensor that it has written, so it can put any mask into any arrangement
of the scores. It writes two texts: the model, and the model with its softmax replaced by one that keeps k keys.
Both are plain functions, so a failure can be pasted as a test.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from programs import Input, Program

_LOW = {torch.float64: "torch.float64", torch.float32: "torch.float32", torch.bfloat16: "torch.bfloat16",
        torch.float16: "torch.float16"}  # fmt: skip
WITHOUT_SIZES = ("symbolic", "propagated")
"""Tracers that run a model with its sizes as numbers."""
_ORDER = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Writer:
    """Writes one program, choice by choice."""

    def __init__(self, draw: Callable[[Any], Any]) -> None:
        self.draw = draw
        self.lines: list[str] = []
        self.reference: list[str] = []
        self.inputs: dict[str, Input] = {}
        self.sizes: dict[str, int] = {"1": 1}
        self.conditions: list[tuple[str, str]] = []
        self.names = 0
        self.softmaxes = 0
        self.has_sdpa = False
        self.has_huge = False
        self.returned: list[str] = []
        self.dtype = self.coarsest = self.choose(*[torch.float64] * 12, *_ORDER[1:])
        self.tracer = self.choose(*["propagated"] * 9, *["make_fx"] * 4, "symbolic", "export", "dynamo")
        self.dynamic = self.tracer in ("export", "dynamo") and self.chance(2)

    def choose(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def chance(self, n: int) -> bool:
        """True once in n times."""
        return self.draw(st.integers(0, n - 1)) == n - 1

    def emit(self, line: str, reference: str | None = None) -> None:
        self.lines.append(line)
        self.reference.append(line if reference is None else reference)

    def bind(self, prefix: str, expression: str) -> str:
        self.names += 1
        name = f"{prefix}{self.names}"
        self.emit(f"{name} = {expression}")
        return name

    def input(self, name: str, axes: str, kind: str = "normal") -> str:
        self.names += 1
        name = name if name not in self.inputs else f"{name}{self.names}"
        self.inputs[name] = Input(name, axes, kind)
        return name

    def rounds_to(self, dtype: torch.dtype) -> str:
        self.coarsest = max(self.coarsest, dtype, key=_ORDER.index)
        return _LOW[dtype]

    def program(self) -> Program:
        special = None
        if not self.has_sdpa and self.chance(12) and "k" in self.inputs and self.inputs["k"].kind == "normal":
            special = (self.choose("q", "k"), self.choose(math.nan, math.inf, -math.inf))
        for lines in (self.lines, self.reference):
            lines.append(f"return {', '.join(self.returned)}")
        return Program(
            tuple(self.inputs.values()), tuple(self.lines), tuple(self.reference), dict(self.sizes), self.dtype,
            self.coarsest, self.tracer, self.dynamic, special, self.softmaxes,
        )  # fmt: skip

    # Axes.

    def permuted(self, x: str, letters: str, wanted: str) -> str:
        """x with its axes in another order."""
        if letters == wanted:
            return x
        dims = [letters.index(c) for c in wanted]
        moved = [n for n, d in enumerate(dims) if n != d]
        rank = len(dims)
        if len(moved) == 2:
            first, second = moved
            spellings = [f"{x}.transpose({first}, {second})", f"{x}.swapaxes({first - rank}, {second - rank})"]
            if moved == [rank - 2, rank - 1]:
                spellings += [f"{x}.mT", f"{x}.transpose(-2, -1)", f"{x}.transpose(-1, -2)"]
            if rank == 2:
                spellings += [f"{x}.t()", f"{x}.T"]
            if self.chance(2):
                return self.choose(*spellings)
        text = ", ".join(map(str, dims))
        return self.choose(f"{x}.permute({text})", f"torch.permute({x}, ({text}))", f"{x}.permute([{text}])")

    def fit(self, x: str, letters: str, layout: str) -> str:
        """x with axes that broadcast against the layout."""
        wanted = "".join(c for c in layout if c in letters)
        x = self.permuted(x, letters, wanted)
        items = [":" if c in wanted else "None" for c in layout]
        while items and items[0] == "None":
            items.pop(0)
        if "None" not in items:
            return x
        if self.chance(3):
            for position, item in enumerate(items):
                if item == "None":
                    x = f"{x}.unsqueeze({position - len(items)})" if self._is_last_run(items, position) else x
            if items == [":"] * len(wanted) + ["None"] * (len(items) - len(wanted)):
                return x
            x = x.split(".unsqueeze(")[0]
        return f"{x}[{', '.join(items)}]"

    @staticmethod
    def _is_last_run(items: list[str], position: int) -> bool:
        return all(item == "None" for item in items[position:])

    def any_order(self, letters: str) -> str:
        return "".join(self.draw(st.permutations(list(letters))))

    def dim(self, layout: str, letter: str) -> int:
        return layout.index(letter) - self.choose(len(layout), 0)

    # Factors.

    def factor(self, name: str, lead: str, last: str, is_free: bool) -> tuple[str, str]:
        """An input of axes lead + last, stored in some order, and brought to that one unless `is_free`."""
        letters = lead + last
        stored = self.any_order(letters) if self.chance(3) else letters
        name = self.input(name, stored)
        if is_free or stored == letters:
            return name, stored
        self.emit(f"{name} = {self.permuted(name, stored, letters)}")
        return name, letters

    def repeated_heads(self, name: str, width: str, query: tuple[str, str] = ("", "")) -> str:
        """K or V of g heads brought to h."""
        name = self.input(name, "bgj" + width)
        self._lengths(*query, (name, "bgj" + width))
        r, sizes = self.sizes["r"], self.sizes
        spellings = [
            f"{name}.repeat_interleave({r}, dim=1)",
            f"torch.repeat_interleave({name}, {r}, -3)",
            f"{name}[:, :, None].expand(B, {sizes['g']}, {r}, LK, {sizes[width]}).reshape(B, {sizes['h']}, LK, {sizes[width]})",
            f"{name}[:, :, None, :, :].expand(-1, -1, {r}, -1, -1).flatten(1, 2)",
            f"{name}.unsqueeze(2).expand(-1, -1, {r}, -1, -1).reshape(B, {sizes['h']}, LK, -1)",
            f"{name}.repeat(1, {r}, 1, 1)",
            f"{name}[:, None].expand(B, {r}, {sizes['g']}, LK, {sizes[width]}).reshape(B, {sizes['h']}, LK, {sizes[width]})",
        ]
        self.emit(f"{name} = {self.choose(*spellings)}")
        return name

    def scale(self, x: str, layout: str) -> str:
        """x times or over something."""
        spellings = [f"{x} * 0.5", f"0.25 * {x}", f"{x} / 1.5", f"{x}.mul(0.7)", f"torch.div({x}, 2)", f"{x} * -1.25",
                     f"{x} / math.sqrt({x}.size(-1))", f"{x} * ({x}.shape[-1] ** -0.5)", f"-{x}",
                     f"{x} / torch.full([], 2.0, dtype={x}.dtype)", f"{x} * torch.tensor(0.5, dtype={x}.dtype)"]  # fmt: skip
        if self.chance(3):
            temperature = self.input("temperature", "", "scale")
            spellings = [f"{x} * {temperature}", f"{x} / {temperature}", f"{x} * {temperature}.exp()"]
        elif "h" in layout and self.chance(3):
            heads = self.fit(self.input("scale_heads", "h", "scale"), "h", layout)
            spellings = [f"{x} * {heads}", f"{x} / {heads}"]
        return self.choose(*spellings)

    # Attention.

    def attention(self) -> None:
        if not self.sizes.get("i"):
            self._draw_sizes()
        if self.chance(7):
            self.sdpa()
            return
        lead = self.choose("bh", "bh", "bh", "bh", "h", "", "n", "bgr")
        is_einsum = self.chance(4)
        query, query_letters = self.factor("q", lead, "id", is_einsum)
        kind = self.choose("full", "full", "full", "one_head", "no_lead", "grouped", "transposed")
        if kind == "grouped" and lead == "bh":
            key, key_letters = self.repeated_heads("k", "d", (query, query_letters)), "bhjd"
        elif kind == "one_head" and lead == "bh" and not is_einsum:
            key, key_letters = self.input("k", "b1jd"), "bhjd"
        elif kind == "no_lead":
            key, key_letters = self.factor("k", "", "jd", True)
            if not is_einsum and key_letters != "jd":
                self.emit(f"{key} = {self.permuted(key, key_letters, 'jd')}")
                key_letters = "jd"
        elif lead == "bgr":
            key, key_letters = self.input("k", "bgjd"), "bgjd"
            if not is_einsum:
                key = self.bind("k", f"{key}[:, :, None]")
                key_letters = "bgrjd"
        else:
            key, key_letters = self.factor("k", lead, "dj" if kind == "transposed" else "jd", is_einsum)
        self._lengths(query, query_letters, (key, key_letters))
        if self.chance(4):
            query = self.bind("q", self.scale(query, query_letters))
        if self.chance(8):
            key = self.bind("k", self.scale(key, key_letters))
        if self.chance(10):
            query = self.bind("q", f"{query}.clone()")
            self.emit(f"{query}.mul_(1.5)")
        scores, letters = self.product(query, query_letters, key, key_letters, lead, is_einsum)
        for _ in range(self.draw(st.integers(0, 4))):
            scores, letters = self.score_step(scores, letters, query, key)
        weights = self.softmax(scores, letters)
        if self.chance(25):
            self.emit(f"{query} = {query}.clone()")
            self.emit(f"{query}.zero_()")
        for _ in range(self.draw(st.integers(0, 2))):
            weights, letters = self.weight_step(weights, letters)
        if self.dtype in (torch.bfloat16, torch.float16):
            self.emit(f"{weights} = {weights}.to({_LOW[self.dtype]})")
        elif self.chance(8):
            self.emit(f"{weights} = {weights}.to({query}.dtype)")
        output = self.value_product(weights, letters)
        self.returned.append(output)
        if self.chance(15):
            self.returned.append(self.choose(weights, scores))

    def _draw_sizes(self) -> None:
        sizes = st.sampled_from((3, 2, 1, 4, 5))
        for letter in "bgrdeij":
            self.sizes[letter] = self.draw(sizes)
        self.sizes["j"] = self.choose(5, 4, 6, 3, 1, self.sizes["i"])
        self.sizes["r"] = self.choose(1, 2, 3)
        self.sizes["h"] = self.sizes["g"] * self.sizes["r"]
        self.sizes["n"] = self.sizes["b"] * self.sizes["h"]
        if self.dynamic:
            self.sizes["b"], self.sizes["i"], self.sizes["j"] = self.choose((2, 3, 4), (2, 4, 4), (3, 4, 5), (1, 4, 4))

    def _lengths(self, query: str, query_letters: str, key: tuple[str, str]) -> None:
        """Binds B, LQ and LK: read off the inputs, or numbers."""
        if any(line.startswith("LK =") for line in self.lines):
            return
        is_read = self.dynamic or (self.tracer not in WITHOUT_SIZES and self.chance(2))
        read = {c: f"{query}.size({n})" for n, c in enumerate(query_letters)}
        for name, letter in (("B", "b"), ("LQ", "i")):
            self.emit(f"{name} = {read[letter] if is_read and letter in read else self.sizes[letter]}")
        self.emit(f"LK = {key[0]}.size({key[1].index('j')})" if is_read else f"LK = {self.sizes['j']}")

    def product(
        self, query: str, query_letters: str, key: str, key_letters: str, lead: str, is_einsum: bool
    ) -> tuple[str, str]:
        if is_einsum:
            output = self.any_order(lead + "ij") if self.chance(2) else lead + "ij"
            terms = [(query, query_letters), (key, key_letters)]
            terms = self.draw(st.permutations(terms))
            equation = f"{terms[0][1]},{terms[1][1]}->{output}"
            text = f"torch.einsum('{equation}', {terms[0][0]}, {terms[1][0]})"
            return self.bind("s", text), output
        is_whole = len(key_letters) == len(query_letters)
        transposed = key if key_letters[-1] == "j" else self.permuted(key, key_letters, key_letters[:-2] + "dj")
        is_one_head = key in self.inputs and self.inputs[key].axes == "b1jd"
        if lead == "bh" and key_letters == "bhjd" and not is_one_head and self.chance(5):
            d = self.sizes["d"]
            left = f"{query}.reshape(B * {self.sizes['h']}, LQ, {d})"
            right = f"{key}.reshape(B * {self.sizes['h']}, LK, {d}).transpose(1, 2)"
            text = self.choose(
                f"torch.bmm({left}, {right})", f"{left} @ {right}", f"torch.bmm({left}, {right}).mul(0.5)"
            )
            return self.bind("s", text), "nij"
        if key_letters[-1] == "d" and self.chance(8):
            swapped = self.permuted(query, query_letters, query_letters[:-2] + "di")
            return self.bind("s", self.choose(f"{key} @ {swapped}", f"torch.matmul({key}, {swapped})")), lead + "ji"
        spellings = [f"{query} @ {transposed}", f"torch.matmul({query}, {transposed})", f"{query}.matmul({transposed})"]
        if lead == "" and is_whole:
            spellings += [f"torch.mm({query}, {transposed})", f"{query}.mm({transposed})"]
            if self.chance(3):
                bias = self.input("bias", self.choose("ij", "j"))
                spellings = [f"torch.addmm({bias}, {query}, {transposed}, beta=0.5, alpha=2)",
                             f"{bias}.addmm({query}, {transposed})"]  # fmt: skip
        if len(lead) == 1 and is_whole:
            spellings += [f"torch.bmm({query}, {transposed})", f"{query}.bmm({transposed})"]
            if self.chance(3):
                bias = self.input("bias", lead + "ij")
                spellings = [f"torch.baddbmm({bias}, {query}, {transposed}, beta={self.choose('1', '0.5', '0')}, alpha=0.5)",
                             f"{bias}.baddbmm({query}, {transposed})"]  # fmt: skip
        if key_letters == "jd" and self.chance(8):
            spellings = [f"F.linear({query}, {key})"]
        return self.bind("s", self.choose(*spellings)), lead + "ij"

    def score_step(self, scores: str, letters: str, query: str, key: str) -> tuple[str, str]:
        match self.choose("scale", "mask", "mask", "mask", "bias", "bias", "point", "move", "cast", "in_place", "rare"):
            case "scale":
                return self.bind("s", self.scale(scores, letters)), letters
            case "mask":
                return self.masked(scores, letters), letters
            case "bias":
                return self.biased(scores, letters, query), letters
            case "point":
                return self.bind("s", self.choose(*self._pointwise(scores, letters))), letters
            case "move":
                return self.move(scores, letters)
            case "cast":
                dtype = self.choose(torch.float64, torch.float32)
                if dtype != torch.float64 or self.dtype != torch.float64:
                    self.rounds_to(dtype)
                return self.bind("s", f"{scores}.to({_LOW[dtype]})"), letters
            case "in_place":
                line = self.choose(
                    f"{scores} *= 0.5", f"{scores}.mul_(2.0)", f"{scores}.div_(3)", f"{scores}.add_(1.0)",
                    f"{scores} -= 0.25", f"{scores}.neg_()", f"{scores}.clamp_(-1.5, 2.0)", f"{scores}.tanh_()",
                    f"{scores}.transpose(-2, -1).mul_(0.5)", f"{scores}.relu_()", f"{scores}[..., 0] = -1.0",
                    f"{scores}[..., 1:] = -2.0", f"{scores}[..., :-1, -1] = 0.5", f"{scores}[{scores} < 0] = -1.0",
                    f"F.relu({scores}, inplace=True)", f"{scores}.exp_()",
                )  # fmt: skip
                self.emit(line)
                return scores, letters
        dim = self.dim(letters, "j")
        return self.bind("s", self.choose(
            f"{scores} - {scores}.mean({dim}, keepdim=True)", f"{scores}.cumsum({dim})", f"{scores}[...]",
            f"{scores} - {scores}.amax({dim}, keepdim=True)", f"{scores} - {scores}.max({dim}, keepdim=True).values",
            f"{scores} - {scores}.max({dim}, keepdim=True)[0].detach()", f"F.dropout({scores}, 0.3, training=False)",
            f"{scores} - {scores}.amax({self.dim(letters, 'i')}, keepdim=True)", f"{scores}.clone()",
            f"{scores}.contiguous()", f"{scores}.detach()", f"{scores} - {scores}.logsumexp({dim}, keepdim=True)",
            f"{scores}.sort({dim}).values", f"{scores}.flip({dim})", f"{scores}.roll(1, {dim})",
            f"{scores} / {scores}.norm(dim={dim}, keepdim=True)", f"{scores} - {scores}.max()",
        )), letters  # fmt: skip

    def _pointwise(self, s: str, letters: str) -> list[str]:
        return [
            f"torch.tanh({s} / 2) * 2", f"{s}.tanh() * 3.0", f"{s}.clamp(-0.5, 1.0)", f"torch.clamp({s}, min=-1)",
            f"{s}.clamp(max=0.7)", f"F.hardtanh({s})", f"F.relu({s})", f"{s}.relu()", f"F.leaky_relu({s}, 0.2)",
            f"{s} * {s}.sigmoid()", f"torch.where({s} > 0, {s}, 0.1 * {s})", f"{s} + {s}", f"{s} * {s}", f"F.gelu({s})",
            f"F.softplus({s})", f"F.elu({s})", f"{s}.abs()", f"{s}.sin()", f"{s}.square()", f"{s} ** 3",
            f"torch.maximum({s}, -{s} * 0.5)", f"({s} * 0.3).exp()", f"{s}.nan_to_num()", f"F.silu({s})", f"2 - {s}",
            f"torch.sub(1, {s}, alpha=2)", f"1 / (2 + {s}.abs())", f"torch.sign({s}) * {s}.abs().sqrt()",
            f"{s}.masked_fill({s} < -0.5, -inf)", f"torch.where({s} >= {s}.detach(), {s}, 0.0)", f"{s} * 1.0 + 0.0",
            f"({s} * 2).round()", f"{s} % 1.5", f"{s} // 0.5", f"F.gelu({s}, approximate='tanh')",
            f"torch.addcmul({s}, {s}, {s}, value=0.1)", f"torch.minimum({s}, {s} * {s})", f"torch.log1p({s}.abs())",
            f"{s} - 0.5 * {s}.detach()", f"torch.lerp({s}, {s} * 2, 0.5)", f"{s}.pow(2)", f"2 ** {s}",
        ]  # fmt: skip

    def move(self, scores: str, letters: str) -> tuple[str, str]:
        if letters == "nij" and "b" in self.sizes and self.chance(2):
            return self.bind("s", f"{scores}.view(B, {self.sizes['h']}, LQ, LK)"), "bhij"
        if letters == "bhij" and self.chance(2):
            shape = f"B * {self.sizes['h']}, LQ, LK"
            return self.bind("s", self.choose(f"{scores}.reshape({shape})", f"{scores}.flatten(0, 1)")), "nij"
        if letters == "bgrij" and self.chance(2):
            return self.bind("s", f"{scores}.reshape(B, {self.sizes['h']}, LQ, LK)"), "bhij"
        wanted = self.any_order(letters)
        return self.bind("s", self.permuted(scores, letters, wanted)), wanted

    # Masks and biases.

    def positions(self) -> tuple[str, str]:
        """The positions of queries, as a column, and of keys."""
        rows = self.choose("torch.arange(LQ)", "torch.arange(0, LQ)", "torch.arange(1, LQ + 1)", "(torch.arange(LQ) + (LK - LQ))",
                           "(torch.arange(LQ) * 2)", "torch.arange(2, 2 + LQ, device='cpu')")  # fmt: skip
        columns = self.choose(*["torch.arange(LK)"] * 3, "torch.arange(1, LK + 1)", "torch.arange(0, 2 * LK, 2)")
        row = self.bind("i", f"{rows}{self.choose('[:, None]', '.unsqueeze(-1)', '.view(-1, 1)', '.unsqueeze(1)')}")
        return row, self.bind("j", f"{columns}{self.choose('', '[None, :]', '.unsqueeze(0)', '.view(1, -1)')}")

    def condition(self, allowed: str) -> tuple[str, str]:
        """A boolean tensor and its letters."""
        known = [c for c in self.conditions if set(c[1]) <= set(allowed)]
        if known and self.chance(3):
            return self.choose(*known)
        text, letters = self._one_condition(allowed)
        name = self.bind("m", text)
        if self.chance(3):
            other, other_letters = self._one_condition(allowed)
            other = self.bind("m", other)
            union = "".join(c for c in "nbhgrij" if c in letters + other_letters)
            sign = self.choose("&", "|", "^", "&", "|")
            left, right = self.fit(name, letters, union), self.fit(other, other_letters, union)
            function = {"&": "logical_and", "|": "logical_or", "^": "logical_xor"}[sign]
            name = self.bind("m", self.choose(f"{left} {sign} {right}", f"torch.{function}({left}, {right})"))
            letters = union
        if letters == "ij" and self.chance(2):
            name = self.bind("m", f"{name} | (torch.arange(LK) < 1)")
        if self.chance(6):
            name = self.bind("m", self.choose(f"~{name}", f"torch.logical_not({name})", f"{name} == False"))
        self.conditions.append((name, letters))
        return name, letters

    def _one_condition(self, allowed: str) -> tuple[str, str]:
        kinds = ["compare", "compare", "window", "chunk", "prefix", "triangle", "keep"]
        kinds += [kind for kind, letter in (("padding", "b"), ("documents", "b"), ("heads", "h")) if letter in allowed]
        match self.choose(*kinds):
            case "padding":
                return self.input("padding", "bj", "keep"), "bj"
            case "documents":
                rows, columns = self.input("ids", "bi", "ids"), self.input("ids", "bj", "ids")
                sign = self.choose("==", "==", ">=", "!=")
                return f"{rows}[:, :, None] {sign} {columns}[:, None, :]", "bij"
            case "heads":
                i, j = self.positions()
                reach = self.choose(f"torch.arange({self.sizes['h']})[:, None, None]", "torch.tensor(1)")
                if reach.startswith("torch.tensor"):
                    return f"({j} - {i}) <= {reach}", "ij"
                return f"({i} - {j}) <= {reach}", "hij"
            case "keep":
                letters = self.choose("ij", "".join(c for c in "nbhgrij" if c in allowed), "j", "i")
                return self.input("keep", letters, "keep"), letters
            case "triangle":
                ones, diagonal = "torch.ones(LQ, LK, dtype=torch.bool)", self.choose(0, 1, -1, 2, "LK - LQ")
                side = self.choose("tril", "triu")
                return self.choose(
                    f"{ones}.{side}({diagonal})", f"torch.{side}({ones}, diagonal={diagonal})",
                    f"torch.{side}(torch.ones(LQ, LK), {diagonal}) == {self.choose(0, 1)}",
                    f"torch.{side}(torch.ones(LQ, LK)).bool()", f"torch.ones((LQ, LK)).{side}({diagonal}) > 0.5",
                    f"torch.{side}(torch.full((LQ, LK), -inf), {diagonal}) == 0",
                ), "ij"  # fmt: skip
        i, j = self.positions()
        compare = self.choose("<=", ">=", "<", ">", "==", "!=")
        w, c = self.choose(1, 2, 3), self.choose(2, 3)
        return self.choose(
            f"{j} {compare} {i}", f"{i} {compare} {j}", f"torch.le({j}, {i})", f"{i}.ge({j})", f"{j} - {i} {compare} {w}",
            f"({i} - {j}).abs() <= {w}", f"({j} <= {i}) & ({j} > {i} - {w})", f"({i} // {c}) == ({j} // {c})",
            f"torch.div({i}, {c}, rounding_mode='floor') >= {j} // {c}", f"({j} <= {i}) | ({j} < {w})",
            f"({i} - {j}) % {c} == 0", f"({i} >= {j}) & (({i} - {j}) < {w})", f"({i} + {j}) {compare} {w}",
            f"{i}.float() * 0.7 {compare} {j}", f"torch.abs({i} - {j}) < {w}", f"{j}.remainder({c}) != {i} % {c}",
            f"(({i} - {j}) * {w}) // -{c} >= -1", f"{i} > -1", f"({j} < {w}).expand(LQ, LK)", f"({i} ^ {j}) > {w}",
            f"torch.maximum({i}, {j}) {compare} {w}", f"({i} - {j}).clamp(min=0) < {w}",
        ), "ij"  # fmt: skip

    def masked(self, scores: str, letters: str) -> str:
        condition, own = self.condition(letters)
        m = self.fit(condition, own, letters)
        value = self.choose("-inf", "-inf", "float('-inf')", "torch.finfo(torch.float32).min", "-1e9", "-1e4", "-3.0")
        if self.dtype in (torch.bfloat16, torch.float16):
            value = self.choose("-inf", f"torch.finfo({scores}.dtype).min", "-1e4", "-3.0")
        finite = "-1e4" if "inf" in value else value
        self.has_huge |= value.startswith("torch.finfo") or value == "-1e9"
        if self.chance(8):
            line = self.choose(f"{scores}.masked_fill_(~{m}, {value})", f"{scores} += torch.where({m}, 0.0, {value})",
                               f"{scores}.add_(torch.where({m}, 0.0, {value}))",
                               f"{scores}[(~{m}).expand({scores}.shape)] = {value}")  # fmt: skip
            self.emit(line)
            return scores
        return self.bind("s", self.choose(
            f"torch.where({m}, {scores}, {value})", f"torch.where(~{m}, {value}, {scores})", f"{scores}.where({m}, {value})",
            f"{scores}.masked_fill(~{m}, {value})", f"{scores}.masked_fill(torch.logical_not({m}), {value})",
            f"torch.where({m}, {scores}, torch.tensor({value}, dtype={scores}.dtype))",
            f"torch.where({m}, {scores}, torch.full_like({scores}, {value}))",
            f"{scores} + torch.where({m}, 0.0, {value})", f"{scores} + (1 - {m}.to({scores}.dtype)) * {finite}",
            f"{scores} - (~{m}).to({scores}.dtype) * 1e4", f"{scores} + {m}.to({scores}.dtype).log()",
            f"{scores} * {m}", f"{scores} * {m} - 1e4 * (1 - {m}.to({scores}.dtype))", f"{scores} + {m}",
            f"{scores} + torch.zeros({m}.shape, dtype={scores}.dtype).masked_fill(~{m}, {value})",
            f"{scores} + (1.0 - {m}.float()) * {finite}", f"{scores} + ({m}.int() - 1) * 1000",
            f"torch.where({m}, {scores}, {scores} * 0.5)", f"{scores}.masked_fill({m} == 0, {value})",
            f"torch.where({m} & ({scores} > -1), {scores}, {value})", f"{scores}.masked_fill({m}.logical_not(), {value})",
        ))  # fmt: skip

    def biased(self, scores: str, letters: str, query: str) -> str:
        kinds = ["tensor", "tensor", "distance", "indices"] + ["alibi", "table"] * ("h" in letters)
        match self.choose(*kinds):
            case "tensor":
                subset = "".join(c for c in "nbhgrij" if c in letters and self.chance(2))
                bias = self.fit(self.input("bias", subset), subset, letters)
            case "alibi":
                i, j = self.positions()
                slopes = self.input("slopes", "h")
                distance = self.choose(f"({j} - {i})", f"-({i} - {j}).abs()", f"({i} - {j}).clamp(min=0)", f"{j}")
                text = self.choose(f"{slopes}[:, None, None] * {distance}", f"{slopes}.view(-1, 1, 1) * {distance}.to({slopes}.dtype)",
                                   f"{distance} * {slopes}.reshape({self.sizes['h']}, 1, 1)")  # fmt: skip
                bias = self.fit(self.bind("bias", text), "hij", letters)
            case "table":
                self.sizes["N"] = 5
                i, j = self.positions()
                table = self.input("table", "Nh")
                bucket = self.bind("bucket", self.choose(
                    f"({j} - {i}).clamp(-2, 2) + 2", f"({i} - {j}).abs().clamp(max=4)",
                    f"torch.where({j} > {i}, 4, ({i} - {j}).clamp(max=3).clamp(min=0))", f"({i} + {j}) % 5",
                    f"torch.log2(({i} - {j}).abs().float() + 1).long().clamp(max=4)",
                ))  # fmt: skip
                found = self.bind("bias", self.choose(f"{table}[{bucket}]", f"F.embedding({bucket}, {table})"))
                bias = self.fit(found, "ijh", letters)
            case "indices":
                i, j = self.positions()
                bias = self.fit(self.bind("bias", self.choose(f"{j} - {i}", f"({i} * 0.25 - {j} * 0.5)", f"({i} - {j}).abs().neg()",
                                                              f"torch.cos(({i} - {j}).float())", f"({i} - {j}) / 3")), "ij", letters)  # fmt: skip
                if "torch.cos" in self.lines[-1] or "/ 3" in self.lines[-1]:
                    self.rounds_to(torch.float32)
            case "distance":
                i, j = self.positions()
                bias = self.fit(self.bind("bias", f"({j} - {i}).to({scores}.dtype) * 0.5"), "ij", letters)
        if self.chance(10):
            self.emit(f"{scores} += {bias}")
            return scores
        return self.bind("s", self.choose(
            f"{scores} + {bias}", f"{bias} + {scores}", f"torch.add({scores}, {bias}, alpha=2)", f"{scores} - {bias}",
            f"torch.add({bias}, {scores}, alpha=0.5)", f"{bias} - {scores}", f"torch.sub({bias}, {scores}, alpha=2)",
            f"{scores} * {bias}", f"{scores}.add({bias})", f"torch.maximum({scores}, {bias})",
            f"torch.where({scores} > {bias}, {scores}, {bias})", f"{scores} / (1 + {bias}.abs())",
            f"torch.addcmul({scores}, {bias}, {bias}, value=0.5)", f"{scores} + {bias} * {scores}",
        ))  # fmt: skip

    # The softmax and what follows.

    def softmax(self, scores: str, letters: str) -> str:
        over = self.choose(*letters) if self.chance(15) else "j"
        dim = self.dim(letters, over)
        self.names += 1
        weights = f"w{self.names}"
        if over == "j" and letters in ("bhij", "hij") and self.chance(12):
            return self._softmax_with_sink(scores, letters, weights)
        spellings = [
            f"F.softmax({scores}, dim={dim})", f"torch.softmax({scores}, {dim})", f"{scores}.softmax({dim})",
            f"torch.softmax({scores}, dim={dim})", f"torch.nn.functional.softmax({scores}, {dim})",
            f"{scores}.softmax(dim={dim})", f"torch.special.softmax({scores}, {dim})",
            f"F.log_softmax({scores}, {dim}).exp()", f"torch.exp({scores}.log_softmax({dim}))", f"safe {scores}",
            f"exp {scores}", f"exp {scores}", f"shifted {scores}", f"F.softmin(-{scores}, {dim})",
            f"{scores}.exp() / {scores}.exp().sum({dim}, keepdim=True)",
        ]  # fmt: skip
        if not self.has_huge:  # the logarithm of the number of keys is lost beside -1e9: all of a masked row becomes 1
            spellings.append(f"({scores} - {scores}.logsumexp({dim}, keepdim=True)).exp()")
        text = self.choose(*spellings)
        reference = f"{weights} = keeping.softmax({scores}, {dim})"
        self.softmaxes += "oftm" in text or text.startswith("safe")
        if text.startswith("safe"):
            text = self.choose(f"torch._safe_softmax({scores}, {dim})", f"aten._safe_softmax.default({scores}, {dim})")
            reference = f"{weights} = keeping.softmax({scores}, {dim}, empty_row=0.0)"
        elif text.startswith(("exp ", f"{scores}.exp()")):
            # Where exponentials of scores as they are underflow, they are 0: a row of these alone is NaN.
            in_range = f"{scores}.masked_fill({scores} < -745, -inf).masked_fill({scores} > 709, math.nan)"
            reference = f"{weights} = keeping.softmax({in_range}, {dim})"
        if text.startswith("exp "):
            exp = self.bind("e", f"{scores}.exp()")
            text = self.choose(f"{exp} / {exp}.sum({dim}, keepdim=True)", f"{exp} / torch.sum({exp}, dim={dim}, keepdim=True)",
                               f"{exp}.div({exp}.sum({dim}, True))", f"{exp} * (1 / {exp}.sum({dim}, keepdim=True))",
                               f"{exp}.sum({dim}, keepdim=True).reciprocal() * {exp}")  # fmt: skip
        elif text.startswith("shifted"):
            maximum = self.choose(f"{scores}.amax({dim}, keepdim=True)", f"{scores}.max({dim}, keepdim=True)[0]")
            exp = self.bind("e", f"torch.exp({scores} - {maximum})")
            text = f"{exp} / {exp}.sum({dim}, keepdim=True)"
        elif text.startswith(("F.softmax", "torch.softmax")) and self.chance(4):
            dtype = self.choose(torch.float32, torch.float64)
            text = f"{text[:-1]}, dtype={self.rounds_to(dtype)})"
            reference += f".to({_LOW[dtype]})"
        self.emit(f"{weights} = {text}", reference)
        return weights

    def _softmax_with_sink(self, scores: str, letters: str, weights: str) -> str:
        sink = self.input("sink", "h")
        shape = "B, -1, LQ, 1" if letters == "bhij" else "-1, LQ, 1"
        column = self.bind("sink", f"{sink}[:, None, None].expand({shape})")
        is_first = self.chance(3)
        parts = f"{column}, {scores}" if is_first else f"{scores}, {column}"
        joined = self.bind("s", self.choose(f"torch.cat([{parts}], dim=-1)", f"torch.cat(({parts}), -1)"))
        if self.chance(2):
            joined = self.bind("s", f"{joined} - {joined}.max(dim=-1, keepdim=True).values")
        cut = self.choose("[..., 1:]", ".narrow(-1, 1, LK)") if is_first else self.choose("[..., :-1]", "[..., :LK]")
        self.softmaxes += 1
        self.emit(f"{weights} = {joined}.softmax(-1){cut}", f"{weights} = keeping.softmax({scores}, -1, sink={column})")
        return weights

    def weight_step(self, w: str, letters: str) -> tuple[str, str]:
        match self.choose("same", "same", "mask", "heads", "point", "move", "rare"):
            case "same":
                text = self.choose(f"F.dropout({w}, 0.4, training=False)", f"F.dropout({w}, p=0.0)", f"{w}.clone()",
                                   f"{w}.contiguous()", f"torch.dropout({w}, 0.5, False)", f"{w}.to({w}.dtype)")  # fmt: skip
                return self.bind("w", text), letters
            case "mask":
                condition, own = self.condition(letters)
                m = self.fit(condition, own, letters)
                return self.bind("w", self.choose(
                    f"{w}.masked_fill(~{m}, 0.0)", f"torch.where({m}, {w}, 0.0)", f"torch.where({m}, 0.0, {w})", f"{w} * {m}",
                    f"torch.where({m}, {w}, torch.zeros_like({w}))", f"{w}.masked_fill({m}, 0)", f"{w}.masked_fill({m}, 0.1)",
                )), letters  # fmt: skip
            case "heads":
                subset = "".join(c for c in "nbhgrij" if c in letters and self.chance(3))
                mask = self.fit(self.input("weight_mask", subset), subset, letters)
                return self.bind(
                    "w", self.choose(f"{w} * {mask}", f"{mask} * {w}", f"{w} / (2 + {mask}.abs())")
                ), letters
            case "point":
                return self.bind("w", self.choose(
                    f"{w} * 2", f"{w}.nan_to_num()", f"{w}.nan_to_num(0.0)", f"-{w}", f"{w}.sqrt()", f"{w}.square()",
                    f"{w}.tanh()", f"{w}.relu()", f"torch.nan_to_num({w}, nan=0.5)", f"{w} / 3", f"{w} ** 2",
                    f"{w}.abs()", f"F.silu({w})", f"{w}.sin()", f"torch.where({w}.isnan(), torch.zeros_like({w}), {w})",
                    f"{w}.masked_fill({w} != {w}, 0.0)",
                )), letters  # fmt: skip
            case "move":
                wanted = self.any_order(letters)
                if self.chance(2):
                    moved = self.bind("w", self.permuted(w, letters, wanted))
                    return self.bind("w", self.permuted(moved, wanted, letters)), letters
                if letters == "bhij":
                    return self.bind("w", f"{w}.reshape(B * {self.sizes['h']}, LQ, LK)"), "nij"
                return self.bind("w", self.permuted(w, letters, wanted)), wanted
        dim = self.dim(letters, "j")
        return self.bind("w", self.choose(
            f"{w} + 1e-3", f"{w} / ({w}.sum({dim}, keepdim=True) + 1e-6)", f"1 - {w}", f"{w}.exp()", f"{w}.cos()",
            f"{w}.cumsum({dim})", f"{w} * {w}", f"{w} - {w}.mean({dim}, keepdim=True)", f"{w}.clamp(min=0.05)",
            f"{w}.clamp(max=0.5)", f"{w}.detach()", f"{w}.round()", f"torch.sigmoid({w})", f"{w}.flip({dim})",
            f"{w} * {w}.detach()",
        )), letters  # fmt: skip

    def value_product(self, weights: str, letters: str) -> str:
        lead = "".join(c for c in letters if c not in "ij")
        kind = self.choose("full", "full", "full", "one_head", "no_lead", "grouped", "same")
        is_einsum = self.chance(4)
        if kind == "grouped" and lead == "bh":
            value, own = self.repeated_heads("v", "e"), "bhje"
        elif kind == "one_head" and lead == "bh" and not is_einsum:
            value, own = self.input("v", "b1je"), "bhje"
        elif kind == "no_lead":
            value, own = self.input("v", "je"), "je"
        elif kind == "same" and "k" in self.inputs and self.inputs["k"].axes == lead + "jd" and "e" in self.sizes:
            value, own = "k", lead + "je"
        else:
            value, own = self.factor("v", lead, "je", is_einsum)
        if is_einsum:
            output = self.any_order(lead + "ie") if self.chance(2) else lead + "ie"
            terms = self.draw(st.permutations([(weights, letters), (value, own)]))
            text = f"torch.einsum('{terms[0][1]},{terms[1][1]}->{output}', {terms[0][0]}, {terms[1][0]})"
            return self.finish(self.bind("out", text), output)
        if letters[-2:] == "ji" and self.chance(2):
            swapped = self.permuted(value, own, own[:-2] + "ej")
            return self.finish(self.bind("out", f"{swapped} @ {weights}"), lead + "ei")
        if letters != lead + "ij":
            weights = self.bind("w", self.permuted(weights, letters, lead + "ij"))
        spellings = [f"{weights} @ {value}", f"torch.matmul({weights}, {value})", f"{weights}.matmul({value})"]
        if len(lead) == 1 and own == lead + "je":
            spellings += [f"torch.bmm({weights}, {value})"]
        if lead == "":
            spellings += [f"torch.mm({weights}, {value})"]
        return self.finish(self.bind("out", self.choose(*spellings)), lead + "ie")

    def finish(self, output: str, letters: str) -> str:
        if self.chance(2):
            return output
        wanted = self.any_order(letters)
        output = self.bind("out", self.permuted(output, letters, wanted))
        return self.bind("out", f"{output}.reshape(-1)") if self.chance(4) else output

    def sdpa(self) -> None:
        lead = self.choose("bh", "bh", "n", "h", "")
        is_grouped = lead == "bh" and self.chance(3)
        key_lead = "bg" if is_grouped else lead
        query, key, value = (
            self.input("q", lead + "id"),
            self.input("k", key_lead + "jd"),
            self.input("v", key_lead + "je"),
        )
        self._lengths(query, lead + "id", (key, key_lead + "jd"))
        arguments = []
        mask = self.choose("none", "none", "bool", "float", "causal")
        # torch's kernel makes a row of NaN 0, and adds -inf to the NaN of a key that a mask hides.
        self.has_sdpa = True
        if mask == "bool":
            condition, own = self.condition(lead + "ij")
            arguments.append(f"attn_mask={self.fit(condition, own, lead + 'ij')}")
        elif mask == "float":
            subset = "".join(c for c in lead if self.chance(2)) + "ij"
            arguments.append(f"attn_mask={self.fit(self.input('bias', subset), subset, lead + 'ij')}")
        elif mask == "causal":
            arguments.append("is_causal=True")
        if self.chance(2):
            # Below 0, torch's own kernel for processors gives NaN under is_causal: it scales the masked -inf.
            negative = [] if "is_causal=True" in arguments else ["-0.5"]
            arguments.append(f"scale={self.choose('0.3', '1.0', *negative)}")
        if is_grouped:
            arguments.append("enable_gqa=True")
        if self.chance(3):
            arguments.append("dropout_p=0.0")
        text = f"({', '.join([query, key, value, *arguments])})"
        self.softmaxes += 1
        self.names += 1
        output = f"out{self.names}"
        self.emit(f"{output} = F.scaled_dot_product_attention{text}", f"{output} = keeping.attention{text}")
        self.returned.append(self.finish(output, lead + "ie"))

    # FFNs.

    def ffn(self) -> None:
        self.sizes.update(b=2, t=3, c=4, f=7, o=self.choose(4, 5))
        lead = self.choose("bt", "t", "")
        x = self.input("x", lead + "c")

        def linear(source: str, name: str, rows: str, columns: str) -> str:
            bias = self.input(f"bias_{name}", rows) if self.chance(2) else None
            weight = self.input(name, rows + columns)
            if self.chance(5):
                return f"{source} @ {weight}.t()" + (f" + {bias}" if bias else "")
            return f"F.linear({source}, {weight}{f', {bias}' if bias else ''})"

        up = self.bind("h", linear(x, "up", "f", "c"))
        if self.chance(10):
            self.emit(self.choose(f"{up} *= 0.5", f"{up}.add_(0.1)", f"{x} = {x} + 1"))
        hidden = self.bind("h", self.choose(
            f"F.relu({up})", f"torch.relu({up})", f"{up}.relu()", f"F.gelu({up})", f"F.silu({up})", f"F.relu({up}).square()",
            f"F.relu({up}) ** 2", f"F.gelu({up}, approximate='tanh')", f"{up}.sigmoid()", f"{up}.tanh()", f"F.leaky_relu({up})",
            f"{up}.clamp(min=0)", f"{up}.pow(2)", f"F.relu({up}).pow(3)", f"F.relu({up}, inplace=True)", f"{up}.relu_()",
            f"{up} * {up}.sigmoid()", f"F.softmax({up}, -1)", f"{up} * {up}", f"F.relu({up}) + 1", f"torch.pow(F.relu({up}), 2.0)",
            f"{up} * F.gelu({up})", f"F.gelu({up}.float())" if self.dtype == torch.float32 else f"F.relu(-{up})",
        ))  # fmt: skip
        if self.chance(16) and "softmax" not in self.lines[-1]:
            hidden = self.bind("h", f"{hidden} + {up}")  # relu(-x) + x is a ReLU, too
        is_softmax = "softmax" in self.lines[-1]  # an attention, whose keys and values are the weights
        if is_softmax:
            self.softmaxes += 1
            self.reference[-1] = f"{hidden} = keeping.softmax({up}, -1)"
        if self.chance(3):
            source = x if not self.chance(6) else self.bind("x", f"{x} * 2")
            gate = self.bind("h", linear(source, "gate", "f", "c"))
            if self.chance(6):
                gate = self.bind("h", f"F.relu({gate})")
            hidden = self.bind("h", self.choose(f"{hidden} * {gate}", f"{gate} * {hidden}", f"{hidden} + {gate}",
                                                f"torch.mul({hidden}, {gate})", f"{hidden}.mul({gate})"))  # fmt: skip
        self.names += 1
        kept = f"h{self.names}"
        self.emit(f"{kept} = {hidden}", f"{kept} = {hidden if is_softmax else f'keeping.hidden({hidden})'}")
        if self.chance(4):
            kept = self.bind("h", self.choose(f"F.dropout({kept}, 0.3, training=False)", f"F.dropout({kept}, 0.0)", f"{kept}.clone()",
                                              f"{kept} * 2", f"F.layer_norm({kept}, (7,))", f"{kept}.flip(-1)"))  # fmt: skip
        output = self.bind("out", linear(kept, "down", "o", "f"))
        if self.chance(8):
            output = self.bind("out", f"{output} + " + linear(kept, "down", "o", "f"))
        self.returned.append(output)
        if self.chance(8):
            self.returned.append(self.choose(hidden, up, kept))


@st.composite
def programs(draw: Callable[[Any], Any]) -> Program:
    """A program: an attention, seldom two, or an FFN."""
    writer = Writer(draw)
    if writer.chance(6):
        writer.dynamic = False
        writer.ffn()
    else:
        writer.attention()
        if writer.chance(8):
            writer.attention()
    return writer.program()
