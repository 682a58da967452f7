"""The error of a setting that cannot be: its message is for users. Imports no torch."""


class RefusedError(ValueError):
    """One line that names key, value and fix. Any other error that a model raises is told as a fault in its code."""
