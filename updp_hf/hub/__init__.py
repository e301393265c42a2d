"""Merged models on the Hub and in folders. Published code files call `updp_hf.hub.push_model`, so that name stays."""

from updp_hf.hub.push import HubError, push_folder, push_model

__all__ = ["HubError", "push_folder", "push_model"]
