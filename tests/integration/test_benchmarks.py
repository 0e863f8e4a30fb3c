"""Each benchmark of examples/ runs at tiny sizes, agrees with its rivals, and writes figures of all of them."""

from __future__ import annotations

import importlib
import importlib.util
import json

import pytest
import torch
from topk_fx.lowering.cpu import build

pytestmark = pytest.mark.skipif(
    bool(build.why_unavailable()), reason=f"C++ cannot be compiled: {build.why_unavailable()}"
)

ROWS_AND_RIVALS = {
    "benchmark_attention": (2, {"SDPA", "matmul, softmax", "matmul, softmax, Inductor", "top-k, C++", "top-k, chunked ATen"}),
    "benchmark_decode": (2, {"SDPA", "matmul, softmax", "matmul, softmax, Inductor", "top-k, C++", "top-k, chunked ATen"}),
    "benchmark_ffn": (2, {"torch, dense", "Inductor, dense", "top-k, ATen", "top-k, C++"}),
    "benchmark_masks": (1, {"causal", "causal: SDPA", "window of 512", "ALiBi, read", "T5's bias, computed: SDPA"}),
    "benchmark_model": (3, {"SDPA, Inductor", 'backend="topk"'}),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS_AND_RIVALS)
def test_benchmark_writes_figures_of_all_rivals(name, tmp_path, capsys):
    output = tmp_path / f"{name}.json"
    importlib.import_module(name).main(["--quick", "--output", str(output)])
    figures, shown = json.loads(output.read_text()), capsys.readouterr().out
    count, rivals = ROWS_AND_RIVALS[name]
    assert figures["command"] == f"python examples/{name}.py --quick --output {output}"
    assert (figures["torch"], figures["threads"]) == (torch.__version__, 1)
    assert len(figures["rows"]) == count
    for row in figures["rows"]:
        assert rivals <= row["rivals"].keys()
        assert row["label"] in shown
        for rival in row["rivals"].values():
            assert 0 < rival["milliseconds_low"] <= rival["milliseconds"] <= rival["milliseconds_high"]
            assert rival["ratio"] > 0
            assert rival["topk_ratio"] > 0
    assert output.with_suffix(".png").exists() == (importlib.util.find_spec("matplotlib") is not None)


def test_quick_gives_way_to_what_is_said(tmp_path):
    output = tmp_path / "attention.json"
    importlib.import_module("benchmark_attention").main(
        ["--quick", "--lengths", "32", "64", "--tasks", "forward", "--k", "4", "--output", str(output)]
    )
    assert [(row["length"], row["k"]) for row in json.loads(output.read_text())["rows"]] == [(32, 4), (64, 4)]


def test_screening_is_timed_beside_plain_and_dense(tmp_path, capsys):
    output = tmp_path / "screening.json"
    arguments = ["--lengths", "300", "--sizes", "16", "--k", "8", "--rounds", "1", "--output", str(output)]
    importlib.import_module("benchmark_screening").main(arguments)
    rows = json.loads(output.read_text())["rows"]
    assert [row["what"] for row in rows] == ["prefill"] * 4 + ["decode"] * 4
    for row in rows:
        assert row["milliseconds"].keys() == {"torch, dense", "top-k, plain", "top-k, screened"}
        assert row["screened/plain"]["median"] > 0
        assert row["screened/dense"]["median"] > 0
    assert "screened/plain x" in capsys.readouterr().out


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("instructions", build.supported_instruction_sets())
def test_dense_control_is_attention(instructions, dtype, is_causal):
    control = importlib.import_module("dense_control")
    for length, depth in ((1, 8), (97, 64), (130, 33)):
        query, key, value = (torch.randn(1, 2, length, depth).to(dtype) for _ in range(3))
        with build.instruction_set(instructions):
            output = control.attention(query, key, value, is_causal=is_causal)
        expected = torch.nn.functional.scaled_dot_product_attention(
            query.double(), key.double(), value.double(), is_causal=is_causal
        )
        # The exponentials are rounded to bfloat16 where its pairs are multiplied.
        rounding = 1e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(
            output.double(), expected, rtol=0, atol=rounding * max(1, expected.abs().max().item())
        )
    with pytest.raises(ValueError, match="contiguous and of one shape and dtype"):
        control.attention(query, key[:, :, :5], value, is_causal=is_causal)
