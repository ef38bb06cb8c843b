"""The one error a user is meant to read."""


class InputError(ValueError):
    """What the user gave cannot be used.

    Its message is one line that names the value, what was expected and the cure. The command line prints it
    on stderr and exits with code 2; any other exception is a bug and keeps its traceback.
    """
