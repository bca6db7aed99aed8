"""What a user did wrong, said in one line; entry points print it and exit with status 2."""


class UserError(Exception):
    """Bad input: the message says what was found, what was expected and which option to change."""


class ConfigError(UserError):
    """A configuration that cannot be run."""
