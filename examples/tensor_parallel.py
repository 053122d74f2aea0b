"""A language model in several processes, each with a shard of every linear, in int8.

    torchrun --nproc-per-node 2 -m examples.tensor_parallel --model FOLDER_OR_HUB_ID
    torchrun --nproc-per-node 3 -m examples.tensor_parallel      # SmolLM2-135M-Instruct, from the hub; it has 9 heads

transformers splits the model by its own plan, and ``backend="int8"`` quantises what each process holds. With
``--check`` every process loads the whole model as well, and compares.
"""

from __future__ import annotations

import datetime
from typing import Annotated, Any

import typer

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def main(
    model: Annotated[str, typer.Option(help="transformers folder or hub id")] = MODEL,
    prompt: Annotated[str, typer.Option(help="text to continue; the model's tokenizer is needed")] = "",
    tokens: Annotated[int, typer.Option(help="length of the continuation; 0: none", min=0)] = 20,
    check: Annotated[bool, typer.Option(help="compare with the whole model in one process")] = False,
) -> None:
    """Run a model under tensor parallelism in int8, and say what each process holds and sends."""
    import torch
    import transformers
    from torch import distributed

    import int8compile

    on_gpu = torch.cuda.is_available()
    distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=datetime.timedelta(minutes=5))
    rank, world = distributed.get_rank(), distributed.get_world_size()
    config: Any = transformers.AutoConfig.from_pretrained(model)
    for name in ("num_attention_heads", "num_key_value_heads"):
        if getattr(config, name) % world:  # in every process, so that none waits for the others
            raise typer.BadParameter(f"{world} processes do not divide {name}={getattr(config, name)} of {model}")
    if not on_gpu:
        torch.set_num_threads(1)

    split = transformers.DistributedConfig(tp_size=world)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    network: Any = transformers.AutoModelForCausalLM.from_pretrained(model, distributed_config=split, dtype=dtype)
    compiled = torch.compile(network, backend="int8")
    if prompt:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        ids = tokenizer(prompt, return_tensors="pt").input_ids.to(network.device)
    else:
        ids = (torch.arange(1, 33, device=network.device) * 997 % config.vocab_size).unsqueeze(0)
    with torch.no_grad():
        logits = compiled(ids, use_cache=False).logits
        report = int8compile.last_report()
        assert report is not None
        if check:
            whole: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype).to(network.device)
            want = whole(ids, use_cache=False).logits
            torch._dynamo.reset()
            alone = torch.compile(whole, backend="int8")(ids, use_cache=False).logits
    if rank == 0:
        print(report)
        print(f"\nin each of {world} processes: {report.summary()}")
        before, after = report.weight_bytes_before, report.weight_bytes_after
        print(f"weights read by each process: {before / 2**20:.1f} MiB in float, {after / 2**20:.1f} MiB now")
        reduced = 2 * ids.numel() * config.hidden_size * dtype.itemsize
        sent = 2 * (world - 1) * reduced // world
        print(f"sent by each process in a layer: {sent / 2**10:.0f} KiB for {ids.numel()} tokens, two all-reduces")
        if check:
            print(f"error against float, one process: {relative(alone, want):.4f}")
            print(f"error against float, {world} processes: {relative(logits, want):.4f}")
    if prompt and tokens:
        network.forward = torch.compile(network.forward, backend="int8")
        out = network.generate(ids, max_new_tokens=tokens, do_sample=False, cache_implementation="static")
        if rank == 0:
            print(tokenizer.decode(out[0], skip_special_tokens=True))
    distributed.destroy_process_group()


def relative(value: Any, expected: Any) -> float:
    """The norm of the difference, as a part of what is expected."""
    return float((value - expected).norm() / expected.norm())


if __name__ == "__main__":
    typer.run(main)
