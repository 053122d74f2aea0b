"""A graph of our own: a copy of Dynamo's (or an exported one) with int8 weights as inputs, and its text.

``capture``  the copy, its constants, the inputs that carry int8 weights
``dump``     a graph as text that is the same in every run and version
"""
