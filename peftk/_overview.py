"""Whether this process is the command line that was asked for its overview or version alone."""

from __future__ import annotations

import os
import sys

ANSWERED = {"--help", "-h", "--version"}
"""What `peftk` answers by itself; without arguments it prints its overview too."""


def asked_for() -> bool:
    """Say whether `peftk` or `python -m peftk` runs with no arguments but these."""
    # A program that embeds Python may have none.
    program, *arguments = getattr(sys, "argv", None) or [""]
    started = list(zip(sys.orig_argv, sys.orig_argv[1:], strict=False))
    # While the package of a module is imported, the module's own path is not known yet.
    module = program == "-m" and ("-m", "peftk") in started
    script = os.path.basename(program) in ("peftk", "peftk.exe")
    return (module or script) and set(arguments) <= ANSWERED
