"""The one exception that the command line turns into a message instead of a traceback."""


class UserError(ValueError):
    """Something the user asked for cannot be done; the message says what to do instead."""
