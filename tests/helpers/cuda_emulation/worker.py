"""The other side of ``Emulator``: loads a library and answers calls, pickled on stdin, on stdout."""

import ctypes
import os
import pickle
import sys

import torch

answers = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)  # whatever else is printed must not get between the answers
torch.set_num_threads(1)
library = ctypes.CDLL(sys.argv[1])
torch.ops.load_library(sys.argv[1])

while True:
    try:
        op, args, settings = pickle.load(sys.stdin.buffer)
    except EOFError:
        break
    try:
        if op == "counts":
            result = library.emulation_barriers(), library.emulation_waits()
        else:
            values = [settings.get(n, d) for n, d in (("seed", 0), ("skip_barrier", -1), ("skip_wait", -1))]
            library.emulation_set(*values, settings.get("multiprocessors", 2))
            result = getattr(torch.ops.int8compile_emulated, op)(*args)
        pickle.dump(("ok", result), answers)
    except Exception as error:  # whatever the operator raises is the caller's
        pickle.dump(("error", error), answers)
    answers.flush()
