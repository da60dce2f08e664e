"""Errors that are the user's to mend: one sentence, no traceback."""


class UserError(Exception):
    """A mistake in what was asked for or given, not in the program.

    The message names the thing, the place and the way out. The command line prints
    it alone and exits with 2.
    """
