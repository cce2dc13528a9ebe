"""Errors that a user can mend."""


class UserError(ValueError):
    """Something in the input that its user can mend: one message with the place (file, key), the rule and the value.

    The command line prints the message without a traceback and ends with exit code 2; any other error ends with 1.
    """
