"""topk_fx.rewrite of exported programs: run, trained, saved and loaded, with sizes known only at run time."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import Calling, KeepingTopK, assert_same, drawn, values_and_gradients
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import topk_fx
from topk_fx.testing import graph_text

SIZE, K = 12, 3


class Model(nn.Module):
    """Attention masked by padding and by a buffer, an FFN, and two outputs, one of which an op itself puts out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(SIZE, 3 * SIZE)
        self.ffn = nn.Sequential(nn.Linear(SIZE, 20), nn.ReLU(), nn.Linear(20, SIZE))
        self.register_buffer("slopes", torch.tensor([1.0, 0.5, 0.25]).view(3, 1, 1))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Tensor, keep: Tensor) -> dict[str, Tensor]:
        self.calls.add_(1)
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, 3, -1).permute(2, 0, 3, 1, 4)
        distance = torch.arange(length) - torch.arange(length).unsqueeze(-1)
        scores = (q @ k.transpose(-2, -1) + self.slopes * distance).masked_fill(~keep[:, None, None], -1e9)
        x = x + (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, SIZE)
        return {"hidden": x, "output": self.ffn(x)}


def inputs(batch: int = 2, length: int = 9) -> tuple[Tensor, Tensor]:
    return drawn(batch, length, SIZE, seed=length), torch.arange(length).expand(batch, length) < length - 2


def reference(x: Tensor, keep: Tensor, k: Any = K) -> dict[str, Tensor]:
    with KeepingTopK(k):
        return Model()(x, keep)


def export(**options: Any) -> ExportedProgram:
    return torch.export.export(Model(), inputs(), **options)


def reloaded(program: ExportedProgram) -> ExportedProgram:
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    return torch.export.load(buffer)


STEPS: dict[str, Callable[[ExportedProgram], ExportedProgram]] = {
    "rewritten": lambda program: program,
    "saved_and_loaded": reloaded,
    "decomposed": lambda program: program.run_decompositions(),
    "decomposed_saved_and_loaded": lambda program: reloaded(program.run_decompositions()),
}


@pytest.mark.parametrize(("step", "k"), [*((step, K) for step in STEPS), ("rewritten", "all"), ("rewritten", 0.3)])
def test_exported_program_computes_the_reference(step: str, k: Any) -> None:
    program, report = topk_fx.rewrite(export(), k=k, ffn_k="all")
    assert [(site.kind, site.rewritten) for site in report] == [("attention", True), ("ffn", True)]
    module = STEPS[step](program).module()
    assert_same(module(*inputs()), reference(*inputs(), k))
    assert module.calls == 1


@pytest.mark.parametrize("step", STEPS)
def test_exported_program_with_dynamic_sizes_computes_the_reference(step: str) -> None:
    """A share of the keys is counted at run time; where it is one key, that is a length as any other."""
    sizes = {0: Dim("batch", min=1, max=64), 1: Dim("length", min=3, max=64)}
    original = export(dynamic_shapes=(sizes, sizes))
    program, report = topk_fx.rewrite(original, k=0.3)
    assert [site.kind for site in report.rewritten] == ["attention"]
    program = STEPS[step](program)
    assert {str(x): str(span) for x, span in program.range_constraints.items()} == {
        str(x): str(span) for x, span in original.range_constraints.items()
    }
    module = program.module()
    for batch, length in ((2, 9), (1, 4), (5, 31), (2, 3)):
        assert_same(module(*inputs(batch, length)), reference(*inputs(batch, length), 0.3))


def test_exported_program_keeps_its_signature_and_its_original() -> None:
    original = export()
    text, outputs = graph_text(original), [spec.arg.name for spec in original.graph_signature.output_specs]
    program, _ = topk_fx.rewrite(original, k=K, ffn_k=5)
    assert (graph_text(original), [s.arg.name for s in original.graph_signature.output_specs]) == (text, outputs)
    assert_same(original.module()(*inputs()), Model()(*inputs()))
    assert program.graph_signature.input_specs == original.graph_signature.input_specs
    assert program.call_spec == original.call_spec
    returned = next(node for node in reversed(program.graph.nodes) if node.op == "output").all_input_nodes
    assert [spec.arg.name for spec in program.graph_signature.output_specs] == [node.name for node in returned]
    assert program.state_dict["qkv.weight"] is original.state_dict["qkv.weight"]


def test_exported_program_is_checked_as_any_other() -> None:
    program, _ = topk_fx.rewrite(export(), k=K, ffn_k=5)
    program.validate()
    text = graph_text(program)
    assert text.count("topk_fx.attention(") == text.count("topk_fx.ffn(") == 1
    assert "softmax" not in text
    assert graph_text(topk_fx.rewrite(program, k=K, ffn_k=5)[0]) == text


def test_exported_program_trains() -> None:
    def train(model: nn.Module) -> tuple[list[Tensor], dict[str, Tensor]]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(*inputs())["output"].square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return losses, dict(model.named_parameters())

    program, _ = topk_fx.rewrite(export(), k=K)
    with KeepingTopK(K):
        expected = train(Model())
    assert_same(train(program.module()), expected)


def test_saved_program_runs_in_a_process_that_imports_topk_fx(tmp_path: Path) -> None:
    program, _ = topk_fx.rewrite(export(), k=K, ffn_k=5)
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save((inputs(), program.module()(*inputs())), tmp_path / "expected.pt")
    code = """
import sys
import torch
import topk_fx
program = torch.export.load(sys.argv[1] + "/program.pt2")
inputs, expected = torch.load(sys.argv[1] + "/expected.pt")
torch.testing.assert_close(program.module()(*inputs), expected)
print("equal")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ,
    )
    assert done.stdout == "equal\n", done.stderr


def test_attention_that_is_the_output_is_rewritten() -> None:
    """The output's name changes with the node that it is."""

    def model(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        output = F.scaled_dot_product_attention(q, k, k)
        return output, output

    q, k = drawn(2, 7, 4), drawn(2, 9, 4)
    program, report = topk_fx.rewrite(torch.export.export(Calling(model), (q, k)), k=K)
    assert len(report.rewritten) == 1
    expected = topk_fx.reference.attention(q, k, k, k=K)
    assert_same(program.module()(q, k), (expected, expected))
    assert_same(reloaded(program).module()(q, k), (expected, expected))


def test_output_that_is_viewed_is_laid_out_as_that_of_sdpa() -> None:
    """SDPA puts its heads last in memory; then contiguous() does nothing, and an export does not record it."""

    def model(x: Tensor) -> Tensor:
        q = x.view(2, 7, 3, 8).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q).transpose(1, 2).contiguous().view(2, 7, 24)

    x = drawn(2, 7, 24)
    program, report = topk_fx.rewrite(torch.export.export(Calling(model), (x,)), k=K)
    assert [site.rewritten for site in report] == [True]
    with KeepingTopK(K):
        expected = values_and_gradients(model, (x,))
    assert_same(values_and_gradients(program.module(), (x,)), expected)


def test_output_that_leaves_the_graph_is_laid_out_as_that_of_sdpa() -> None:
    """Who calls the program may take a view of it."""

    def model(x: Tensor) -> tuple[Tensor, Tensor]:
        q = x.view(2, 7, 3, 8).transpose(1, 2)
        output = F.scaled_dot_product_attention(q, q, q)
        return output, torch.as_strided(output, (2, 7, 24), (168, 24, 1))

    x = drawn(2, 7, 24)
    program, report = topk_fx.rewrite(torch.export.export(Calling(model), (x,)), k="all")
    assert [site.rewritten for site in report] == [True]
    (output, strided), (expected, expected_strided) = program.module()(x), model(x)
    assert_same(output.transpose(1, 2).view(2, 7, 24), expected.transpose(1, 2).view(2, 7, 24))
    assert_same(strided, expected_strided)


def test_attention_over_a_mutated_buffer_reads_what_dense_reads() -> None:
    """A cache of keys and values, written before it is attended to, as in decoding."""

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("cache", torch.zeros(2, 9, 4))

        def forward(self, x: Tensor, position: Tensor) -> Tensor:
            self.cache.index_copy_(1, position, x)
            keep = torch.arange(9) <= position
            return F.scaled_dot_product_attention(x, self.cache, self.cache, attn_mask=keep)

    positions = [torch.tensor([n]) for n in range(5)]
    tokens = [drawn(2, 1, 4, seed=n) for n in range(5)]
    program, report = topk_fx.rewrite(torch.export.export(Decoder(), (tokens[0], positions[0])), k=2)
    assert len(report.rewritten) == 1
    module, dense = program.module(), Decoder()
    for token, position in zip(tokens, positions, strict=True):
        with KeepingTopK(2):
            expected = dense(token, position)
        assert_same(module(token, position), expected)
    assert_same(module.cache, dense.cache)


def test_unlifted_module_of_a_program_is_rewritten_as_a_graph_module() -> None:
    module, report = topk_fx.rewrite(export().module(), k=K)
    assert [site.kind for site in report.rewritten] == ["attention"]
    assert_same(module(*inputs()), reference(*inputs()))


def test_rewritten_program_is_compiled_by_torch_compile() -> None:
    q, k = drawn(2, 7, 4), drawn(2, 9, 4)
    dense = Calling(lambda q, k: F.scaled_dot_product_attention(q, k, k))
    program, _ = topk_fx.rewrite(torch.export.export(dense, (q, k)), k=K)
    compiled = torch.compile(program.module(), backend="aot_eager", fullgraph=True)
    with KeepingTopK(K):
        expected = values_and_gradients(dense, (q, k))
    assert_same(values_and_gradients(compiled, (q, k)), expected)


@pytest.mark.parametrize("is_inference", [False, True], ids=["no_grad", "inference_mode"])
def test_rewritten_program_runs_from_a_package_of_aotinductor(is_inference: bool, tmp_path: Path) -> None:
    """A score that reads no tensor: AOTInductor hands its empty list of operands to the op as None."""
    q, k = drawn(2, 7, 4), drawn(2, 9, 4)
    dense = Calling(lambda q, k: F.scaled_dot_product_attention(q, k, k))
    lengths = ({}, {1: Dim("length", min=2, max=64)})
    program, _ = topk_fx.rewrite(torch.export.export(dense, (q, k), dynamic_shapes=(lengths,)), k=K)
    with torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        run = torch._inductor.aoti_load_package(package)
    for keys in (9, 21, 2):
        k = drawn(2, keys, 4, seed=keys)
        with torch.inference_mode() if is_inference else torch.no_grad():
            assert_same(run(q, k), topk_fx.reference.attention(q, k, k, k=K))


def test_inputs_named_as_builtins_keep_their_names() -> None:
    """torch.export takes such names, and a copied graph would rename them."""

    class Attention(nn.Module):
        def forward(self, input: Tensor, min: Tensor, type: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(input, min, type)

    q, k = drawn(2, 7, 4), drawn(2, 9, 4)
    named = {"input": q, "min": k, "type": k}
    program, report = topk_fx.rewrite(torch.export.export(Attention(), (), named), k=K)
    assert len(report.rewritten) == 1
    expected = topk_fx.reference.attention(q, k, k, k=K)
    for step in STEPS.values():
        assert_same(step(program).module()(**named), expected)


def test_program_without_attention_is_left_as_it_is() -> None:
    original = torch.export.export(nn.Linear(4, 4), (drawn(2, 4),))
    program, report = topk_fx.rewrite(original, k=K)
    assert graph_text(program) == graph_text(original)
    assert str(report) == "topk_fx: exported program: no softmax, attention call or FFN found; nothing was changed"


@pytest.mark.parametrize("program", [Model(), len, None, "model"], ids=["module", "function", "none", "string"])
def test_what_is_not_traced_is_refused_with_what_to_do(program: Any) -> None:
    message = (
        rf"program is a {type(program).__name__}; accepted: a torch.fx.GraphModule or a torch.export.ExportedProgram"
    )
    with pytest.raises(topk_fx.errors.UnsupportedProgramError, match=message):
        topk_fx.rewrite(program, k=K)


def test_options_are_checked_before_the_program_is_rewritten() -> None:
    program = export()
    with pytest.raises(
        topk_fx.errors.UnknownOptionError, match=r"unknown option 'ks'; topk_fx knows k, .*Did you mean"
    ):
        topk_fx.rewrite(program, ks=3)
    with pytest.raises(topk_fx.errors.ConfigError, match="config=3 is not accepted: give a topk_fx.TopKConfig"):
        topk_fx.rewrite(program, 3)  # type: ignore[arg-type]
    with pytest.raises(topk_fx.errors.UnknownOptionError, match="unknown option 'max_autotune'"):
        topk_fx.rewrite(program, max_autotune=True)


def test_config_is_accepted_whole_and_changed() -> None:
    config = topk_fx.TopKConfig(k=5)
    reports = [topk_fx.rewrite(export(), config)[1], topk_fx.rewrite(export(), config, k=2)[1]]
    assert [[site.k for site in report.rewritten] for report in reports] == [["5"], ["2"]]
