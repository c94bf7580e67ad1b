"""The two classes from which every error derives that is not a bug of ours.

A command ends on them with a message and an exit code, never with a traceback. A library user catches them, or the
`ValueError` and `RuntimeError` that they are.
"""


class InputError(ValueError):
    """A file, folder, flag or argument cannot be used; the message names it and says what to do. Exit code 2."""


class RunError(RuntimeError):
    """Work that was possible as asked could not be finished; the message says why. Exit code 1."""
