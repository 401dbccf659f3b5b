"""The one error that users see, and the helper that finds what they meant."""

import contextlib
import difflib
import functools
import os
import re
import sys


class UserError(Exception):
    """A mistake in an option file, a path, an image or the environment.

    The message is complete and is printed as it is; entry points turn it into ``error: ...`` and exit code 2.
    """


class SeveralErrors(UserError):
    """Several mistakes at once, a line each.

    Attributes:
        problems (list[str]): the lines.
    """

    def __init__(self, problems, source=None):
        self.problems = [one_line(problem) for problem in problems]
        head = [one_line(source)] if source is not None else []
        if len(self.problems) == 1:
            super().__init__(': '.join([*head, *self.problems]))
        else:
            super().__init__('\n  '.join([': '.join([*head, f'{len(self.problems)} problems']), *self.problems]))


def entry_point(interrupted='interrupted'):
    """Decorator of an entry point ``main(argv=None)`` that returns an exit code, or None for 0.

    Mistakes become ``error: ...`` on the error stream and exit code 2; Ctrl+C becomes ``interrupted`` and 130.
    argparse's own exits are returned, and a reader that has gone (``| head``) is no error.
    """

    def decorate(main):
        @functools.wraps(main)
        def run(argv=None):
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(AttributeError, ValueError):  # not a terminal, pipe or file; closed
                    stream.reconfigure(errors='backslashreplace')  # of letters that its encoding does not have
            try:
                code = main(argv) or 0
                sys.stdout.flush()
                return code
            except UserError as error:
                print(f'error: {error if isinstance(error, SeveralErrors) else one_line(error)}', file=sys.stderr)
                return 2
            except SystemExit as stop:
                return stop.code or 0
            except KeyboardInterrupt:
                print(interrupted, file=sys.stderr)
                return 130
            except BrokenPipeError:
                # What is left to write must go somewhere, or Python complains at its end.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return 0

        return run

    return decorate


def nearest(name, candidates, cutoff=0.6):
    """Return ``" (did you mean 'x'?)"`` for the candidate closest to name, or an empty string."""
    close = difflib.get_close_matches(str(name), [str(c) for c in candidates], n=1, cutoff=cutoff)
    return f" (did you mean '{close[0]}'?)" if close else ''


def one_line(text):
    r"""A text with line breaks and other characters that no terminal shows as escapes, such as ``\n``."""
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in str(text))


def out_of_memory(error):
    """Whether an exception says that memory was asked for and not there, on a GPU or not."""
    names = {cls.__name__ for cls in type(error).__mro__}
    text = str(error)
    return bool(names & {'MemoryError', 'OutOfMemoryError'}) or any(part in text for part in _NO_MEMORY)


# Of torch's allocators on CPUs (Linux, Windows), C++, oneDNN, OpenCV, CUDA and its libraries.
_NO_MEMORY = ("can't allocate memory", 'not enough memory', 'bad_alloc', 'could not create a memory object')
_NO_MEMORY += ('Insufficient memory', 'Failed to allocate memory', 'bad allocation', 'out of memory', '_ALLOC_FAILED')


def looked_in(path, text=' in {}'):
    """The folder that a relative path was looked for in, in a text; '' for an absolute path."""
    try:
        return '' if os.path.isabs(path) else text.format(os.getcwd())
    except OSError:  # the current folder is gone
        return ''


def reason(error):
    """An exception of another library in one line."""
    if isinstance(error, KeyError) and error.args:
        text = str(error.args[0])
        return text if ' ' in text else f'there is no {text!r}'
    # BasicSR raises sentences in pieces.
    pieces = len(error.args) > 1 and all(isinstance(arg, str) for arg in error.args)
    text = (''.join(error.args) if pieces else str(error)).strip().partition('\n')[0]
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        size = re.search(r'\d+ bytes', text)
        return f'not enough memory{f" for {size.group()}" if size else ""}'
    plain = isinstance(error, (AssertionError, OSError, RuntimeError, TypeError, ValueError)) and text
    return text if plain else f'{type(error).__name__}: {text}'.rstrip(': ')
