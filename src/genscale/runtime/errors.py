"""The one error that is the user's to mend."""


class UserError(Exception):
    """A mistake in a recipe, a file or a command: one line that says what, where, and what was expected.

    The command line prints it as ``error: ...`` and exits with code 2, without a traceback. Every other
    exception is a fault of genscale and keeps its traceback.
    """

    told = False
    """Whether another process of the same run tells it already."""
    exit_code = 2


def nearest(word: str, known: list[str]) -> str:
    """``", did you mean 'x'?"`` for the closest known word, or the empty string when none is close."""
    import difflib

    matches = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f", did you mean '{matches[0]}'?" if matches else ""
