"""TopKConfig: what to keep, where, and when; validated at construction."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import json
import numbers
import os
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Union, cast

from .errors import ConfigError, UnknownOptionError

Keep = int | float | Literal["all"]
"""How much is kept: a count >= 1, a share in (0, 1], or "all"."""

FrozenSites = tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]
"""Settings by glob as nested tuples, so that a config is hashable."""

ConfigSource = Union["TopKConfig", str, os.PathLike[str]]
"""A configuration, or the path of its JSON."""

DEFAULT_K = 128
DEFAULT_FFN_K = 0.25
LOWERINGS = ("aten", "cpu", "triton")
INNER_COMPILERS = ("inductor", "aot_eager", "eager")
SITE_SETTINGS = ("k", "ffn_k", "when", "enabled")


def validate_keep(name: str, value: object) -> Keep:
    """`value` as a `Keep`, or a ConfigError that names `name`."""
    accepted = 'an int >= 1, a float in (0, 1] (a share), or "all"'
    if isinstance(value, str) and value == "all":
        return "all"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ConfigError(f"{name}={value!r} is not accepted: give {accepted}")
    if isinstance(value, numbers.Integral):
        if value < 1:
            raise ConfigError(f"{name}={value} is not accepted: a count must be at least 1; give {accepted}")
        return int(value)
    if not 0.0 < float(value) <= 1.0:
        raise ConfigError(f"{name}={value} is not accepted: a float is a share and lies in (0, 1]; give {accepted}")
    return float(value)


def as_ratio(share: float) -> tuple[int, int]:
    """A share as numerator and denominator, read as it is written: 0.1 is 1/10."""
    return Fraction(repr(share)).as_integer_ratio()


def kept_count(keep: Keep, total: int) -> int:
    """How many of `total` are asked for: the count itself, the share rounded up, or all. It may exceed `total`."""
    if keep == "all":
        return total
    if isinstance(keep, float):
        numerator, denominator = as_ratio(keep)
        return -(-total * numerator // denominator)
    assert isinstance(keep, int)
    return keep


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint such as ` Did you mean 'k'?`, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


@dataclasses.dataclass(frozen=True)
class SiteConfig:
    """The settings that hold at one site, after the per-site settings were applied."""

    k: Keep
    ffn_k: Keep | None
    when: Literal["pays", "always"]
    ffn_when: Literal["pays", "always"]
    enabled: bool = True


@dataclasses.dataclass(frozen=True)
class TopKConfig:
    """What `backend="topk"` and `topk_fx.rewrite` do. Frozen and hashable.

    Args:
        k: keys kept per query: an int >= 1, a float in (0, 1] (a share of the keys, rounded up), or "all" (every key:
            the result equals dense attention). Default 128.
        ffn_k: hidden units kept per token, in the same form. Default: "all" if k is "all", else a quarter for
            ReLU-family activations. FFNs of other activations are rewritten only if it is given.
        when: "always" rewrites every site, "pays" only those where top-k is expected to take less time than dense.
            Default: "always" for attention if k is given, and for FFNs if ffn_k is; otherwise "pays".
        sites: settings for single sites, by glob on the module path: `{"model.layers.0.*": {"k": 256},
            "*.cross_attn": False}`. False leaves the site dense. Of several globs that match, later ones win. One of
            several sites at one path has its number, from 0 in graph order, behind it: `"layers.0#1"`.
        lowering: force one lowering ("aten", "cpu", "triton"); by default the best available is taken.
        inner: what compiles the rewritten graph: "inductor" (default), "aot_eager" or "eager" (for debugging).
        validate: True runs each site's op, at k = "all", beside the nodes that it would replace, on random inputs of
            the site's shapes, and leaves the site dense if they disagree; "raise" raises a ValidationError then.

    Raises:
        ConfigError: a value is not accepted; the message says what is.
    """

    k: Keep | None = None
    ffn_k: Keep | None = None
    when: Literal["pays", "always"] | None = None
    sites: Mapping[str, Mapping[str, Any] | bool] | FrozenSites = ()
    lowering: Literal["aten", "cpu", "triton"] | None = None
    inner: Literal["inductor", "aot_eager", "eager"] = "inductor"
    validate: bool | Literal["raise"] = False
    _k_given: bool = dataclasses.field(init=False, repr=False, default=False)
    _spelled: str = dataclasses.field(init=False, repr=False, default="")  # k=1 and k=1.0 differ, though 1 == 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "_k_given", self.k is not None)
        object.__setattr__(self, "k", DEFAULT_K if self.k is None else validate_keep("k", self.k))
        _choice("when", self.when, ("pays", "always"), optional=True)
        _choice("lowering", self.lowering, LOWERINGS, optional=True)
        _choice("inner", self.inner, INNER_COMPILERS)
        if not isinstance(self.validate, bool):  # 1 == True, and would be another key
            _choice("validate", self.validate, ("raise",), beside="True, False or ")
        if self.ffn_k is not None:
            object.__setattr__(self, "ffn_k", validate_keep("ffn_k", self.ffn_k))
        object.__setattr__(self, "sites", _freeze_sites(self.sites))
        object.__setattr__(self, "_spelled", repr((self.k, self.ffn_k, self.sites)))

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        """The names that `options=` of torch.compile may hold for topk_fx."""
        return tuple(field.name for field in dataclasses.fields(cls) if field.init)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> TopKConfig:
        """A config from keyword options; an unknown name raises with the nearest known one."""
        for name in options:
            if name not in cls.option_names():
                raise UnknownOptionError(
                    f"unknown option {name!r}; topk_fx knows {', '.join(cls.option_names())}."
                    f"{nearest(name, cls.option_names())}"
                )
        return cls(**options)

    def replace(self, **changes: Any) -> TopKConfig:
        """This configuration with other values for some fields, as if all had been given together."""
        kept = {name: getattr(self, name) for name in self.option_names()}
        if not self._k_given:
            del kept["k"]
        return TopKConfig.from_options({**kept, **changes})

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The configuration as JSON, also written to `path` if it is given; `from_json` reads it back, equal."""
        fields = {name: getattr(self, name) for name in self.option_names()}
        if not self._k_given:
            del fields["k"]
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        fields = {name: value for name, value in fields.items() if name == "k" or value != defaults[name]}
        if "sites" in fields:
            fields["sites"] = {pattern: dict(items) for pattern, items in fields["sites"]}
        text = json.dumps(fields, indent=2)
        if path is not None:
            Path(path).write_text(text + "\n")
        return text

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> TopKConfig:
        """The configuration that `to_json` wrote: from the path of a file, or from its text, which begins with `{`.

        Raises:
            ConfigError: there is no such file, it holds no JSON object, or a value is not accepted.
        """
        is_text = isinstance(source, str) and source.lstrip().startswith("{")
        name = "the JSON text" if is_text else os.fspath(source)
        try:
            fields = json.loads(str(source) if is_text else Path(source).read_text())
        except OSError as error:
            raise ConfigError(f"config={name!r} is not accepted: {error.strerror}; give a TopKConfig's JSON") from error
        except ValueError as error:
            raise ConfigError(f"config: {name} is no JSON: {error}") from error
        if not isinstance(fields, dict):
            raise ConfigError(
                f"config: {name} holds a {type(fields).__name__}; give an object of a TopKConfig's fields"
            )
        return cls.from_options(fields)

    def unmatched(self, sites: Iterable[tuple[str, int]]) -> tuple[str, ...]:
        """The globs of `sites` that match none of the sites, given as module path and number there."""
        known = list(sites)
        globs = (pattern for pattern, _ in cast(FrozenSites, self.sites))
        return tuple(glob for glob in globs if not any(_matches(*site, glob) for site in known))

    def at(self, where: str, number: int = 0) -> SiteConfig:
        """The settings for the site in module `where`, the one of that number if there are several."""
        assert self.k is not None
        settings: dict[str, Any] = {}
        for pattern, items in cast(FrozenSites, self.sites):
            if _matches(where, number, pattern):
                settings.update(items)
        k = settings.get("k", self.k)
        ffn_k = settings.get("ffn_k", self.ffn_k)
        when = settings.get("when", self.when)
        ffn_given = ffn_k is not None or k == "all"
        return SiteConfig(
            k=k,
            ffn_k="all" if ffn_k is None and k == "all" else ffn_k,
            when=when or ("always" if "k" in settings or self._k_given else "pays"),
            ffn_when=when or ("always" if ffn_given else "pays"),
            enabled=settings.get("enabled", True),
        )


def _matches(where: str, number: int, pattern: str) -> bool:
    """Whether a glob means the site of that number at a module path."""
    return fnmatch.fnmatchcase(where, pattern) or fnmatch.fnmatchcase(f"{where}#{number}", pattern)


def as_config(config: object, options: Mapping[str, Any]) -> TopKConfig:
    """The configuration that a caller gave, as an object, as the path of its JSON, or as its fields in `options`."""
    if config is None:
        return TopKConfig.from_options(options)
    if isinstance(config, (str, os.PathLike)):
        config = TopKConfig.from_json(config)
    if not isinstance(config, TopKConfig):
        raise ConfigError(
            f"config={config!r} is not accepted: give a topk_fx.TopKConfig, the path of its JSON, or its fields by name"
        )
    return config.replace(**options)


def _choice(name: str, value: object, accepted: tuple[str, ...], optional: bool = False, beside: str = "") -> None:
    if value is None and optional:
        return
    if value not in accepted:
        hint = nearest(value, accepted) if isinstance(value, str) else ""
        names = f"{beside or 'one of '}{', '.join(map(repr, accepted))}"
        raise ConfigError(f"{name}={value!r} is not accepted: give {names}.{hint}")


def _freeze_sites(sites: object) -> FrozenSites:
    """`sites` as nested tuples, so that the config is hashable."""
    if isinstance(sites, tuple) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in sites):
        sites = {pattern: dict(items) if isinstance(items, tuple) else items for pattern, items in sites}
    if not isinstance(sites, Mapping):
        raise ConfigError(f"sites={sites!r} is not accepted: give a dict from a glob on the module path to settings")
    frozen = []
    for pattern, settings in sites.items():
        if not isinstance(pattern, str):
            raise ConfigError(f"sites: the key {pattern!r} is not accepted: give a glob on the module path, a str")
        if isinstance(settings, bool):
            settings = {"enabled": settings}
        if not isinstance(settings, Mapping):
            raise ConfigError(f"sites[{pattern!r}]={settings!r} is not accepted: give a dict of settings, or False")
        items: dict[str, Any] = {}
        for name, value in settings.items():
            if name not in SITE_SETTINGS:
                raise UnknownOptionError(
                    f"sites[{pattern!r}]: unknown setting {name!r}; a site takes {', '.join(SITE_SETTINGS)}."
                    f"{nearest(str(name), SITE_SETTINGS)}"
                )
            if name in ("k", "ffn_k"):
                value = validate_keep(f"sites[{pattern!r}][{name!r}]", value)
            elif name == "when":
                _choice(f"sites[{pattern!r}]['when']", value, ("pays", "always"))
            elif not isinstance(value, bool):
                raise ConfigError(f"sites[{pattern!r}]['enabled']={value!r} is not accepted: give True or False")
            items[name] = value
        frozen.append((pattern, tuple(sorted(items.items()))))
    return tuple(frozen)
