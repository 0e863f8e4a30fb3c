"""calibrate: the cheapest k for each site with which the whole model loses no more than asked on the user's data."""

from __future__ import annotations

import functools
import glob
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from topk_fx.config import ConfigSource, FrozenSites, TopKConfig, as_config
from topk_fx.errors import CalibrationError, ConfigError, DTypeError
from topk_fx.export import rewrite

from .allocation import Allocation, Point, allocations
from .metric import Batch, Divergence, Loss, Metric, OutputsMetric, metric_of, summarise
from .progress import progress
from .search import last_within
from .statistics import SiteKey, SiteStatistics, measure_graph
from .table import kept_shares, site_table
from .traced import TracedModel, Variant, traced_in_evaluation

DENSE_OUTPUT_BYTES = 2**31
"""Outputs of the dense model that are held; those of further batches are computed again whenever they are needed."""

PROBED_ERROR = 0.03
"""A site is tried alone at the k at which its own output is this far off: enough to show, and near where it ends.

From k = 16 to 512, KL over squared error changed by 2x at most at the 19 of 30 sites of SmolLM2 where it was measured
(one text of 1,024 tokens).
"""

STEPS_OF_K = 8
"""Values of k that are considered between one power of two and the next."""

STEPS_OF_UNIFORM_K = 16


def calibrate(
    model: Callable[..., Any],
    batches: Iterable[Mapping[str, Any]],
    *,
    budget: float,
    metric: str | OutputsMetric = "kl",
    ffn: bool = False,
    confidence: float = 0.95,
    probe_batches: int = 2,
    config: ConfigSource | None = None,
    verbose: bool = True,
) -> TopKConfig:
    """The cheapest k of each site with which the model's loss over `batches`, as measured, is within the budget.

    A dense run with statistics tells how far each site's output is off at each k. Each site is then rewritten alone, at
    one k, which tells what an error there does to the model's outputs. The two give the order in which keys are best
    given up; how far the budget reaches is found by running the rewritten model on all batches, some six times. Last,
    the same k at every site is searched for likewise; the result never keeps more than that.

    Args:
        model: a module or function. It is traced by torch.compile, runs in evaluation mode without gradients, and is
            given back as it was.
        batches: keyword arguments of the model, on its device; the more tokens, the nearer to the budget the result may
            come. An iterable that ends.
        budget: the most loss, in the unit of the metric; > 0.
        metric: "kl": KL(dense || top-k) of the logits, in nats per token. "perplexity": the relative increase, 0.02 is
            +2 %, of a causal language model on `labels` or else `input_ids`. Or a function (outputs, dense_outputs,
            batch) -> float, of which the mean over batches counts. What `attention_mask` hides does not count in the
            first two.
        ffn: whether hidden units of FFNs are given up too.
        confidence: the loss that must be within the budget is the upper bound, at this one-sided confidence, for other
            data like these; 0.5: the measured mean itself. The samples are tokens, or the batches for a function.
        probe_batches: batches, evenly spread, on which the single sites are measured.
        config: of which `lowering`, `inner` and `validate` are taken over, and which sites are to stay dense.
        verbose: print progress (a bar if tqdm is installed) and, at the end, a table of the sites.

    Returns:
        A TopKConfig that names every site, for `options={"config": config}` or `rewrite(program, config)`; `to_json`
        keeps it. A site whose keys are all needed, and any that was not met here, stays dense. A k is a count: it holds
        for lengths like those of the batches.

    Raises:
        CalibrationError: no site can be rewritten, or even the first step is over the budget.
        ConfigError, DTypeError: an argument is not accepted; the message names it.
    """
    budget = _check_budget(budget)
    checked = _check_batches(batches)
    chosen_metric = metric_of(metric)
    checked_confidence = _check_confidence(confidence)
    if isinstance(probe_batches, bool) or not isinstance(probe_batches, int) or probe_batches < 1:
        raise ConfigError(f"probe_batches={probe_batches!r} is not accepted: give an int >= 1")
    if not callable(model):
        raise DTypeError(f"model is a {type(model).__name__}; accepted: a module or a function")
    base = _base(as_config(config, {}))
    with traced_in_evaluation(model) as traced:
        run = _Calibration(traced, checked, chosen_metric, budget, checked_confidence, base, verbose)
        return run.calibrate(("attention", "ffn") if ffn else ("attention",), _spread(len(checked), probe_batches))


class _Calibration:
    """One call of `calibrate`: what it is to reach, and what it has measured so far."""

    def __init__(
        self,
        traced: TracedModel,
        batches: Sequence[Batch],
        metric: Metric,
        budget: float,
        confidence: float,
        base: TopKConfig,
        verbose: bool,
    ) -> None:
        self.traced, self.batches, self.metric, self.budget = traced, batches, metric, budget
        self.confidence, self.base, self.verbose = confidence, base, verbose
        self.dense_outputs: dict[int, Any] = {}
        self.sites: dict[SiteKey, SiteStatistics] = {}
        self.shared_paths: set[str] = set()
        self.losses: dict[Assignment, Loss] = {}

    def calibrate(self, kinds: Sequence[str], probed: Sequence[int]) -> TopKConfig:
        self._measure_sites(kinds, probed)
        sensitivities = self._probe_sites(probed)
        curves = {key: self._curve(site, sensitivities[key]) for key, site in self.sites.items()}
        path, uniform_path = allocations(curves), self._uniform(sensitivities)
        chosen = self._search("k by site", path)
        uniform = self._search("one k", uniform_path)
        best = min((x for x in (chosen, uniform) if x is not None), key=lambda x: x.cost, default=None)
        if best is None:
            raise CalibrationError(self._why_none(path[1]))
        if self.verbose:
            self._print(best, uniform, sensitivities)
        return self.config(best.ks)

    def config(self, ks: Mapping[SiteKey, int | None]) -> TopKConfig:
        """The configuration that rewrites the sites with a k, and nothing else."""
        names = self.names()
        sites: dict[str, Any] = {"*": {"enabled": False}}
        for key, k in ks.items():
            if k is not None:
                sites[pattern_of(names[key])] = {"enabled": True, "k" if key.kind == "attention" else "ffn_k": k}
        return self.base.replace(k="all", when="always", sites=sites)

    def names(self) -> dict[SiteKey, str]:
        """What `sites=` knows each site by: its path, with its number where others have the same."""
        numbered = {*self.shared_paths, ""}
        return {key: f"{key.where}#{key.number}" if key.where in numbered else key.where for key in self.sites}

    def _measure_sites(self, kinds: Sequence[str], probed: Sequence[int]) -> None:
        dense = self.base.replace(k="all", when="always")
        measure: Variant = functools.partial(
            measure_graph, config=dense, kinds=kinds, found=self.sites, shared_paths=self.shared_paths
        )
        with progress("statistics of the dense model", len(probed), self.verbose) as advance:
            for index in probed:
                self.traced.run(self.batches[index], measure)
                advance()
        self.sites = {key: site for key, site in self.sites.items() if site.total > 1 and site.kept(None) > 0}
        if not self.sites:
            raise CalibrationError(
                f"no {' or '.join(kinds)} site of the model can be rewritten; topk_fx.explain says what stays dense, "
                "and why"
            )

    def _probe_sites(self, probed: Sequence[int]) -> dict[SiteKey, float]:
        """For each site, the loss that comes with each part of squared relative error of its output."""
        found = {}
        divergence = Divergence.of(self.metric, self._dense_output(probed[0]))
        with progress("sites, one at a time", len(self.sites), self.verbose) as advance:
            for key, site in self.sites.items():
                distances = [abs(_log(site.relative_error(k)) - _log(PROBED_ERROR)) for k in site.grid]
                k = site.grid[distances.index(min(distances))]
                loss = self._samples({key: k}, probed, divergence).mean().item()
                found[key] = loss / max(site.relative_error(k), _LEAST)
                advance()
        return found

    def _curve(self, site: SiteStatistics, sensitivity: float) -> list[Point]:
        return [
            Point(None, _cost(site, None), 0.0),
            *(_point(site, k, sensitivity) for k in _ks(site.total, STEPS_OF_K)),
        ]

    def _uniform(self, sensitivities: Mapping[SiteKey, float]) -> list[Allocation[SiteKey]]:
        """The same k everywhere, falling from all; with FFNs, the same share of keys and of units."""
        most = max(site.total for site in self.sites.values())
        has_units = any(key.kind == "ffn" for key in self.sites)
        found = []
        for count in [None, *_ks(most, STEPS_OF_UNIFORM_K)]:
            points = {}
            for key, site in self.sites.items():
                k = count if count is None or not has_units else -(-site.total * count // most)
                is_all = k is None or k >= site.total
                points[key] = _point(site, None if is_all else k, sensitivities[key])
            cost, loss = sum(x.cost for x in points.values()), sum(x.loss for x in points.values())
            found.append(Allocation({key: x.k for key, x in points.items()}, cost, loss))
        return found

    def _search(self, name: str, path: Sequence[Allocation[SiteKey]]) -> Allocation[SiteKey] | None:
        """The cheapest of a path whose measured loss is within the budget."""
        predicted, costs = [x.loss for x in path], [x.cost for x in path]
        place = last_within(predicted, costs, lambda n: self._loss(path[n], name).upper, self.budget)
        return path[place] if place > 0 else None

    def _loss(self, allocation: Allocation[SiteKey], name: str) -> Loss:
        """The measured loss over all batches."""
        assignment = tuple(sorted((key, k) for key, k in allocation.ks.items() if k is not None))
        if assignment not in self.losses:
            samples = self._samples(dict(assignment), range(len(self.batches)), self.metric, name)
            self.losses[assignment] = summarise(self.metric, samples, self.confidence)
        return self.losses[assignment]

    def _samples(
        self, ks: Mapping[SiteKey, int], indices: Sequence[int], metric: Metric | Divergence, name: str = ""
    ) -> Tensor:
        """The samples of batches with the sites rewritten."""
        variant: Variant = functools.partial(_rewritten, config=self.config(ks).replace(validate=False))
        found = []
        with progress(f"whole model, {name}", len(indices), self.verbose and bool(name)) as advance:
            for index in indices:
                dense = self._dense_output(index)
                outputs = self.traced.run(self.batches[index], variant)
                found.append(metric.samples(outputs, dense, self.batches[index]).cpu())
                advance()
        samples = torch.cat(found)
        if not samples.numel():
            raise ConfigError("batches have no token that counts: see labels and attention_mask")
        return samples

    def _dense_output(self, index: int) -> Any:
        """What the dense model gives for a batch, held while there is room."""
        if index in self.dense_outputs:
            return self.dense_outputs[index]
        outputs = self.traced.run(self.batches[index])
        if sum(map(_bytes, (outputs, *self.dense_outputs.values()))) <= DENSE_OUTPUT_BYTES:
            self.dense_outputs[index] = outputs
        return outputs

    def _why_none(self, least: Allocation[SiteKey]) -> str:
        (key,) = (key for key, k in least.ks.items() if k is not None)
        loss = self._loss(least, "first step")
        return (
            f"no k meets the budget of {self.metric.text(self.budget)}: the first that is worth giving up is all but "
            f"{least.ks[key]} of {self.sites[key].total} at {self.names()[key]!r} alone, and there the loss is "
            f"{self.metric.text(loss.value)}, at most "
            f"{self.metric.text(loss.upper)} at a confidence of {self.confidence:.0%}. Give a larger budget, or more "
            "batches, which bring the two together; or leave the model dense"
        )

    def _print(
        self,
        best: Allocation[SiteKey],
        uniform: Allocation[SiteKey] | None,
        sensitivities: Mapping[SiteKey, float],
    ) -> None:
        names = self.names()
        rows = [
            (names[key], self.sites[key], k, _point(self.sites[key], k, sensitivities[key]).loss)
            for key, k in best.ks.items()
        ]
        print(site_table(rows))
        loss = self._loss(best, "")
        print(
            f"\ntopk_fx: {self.metric.text(loss.value)} over {len(self.batches)} batches, at most "
            f"{self.metric.text(loss.upper)} at a confidence of {self.confidence:.0%}; "
            f"budget {self.metric.text(self.budget)}"
        )
        print(f"kept: {kept_shares([(self.sites[key], k) for key, k in best.ks.items()])}")
        if uniform is None:
            print("the same k at every site: none is within the budget")
        else:
            share = kept_shares([(self.sites[key], k) for key, k in uniform.ks.items()])
            counts = " and ".join(sorted({str(k) for k in uniform.ks.values() if k is not None}))
            print(
                f"the same at every site (k={counts}): {share}; by site it is x{best.cost / uniform.cost:.2f} of that"
            )


Assignment = tuple[tuple[SiteKey, int], ...]
_LEAST = 1e-12


def pattern_of(name: str) -> str:
    """A glob that matches a name and nothing else."""
    return glob.escape(name)


def _rewritten(graph: fx.GraphModule, config: TopKConfig) -> Callable[..., Any]:
    return rewrite(graph, config)[0]


def _cost(site: SiteStatistics, k: int | None) -> float:
    """Multiplications with what is kept, as an entry of an attention and of an FFN are not the same work."""
    return site.kept(k) * site.width


def _point(site: SiteStatistics, k: int | None, sensitivity: float) -> Point:
    return Point(k, _cost(site, k), 0.0 if k is None else sensitivity * site.relative_error(k))


def _ks(total: int, steps: int) -> list[int]:
    """Counts below `total`, falling, so many between one power of two and the next."""
    last = math.ceil(math.log2(max(total, 2)) * steps)
    return sorted({k for n in range(last + 1) if (k := round(2 ** (n / steps))) < total}, reverse=True)


def _log(x: float) -> float:
    return math.log(max(x, _LEAST))


def _spread(count: int, most: int) -> list[int]:
    """At most so many indices below `count`, evenly spread."""
    most = min(count, most)
    return [(2 * n + 1) * count // (2 * most) for n in range(most)]


def _bytes(outputs: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tree_leaves(outputs) if isinstance(x, Tensor))


def _base(config: TopKConfig) -> TopKConfig:
    """What calibration takes over from a configuration: how to compute, and which sites stay dense."""
    given = cast(FrozenSites, config.sites)
    sites = {pattern: {"enabled": x} for pattern, items in given if (x := dict(items).get("enabled")) is not None}
    return TopKConfig(lowering=config.lowering, inner=config.inner, validate=config.validate, sites=sites)


def _check_budget(budget: object) -> float:
    is_number = isinstance(budget, numbers.Real) and not isinstance(budget, bool)
    if not is_number or not math.isfinite(value := float(cast(float, budget))) or value <= 0:
        raise ConfigError(
            f"budget={budget!r} is not accepted: give a finite float > 0, the most loss in the metric's unit"
        )
    return value


def _check_confidence(confidence: object) -> float:
    is_number = isinstance(confidence, numbers.Real) and not isinstance(confidence, bool)
    if not is_number or not 0.5 <= (value := float(cast(float, confidence))) < 1:
        raise ConfigError(f"confidence={confidence!r} is not accepted: give a float in [0.5, 1)")
    return value


def _check_batches(batches: object) -> list[Batch]:
    accepted = "give an iterable of dicts, the keyword arguments of the model"
    if isinstance(batches, (Mapping, str, Tensor)) or not isinstance(batches, Iterable):
        raise DTypeError(f"batches is a {type(batches).__name__}; {accepted}")
    found = list(batches)
    if not found:
        raise ConfigError(f"batches is empty; {accepted}")
    for number, batch in enumerate(found):
        if not isinstance(batch, Mapping) or not all(isinstance(name, str) for name in batch):
            raise DTypeError(f"batches[{number}] is a {type(batch).__name__}; {accepted}")
    return found
