"""The one exception that means "the user can mend this".

Raised with a message that names the flag, the file and the numbers; the entry points print it without a
traceback and exit with code 2. Everything else that is raised is a bug of ours or of a library and keeps its traceback.
"""


class UserError(ValueError):
    """A mistake in flags, files or environment, described for the person who made it."""


class SaveError(UserError):
    """A checkpoint could not be written. Nobody's mistake: another start may fare better."""
