"""What a user did wrong, said in one line; entry points print it and exit with status 2."""

import argparse
import sys

BAD_INPUT = 2


class UserError(Exception):
    """Bad input: the message says what was found, what was expected and which option to change."""


class ConfigError(UserError):
    """A configuration that cannot be run."""


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are a `ConfigError` instead of a page of usage."""

    def error(self, message: str) -> None:
        """Raises what was wrong."""
        raise ConfigError(f"{message}; --help shows the usage")


def report_error(error: UserError | OSError) -> int:
    """Prints the error as one line on stderr; returns the exit status for bad input."""
    text = str(error)
    if isinstance(error, OSError):
        text = f"{'' if error.filename is None else f'{error.filename}: '}{error.strerror or error}"
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    return BAD_INPUT
