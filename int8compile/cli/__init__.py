"""The ``int8compile`` command."""

from int8compile.cli.app import main

__all__ = ["main"]
