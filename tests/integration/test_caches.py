"""Inductor's caches serve what was compiled from the same graph by the same topk_fx, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import assert_same, drawn
from torch import Tensor, fx
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass

import topk_fx
from topk_fx import cache_identity

INPUTS = (drawn(3, 7, 4, seed=1), drawn(3, 9, 4, seed=2), drawn(3, 9, 5, seed=3))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)).softmax(-1) @ v


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with inductor_config.patch(fx_graph_cache=True, fx_graph_remote_cache=False):
        yield


def compile_anew(k: Any = 3, **options: Any) -> dict[str, int]:
    """Compiles and runs as a new process would, and tells what the cache did."""
    torch._dynamo.reset()
    counters.clear()
    output = torch.compile(attention, backend="topk", options={"k": k, **options})(*INPUTS)
    assert_same(output, topk_fx.reference.attention(*INPUTS, k=k, scale=1.0))
    return {name: counters["inductor"][f"fxgraph_cache_{name}"] for name in ("hit", "miss", "bypass")}


HIT, MISS = {"hit": 1, "miss": 0, "bypass": 0}, {"hit": 0, "miss": 1, "bypass": 0}


def test_same_graph_hits_and_another_k_misses() -> None:
    assert [compile_anew(3), compile_anew(3), compile_anew(2), compile_anew(2)] == [MISS, HIT, MISS, HIT]


def test_changed_sources_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an older topk_fx compiled is not served; going back, it is."""
    assert compile_anew() == MISS
    with monkeypatch.context() as patched:
        patched.setattr(cache_identity, "source_hash", lambda: "another")
        assert compile_anew() == MISS
    assert compile_anew() == HIT


def test_another_lowering_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compile_anew() == MISS
    monkeypatch.setattr("topk_fx.lowering.choose", lambda config: "another")
    assert compile_anew() == MISS


class UsersPass(CustomGraphPass):
    def __init__(self, version: str) -> None:
        self.version = version

    def __call__(self, graph: fx.Graph) -> None:
        pass

    def uuid(self) -> str:
        return self.version


def test_users_pass_counts_by_its_own_identity() -> None:
    runs = [compile_anew(post_grad_custom_pre_pass=UsersPass(version)) for version in ("1", "1", "2")]
    assert runs == [MISS, HIT, MISS]


def test_users_pass_without_identity_is_never_cached() -> None:
    def users_pass(graph: fx.Graph) -> None:
        pass

    assert [compile_anew(post_grad_custom_pre_pass=users_pass)["hit"] for _ in range(2)] == [0, 0]


def test_second_process_hits(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("""
import torch
from torch._dynamo.utils import counters

def attention(q, k, v):
    return (q @ k.transpose(-2, -1)).softmax(-1) @ v

inputs = torch.randn(3, 7, 4), torch.randn(3, 9, 4), torch.randn(3, 9, 5)
output = torch.compile(attention, backend="topk", options={"k": 3})(*inputs)
print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
import topk_fx
torch.testing.assert_close(output, topk_fx.reference.attention(*inputs, k=3, scale=1.0))
""")
    command = [sys.executable, str(script)]
    runs = [
        subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=300, check=False)
        for _ in range(2)
    ]
    assert [run.stdout for run in runs] == ["0 1\n", "1 0\n"], runs[-1].stderr


def test_source_hash_covers_every_source_file() -> None:
    """Python and C++ of topk_fx, of its passes and of its lowerings."""
    folders = cache_identity._source_folders()
    covered = {path.name for folder in folders for path in folder.rglob("*.py")}
    assert {"ops.py", "replay.py", "attention.py", "rewrite.py", "choice.py", "bags.py"} <= covered


def test_source_hash_changes_with_a_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "kernel.cpp").write_text("int a;")
    monkeypatch.setattr(cache_identity, "_source_folders", lambda: [tmp_path])
    hashes = [cache_identity.source_hash.__wrapped__()]
    for name, text in (("kernel.cpp", "int b;"), ("renamed.cpp", "int b;"), ("note.txt", "no source")):
        (tmp_path / name).write_text(text)
        hashes.append(cache_identity.source_hash.__wrapped__())
    assert len(set(hashes)) == 3
    assert hashes[2] == hashes[3]
