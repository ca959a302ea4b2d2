"""The command `earthformer-hf`; it needs the extra `cli`."""

import signal
import sys

from ..errors import DEBUG
from . import data, forecasts, hub, plots, scores, services  # registers the commands
from .frame import app


def main():
    """The program. Asked to terminate, it removes its drafts and temporary files first, as after an error."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if DEBUG in sys.argv:  # an option of the program, which its parser wants before the command
        sys.argv.remove(DEBUG)
        sys.argv.insert(1, DEBUG)
    app()


__all__ = ["app", "data", "forecasts", "hub", "main", "plots", "scores", "services"]
