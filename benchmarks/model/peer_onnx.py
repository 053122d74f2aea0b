"""ONNX Runtime with dynamically quantised int8 products, as a contender of ``benchmarks/model``.

The model is exported once, with any number of tokens and of cached tokens, then ``quantize_dynamic`` gives each linear
but the output embedding int8 weights with one scale for each output channel. Keys and values stay inside ONNX Runtime
between the steps (I/O binding), so that a step copies only what the graph itself copies.
"""

from __future__ import annotations

import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.peers import peer


class OnnxRuntime:
    """A causal language model in ONNX Runtime; the methods are those of ``benchmarks.model.contender.Model``.

    Args:
        model: a transformers model in float32 with one layer of keys and values for each decoder layer.

    Raises:
        AbsentError: onnx, onnxscript or onnxruntime is not installed.
    """

    def __init__(self, model: Any) -> None:
        peer("onnx")
        peer("onnxscript")
        self._api = peer("onnxruntime")
        config = model.config
        self._layers = config.num_hidden_layers
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._cache_shape = (1, config.num_key_value_heads, 0, head_dim)
        with tempfile.TemporaryDirectory(prefix="int8compile-onnx-") as folder:
            file = self._quantized(_export(model, self._cache_shape, self._layers, Path(folder)))
            options = self._api.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            self._session = self._api.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self._inputs = [node.name for node in self._session.get_inputs()]
        self._outputs = [node.name for node in self._session.get_outputs()]
        empty = self._api.OrtValue.ortvalue_from_numpy(np.zeros(self._cache_shape, np.float32))
        self._empty = [empty] * (2 * self._layers)

    def _quantized(self, file: Path) -> Path:
        quantization = peer("onnxruntime", "quantization")
        onnx = peer("onnx")
        target = file.with_name("int8.onnx")
        graph = onnx.load(str(file), load_external_data=False).graph
        logits = graph.output[0].name
        quantization.quantize_dynamic(
            str(file),
            str(target),
            op_types_to_quantize=["MatMul"],
            nodes_to_exclude=[node.name for node in graph.node if logits in node.output],
            per_channel=True,
            # Without VNNI, pairs of products are added in 16 bits, which saturate with 8-bit weights.
            reduce_range=not torch.cpu._is_vnni_supported(),
            weight_type=quantization.QuantType.QInt8,
            use_external_data_format=True,
            extra_options={"MatMulConstBOnly": True},
        )
        quantized = onnx.load(str(target), load_external_data=False).graph
        self.int8_products = sum(node.op_type in ("MatMulInteger", "DynamicQuantizeMatMul") for node in quantized.node)
        if self.int8_products == 0:
            raise RuntimeError("quantize_dynamic made no int8 products")
        return target

    def open_cache(self, length: int, tokens: list[int] | None = None) -> None:
        """Evaluate ``tokens`` and keep their keys and values; the cache grows, whatever ``length`` is."""
        self._cache = self._empty
        if tokens:
            _, self._cache = self._run(tokens, self._empty)

    def prompt(self, tokens: list[int]) -> float:
        """As ``Model.prompt``, but with all logits: it has no way to compute fewer."""
        return self.score(tokens)[0]

    def score(self, tokens: list[int]) -> tuple[float, float]:
        """As ``Model.score``."""
        start = time.perf_counter()
        output, _ = self._run(tokens, self._empty)
        seconds = time.perf_counter() - start
        logits = torch.from_numpy(output.numpy()[0])
        self._last = logits[-1].numpy().copy()
        return seconds, float(nn.functional.cross_entropy(logits[:-1], torch.tensor(tokens[1:])))

    def decode(self, tokens: list[int], count: int) -> tuple[list[int], list[float]]:
        """As ``Model.decode``."""
        new: list[int] = []
        seconds: list[float] = []
        pending = list(tokens)
        while len(new) < count:
            token = pending.pop(0) if pending else new[-1]
            start = time.perf_counter()
            output, self._cache = self._run([token], self._cache)
            logits = output.numpy()[0, -1]
            best = int(logits.argmax())
            seconds.append(time.perf_counter() - start)
            if not pending:
                new.append(best)
        self._last = logits.copy()
        return new, seconds

    def last_logits(self) -> Any:
        return self._last

    def _run(self, tokens: list[int], cache: list[Any]) -> tuple[Any, list[Any]]:
        """Logits, and keys and values of all tokens so far, as OrtValues."""
        binding = self._session.io_binding()
        binding.bind_cpu_input(self._inputs[0], np.array([tokens], np.int64))
        for name, value in zip(self._inputs[1:], cache, strict=True):
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        logits, *cache = binding.get_outputs()
        return logits, cache


class _Step(nn.Module):
    """A model whose cache is tensors in and tensors out."""

    def __init__(self, model: Any, layers: int) -> None:
        super().__init__()
        self.model, self.layers = model, layers

    def forward(self, ids: torch.Tensor, *past: torch.Tensor) -> tuple[torch.Tensor, ...]:
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        for i in range(self.layers):
            cache.update(past[2 * i], past[2 * i + 1], i)
        out = self.model(ids, past_key_values=cache, use_cache=True)
        present = [t for layer in out.past_key_values.layers for t in (layer.keys, layer.values)]
        return (out.logits, *present)


def _export(model: Any, cache_shape: tuple[int, ...], layers: int, folder: Path) -> Path:
    for name in ("torch.onnx", "onnxscript"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Example sizes above 1, or the exporter would take them for constants.
    past = tuple(torch.zeros(1, cache_shape[1], 6, cache_shape[3]) for _ in range(2 * layers))
    cached = torch.export.Dim("cached", min=1, max=1 << 16)
    tokens = torch.export.Dim("tokens", min=1, max=1 << 16)
    program = torch.onnx.export(
        _Step(model, layers).eval(),
        (torch.tensor([[1, 2, 3, 4]]), *past),
        dynamo=True,
        dynamic_shapes=({1: tokens}, tuple({2: cached} for _ in past)),
        verbose=False,
    )
    assert program is not None
    file = folder / "float.onnx"
    program.save(str(file), external_data=True)
    return file
