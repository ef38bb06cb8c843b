"""The error that is shown to users."""


class InputError(ValueError):
    """The user's input cannot be used.

    Its message is one line that names the value, what was expected and the fix. The command line prints it
    on stderr and exits with code 2; any other exception is a bug and keeps its traceback.
    """
