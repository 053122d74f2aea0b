"""The copy of a graph that passes rewrite, with int8 weights as inputs, and graphs as text.

``capture``  copies a graph; knows its constants and adds inputs for int8 weights
``dump``     prints a graph as text that is the same in every run and version
"""
