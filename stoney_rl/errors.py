"""The one exception that means: the input is bad, here is what to do about it."""


class StoneyError(Exception):
    """Bad input. The message is one line: what is wrong, where, what was expected, what to do.

    The library raises it; scripts print it without a traceback and exit with code 2 (see ``cli.run``).
    """
