"""Sharing: folders and hub repositories, their cards, and checks of both."""

from .check import check
from .export import export
from .files import model_files
from .loading import has_weights, load
from .push import push, upload


__all__ = ["check", "export", "has_weights", "load", "model_files", "push", "upload"]
