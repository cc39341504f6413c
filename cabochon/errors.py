"""The exceptions the CLI prints as a line: the user's doing and the machine's. A bug is neither."""


class UserError(ValueError):
    """Something the user gave is not usable: the message names the file, line or key, what was expected and what to do.

    The CLI prints it without a traceback and exits with 2. A bug never raises it.
    """


class MachineError(RuntimeError):
    """The machine failed, not the user and not the code: an engine gone, a sandbox that cannot start.

    The CLI prints it without a traceback and exits with 1, so that a script can tell it from a wrong setting.
    """
