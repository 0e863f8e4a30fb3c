"""Runs the C++ kernels of one instruction set, built with sanitizers, over the calls that are hardest for memory.

    LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \\
        PYTHONPATH=tests python tests/lowering/sanitized.py avx2

AddressSanitizer sees memory of torch too, as the preloaded library is what allocates it; a report of it or of
UndefinedBehaviorSanitizer ends the process. The results are compared with the definition on the way. Instead of an
instruction set, the name of one of FAULTS runs that fault, so that a test can see the report.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator

os.environ.pop("LD_PRELOAD", None)  # which is for this process, not for the compiler that it runs

import torch
from inputs import LAYOUTS, attention_inputs
from kernel_checks import DTYPES, INF, LOWEST, NAN, check_attention, check_ffn, ffn_arguments, normal
from topk_fx.lowering import cpu
from topk_fx.lowering.cpu import build, screening
from torch import Tensor

SANITIZERS = (
    *("-O1", "-g1", "-fno-omit-frame-pointer"),
    *("-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"),
)

FAULTS = {
    "write_beyond_a_tensor": 'extern "C" float fault(float* x, int count) { return x[count] = 1; }\n',
    "signed_overflow": 'extern "C" float fault(float* x, int count) { return x[0] + (count + 0x7ffffffb); }\n',
}
"""Functions of five numbers and their count; what each does wrong is in its name."""

SCORES = {
    "causal": list,
    "mask($0)": lambda full: [torch.rand(1, full[1], *full[2:]) < 0.3],
    "keep(and(le(j, i), gt(j, sub(i, $0))), -inf)": lambda full: [torch.full((1, 1, 1, 1), 20)],
    "keep(and(le(j, i), $0), -inf)": lambda full: [(torch.arange(full[3]) < full[3] // 2 + 1).view(1, 1, 1, -1)],
    "add($0)": lambda full: [torch.zeros(full[-2:]).masked_fill(torch.rand(full[-2:]) < 0.5, LOWEST)[None, None]],
    "div(2.0) tanh mul(2.0) add($0) causal": lambda full: [torch.randn(1, full[1], full[3], full[2]).mT],
    "div(2.0) tanh mul(2.0) keep($0, -1e9)": lambda full: [torch.rand(1, 1, *full[2:]) < 0.9],
    "mul(2.0) add($0) sub($1)": lambda full: [torch.randn(1, full[1], *full[2:]), torch.randn(1, 1, 1, full[3])],
    "add(lookup($0, minimum(abs(sub(j, i)), 15)))": lambda full: [torch.randn(1, full[1], 1, 16)],
}
"""Score functions with what draws their operands, given [B, Hq, Lq, Lk]."""


def main(name: str) -> None:
    if name in FAULTS:
        return run_fault(FAULTS[name])
    for instructions, options in build.INSTRUCTION_SETS.items():
        build.INSTRUCTION_SETS[instructions] = (*options, *SANITIZERS)
    torch.manual_seed(0)
    with build.instruction_set(name):
        start_builds()
        for threads in (1, 2):
            torch.set_num_threads(threads)
            count = sum(1 for run in (attention, scores, hard_rows, screened, empty_tensors, ffns) for _ in run())
            print(f"{name}, {threads} threads: {count} calls without a report")


def run_fault(code: str) -> None:
    build.INSTRUCTION_SETS["portable"] += SANITIZERS
    with build.instruction_set("portable"):
        fault = build.load(code).fault
    x = torch.ones(5)
    fault.restype = ctypes.c_float
    print("not reported:", fault(ctypes.c_void_p(x.data_ptr()), ctypes.c_int(5)))


def start_builds() -> None:
    """Kernels are compiled several at a time, before the first of them is needed."""
    for dtype in DTYPES:
        tensor = torch.empty(1, 1, 1, 1, dtype=dtype, requires_grad=True)
        cpu.prepare(tensor, tensor, tensor, [], "causal")


def attention() -> Iterator[Tensor]:
    """Prefills and decodings of sizes beside every block, tile and vector, in all layouts; forward and backward."""
    sizes = [(1, 1, 1, 1), (4, 33, 15, 17), (13, 129, 33, 20), (97, 263, 40, 37), (1, 1300, 64, 16), (3, 1025, 31, 129)]
    layouts = list(LAYOUTS.values())
    for number, (queries, keys, size, value_size) in enumerate(sizes):
        for dtype in DTYPES:
            inputs = attention_inputs((2,), 4, queries, keys, size, value_size, key_heads=2, dtype=dtype)
            exact = [layouts[(number + n) % len(layouts)](x.detach()) for n, x in enumerate(inputs)]
            drawn = [torch.randn(x.shape).to(dtype) for x in inputs]
            for k in (1, 17, keys + 3):  # an odd k, too: the memory of every thread is aligned nonetheless
                yield check_attention(*exact, k=k, is_exact=True)
                yield check_attention(*drawn, "causal", scale=-0.3, k=k)
                yield backward(*exact, k=k)


def backward(query: Tensor, key: Tensor, value: Tensor, k: int) -> Tensor:
    arguments = (query, key, value, [], "causal", 0.5)
    dropout_keep = torch.rand(*query.shape[:3], min(k, key.size(2))) < 0.5
    output, indices, weights = cpu.attention_forward(*arguments, k, dropout_keep, 0.5, True)
    gradients = cpu.attention_backward(
        torch.randn(output.shape).to(output.dtype), *arguments, indices, weights, 0.5, []
    )
    assert all(x.isfinite().all() for x in gradients)
    return indices


def scores() -> Iterator[Tensor]:
    """Generated code: masks, windows, tables and biases whose last element ends their memory."""
    for queries, keys in ((1, 150), (67, 150), (131, 129)):
        query, key, value = (torch.randn(1, 2, length, 24) for length in (queries, keys, keys))
        for score, draw in SCORES.items():
            operands = draw((1, 2, queries, keys)) if draw is not list else []
            yield check_attention(query, key, value, score, operands, k=11)


def hard_rows() -> Iterator[Tensor]:
    """NaN and infinite scores, rows without a key, all scores equal, and each key better than the last."""
    for dtype in DTYPES:
        query, key, value = (x.detach() for x in attention_inputs((1,), 2, 40, 300, 16, 24, dtype=dtype))
        mask = torch.rand(1, 2, 40, 300) < 0.3
        mask[:, :, 7] = False
        poisoned = [query.clone(), key.clone(), value]
        poisoned[0][0, 0, 3, 2], poisoned[0][0, 1, 5, 0], poisoned[1][0, 0, 17, 3] = NAN, INF, NAN
        for zero_empty_rows in (False, True):
            yield check_attention(*poisoned, "mask($0)", [mask], k=30, zero_empty_rows=zero_empty_rows, is_exact=True)
        yield check_attention(query, key, value, scale=0.0, k=9, is_exact=True)
        yield check_attention(query, key, value, scale=INF, k=9, zero_empty_rows=True, is_exact=True)
        rising = torch.arange(300.0).to(dtype).view(1, 1, 300, 1).expand(1, 2, 300, 16)
        for k in (1, 64, 299):
            yield check_attention(torch.ones_like(query), rising / 16, value, k=k, is_exact=True)


def screened() -> Iterator[Tensor]:
    """Keys screened in int8, if the instruction set has that."""
    if screening.is_available():
        with screening.forced(True) as counts:
            yield from scores()
            yield from hard_rows()
        assert counts.screened > counts.left


def empty_tensors() -> Iterator[Tensor]:
    for batch, queries, keys, size, value_size in (
        *((0, 3, 5, 4, 4), (1, 0, 5, 4, 4), (1, 3, 0, 4, 4)),
        *((1, 3, 5, 0, 4), (1, 3, 5, 4, 0), (1, 20, 5, 0, 4)),
    ):
        query, key = torch.randn(batch, 2, queries, size), torch.randn(batch, 2, keys, size)
        value = torch.randn(batch, 2, keys, value_size)
        output, *_ = cpu.attention_forward(query, key, value, [], "", 0.5, 3, None, 0.0, True)
        assert output.shape == (batch, 2, queries, value_size)
        yield output


def ffns() -> Iterator[Tensor]:
    """Numbers of tokens beside a pass, sizes beside a vector, weights by rows and by columns; forward and backward."""
    for dtype in DTYPES:
        for tokens, sizes in (
            (1, (1, 1, 1)),
            (2, (37, 131, 29)),
            (9, (64, 65, 70)),
            (5, (33, 64, 300)),
            (3, (4, 0, 3)),
        ):
            for gated in (False, True):
                exact = ffn_arguments(tokens, sizes, gated=gated, dtype=dtype)
                columns = {name: x.T.contiguous().T if "weight" in name and gated else x for name, x in exact.items()}
                drawn = ffn_arguments(tokens, sizes, gated=gated, biased=False, dtype=dtype, draw=normal)
                for k in (1, 17, sizes[1] + 1):
                    yield check_ffn(exact, k, is_exact=True)[0]
                    yield check_ffn(columns, k, is_exact=True)[0]
                    yield ffn_backward(drawn, k)


def ffn_backward(args: dict[str, Tensor], k: int) -> Tensor:
    kept = min(k, args["up_weight"].size(0))
    keep = torch.rand(args["input"].size(0), kept) < 0.5
    output, *saved = cpu.ffn_forward(**args, activation="silu", k=k, dropout_keep=keep, dropout_p=0.5)
    weights = (args[name] for name in ("input", "up_weight", "gate_weight", "down_weight"))
    gradients = cpu.ffn_backward(torch.randn(output.shape).to(output.dtype), *weights, *saved, keep, "silu", 0.5)
    assert all(x.isfinite().all() for x in gradients)
    return output


if __name__ == "__main__":
    main(sys.argv[1])
