"""A model of Llama-3.1-8B's shape for ``benchmarks.gpu``: random weights, planted outlier features, bf16 against int8.

The layers are compiled one by one (they share one compiled graph), and a whole step is captured in one CUDA graph. That
spares a minute of compiling and measures the same kernels as compiling the model at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.gpu.checks import THRESHOLD, Run, load
from benchmarks.gpu.times import Call, microseconds

#: width, heads, key-value heads, feed-forward width, layers, vocabulary
LLAMA = (4096, 32, 8, 14336, 32, 128256)
TINY = (256, 4, 2, 384, 2, 500)
OUTLIERS = 4  # features that stand out after each normalisation, as in trained models of this size
CACHE = 512  # tokens already decoded


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        weight = torch.ones(width)
        weight[:: width // OUTLIERS] = 12.0
        self.weight = nn.Parameter(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = x.float()
        return (values * torch.rsqrt(values.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * self.weight


class Layer(nn.Module):
    """Attention over a static cache (for a prompt: over itself) and a SwiGLU feed-forward network."""

    def __init__(self, width: int, heads: int, kv_heads: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = heads, kv_heads, width // heads
        self.norm1, self.norm2 = Norm(width), Norm(width)
        self.q, self.o = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, kv_heads * self.size, bias=False)
        self.v = nn.Linear(width, kv_heads * self.size, bias=False)
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(
        self, x: torch.Tensor, cache: tuple[torch.Tensor, torch.Tensor] | None, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        batch, tokens, _ = x.shape
        y = self.norm1(x)
        q = self._turn(self.q(y).view(batch, tokens, self.heads, self.size).transpose(1, 2), cos, sin)
        k = self._turn(self.k(y).view(batch, tokens, self.kv_heads, self.size).transpose(1, 2), cos, sin)
        v = self.v(y).view(batch, tokens, self.kv_heads, self.size).transpose(1, 2)
        if cache is not None:
            k, v = torch.cat([cache[0], k], dim=2), torch.cat([cache[1], v], dim=2)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None, enable_gqa=True)
        x = x + self.o(out.transpose(1, 2).reshape(batch, tokens, -1))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))

    @staticmethod
    def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        left, right = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-right, left], dim=-1) * sin


class Llama(nn.Module):
    def __init__(self, sizes: tuple[int, ...], device: str) -> None:
        super().__init__()
        width, heads, kv_heads, hidden, count, vocabulary = sizes
        with torch.device(device):
            self.embedding = nn.Embedding(vocabulary, width)
            self.layers = nn.ModuleList(Layer(width, heads, kv_heads, hidden) for _ in range(count))
            self.norm, self.head = Norm(width), nn.Linear(width, vocabulary, bias=False)
        self.size, self.kv_heads = width // heads, kv_heads

    def step(self, tokens: torch.Tensor, cached: bool) -> Call:
        """One forward pass over tokens [batch, length], with a cache of ``CACHE`` tokens or as a prompt."""
        batch, length = tokens.shape
        weight = self.embedding.weight
        angles = torch.arange(length, device=weight.device)[:, None] / 10000 ** torch.linspace(
            0, 1, self.size // 2, device=weight.device
        )
        cos, sin = (torch.cat([f(angles)] * 2, dim=-1).to(weight.dtype) for f in (torch.cos, torch.sin))
        shape = (batch, self.kv_heads, CACHE, self.size)
        cache = (weight.new_zeros(shape), weight.new_zeros(shape)) if cached else None

        def run() -> torch.Tensor:
            with torch.inference_mode():
                x = self.embedding(tokens)
                for layer in self.layers:
                    x = layer(x, cache, cos, sin)
                out: torch.Tensor = self.head(self.norm(x[:, -1:]))
                return out

        return run


def model(run: Run) -> dict[str, Any]:
    """Milliseconds of a decoded token at batch 1, 8 and 32, and of a prompt of 2048 tokens."""
    load(run)
    sizes = TINY if run.dry_run else LLAMA
    steps = {"prompt": (1, 16 if run.dry_run else 2048, False)}
    steps |= {f"decode, batch {batch}": (batch, 1, True) for batch in ((1, 2) if run.dry_run else (1, 8, 32))}
    torch.manual_seed(0)
    llama = Llama(sizes, run.device).to(torch.bfloat16).eval().requires_grad_(False)
    result: dict[str, Any] = {"complete": False, "sizes": sizes, "ms": {}, "absent": {}, "distance": {}}
    wanted: dict[str, torch.Tensor] = {}
    for contender in ("bf16", "int8", "bitsandbytes"):
        if run.left() < 20:
            result["absent"][contender] = "no time"
            continue
        try:
            _prepare(llama, contender)
        except Exception as error:  # a peer that is not installed, or cannot run here
            result["absent"][contender] = f"{type(error).__name__}: {error}"
            continue
        times = result["ms"].setdefault(contender, {})
        for name, (batch, length, cached) in steps.items():
            if run.left() < 10:
                return result
            tokens = torch.arange(batch * length, device=run.device).view(batch, length) % sizes[-1]
            call = llama.step(tokens, cached)
            try:
                out = call().float().cpu()
                times[name] = microseconds(run, [call], graph=contender != "bitsandbytes") / 1e3
            except Exception as error:
                result["absent"][f"{contender}, {name}"] = f"{type(error).__name__}: {error}"
                continue
            reference = wanted.setdefault(name, out)
            result["distance"][f"{contender}, {name}"] = float((out - reference).norm() / reference.norm())
            run.save("model", result)
    result["complete"] = True
    return result


def _prepare(llama: Llama, contender: str) -> None:
    from int8compile.backend import int8  # its name needs an installed package

    torch._dynamo.reset()
    if contender == "bitsandbytes":
        _to_bitsandbytes(llama)
    for layer in llama.layers:
        if contender == "bitsandbytes":
            layer._compiled_call_impl = None
        else:
            layer.compile(backend=int8 if contender == "int8" else "inductor", dynamic=False)


def _to_bitsandbytes(llama: Llama) -> None:
    import bitsandbytes as bnb

    for layer in llama.layers:
        for name, module in list(layer.named_children()):
            if isinstance(module, nn.Linear):
                new = bnb.nn.Linear8bitLt(
                    module.in_features, module.out_features, bias=False, has_fp16_weights=False, threshold=THRESHOLD
                )
                new.weight = bnb.nn.Int8Params(module.weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
                setattr(layer, name, new.to(module.weight.device).eval())
