"""The exceptions that a user of topk_fx can meet.

Every message names the argument, says what came and what is accepted. A graph that is not understood is never an
exception: it stays dense and the `RewriteReport` says why.
"""

from __future__ import annotations


class TopKError(Exception):
    """Base class of all errors raised by topk_fx."""


class ConfigError(TopKError, ValueError):
    """A configuration value or option that is not accepted."""


class UnknownOptionError(ConfigError):
    """An option that neither topk_fx nor Inductor knows."""


class ShapeError(TopKError, ValueError):
    """A tensor whose rank or sizes do not fit the others."""


class DTypeError(TopKError, TypeError):
    """A tensor, or another argument, of a type that is not accepted."""


class LoweringUnavailableError(TopKError, RuntimeError):
    """A lowering was asked for by name and cannot run here."""


class UnsupportedProgramError(TopKError, TypeError):
    """The program given to `rewrite` or `explain` is of no kind that can be rewritten."""


class ValidationError(TopKError, AssertionError):
    """Under `validate="raise"`, a rewrite whose op does not compute what the nodes that it would replace compute."""


class CalibrationError(TopKError, ValueError):
    """`calibrate` found no site to rewrite, or no k whose loss is within the budget."""


class InternalErrorWarning(RuntimeWarning):
    """A fault of topk_fx in reading a graph: the candidate stays dense, with the reason `internal_error`."""


class UnsupportedDerivativeError(TopKError, RuntimeError):
    """Forward-mode or second derivatives, which the top-k ops do not define."""
