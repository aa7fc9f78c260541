"""The one exception for what a user can mend."""


class HashretError(Exception):
    """Something the user can mend; its text is one line that says what to do next."""
