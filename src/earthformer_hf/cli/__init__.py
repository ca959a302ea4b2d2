"""The command `earthformer-hf`; it needs the extra `cli`."""

import signal
import sys

from ..errors import DEBUG


try:
    import typer  # noqa: F401
except ModuleNotFoundError:
    raise SystemExit("earthformer-hf: typer is missing; install it with: pip install 'earthformer-hf[cli]'") from None

from . import data, forecasts, hub, plots, scores, services  # noqa: E402  registers the commands
from .frame import app  # noqa: E402


def main():
    """The program. Asked to terminate, it removes its drafts and temporary files first, as after an error."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if DEBUG in sys.argv:  # an option of the program, which its parser wants before the command
        sys.argv.remove(DEBUG)
        sys.argv.insert(1, DEBUG)
    app()


__all__ = ["app", "data", "forecasts", "hub", "main", "plots", "scores", "services"]
