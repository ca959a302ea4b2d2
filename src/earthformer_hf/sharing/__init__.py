"""Sharing: folders and hub repositories, their cards, and checks of both."""

from .check import check
from .export import export
from .push import has_weights, load, push, upload


__all__ = ["check", "export", "has_weights", "load", "push", "upload"]
