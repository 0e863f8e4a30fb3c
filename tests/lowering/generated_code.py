"""Writes the code that Inductor generates for our ops on CUDA tensors, compiles it, or runs it on a processor.

    python generated_code.py write FOLDER     # CASE.py for each case; no GPU is needed
    python generated_code.py compile FOLDER   # the kernels of a long attention, as Inductor does, for sm_90
    TRITON_INTERPRET=1 python generated_code.py run FOLDER

The last two print a JSON line for each kernel or case. Where code is run, Triton's interpreter computes the kernels of its
text, launched as its text says. The results are compared with those of the kernels that are launched at once; these have
other block sizes there, and so sums another order.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from topk_fx.lowering import inductor
from triton_cases import CASES, Case, inputs_of

Program = Callable[..., Sequence[Tensor]]

NAMES = ("grouped heads, ragged tiles", "soft cap", "dropout", "permuted layout", "decode, masked", "decode, sink")
LONG = 4096


def programs() -> dict[str, tuple[Program, list[Tensor]]]:
    """What is compiled, by name, and its inputs."""
    attentions = [case for case in CASES if case.name in NAMES]
    assert len(attentions) == len(NAMES)
    return {
        **{case.name: attention(case) for case in attentions},
        "FFN": ffn("relu", has_gate=False),
        "gated FFN with dropout": ffn("silu", has_gate=True, dropout_p=0.3),
    }


def attention(case: Case) -> tuple[Program, list[Tensor]]:
    """Forward and backward, of tensors that Inductor has computed before, and with results that it computes with."""
    x = inputs_of(case)
    has_keep = x.dropout_keep is not None

    def run(query: Tensor, key: Tensor, value: Tensor, grad: Tensor, *rest: Tensor) -> Sequence[Tensor]:
        operands, keep = (list(rest[:-1]), rest[-1]) if has_keep else (list(rest), None)
        settings = (operands, case.score, case.scale)
        key = key * 2
        output, indices, weights = torch.ops.topk_fx.attention_forward(
            query, key, value, *settings, x.k, keep, case.dropout_p, case.zero_empty_rows, "triton"
        )
        needs_grad = [False] * len(operands)
        grads = torch.ops.topk_fx.attention_backward(
            grad, query, key, value, *settings, indices, weights, case.dropout_p, needs_grad, "triton"
        )
        return output + 1, indices, weights, *grads

    rest = [*x.operands, x.dropout_keep] if has_keep else x.operands
    return run, [x.query, x.key, x.value, x.grad, *rest]


def ffn(activation: str, has_gate: bool, dropout_p: float = 0.0) -> tuple[Program, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 40), (130, 40), (130,), (24, 130), *(((130, 40), (130,)) if has_gate else ()))
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    keep = [torch.rand(3, 13, generator=generator) >= dropout_p] if dropout_p else []

    def run(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, *rest: Tensor) -> Sequence[Tensor]:
        gate = rest[:2] if has_gate else (None, None)
        found = torch.ops.topk_fx.ffn_forward(
            x + 1, up, up_bias, *gate, down, activation, 13, rest[-1] if dropout_p else None, dropout_p, "triton"
        )
        return [y for y in found if y.numel()]

    return run, [*tensors, *keep]


def long_attention() -> tuple[Program, list[Tensor]]:
    """bfloat16, causal, forward and backward; its inputs are only to be looked at."""
    case = Case("long", "causal", heads=4, key_heads=2, queries=LONG, keys=LONG, depth=128, value_size=128, k=64)
    program, tensors = attention(case)
    return program, [x.bfloat16() for x in tensors]


# --- writing


def write(folder: Path) -> None:
    import fake_cuda

    fake_cuda.install()
    inductor.register()
    for name, (program, tensors) in programs().items():
        (folder / f"{name}.py").write_text(fake_cuda.generated_code(program, tensors))


def compile_long(folder: Path) -> None:
    import fake_cuda
    from compile_triton import facts_of_cuda
    from torch._inductor.codecache import PyCodeCache

    fake_cuda.install()
    inductor.register()
    code = {}
    for name, is_tried in (("given", False), ("tried", True)):
        code[name] = fake_cuda.generated_code(*long_attention(), max_autotune=is_tried)
        (folder / f"long, {name}.py").write_text(code[name])
    kernels = re.findall(r"async_compile\.triton\('(topk_fx_\w+)', '{3}(.*?)'{3}, device_str", code["given"], re.DOTALL)
    for name, source in kernels:
        kernel = getattr(PyCodeCache.load(source), name)
        kernel.inductor_meta["use_static_triton_launcher"] = False
        kernel.precompile(warm_cache_only=True)
        (result,) = kernel.compile_results
        print(json.dumps({"kernel": name, **facts_of_cuda(result.kernel)}), flush=True)


# --- running


def run(folder: Path) -> None:
    for name, (program, tensors) in programs().items():
        path = folder / f"{name}.py"
        module = interpreted(path)
        kernels = sorted(path.stem for path in path.with_suffix("").glob("*.py"))
        found = module.call([x.clone() for x in tensors])
        expected = program(*tensors)
        differences = [difference(x, y) for x, y in zip(found, expected, strict=True)]
        print(json.dumps({"case": name, "kernels": kernels, "differences": differences}), flush=True)


def difference(x: Tensor, y: Tensor) -> float:
    """The largest, as a share of the largest number; infinite where dtypes, shapes, whole numbers or NaN differ."""
    is_same = (x.dtype, x.shape) == (y.dtype, y.shape) and x.isnan().equal(y.isnan())
    if not is_same or not (x.is_floating_point() or x.equal(y)):
        return float("inf")
    x, y = x.double().nan_to_num(), y.double().nan_to_num()
    return ((x - y).abs().max() / y.abs().max().clamp(min=1e-6)).item()


def interpreted(path: Path) -> ModuleType:
    """Generated code as a module whose tensors are on the processor and whose kernels are interpreted."""
    text = path.read_text()
    text = text.replace("with torch.cuda._DeviceGuard(0):", "if True:").replace("torch.cuda.set_device(0)", "pass")
    text = re.sub(r"^from torch\._C import _cuda_getCurrentRawStream as .*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^async_compile = AsyncCompile\(\)$", "async_compile = KERNELS", text, flags=re.MULTILINE)
    text = re.sub(r"^empty_strided_cuda = .*$", "", text, flags=re.MULTILINE)
    module = ModuleType("generated_code_of_inductor")
    module.__dict__.update(
        __file__=str(path), KERNELS=Kernels(path.with_suffix("")), empty_strided_cuda=garbage,
        get_raw_stream=lambda _: 0,
    )  # fmt: skip
    exec(compile(text, path, "exec"), module.__dict__)
    return module


def garbage(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory that nothing has written to: what is read of it shows."""
    return torch.empty_strided(shape, strides, dtype=dtype).fill_(torch.nan if dtype.is_floating_point else 10**8)


class Kernels:
    """In the place of Inductor's `async_compile`: kernels for the interpreter, from files that it can read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def triton(self, name: str, source: str, device_str: str = "cuda") -> Kernel:
        tree = ast.parse(source)
        (entry,) = (x for x in tree.body if isinstance(x, ast.FunctionDef) and len(x.decorator_list) > 1)
        heuristic, jit = entry.decorator_list
        entry.decorator_list = [jit]
        tree.body = [x for x in tree.body if not isinstance(x, ast.Expr)]  # a call that looks for a GPU
        path = self.folder / f"{entry.name}.py"
        path.write_text(ast.unparse(tree))
        spec = importlib.util.spec_from_file_location(f"kernel_{len(list(self.folder.iterdir()))}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return Kernel(getattr(module, entry.name), {x.arg: x.value for x in heuristic.keywords})

    def wait(self, _scope: Any) -> None:
        pass


class Kernel:
    """A kernel as generated code calls it. `settings` are the arguments of its heuristic, not evaluated."""

    def __init__(self, function: Any, settings: dict[str, ast.expr]) -> None:
        self.function, self.names = function, function.arg_names
        self.meta = ast.literal_eval(settings["inductor_meta"])
        self.constants = {"XBLOCK": 64}
        if "configs" in settings:
            (config,) = ast.literal_eval(settings["configs"])
            self.constants = {name: x for name, x in config.items() if name in self.names}

    def run(self, *arguments: Any, stream: int) -> None:
        taken = [name for name in self.names if name not in self.constants]
        named = dict(zip(taken, arguments, strict=False))
        if self.meta["grid_type"] == "Grid1D":
            grid = (-(-named["xnumel"] // self.constants["XBLOCK"]),)
        else:
            assert self.meta["grid_type"] == "FixedGrid", self.meta["grid_type"]
            grid = arguments[len(taken) :]
        self.function[tuple(grid)](**named, **self.constants)


if __name__ == "__main__":
    {"write": write, "compile": compile_long, "run": run}[sys.argv[1]](Path(sys.argv[2]))
