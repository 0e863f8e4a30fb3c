"""TopKConfig: what is accepted, how shares are rounded, and which setting holds at a site."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from topk_fx import TopKConfig
from topk_fx.config import kept_count, validate_keep
from topk_fx.errors import ConfigError, UnknownOptionError


@pytest.mark.parametrize("keep", [1, 128, 0.25, 1.0, 1e-9, "all"])
def test_keep_is_accepted_unchanged(keep):
    accepted = validate_keep("k", keep)
    assert accepted == keep
    assert type(accepted) is type(keep)


def test_numpy_numbers_become_python_numbers():
    assert type(validate_keep("k", np.int64(3))) is int
    assert type(validate_keep("k", np.float64(0.5))) is float


@pytest.mark.parametrize(
    "keep",
    [0, -3, 1.5, 2.0, 0.0, -0.5, math.nan, math.inf, "some", "", True, False, None, [4], 2j, torch.tensor(3)],
    ids=repr,
)
def test_keep_is_refused_by_name(keep):
    with pytest.raises(ConfigError, match=r'ffn_k=.* is not accepted.*give an int >= 1, a float in \(0, 1\].*"all"'):
        validate_keep("ffn_k", keep)


@pytest.mark.parametrize(
    ("keep", "total", "count"),
    [
        (128, 1000, 128),
        (128, 9, 128),
        ("all", 9, 9),
        (1.0, 7, 7),
        (0.5, 1, 1),
        (0.25, 10, 3),
        (0.25, 12, 3),
        (0.1, 30, 3),  # 0.1 * 30 is 3.0000000000000004
        (0.07, 100, 7),  # 0.07 * 100 is 7.000000000000001
        (1 / 3, 3, 1),
        (1e-9, 10, 1),
        (0.5, 0, 0),
    ],
)
def test_share_is_rounded_up_as_written(keep, total, count):
    assert kept_count(keep, total) == count


def test_one_and_one_point_zero_differ():
    assert kept_count(validate_keep("k", 1), 7) == 1
    assert kept_count(validate_keep("k", 1.0), 7) == 7


def test_defaults_leave_slower_sites_dense():
    site = TopKConfig().at("model.layers.0")
    assert (site.k, site.ffn_k, site.when, site.ffn_when, site.enabled) == (128, None, "pays", "pays", True)


def test_given_k_is_obeyed_at_every_attention_site():
    site = TopKConfig(k=128).at("")
    assert (site.k, site.when, site.ffn_when) == (128, "always", "pays")


def test_given_ffn_k_is_obeyed_at_every_ffn_site():
    site = TopKConfig(ffn_k=0.5).at("")
    assert (site.ffn_k, site.when, site.ffn_when) == (0.5, "pays", "always")


@pytest.mark.parametrize("value", [True, False, "raise"])
def test_validate_is_accepted(value):
    config = TopKConfig(validate=value)
    assert config.validate is value
    assert config == TopKConfig().replace(validate=value)
    assert hash(config) == hash(TopKConfig(validate=value))


@pytest.mark.parametrize("value", [1, 0, None, "rise", "true"], ids=repr)
def test_validate_is_refused_by_name(value):
    with pytest.raises(ConfigError, match=r"validate=.* is not accepted: give True, False or 'raise'"):
        TopKConfig(validate=value)


def test_all_keys_mean_all_units():
    site = TopKConfig(k="all").at("")
    assert (site.k, site.ffn_k, site.when, site.ffn_when) == ("all", "all", "always", "always")
    assert TopKConfig(k="all", ffn_k=3).at("").ffn_k == 3


@pytest.mark.parametrize("when", ["pays", "always"])
def test_given_when_decides_for_both_kinds(when):
    site = TopKConfig(k=3, ffn_k=3, when=when).at("")
    assert (site.when, site.ffn_when) == (when, when)


def test_site_settings_follow_globs_and_later_ones_win():
    config = TopKConfig(
        k=64,
        sites={
            "model.layers.*": {"k": 256, "when": "pays"},
            "model.layers.1.*": {"k": 0.5, "ffn_k": "all"},
            "*.cross_attn": False,
            "model.layers.2.cross_attn": {"enabled": True},
        },
    )
    assert config.at("head").k == 64
    assert config.at("model.layers.0.self_attn").k == 256
    assert config.at("model.layers.0.self_attn").when == "pays"
    assert config.at("model.layers.1.self_attn").k == 0.5
    assert config.at("model.layers.1.mlp").ffn_k == "all"
    assert config.at("model.layers.1.mlp").ffn_when == "pays"
    assert not config.at("model.layers.1.cross_attn").enabled
    assert config.at("model.layers.2.cross_attn").enabled


def test_k_of_one_site_is_obeyed_there_alone():
    config = TopKConfig(sites={"a.*": {"k": 8}, "b.*": {"ffn_k": 8}, "c.*": True})
    assert (config.at("a.x").when, config.at("a.x").ffn_when) == ("always", "pays")
    assert (config.at("b.x").when, config.at("b.x").ffn_when) == ("pays", "always")
    assert config.at("c.x") == config.at("elsewhere")


def test_globs_tell_upper_from_lower_case():
    assert TopKConfig(k=1, sites={"Model.*": {"k": 2}}).at("model.a").k == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, r"k=0 is not accepted: a count must be at least 1"),
        ({"k": 1.5}, r"k=1\.5 is not accepted: a float is a share"),
        ({"ffn_k": "some"}, r"ffn_k='some' is not accepted"),
        ({"when": "pay"}, r"when='pay' is not accepted: give one of 'pays', 'always'.*Did you mean 'pays'"),
        ({"when": 3}, r"when=3 is not accepted"),
        ({"lowering": "cuda"}, r"lowering='cuda' is not accepted: give one of 'aten', 'cpu', 'triton'"),
        ({"inner": "tvm"}, r"inner='tvm' is not accepted: give one of 'inductor'"),
        ({"inner": None}, r"inner=None is not accepted"),
        ({"sites": ["a.*"]}, r"sites=\['a.*'\] is not accepted: give a dict"),
        ({"sites": ("a.*", "b.*")}, r"sites=.* is not accepted: give a dict"),
        ({"sites": {1: False}}, r"sites: the key 1 is not accepted"),
        ({"sites": {"a": 64}}, r"sites\['a'\]=64 is not accepted: give a dict of settings, or False"),
        ({"sites": {"a": {"k": True}}}, r"sites\['a'\]\['k'\]=True is not accepted"),
        ({"sites": {"a": {"ffn_k": 2.0}}}, r"sites\['a'\]\['ffn_k'\]=2\.0 is not accepted"),
        ({"sites": {"a": {"when": "never"}}}, r"sites\['a'\]\['when'\]='never' is not accepted"),
        ({"sites": {"a": {"enabled": 1}}}, r"sites\['a'\]\['enabled'\]=1 is not accepted: give True or False"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_config_is_refused_at_construction(options, message):
    with pytest.raises(ConfigError, match=message):
        TopKConfig(**options)


def test_unknown_names_raise_with_the_nearest_known_one():
    with pytest.raises(UnknownOptionError, match=r"unknown option 'fnn_k'; topk_fx knows k,.*Did you mean 'ffn_k'"):
        TopKConfig.from_options({"fnn_k": 3})
    with pytest.raises(UnknownOptionError, match=r"sites\['a'\]: unknown setting 'enable'.*Did you mean 'enabled'"):
        TopKConfig(sites={"a": {"enable": False}})
    with pytest.raises(UnknownOptionError, match="_k_given"):
        TopKConfig.from_options({"_k_given": True})


def test_config_is_frozen_and_hashable():
    sites = {"a.*": {"k": 3}}
    config = TopKConfig(k=64, sites=sites)
    assert hash(config) == hash(TopKConfig(k=64, sites={"a.*": {"k": 3}}))
    assert config == TopKConfig(k=64, sites={"a.*": {"k": 3}})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.k = 3
    sites["a.*"]["k"] = 5
    assert config.at("a.x").k == 3


def test_default_k_and_the_same_k_given_are_different_configs():
    assert TopKConfig() != TopKConfig(k=128)


def test_one_key_and_all_keys_are_different_configs():
    assert TopKConfig(k=1) != TopKConfig(k=1.0)  # though 1 == 1.0 in Python
    assert TopKConfig(sites={"a": {"k": 1}}) != TopKConfig(sites={"a": {"k": 1.0}})


def test_replace_keeps_what_was_not_given():
    config = TopKConfig(ffn_k=0.5, sites={"a": False}).replace(lowering="aten")
    assert (config.at("b").when, config.at("b").ffn_k, config.lowering) == ("pays", 0.5, "aten")
    assert not config.at("a").enabled
    assert config.replace(k=64).at("b").when == "always"
    assert TopKConfig(k=64).replace(ffn_k=3).at("b").when == "always"


def test_replace_refuses_unknown_names():
    with pytest.raises(UnknownOptionError, match="Did you mean 'lowering'"):
        TopKConfig().replace(lowring="aten")


def test_one_of_several_sites_at_a_path_is_named_by_its_number():
    config = TopKConfig(k=1, sites={"a": {"k": 2}, "a#1": {"k": 3}, "*#2": False})
    assert [config.at("a", number).k for number in (0, 1, 2)] == [2, 3, 2]
    assert [config.at("b", number).enabled for number in (1, 2)] == [True, False]
    assert config.at("a#1").k == 3  # a module that is called so
