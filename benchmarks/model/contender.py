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

FLOATS = ("float32", "bfloat16", "float16")
#: backend -> the dtypes it can have
BACKENDS: dict[str, tuple[str, ...]] = {
    "eager": FLOATS,
    "inductor": FLOATS,
    "frozen": FLOATS,  # inductor, with freezing: weights are constants, prepacked
    "autotuned": FLOATS,  # the same with max-autotune
    "int8": FLOATS,
    "int8-head": FLOATS,  # the output embedding in int8 too
    "int8-weights-head": FLOATS,  # the output embedding's weights in int8, its activations in float
    "int8-weights": FLOATS,  # every linear so
    "emulation": FLOATS,  # LLM.int8() by the tests' gold; slow
    "torchao": FLOATS,  # int8 dynamic, by inductor with freezing and max-autotune
    "torchao-weights": FLOATS,  # int8 weights alone, likewise; without freezing unless in bfloat16
    "bitsandbytes": FLOATS,
    "onnxruntime": ("float32",),
    "llama.cpp": ("q8_0",),
}
FLOAT_BACKENDS = ("eager", "inductor", "frozen", "autotuned")
PEERS = ("torchao", "torchao-weights", "bitsandbytes", "onnxruntime", "llama.cpp")

_AUTOTUNED = {"freezing": True, "max_autotune": True}
_COMPILED: dict[str, tuple[str, dict[str, Any] | None]] = {
    "inductor": ("inductor", None),
    "frozen": ("inductor", {"freezing": True}),
    "autotuned": ("inductor", _AUTOTUNED),
    "torchao": ("inductor", _AUTOTUNED),
    "torchao-weights": ("inductor", _AUTOTUNED),
    "int8": ("int8", None),
    "int8-head": ("int8", {"skip_output_embeddings": False}),
    "int8-weights-head": ("int8", {"llm_int8_weight_only_modules": ["lm_head"]}),
    "int8-weights": ("int8", {"llm_int8_weight_only_modules": ["lm_head"], "activation": "float"}),
}


def make_model(
    path: str, dtype: str, backend: str, device: str, options: dict[str, Any] | None, threads: int | None
) -> Any:
    """What a contender's process holds: a ``Model``, or a peer with the same methods.

    Raises:
        AbsentError: the peer is not installed, or cannot run such a model.
    """
    import torch

    own_process()
    if threads:
        torch.set_num_threads(threads)
    if backend == "onnxruntime":
        from benchmarks.model.peer_onnx import OnnxRuntime

        return OnnxRuntime(load(path, dtype))
    if backend == "llama.cpp":
        from benchmarks.model.peer_llamacpp import LlamaCpp

        return LlamaCpp(load(path, "float32"))
    return Model(path, dtype, backend, device, options)


def own_process() -> None:
    """No gradients, and neither warnings nor progress, in this process from now on."""
    import torch
    import transformers

    warnings.filterwarnings("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_grad_enabled(False)


def load(path: str, dtype: str) -> Any:
    """A causal language model in eval mode.

    Args:
        path: a transformers folder or hub id, or ``shape:NAME`` for one of ``benchmarks/model/random_llama.py``.
        dtype: name of the dtype that weights and activations have.
    """
    import torch
    import transformers

    if path.startswith("shape:"):
        from benchmarks.model.random_llama import random_llama

        return random_llama(path.removeprefix("shape:"), getattr(torch, dtype))
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    return model.eval()


class Model:
    """A causal language model of transformers, compiled (or not), and its static cache.

    Args:
        path: as for ``load``.
        dtype: name of the dtype that weights and activations have, such as ``"float32"``.
        backend: of ``BACKENDS``, those that are not peers with a runtime of their own.
        device: such as ``"cpu"`` or ``"cuda"``.
        options: for torch.compile; None: those of the backend.
    """

    def __init__(self, path: str, dtype: str, backend: str, device: str, options: dict[str, Any] | None) -> None:
        import torch

        from benchmarks import peers

        self.model = load(path, dtype).to(device)
        self.device = device
        if backend == "emulation":
            from tests.helpers.gold import emulate

            head = self.model.get_output_embeddings()
            linears = {n: m for n, m in self.model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
            self.emulation = emulate(self.model, linears)
            self.emulation.__enter__()  # for as long as the process lives
        elif backend.startswith("torchao"):
            peers.quantize_torchao_(self.model, weight_only=backend == "torchao-weights")
        elif backend == "bitsandbytes":
            peers.quantize_bitsandbytes_(self.model)
        if backend not in _COMPILED:
            self.forward = self.model
        else:
            name, usual = _COMPILED[backend]
            if backend == "torchao-weights" and dtype != "bfloat16":
                usual = {"max_autotune": True}  # freezing would turn int8 weights back into floats
            # Static, because a prompt and a single token shall each have the graph that suits them best.
            self.forward = torch.compile(self.model, backend=name, dynamic=False, options=options or usual)

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

    def prompt(self, tokens: list[int]) -> float:
        """Run a prompt without a cache as ``generate`` does, which asks for the last position's logits: seconds."""
        ids = self._ids(tokens)
        self._wait()
        start = time.perf_counter()
        logits = self.forward(ids, use_cache=False, logits_to_keep=1).logits
        self._wait()
        seconds = time.perf_counter() - start
        self.last = logits[0, -1]
        return seconds

    def score(self, tokens: list[int]) -> tuple[float, float]:
        """Run a prompt with all its logits: seconds, and mean negative log-likelihood of its tokens (nats)."""
        from torch.nn.functional import cross_entropy

        ids = self._ids(tokens)
        self._wait()
        start = time.perf_counter()
        logits = self.forward(ids, use_cache=False).logits
        self._wait()
        seconds = time.perf_counter() - start
        self.last = logits[0, -1]
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
        self.last = logits[0, -1]
        return new, seconds

    def skip_guards(self, skip: bool) -> None:
        """Whether compiled graphs are called from now on without asking whether they fit."""
        import torch

        torch.compiler.set_stance("default", skip_guard_eval_unsafe=skip)

    def last_logits(self) -> Any:
        """Logits [vocabulary] after the last token of the latest call, as a float32 array."""
        return self.last.float().cpu().numpy().copy()

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

    def int8_bytes(self) -> tuple[int, int]:
        """Bytes of all int8 weights and their scales, and bytes of the same weights in 16 bits; zeros without any."""
        from int8compile.weights.store import STORE

        graphs = getattr(self.report(), "graphs", [])
        rewritten = {use.key: use.float_bytes for graph in graphs for use in graph.weights if use.int8_bytes}
        return STORE.nbytes(), 2 * sum(rewritten.values()) // self.model.dtype.itemsize

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


_model: Any = None  # the one model of a contender's process


def _call(method: str, args: tuple[Any, ...]) -> Any:
    global _model
    try:
        if method == "__init__":
            _model = make_model(*args)
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
        threads: int | None = None,
    ) -> None:
        self.backend = backend
        self.name = f"{dtype}-{backend}"
        self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        self.loaded = self._pool.submit(_call, "__init__", (path, dtype, backend, device, options, threads))

    def submit(self, method: str, *args: Any) -> Future[Any]:
        """Call a method of ``Model`` there."""
        return self._pool.submit(_call, method, args)

    def close(self) -> None:
        """End the process after the call it is in, dropping those that wait."""
        self._pool.shutdown(wait=True, cancel_futures=True)
