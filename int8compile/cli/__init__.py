"""The ``int8compile`` command.

``commands``      what each command does
``output``        what they write: results, progress, failures
``diagnosis``     the table of ``doctor``
``tuning``        the table of ``tune``
``accuracy``      the commands ``calibrate`` and ``compare``
``named_models``  the models that a command line names
"""

from int8compile.cli import accuracy
from int8compile.cli.commands import app, main

__all__ = ["accuracy", "app", "main"]
