"""ListOps as Long Range Arena draws it, and the programs that train on it, train on bytes, and take the paper's figures."""

from __future__ import annotations

import importlib
import json
import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fine_tune
import listops
import paper_code
from listops import Bounds


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[MAX 2 9 [MIN 4 7 ] 0 ]", 9),
        ("[MIN 2 9 [SM 8 7 6 ] ]", 1),
        ("[MED 1 5 8 ]", 5),
        ("[MED 1 4 7 8 ]", 5),
        ("[SM 5 5 ]", 0),
        ("7", 7),
    ],
)
def test_expression_comes_to(text, value):
    assert listops.evaluate(text.split()) == value


@pytest.mark.parametrize("text", ["[MAX 1 2", "1 2", "[MAX ]", "] 1", "[NO 1 2 ]", ""])
def test_what_is_no_expression_is_an_error(text):
    with pytest.raises(ValueError, match="is not one expression|is out of place"):
        listops.evaluate(text.split())


def test_drawn_expressions_are_within_their_bounds():
    bounds, source = Bounds(shortest=10, longest=30, depth=3, arguments=4), random.Random(0)
    for _ in range(200):
        tokens = listops.draw(source, bounds)
        assert 10 <= len(tokens) <= 30
        assert 0 <= listops.evaluate(tokens) <= 9
        depth = deepest = 0
        for token in tokens:
            depth += (token in listops.OPERATORS) - (token == listops.END)
            deepest = max(deepest, depth)
        assert deepest <= 2, "digits are the third level"


@pytest.mark.parametrize(
    "wrong", [{"shortest": 3}, {"shortest": 9, "longest": 8}, {"depth": 1}, {"operator_share": 0.0}]
)
def test_bounds_that_no_expression_meets_are_an_error(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Bounds(**wrong)


def test_dataset_has_no_expression_twice_and_is_that_of_its_seed():
    bounds = Bounds(shortest=5, longest=12, depth=2)
    ids, values = listops.draw_dataset(300, bounds, 1)
    assert len(ids.unique(dim=0)) == 300
    assert all(x.equal(y) for x, y in zip((ids, values), listops.draw_dataset(300, bounds, 1), strict=True))
    for row, value in zip(ids.tolist(), values.tolist(), strict=True):
        tokens = [listops.VOCABULARY[x] for x in row[1:] if x != listops.PAD]
        assert row[0] == listops.CLASS
        assert listops.evaluate(tokens) == value


@pytest.mark.parametrize(("name", "score"), [("train_listops", "accuracy"), ("train_bytes", "bits per byte")])
def test_training_writes_scores_of_both_models(name, score, tmp_path, capsys):
    output = tmp_path / name
    importlib.import_module(name).main(["--quick", "--output", str(output)])
    tables = {x["title"]: x["rows"] for x in json.loads(output.with_suffix(".json").read_text())["tables"]}
    (topk,) = (row for row in tables["Over all seeds"] if row.startswith("top-k, k="))
    assert set(tables["Each seed"]) == {f"{model}, seed {n}" for model in ("vanilla", topk) for n in (0, 1)}
    assert all(score in row for row in (*tables["Over all seeds"].values(), *tables["Each seed"].values()))
    assert "## Over all seeds" in capsys.readouterr().out


def test_fine_tuning_sets_each_rival_beside_the_dense_model_with_the_same_training(tmp_path, monkeypatch):
    """Keeping all but one key or unit is nearly dense; keeping few costs something."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, attn_implementation="sdpa",
        )
    ).eval()  # fmt: skip
    monkeypatch.setattr(fine_tune.smollm2, "load_model", lambda _: model)
    monkeypatch.setattr(fine_tune, "load_tokens", lambda _: torch.arange(2000) * 7 % 40)
    output = tmp_path / "fine_tune"
    settings = "--k 1 23 --units 0.97 --length 24 --train-windows 10 --windows 4 --steps 6 --lr 0.01 --inner aot_eager"
    fine_tune.main([*settings.split(), "--output", str(output)])
    (table,) = json.loads(output.with_suffix(".json").read_text())["tables"]
    rows = table["rows"]
    assert list(rows) == ["dense", "k=1", "k=23", "97% of the units"]
    assert rows["dense"]["tuned dense"] == rows["dense"]["tuned so"] < rows["dense"]["perplexity before"]
    for state in ("before", "tuned dense", "tuned so"):
        for name in ("k=23", "97% of the units"):
            assert rows[name][f"of dense, {state}"]["value"] == pytest.approx(1, abs=1e-3)
    assert rows["k=1"]["of dense, tuned dense"]["value"] > 1.001


@pytest.mark.slow
def test_figures_of_the_paper_are_taken_beside_its_own(tmp_path):
    output = tmp_path / "paper"
    importlib.import_module("benchmark_paper").main(
        ["--quick", "--parts", "attention", "--lengths", "64", "128", "--output", str(output)]
    )
    points, growth = (x["rows"] for x in json.loads(output.with_suffix(".json").read_text())["tables"])
    measured = {name for name, row in points.items() if "MiB" in row}
    rivals = ("vanilla", "chunked dense", "SDPA", "paper's code, k=8", "top-k, k=8")
    assert measured == {f"{rival}, {length}" for rival in rivals for length in (64, 128)}
    assert set(growth) == set(rivals)


def test_rival_in_the_manner_of_the_paper_is_topk_attention():
    query, key, value = (torch.randn(1, 2, 40, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    expected = torch.ops.topk_fx.attention(query, key, value, [], "causal", 8**-0.5, 5)
    found = paper_code.topk_attention(query, key, value, k=5, chunk=16)
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(found)
    for x, y in zip(*(torch.autograd.grad(z, (query, key, value), grad) for z in (found, expected)), strict=True):
        torch.testing.assert_close(x, y)
