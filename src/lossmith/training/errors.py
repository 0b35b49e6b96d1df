"""``UserError``: shown by the command line as a message instead of a traceback."""


class UserError(ValueError):
    """The user asked for something impossible; the message says what to do instead."""
