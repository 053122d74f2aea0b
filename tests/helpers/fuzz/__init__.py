"""Random programs, each run in float and in int8: a difference that rounding does not explain is a bug.

``programs``  makes them: Python source, from a seed
``check``     runs one and says what is wrong with it
``shrink``    takes lines out of a wrong one as long as it stays wrong

``python -m fuzz --seconds 600`` (``make fuzz SECONDS=600``) goes on until then; ``tests/compile/test_fuzz.py`` runs
a few hundred.
"""
