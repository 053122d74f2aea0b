"""Runs the ``int8compile`` command inside the test's process."""

from click.testing import Result
from typer.testing import CliRunner

from int8compile.cli import app


def run(*arguments: str, code: int = 0) -> Result:
    """The command's output, after an exit with that code."""
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return result
