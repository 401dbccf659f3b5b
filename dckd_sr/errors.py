"""The one error that users see, and the helper that finds what they meant."""

import difflib


class UserError(Exception):
    """A mistake in an option file, a path, an image or the environment.

    The message is complete and is printed as it is; entry points turn it into ``error: ...`` and exit code 2.
    """


def nearest(name, candidates):
    """Return ``" (did you mean 'x'?)"`` for the candidate closest to name, or an empty string."""
    close = difflib.get_close_matches(str(name), [str(c) for c in candidates], n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else ''
