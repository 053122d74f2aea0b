"""The only place that touches torch's private interfaces; what breaks with a new torch release breaks here.

``dynamo``     what Dynamo knows of the compile that goes on, and torch's structured trace
``inductor``   the hand-off to inductor
``aot``        AOTInductor's packages
``dtensors``   tensors of several processes, and the shard of one that this process holds
``operators``  the schemas behind a graph's calls, and what a call does when it runs on fakes
``graphs``     calls that Dynamo and FX write into graphs, and what they keep on a graph beside its nodes
``modules``    hooks of modules, and PyTorch's families of them
``products``   PyTorch's own product of int8 matrices
``tensors``    a tensor's storage, and whether it is a fake
``files``      the schema of torch's program files
"""
