"""The errors a user can mend: printed as a message without a traceback, exit code 2."""

from __future__ import annotations


class UserError(ValueError):
    """Something in the configuration, the input files or the cluster that the user can mend.

    The message names the file, row and field, what was expected and what was found.
    """
