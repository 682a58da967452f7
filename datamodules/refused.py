"""The error of data, or a setting of theirs, that are of no use: its message is for users."""


class RefusedError(ValueError):
    """One line that names key, value and fix. Any other error that data raise is told as a fault in their code."""
