"""The one exception the CLI prints as a line."""


class UserError(ValueError):
    """Something the user gave is not usable: the message names the file, line or key, what was expected and what to do.

    The CLI prints it without a traceback and exits with 2. A bug never raises it.
    """
