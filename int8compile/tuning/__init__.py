"""``int8compile tune``: measures on this machine which form of a computation is the fastest, where there are several.

``tune``      the whole of it
``tunables``  the list of what is chosen; a new one goes in here
``products``  a tunable: the CPU kernel that multiplies, by rows and shape
``attention`` a tunable: the form of an attention of one query, by dtype and heads
``request``   what to measure for: shapes that are given, or those of a model
``measure``   times the forms of one case in turns, and decides

What differs from the defaults is kept by ``int8compile/native/tuned.py``, where the choices are looked up.
"""
