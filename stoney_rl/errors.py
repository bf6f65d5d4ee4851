"""The exceptions that scripts turn into one line and an exit code."""


class StoneyError(Exception):
    """Bad input. The message is one line: what is wrong, where, what was expected, what to do.

    The library raises it; scripts print it without a traceback and exit with code 2 (see ``cli.run``).
    """


class Preempted(Exception):
    """Training was told to stop (SIGTERM), has saved, and can go on. The message says from where and how.

    Scripts print it and exit with ``cli.EXIT_RESUME``.
    """
