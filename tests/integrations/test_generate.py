"""transformers' generate() on a compiled model: the tokens of LLM.int8(), with no more compiles than inductor makes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gold import emulate
from model_zoo import Entry, eagerly, gpt2, llama, mixtral, tokens
from torch import nn
from torch._dynamo.utils import counters
from transformers import CompileConfig

import int8compile

ENTRIES = {
    "Llama": Entry("Llama", lambda: llama(layers=1), dict, 7),
    "GPT-2": Entry("GPT-2", lambda: gpt2(layers=1), dict, 4),
    "Mixtral": Entry("Mixtral", lambda: mixtral(layers=1), dict, 6),  # q k v o, gate_up down of the experts
}

# (length of the prompt, new tokens): both change, so that static caches and masks do, and graphs must be made anew.
LENGTHS = ((5, 8), (9, 12))

# Prompts for which int8 and float choose different tokens somewhere, and no choice of the emulation is close.
SEEDS = {"Llama": 22, "GPT-2": 25, "Mixtral": 10}
SEED_DECODING = 25

# By how much, in standard deviations of the logits, a token must be ahead of the next best for the comparison to
# mean anything. Compiled code and emulation differ by 1e-6, or by 5e-4 where a code falls on the other side of a half.
MARGIN = 1e-2


@dataclasses.dataclass
class Generated:
    """Tokens of all prompts, the graphs compiled for them, and the narrowest margin of a choice."""

    tokens: list[list[list[int]]]
    graphs: int
    margin: float


def generate(model: nn.Module, seed: int, **how: Any) -> Generated:
    """Generate from each prompt, greedily."""
    counters.clear()
    chosen, margins = [], []
    for i, (length, new) in enumerate(LENGTHS):
        prompt = tokens(length, seed=seed + 100 * i)
        mask = torch.ones_like(prompt)
        limits = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        wanted = {"return_dict_in_generate": True, "output_logits": True}
        out = model.generate(prompt, attention_mask=mask, **limits, **wanted, **how)
        logits = torch.stack(out.logits)
        best, next_best = logits.topk(2).values.unbind(-1)
        margins.append(float((best - next_best).min() / logits.std()))
        chosen.append(out.sequences[:, length:].tolist())
    return Generated(chosen, counters["stats"]["unique_graphs"], min(margins))


def generate_compiled(entry: Entry, cache: str, **compile_options: Any) -> Generated:
    """As users do it: ``model.forward = torch.compile(model.forward, ...)``, then ``generate``."""
    torch._dynamo.reset()
    model, _ = entry.make()
    model.forward = torch.compile(model.forward, **compile_options)
    return generate(model, SEEDS[entry.name], cache_implementation=cache)


def rewritten(entry: Entry) -> list[str]:
    """Paths of what the last compiled model has in int8; as many as the architecture has."""
    report = int8compile.last_report()
    assert report is not None
    names = sorted({site.path for site in report.sites if site.rewritten})
    assert len(names) == entry.int8, report.summary()
    return names


def check_equal(ours: Generated, expected: Generated, in_float: Generated) -> None:
    assert expected.margin > MARGIN, f"a choice of the emulation is decided by {expected.margin:.1e}: take another seed"
    assert in_float.tokens != expected.tokens, "int8 and float choose the same, so nothing is shown: take another seed"
    assert ours.tokens == expected.tokens


def check_generate(entry: Entry, cache: str, int8: dict[str, Any], plain: dict[str, Any]) -> None:
    """Compare generate() compiled by two backends, in float, and in the emulation."""
    ours = generate_compiled(entry, cache, **int8)
    names = rewritten(entry)
    theirs = generate_compiled(entry, cache, **plain)
    model, _ = entry.make()
    in_float = generate(model, SEEDS[entry.name], cache_implementation=cache)
    with emulate(model, names):
        expected = generate(model, SEEDS[entry.name], cache_implementation=cache)

    check_equal(ours, expected, in_float)
    assert 1 < ours.graphs <= theirs.graphs


# Each generates with two backends and compiles for each length; one is enough while working.
@pytest.mark.parametrize(
    ("name", "cache"),
    [
        pytest.param(name, cache, marks=[] if (name, cache) == ("Llama", "static") else pytest.mark.slow)
        for name in ENTRIES
        for cache in ("static", "dynamic")
    ],
)
def test_tokens_and_compiles(name: str, cache: str) -> None:
    entry = ENTRIES[name]
    check_generate(entry, cache, {"backend": eagerly(entry)}, {"backend": lambda gm, inputs: gm.forward})


@pytest.mark.slow
@pytest.mark.parametrize(("name", "cache"), [("Llama", "static"), ("GPT-2", "dynamic")])
def test_tokens_and_compiles_with_inductor(name: str, cache: str) -> None:
    entry = ENTRIES[name]
    check_generate(entry, cache, {"backend": "int8", "options": entry.all_options}, {"backend": "inductor"})


def test_compile_config_compiles_decoding_only() -> None:
    """With ``compile_config`` transformers itself compiles what follows the prompt: the prompt stays in float."""
    entry = ENTRIES["Llama"]
    torch._dynamo.reset()
    model, _ = entry.make()
    config = CompileConfig(backend=eagerly(entry), fullgraph=True)
    config._compile_all_devices = True  # transformers compiles on accelerators only, unless told so
    ours = generate(model, SEED_DECODING, cache_implementation="static", compile_config=config)
    names = rewritten(entry)

    model, _ = entry.make()
    in_float = generate(model, SEED_DECODING, cache_implementation="static")
    model.forward = emulating_decode(model, names)
    expected = generate(model, SEED_DECODING, cache_implementation="static")
    check_equal(ours, expected, in_float)


def emulating_decode(model: nn.Module, names: list[str]) -> Callable[..., Any]:
    """The model's forward, in int8 for one token at a time and in float for a prompt."""
    forward = model.forward

    def call(input_ids: torch.Tensor, **kwargs: Any) -> Any:
        decoding = input_ids.shape[1] == 1
        with emulate(model, names) if decoding else contextlib.nullcontext():
            return forward(input_ids=input_ids, **kwargs)

    return call
