"""The errors of this package. Each says in one sentence what was found, what was expected and what to do."""

from updp_hf.model.layout_updp import UPDPError

__all__ = [
    "AccessError",
    "ExportError",
    "HubError",
    "MergeError",
    "MissingLibraryError",
    "PlanError",
    "UPDPError",
]


class PlanError(UPDPError):
    """A plan that does not fit a model, or is no plan."""


class ExportError(UPDPError):
    """The model cannot be exported, or the exported file does not compute what the model does."""


class MergeError(UPDPError):
    """The model is not in a state to be merged, or the merged model does not compute what the closed one does."""


class HubError(UPDPError):
    """The Hub did not take the model. What lies on disk is as it was."""


class AccessError(UPDPError, OSError):
    """A file or a repository could not be read or written."""


class MissingLibraryError(UPDPError, ImportError):
    """A library of one of the extras is not installed."""
