"""Compiles every Triton kernel for a GPU that need not be there, and prints what came of it, a JSON line a kernel.

    python compile_triton.py cuda:90          # or cuda:80, cuda:100, hip:gfx942

The launches run as they do on a GPU, with a driver that knows the target alone and compiles instead of launching; so what
is compiled is what is launched, block sizes and specialisations included.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from topk_fx.lowering import triton as lowering
from topk_fx.lowering.triton import ffn
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class OfflineDriver:
    """The parts of a Triton driver that compiling asks for."""

    class utils:
        @staticmethod
        def get_device_properties(_device: int) -> dict[str, int]:
            return {"max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int = 0) -> int:
        return 0


def main(name: str) -> None:
    backend, _, architecture = name.partition(":")
    is_cuda = backend == "cuda"
    target = GPUTarget(backend, int(architecture) if is_cuda else architecture, 32 if is_cuda else 64)
    if not is_cuda:
        torch.version.hip = "offline"  # what the launches look at
    driver.set_active(OfflineDriver(target))
    seen: set[str] = set()
    run = jit.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            facts = facts_of_cuda(kernel) if is_cuda else facts_of_hip(kernel)
            print(json.dumps({"kernel": self.__name__, "shared": kernel.metadata.shared} | facts), flush=True)

    jit.JITFunction.run = compile_only
    launch(torch.bfloat16, 128, "causal")
    launch(torch.float32, 64, "")
    launch(torch.bfloat16, 64, "keep(and(le(j, i), $0), -inf)", [torch.ones(1, 1, 1, 1024, dtype=torch.bool)])
    launch(torch.bfloat16, 128, "div(50.0) tanh mul(50.0)", queries=1)
    launch_ffn(torch.bfloat16, ffn.MOST_UNITS, "silu")
    launch_ffn(torch.float32, 8192, "gelu")


def launch(dtype: torch.dtype, depth: int, score: str, operands: Any = (), queries: int = 1024) -> None:
    """What a forward and a backward launch."""
    query, key, value = (
        torch.zeros(1, heads, n, depth, dtype=dtype) for heads, n in ((4, queries), (2, 1024), (2, 1024))
    )
    inputs = (query, key, value, list(operands), score, 0.1)
    output, indices, weights = lowering.attention_forward(*inputs, 64, None, 0.0, False)
    needs_grad = [False] * len(operands)
    lowering.attention_backward(output, *inputs, indices.zero_(), weights, 0.0, needs_grad)


def launch_ffn(dtype: torch.dtype, units: int, activation: str) -> None:
    """What a forward of few tokens and its backward launch, with the most registers that a selection takes."""
    input, up, gate, down = (
        torch.zeros(shape, dtype=dtype) for shape in ((3, 64), (units, 64), (units, 64), (64, units))
    )
    output, *kept = lowering.ffn_forward(input, up, None, gate, None, down, activation, 64, None, 0.0)
    kept[0].zero_()
    lowering.ffn_backward(output, input, up, gate, down, *kept, None, activation, 0.0)


def facts_of_cuda(kernel: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "-sass")
        )
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    ptx = kernel.asm["ptx"]
    return {
        "registers": registers,
        "spilled": stack,
        "async_copies": len(re.findall(r"cp\.async\.c[ag]", ptx)),
        "matrix_instructions": len(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", ptx)),
        "innermost": innermost_loop(sass),
    }


def innermost_loop(sass: str) -> int:
    """Instructions of the shortest loop that multiplies matrices, 0 if there is none."""
    pattern = r"^\s+/\*([0-9a-f]{4,})\*/\s+(\S[^;]*);"
    code = [(int(m[1], 16), m[2]) for m in re.finditer(pattern, sass, re.MULTILINE)]
    lengths = []
    for address, text in code:
        jump = re.search(r"BRA(?:\.\S+)?\s+.*?(0x[0-9a-f]+)", text)
        if jump and int(jump[1], 16) < address:
            body = [t for a, t in code if int(jump[1], 16) <= a <= address]
            if any(re.search(r"MMA", t) for t in body):
                lengths.append(len(body))
    return min(lengths, default=0)


def facts_of_hip(kernel: Any) -> dict[str, Any]:
    assembly = kernel.asm["amdgcn"]

    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])

    return {
        "registers": number("vgpr_count"),
        "spilled": number("vgpr_spill_count"),
        "matrix_instructions": assembly.count("v_mfma"),
    }


if __name__ == "__main__":
    main(sys.argv[1])
