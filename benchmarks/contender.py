"""A model under one backend, in a process of its own.

Contenders that are timed against each other take turns, so that a slow minute of the machine hits all of them. Each
lives in its own process: they compile at the same time, share no caches or thread pools, one's memory can be told from
another's, and ending the process frees all of it.

    contender = Contender("HuggingFaceTB/SmolLM2-135M-Instruct", dtype="float32", backend="int8")
    contender.submit("open_cache", 256).result()
    seconds, nll = contender.submit("score", tokens).result()
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import time
import traceback
import warnings
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

BACKENDS = ("eager", "inductor", "int8", "emulation")


class Model:
    """A causal language model of transformers, compiled (or not), and its static cache.

    Args:
        path: a transformers folder or hub id.
        dtype: name of the dtype that weights and activations have, such as ``"float32"``.
        backend: ``"eager"``, a backend of torch.compile, or ``"emulation"`` (see ``benchmarks/emulation.py``).
        device: such as ``"cpu"`` or ``"cuda"``.
        options: for torch.compile.
    """

    def __init__(self, path: str, dtype: str, backend: str, device: str, options: dict[str, Any] | None) -> None:
        import torch
        import transformers

        warnings.filterwarnings("ignore")
        logging.getLogger("torch").setLevel(logging.ERROR)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        torch.set_grad_enabled(False)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
        self.model = model.to(device).eval()
        self.device = device
        if backend == "emulation":
            from benchmarks.emulation import emulate_

            emulate_(self.model)
        if backend in ("eager", "emulation"):
            self.forward = self.model
        else:
            # Static, because a prompt and a single token shall each have the graph that suits them best.
            self.forward = torch.compile(self.model, backend=backend, dynamic=False, options=options)

    def open_cache(self, length: int, tokens: list[int] | None = None) -> None:
        """Make a static cache for ``length`` tokens that holds ``tokens``. Call it before anything is compiled.

        The tokens go in by the eager float model, as ``generate`` would do it: the cache must be allocated outside of
        compiled code. A decode step takes the same time whatever the cache holds.
        """
        from transformers import StaticCache

        self.cache = StaticCache(config=self.model.config, max_cache_len=length)
        self.model(self._ids(tokens or [0]), past_key_values=self.cache, use_cache=True)
        if tokens is None:
            self.cache.reset()

    def score(self, tokens: list[int]) -> tuple[float, float]:
        """Run a prompt without a cache: seconds, and mean negative log-likelihood of its tokens (nats)."""
        from torch.nn.functional import cross_entropy

        ids = self._ids(tokens)
        self._wait()
        start = time.perf_counter()
        logits = self.forward(ids, use_cache=False).logits
        self._wait()
        seconds = time.perf_counter() - start
        return seconds, float(cross_entropy(logits[0, :-1].float(), ids[0, 1:]))

    def decode(self, tokens: list[int], count: int) -> tuple[list[int], list[float]]:
        """Add ``tokens`` to the cache one at a time, then continue greedily.

        Returns:
            ``count`` new tokens, and the seconds that each call took, those for ``tokens`` included.
        """
        new: list[int] = []
        seconds: list[float] = []
        pending = list(tokens)
        while len(new) < count:
            ids = self._ids([pending.pop(0) if pending else new[-1]])
            start = time.perf_counter()
            logits = self.forward(ids, past_key_values=self.cache, use_cache=True).logits
            token = int(logits[0, -1].argmax())  # waits for the device
            seconds.append(time.perf_counter() - start)
            if not pending:
                new.append(token)
        return new, seconds

    def tensor_bytes(self) -> int:
        """Bytes of all tensors alive in this process, but for those of the cache; each storage counted once."""
        import torch

        gc.collect()
        kinds = (torch.Tensor, torch.nn.Parameter)  # and no fake tensors of the compiler's
        device = torch.device(self.device).type
        storages = [t.untyped_storage() for t in gc.get_objects() if type(t) in kinds and t.device.type == device]
        sizes = {storage._cdata: storage.nbytes() for storage in storages if _has_memory(storage)}
        for layer in getattr(getattr(self, "cache", None), "layers", ()):
            for t in (layer.keys, layer.values):
                sizes.pop(t.untyped_storage()._cdata, None)
        return sum(sizes.values())

    def report(self) -> Any:
        """The ``int8compile.Report`` of this process; None under other backends."""
        import int8compile

        return int8compile.last_report()

    def _ids(self, tokens: list[int]) -> Any:
        import torch

        return torch.tensor([tokens], device=self.device)

    def _wait(self) -> None:
        import torch

        if self.device != "cpu":
            torch.cuda.synchronize()


def _has_memory(storage: Any) -> bool:
    """Whether a storage has its memory still; one that was freed keeps its nominal size, and raises or is null."""
    try:
        return bool(storage.data_ptr() != 0)
    except RuntimeError:
        return False


_model: Model | None = None  # the one model of a contender's process


def _call(method: str, args: tuple[Any, ...]) -> Any:
    global _model
    try:
        if method == "__init__":
            _model = Model(*args)
            return None
        return getattr(_model, method)(*args)
    except Exception as error:
        # Not every exception of torch survives pickling; its text does.
        raise RuntimeError(f"{type(error).__name__}: {error}\n{traceback.format_exc()}") from None


class Contender:
    """A ``Model`` in a process of its own. Calls are carried out in order."""

    def __init__(
        self,
        path: str,
        *,
        dtype: str,
        backend: str,
        device: str = "cpu",
        options: dict[str, Any] | None = None,
    ) -> None:
        self.name = f"{dtype}-{backend}"
        self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        self.loaded = self._pool.submit(_call, "__init__", (path, dtype, backend, device, options))

    def submit(self, method: str, *args: Any) -> Future[Any]:
        """Call a method of ``Model`` there."""
        return self._pool.submit(_call, method, args)

    def close(self) -> None:
        """End the process after the call it is in, dropping those that wait."""
        self._pool.shutdown(wait=True, cancel_futures=True)
