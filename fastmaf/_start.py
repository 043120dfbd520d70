"""What the command does first: Ctrl-C while it is imported ends it as other commands, without a traceback."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress

__all__ = ["interrupt_quietly", "is_command"]


def is_command() -> bool:
    """Whether this process is the command ``fastmaf``, and no other that imports the package."""
    called, words = sys.argv[0] if getattr(sys, "argv", None) else "", sys.orig_argv
    if called == "-m":  # so it is until the module is found
        return "-m" in words[:-1] and words[words.index("-m") + 1] == "fastmaf"
    return os.path.basename(called).removesuffix(".exe") == "fastmaf"


def interrupt_quietly() -> None:
    """Let Ctrl-C end the process, and nothing else, until `main` begins."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        with suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGINT, signal.SIG_DFL)
