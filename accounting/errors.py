"""A person's mistake, and an event that nobody can analyse."""


class OneLine(Exception):
    """An exception whose message is all that a person needs: IPython shows no traceback."""

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


class UserError(OneLine, ValueError):
    """A mistake in what a caller typed or passed.

    The message is one line: what is wrong, which value, what to do. The command line prints it
    without a traceback and exits with status 2; so does a notebook, without the status.
    """


class UnsupportedEvent(UserError):
    """An event for which the chosen accountant or neighbouring relation has no proof.

    The message names the event and what could analyse it instead.
    """
