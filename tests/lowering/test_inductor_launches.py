"""The code that Inductor generates for CUDA tensors launches our kernels: read, compiled and interpreted, with no GPU."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from triton_cases import why_not_interpreted

from topk_fx.compat import INDUCTOR_VIEWS_BOOLS

PROGRAM = Path(__file__).with_name("generated_code.py")
LONG = 4096
PREFILL = {"group_maxima", "thresholds", "mark", "list_marked", "recollect", "attend"}
KERNELS = {
    "grouped heads, ragged tiles": PREFILL | {"gradients"},
    "soft cap": PREFILL,  # whose backward is not one kernel, and stays a call
    "dropout": PREFILL | {"gradients"},
    "permuted layout": PREFILL | {"gradients"},
    "decode, masked": {"row_scores", "attend_to_scores", "gradients"},
    "decode, sink": {"row_scores", "attend_to_scores", "gradients"},
    "FFN": {"hidden_units", "select_units", "project_down"},
    "gated FFN with dropout": {"hidden_units", "select_units", "project_down"},
}
WITH_BOOLEANS = {"dropout", "decode, masked", "gated FFN with dropout"}

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run(task: str, folder: Path, interpret: bool = False) -> list[dict]:
    environment = {
        **os.environ,
        "TRITON_INTERPRET": str(int(interpret)),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"),
    }
    found = subprocess.run([sys.executable, PROGRAM, task, folder], capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stderr[-2000:]
    return [json.loads(line) for line in found.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("generated")


def test_generated_code_computes_what_the_kernels_do(folder):
    if why := why_not_interpreted():
        pytest.skip(why)
    run("write", folder)
    found = {x["case"]: x for x in run("run", folder, interpret=True)}
    assert set(found) == set(KERNELS)
    for name, kernels in KERNELS.items():
        launched = {x.removeprefix("topk_fx_") for x in found[name]["kernels"] if x.startswith("topk_fx_")}
        assert max(found[name]["differences"]) < 1e-5, found[name]
        if name in WITH_BOOLEANS and not INDUCTOR_VIEWS_BOOLS:
            continue
        assert launched == kernels, name
        calls = re.findall(r"torch\.ops\.topk_fx\.(\w+)\.default\(", (folder / f"{name}.py").read_text())
        assert set(calls) == ({"attention_backward"} if name == "soft cap" else set())


def test_kernels_in_generated_code_compile_and_need_no_memory_of_queries_by_keys(folder):
    kernels = run("compile", folder)
    assert {x["kernel"].removeprefix("topk_fx_") for x in kernels} == PREFILL | {"gradients"}
    assert all(x["spilled"] == 0 for x in kernels), kernels
    code = (folder / "long, given.py").read_text()
    shapes = re.findall(r"empty_strided_cuda\(\(([^)]*)\)", code)
    sizes = [math.prod(int(n) for n in shape.split(",") if n.strip()) for shape in shapes]
    assert len(sizes) > 5
    assert max(sizes) < LONG * LONG
    assert len(re.findall(r"topk_fx_\w+\.run\(", code)) == 7


def test_max_autotune_lets_inductor_try_other_launches(folder):
    code = (folder / "long, tried.py").read_text()
    found = re.findall(r"configs=(\[.*?\]),\n.*?@triton\.jit\ndef topk_fx_(\w+)\(", code, re.DOTALL)
    counts = {name: configs.count("num_warps") for configs, name in found}
    assert counts["group_maxima"] > 1
    assert counts["gradients"] == 1, "Inductor would add to the gradients again with each trial"
