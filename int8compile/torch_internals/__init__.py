"""The only place for torch's private interfaces. Whatever breaks with a new torch release breaks here.

(``int8compile/inductor.py``, older than this folder, is the other half of it.)
"""
