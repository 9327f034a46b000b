"""The one error class that means "the user can mend this"."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in what the user gave: input files, options, a foreign folder.

    The message is one line: what was found, where, and the remedy. The command line prints it
    without a traceback and exits with code 2.
    """
