"""RewriteReport: the table that a person reads, and what a program asks of it."""

from __future__ import annotations

import dataclasses

import pytest
from expecttest import assert_expected_inline

from topk_fx import RewriteReport, Site

MODEL = RewriteReport(
    (
        Site(
            kind="attention",
            rewritten=True,
            where="layers.0.self_attn",
            node="softmax",
            shapes={"scores": "[2, 8, 1024, 1024]", "D": "64"},
            k="64",
            lowering="aten",
            dense_bytes=2 * 8 * 1024 * 1024 * 4,
            topk_bytes=2 * 8 * 1024 * 64 * 8,
        ),
        Site(
            kind="ffn",
            rewritten=True,
            where="layers.0.mlp",
            node="linear_1",
            shapes={"tokens": "[2, 1024]", "hidden": "2048"},
            k="0.25",
            lowering="aten",
            dense_bytes=2 * 1024 * 2048 * 4,
            topk_bytes=2 * 1024 * 512 * 8,
        ),
        Site(
            kind="attention",
            rewritten=False,
            reason="k_covers_all_keys",
            detail="7 keys, and k is 64",
            where="layers.0.cross_attn",
            node="softmax_1",
            shapes={"scores": "[2, 8, 1024, 7]", "D": "64"},
            dense_bytes=2 * 8 * 1024 * 7 * 4,
            topk_bytes=2 * 8 * 1024 * 7 * 8,
        ),
        Site(kind="attention", rewritten=False, reason="softmax_not_over_keys", node="softmax_2"),
    ),
    "graph 0",
)


def test_printed_report_is_a_table():
    assert_expected_inline(
        str(MODEL),
        """\
topk_fx: graph 0: 1 of 3 attention sites rewritten; 1 of 1 ffn sites rewritten; left dense: 1 k_covers_all_keys, 1 softmax_not_over_keys
where                kind       shapes                        k     dense     top-k    what was done
-------------------  ---------  ----------------------------  ----  --------  -------  ---------------------------------------------------
layers.0.self_attn   attention  scores [2,8,1024,1024], D 64  64    64.0 MiB  8.0 MiB  rewritten, aten
layers.0.mlp         ffn        tokens [2,1024], hidden 2048  0.25  16.0 MiB  8.0 MiB  rewritten, aten
layers.0.cross_attn  attention  scores [2,8,1024,7], D 64           448 KiB            left dense: k_covers_all_keys (7 keys, and k is 64)
softmax_2            attention                                                         left dense: softmax_not_over_keys""",
    )


def test_masks_that_are_tensors_have_a_column():
    masked = dataclasses.replace(MODEL.sites[0], where="layers.1.self_attn", mask_bytes=2 * 1024 * 1024 * 4)
    assert_expected_inline(
        str(RewriteReport((MODEL.sites[0], masked, MODEL.sites[3]), "graph 0")),
        """\
topk_fx: graph 0: 2 of 3 attention sites rewritten; left dense: 1 softmax_not_over_keys
where               kind       shapes                        k   dense     top-k    mask     what was done
------------------  ---------  ----------------------------  --  --------  -------  -------  ---------------------------------
layers.0.self_attn  attention  scores [2,8,1024,1024], D 64  64  64.0 MiB  8.0 MiB           rewritten, aten
layers.1.self_attn  attention  scores [2,8,1024,1024], D 64  64  64.0 MiB  8.0 MiB  8.0 MiB  rewritten, aten
softmax_2           attention                                                                left dense: softmax_not_over_keys""",
    )


def test_sites_of_a_shared_module_are_one_row():
    """A module called three times, as in a looped transformer."""
    sites = [dataclasses.replace(site, node=f"{site.node}_{n}") for n in range(3) for site in MODEL.sites[:2]]
    assert_expected_inline(
        str(RewriteReport(tuple(sites), "graph 0")),
        """\
topk_fx: graph 0: 3 of 3 attention sites rewritten; 3 of 3 ffn sites rewritten
where                    kind       shapes                        k     dense     top-k    what was done
-----------------------  ---------  ----------------------------  ----  --------  -------  ---------------
layers.0.self_attn (3x)  attention  scores [2,8,1024,1024], D 64  64    64.0 MiB  8.0 MiB  rewritten, aten
layers.0.mlp (3x)        ffn        tokens [2,1024], hidden 2048  0.25  16.0 MiB  8.0 MiB  rewritten, aten""",
    )


def test_report_without_a_site_says_so():
    assert_expected_inline(
        str(RewriteReport()),
        """topk_fx: graph: no softmax, attention call or FFN found; nothing was changed""",
    )


def test_summary_names_only_the_kinds_that_occur():
    assert_expected_inline(
        RewriteReport(MODEL.sites[:1]).summary(), """topk_fx: graph: 1 of 1 attention sites rewritten"""
    )
    assert_expected_inline(
        RewriteReport(MODEL.sites[1:3], "graph 7").summary(),
        """\
topk_fx: graph 7: 0 of 1 attention sites rewritten; 1 of 1 ffn sites rewritten; left dense: 1 k_covers_all_keys""",
    )


def test_summary_counts_reasons_in_order_of_name():
    sites = [Site("ffn", False, reason) for reason in ("b_fact", "a_fact", "b_fact")]
    assert RewriteReport(tuple(sites)).summary().endswith("0 of 3 ffn sites rewritten; left dense: 1 a_fact, 2 b_fact")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (100 * 1024, "100 KiB"),
        (3 * 2**20, "3.0 MiB"),
        (5 * 2**30, "5.0 GiB"),
        (5000 * 2**30, "5000 GiB"),
    ],
)
def test_bytes_are_printed_in_the_unit_that_fits(count, text):
    report = RewriteReport((Site("attention", False, "a_fact", node="x", dense_bytes=count),))
    header, _, row = str(report).splitlines()[1:]
    start, end = header.index("dense"), header.index("top-k")
    assert row[start:end].strip() == text


def test_sites_are_told_apart():
    assert [site.where for site in MODEL.rewritten] == ["layers.0.self_attn", "layers.0.mlp"]
    assert [site.reason for site in MODEL.left_dense] == ["k_covers_all_keys", "softmax_not_over_keys"]
    assert list(MODEL) == list(MODEL.sites)
    assert len(MODEL) == 4


def test_reports_add_up():
    both = RewriteReport(MODEL.sites[:1], "graph 0") + RewriteReport(MODEL.sites[1:], "graph 1")
    assert both == MODEL


def test_sites_can_be_gathered_in_a_set():
    assert len({*MODEL, *MODEL}) == 4


def test_glob_that_matches_no_path_is_told() -> None:
    report = dataclasses.replace(MODEL, unmatched=("decoder.*",))
    assert str(report).splitlines()[-1] == "sites='decoder.*' matches none of these paths"
    other = dataclasses.replace(MODEL, unmatched=())
    assert (report + report).unmatched == ("decoder.*",)
    assert (report + other).unmatched == ()
