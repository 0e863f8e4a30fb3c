"""Pretends that there is an H100: enough for Inductor to generate code for fake CUDA tensors, and to compile its kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import config
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from torch._inductor.virtualized import V
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

SHARED_MEMORY = 232448


class Properties:
    name = "NVIDIA H100"
    major, minor = 9, 0
    multi_processor_count = 132
    total_memory = 80 * 2**30
    warp_size = 32
    max_threads_per_multi_processor, max_threads_per_block = 2048, 1024
    regs_per_multiprocessor = 65536
    L2_cache_size = 50 * 2**20
    gcnArchName = ""
    shared_memory_per_block, shared_memory_per_block_optin = 49152, SHARED_MEMORY
    shared_memory_per_multiprocessor = SHARED_MEMORY + 1024


class Driver:
    """The parts of a Triton driver that generating code asks for."""

    class utils:
        @staticmethod
        def get_device_properties(_device: int) -> dict[str, int]:
            return {"max_shared_mem": SHARED_MEMORY, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}

    launcher_cls = None

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int = 0) -> int:
        return 0


def install() -> None:
    """Puts stubs in the place of what asks the driver, for the rest of the process."""

    def nothing(*_: Any, **__: Any) -> None:
        return None

    def zero(*_: Any, **__: Any) -> int:
        return 0

    for name in ("_cuda_getDevice", "_cuda_maybeExchangeDevice", "_cuda_exchangeDevice", "_cuda_getCurrentRawStream"):
        setattr(torch._C, name, zero)
    torch._C._cuda_setDevice = nothing
    for name in ("_lazy_init", "synchronize", "set_device"):
        setattr(torch.cuda, name, nothing)
    for name in ("_exchange_device", "_maybe_exchange_device", "current_device"):
        setattr(torch.cuda, name, zero)
    answers = {
        "is_available": True, "device_count": 1, "get_device_properties": Properties, "get_device_name": Properties.name,
        "get_device_capability": (9, 0),
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    interface = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_compute_capability": 90,
        "get_device_properties": Properties,
    }  # fmt: skip
    for name, answer in interface.items():
        setattr(CudaInterface, name, staticmethod(lambda *_, answer=answer: answer))
    CudaInterface.Worker.get_device_properties = staticmethod(lambda *_: Properties)
    CudaInterface.Worker.current_device = staticmethod(zero)
    driver.set_active(Driver())
    triton_helpers.set_driver_to_gpu = nothing
    fake_tensor.init_gpu_context = nothing


def generated_code(function: Callable[..., Any], tensors: Sequence[Tensor], **options: Any) -> str:
    """The code that Inductor generates for a function of CUDA tensors shaped and laid out as `tensors`."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.no_grad():
        fakes = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda") for x in tensors]
        traced = make_fx(function, decomposition_table=select_decomp_table())(*fakes)
        with V.set_fake_mode(mode), DebugContext(), config.patch(compile_threads=1, **options):
            graph = GraphLowering(traced, example_inputs=fakes)
            with V.set_graph_handler(graph):
                graph.run(*fakes)
                code, _ = graph.codegen()
    return code.value if hasattr(code, "value") else code
