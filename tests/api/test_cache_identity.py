"""Inductor's cache keys hold topk_fx's sources and lowering; a pass of the user's still runs and still counts."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import fx
from torch._inductor import config as inductor_config
from torch._inductor import custom_graph_pass
from torch._inductor.custom_graph_pass import CustomGraphPass

import topk_fx
from topk_fx import cache_identity
from topk_fx.cache_identity import with_identity


class Recorder(CustomGraphPass):
    """A user's pass: remembers the graphs it was given."""

    def __init__(self, uuid: str | None = "users pass") -> None:
        self.graphs: list[fx.Graph] = []
        self._uuid = uuid

    def __call__(self, graph: fx.Graph) -> None:
        self.graphs.append(graph)

    def uuid(self) -> str | None:
        return self._uuid


def key(options: dict, identity: str = "topk_fx") -> object:
    return with_identity(options, identity)["post_grad_custom_pre_pass"].uuid()


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a copy of a source or two, in place of topk_fx's own."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "ops.py").write_text("k = 1\n")
    (tmp_path / "kernels" / "select.cpp").write_text("int k = 1;\n")
    (tmp_path / "kernels" / "select.h").write_text("int k;\n")
    (tmp_path / "notes.txt").write_text("k\n")
    monkeypatch.setattr(cache_identity, "_source_folders", lambda: [tmp_path])
    cache_identity.source_hash.cache_clear()
    yield tmp_path
    cache_identity.source_hash.cache_clear()


def rehashed() -> str:
    cache_identity.source_hash.cache_clear()
    return cache_identity.source_hash()


@pytest.mark.parametrize("name", ["ops.py", "kernels/select.cpp", "kernels/select.h"])
def test_identity_changes_with_every_source(sources, name):
    before = cache_identity.cache_identity("aten")
    (sources / name).write_text("k = 2\n")
    assert rehashed() not in before
    assert cache_identity.cache_identity("aten") != before


def test_identity_changes_with_a_new_and_a_renamed_source(sources):
    hashes = [rehashed()]
    (sources / "extra.py").write_text("")
    hashes.append(rehashed())
    (sources / "extra.py").rename(sources / "other.py")
    hashes.append(rehashed())
    assert len(set(hashes)) == 3


def test_identity_ignores_what_is_no_source(sources):
    before = rehashed()
    (sources / "notes.txt").write_text("other\n")
    assert rehashed() == before


def test_identity_changes_with_the_lowering():
    assert cache_identity.cache_identity("aten") != cache_identity.cache_identity("cpu")


def test_identity_covers_passes_and_lowerings():
    files = {path for folder in cache_identity._source_folders() for path in folder.rglob("*.py")}
    for module in (topk_fx, topk_fx.passes, topk_fx.lowering, topk_fx.lowering.aten):
        assert Path(module.__file__) in files


def test_key_is_the_identity_and_the_pass_changes_nothing():
    assert key({}) == "topk_fx"
    assert key({}, "other") == "other"
    graph = fx.Graph()
    graph.output(graph.placeholder("x"))
    before = str(graph)
    with_identity({}, "topk_fx")["post_grad_custom_pre_pass"](graph)
    assert str(graph) == before


def test_options_are_kept_and_not_changed():
    options = {"max_autotune": True}
    assert with_identity(options, "topk_fx")["max_autotune"] is True
    assert list(options) == ["max_autotune"]


@pytest.mark.parametrize("given_as", ["option", "config"])
def test_users_pass_still_runs_and_stays_in_the_key(given_as):
    users = Recorder()
    graph = fx.Graph()
    with inductor_config.patch(post_grad_custom_pre_pass=users if given_as == "config" else None):
        options = {"post_grad_custom_pre_pass": users} if given_as == "option" else {}
        ours = with_identity(options, "topk_fx")["post_grad_custom_pre_pass"]
    ours(graph)
    assert users.graphs == [graph]
    assert ours.uuid() == ("topk_fx", "users pass")


def test_key_changes_with_the_users_pass():
    keys = [key({"post_grad_custom_pre_pass": x}) for x in (None, Recorder("a"), Recorder("b"))]
    assert len(set(keys)) == 3


def test_pass_without_a_uuid_turns_caching_off_as_inductor_does():
    graphs = []
    assert key({"post_grad_custom_pre_pass": graphs.append}) is None
    assert key({"post_grad_custom_pre_pass": Recorder(None)}) is None
    assert key({"post_grad_custom_pre_pass": Recorder("")}) is None
    assert key({"post_grad_custom_pre_pass": [Recorder("a"), graphs.append]}) is None
    with_identity({"post_grad_custom_pre_pass": graphs.append}, "topk_fx")["post_grad_custom_pre_pass"]("graph")
    assert graphs == ["graph"]


@pytest.mark.parametrize("kind", [list, tuple])
def test_several_passes_run_in_their_order_and_all_count(kind):
    seen = []
    first, last = Recorder("a"), Recorder("b")
    passes = kind([first, lambda graph: seen.append(len(last.graphs)), last])
    with_identity({"post_grad_custom_pre_pass": passes}, "topk_fx")["post_grad_custom_pre_pass"]("graph")
    assert (first.graphs, seen, last.graphs) == (["graph"], [0], ["graph"])
    keys = [key({"post_grad_custom_pre_pass": kind(map(Recorder, names))}) for names in ("ab", "ac", "ba", "a", "")]
    assert keys == [("topk_fx", "a", "b"), ("topk_fx", "a", "c"), ("topk_fx", "b", "a"), ("topk_fx", "a"), "topk_fx"]


@pytest.mark.skipif(
    not hasattr(custom_graph_pass, "CustomInferenceAwareGraphPass"), reason="this torch has no such pass"
)
def test_pass_that_asks_whether_gradients_are_needed_is_told():
    class Asking(custom_graph_pass.CustomInferenceAwareGraphPass):
        def __call__(self, graph, is_inference):
            seen.append(is_inference)

        def uuid(self):
            return "asking"

    seen = []
    ours = with_identity({"post_grad_custom_pre_pass": Asking()}, "topk_fx")["post_grad_custom_pre_pass"]
    assert isinstance(ours, custom_graph_pass.CustomInferenceAwareGraphPass)  # so that Inductor tells it
    ours("graph", is_inference=True)
    ours("graph", is_inference=False)
    assert seen == [True, False]
