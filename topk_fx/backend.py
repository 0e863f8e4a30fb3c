"""torch.compile(model, backend="topk"): rewrites the Dynamo graph, then hands it to Inductor."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from . import lowering
from .compat import compile_with, expand_mode
from .config import TopKConfig, as_config, nearest
from .errors import ConfigError, UnknownOptionError
from .passes import TopKPass
from .report import RewriteReport

log = logging.getLogger(__name__)
_reports: list[RewriteReport] = []
_graph_numbers = itertools.count()


def topk_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend that the entry point `topk` of torch.compile names.

    Args:
        gm: the graph that Dynamo captured; it is rewritten in place.
        example_inputs: the graph's inputs.
        mode: a mode of Inductor's, such as "max-autotune"; torch.compile lets it stand only without options, so it is
            accepted as an option too.
        options: fields of `TopKConfig`, `config` (a TopKConfig that they change, or the path of its JSON), `mode`, and
            options of Inductor's.

    Raises:
        UnknownOptionError: an option that neither topk_fx nor Inductor knows.
        ConfigError: an option with a value that is not accepted.
        LoweringUnavailableError: a lowering was asked for that cannot run here.
    """
    from .cache_identity import cache_identity  # imports Inductor, which `import topk_fx` need not wait for

    config, inductor_options = split_options(options or {}, mode)
    chosen = lowering.choose(config)
    pays = functools.partial(lowering.pays, lowering=chosen)
    run = TopKPass(config, chosen, pays, lowering.lowering_to_run, lowering.ffn_lowering_of)
    report = run(gm, f"graph {next(_graph_numbers)}")
    lowering.register_for(report)
    _reports.append(report)
    log.info("%s", report)
    return compile_with(config.inner, gm, example_inputs, inductor_options, cache_identity(chosen))


def split_options(options: Mapping[str, Any], mode: str | None = None) -> tuple[TopKConfig, dict[str, Any]]:
    """Options of torch.compile as a TopKConfig and what is left for Inductor, with the mode expanded."""
    from torch._inductor import config as inductor_config

    ours = {name: value for name, value in options.items() if name in TopKConfig.option_names()}
    rest = {str(name).replace("-", "_"): value for name, value in options.items() if name not in ours}
    base = rest.pop("config", None)
    mode = rest.pop("mode", None) or mode
    known = inductor_config.get_config_copy()
    for name in rest:
        if name not in known:
            ours_all = (*TopKConfig.option_names(), "config", "mode")
            raise UnknownOptionError(
                f"unknown option {name!r}: it is an option neither of topk_fx ({', '.join(ours_all)}) nor of "
                f"Inductor (torch._inductor.list_options()).{nearest(name, (*ours_all, *known))}"
            )
        kind = inductor_config.get_type(name)  # type: ignore[attr-defined]
        # Generic types and unions know no isinstance; torch.compile does not check them for its own backend either.
        if isinstance(kind, type) and not isinstance(rest[name], kind):
            raise ConfigError(f"{name}={rest[name]!r} is not accepted: Inductor takes a value of type {kind.__name__}")
    return as_config(base, ours), {**(expand_mode(mode) if mode else {}), **rest}


def reports() -> list[RewriteReport]:
    """One report for each graph that `backend="topk"` has compiled since the last `clear_reports`, oldest first."""
    return list(_reports)


def clear_reports() -> None:
    """Forgets all reports."""
    _reports.clear()
