"""Merged models on the Hub and in folders. Published code files call `updp_hf.hub.push_model`, so that name stays."""

from updp_hf.errors import HubError
from updp_hf.hub.push import push_folder, push_model

__all__ = ["HubError", "push_folder", "push_model"]
