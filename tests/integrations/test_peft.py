"""LoRA on Int8Linear: found, right in eager and compiled, merged and unmerged, trained."""

import copy
import subprocess
import sys
import warnings

import pytest
import torch
from compiling import compile_eager
from model_zoo import ZOO, llama
from torch import nn

pytest.importorskip("peft")
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training

from int8compile import Int8Linear, last_report, quantize_
from int8compile.integrations.peft import LoraInt8Linear

ENTRIES = {entry.name: entry for entry in ZOO}


def int8_model(name: str = "Llama") -> tuple[nn.Module, dict[str, torch.Tensor]]:
    model, inputs = ENTRIES[name].make()
    quantize_(model.requires_grad_(False), {"min_features": 0})
    return model, inputs


def lora(model: nn.Module, targets="all-linear", **options):
    """With B not zero, as after some training."""
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def adapted(model: nn.Module) -> dict[str, LoraInt8Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraInt8Linear)}


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize(("name", "count"), [("Llama", 14), ("GPT-2", 8), ("Qwen3", 14)])
def test_all_linear_finds_every_int8_linear(name, count):
    model, inputs = int8_model(name)
    before = logits(model, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = lora(model)
    assert len(adapted(model)) == count
    assert (logits(model, inputs) - before).norm() > 1e-3 * before.norm()
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), before)


def test_computes_base_plus_adapter_and_trains_the_adapter_alone():
    base = nn.Sequential(nn.Linear(24, 16)).requires_grad_(False)
    quantize_(base, {"min_features": 0})
    int8 = base[0]
    model, x = lora(base, ["0"], lora_alpha=8), torch.randn(5, 24).requires_grad_()
    layer = adapted(model)["base_model.model.0"]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    out = model(x)
    torch.testing.assert_close(out, int8(x) + 2 * (x @ a.t() @ b.t()))
    grad = torch.randn_like(out)
    out.backward(grad)
    torch.testing.assert_close(x.grad, grad @ int8.dequantize() + 2 * grad @ b @ a, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(b.grad, 2 * grad.t() @ (x @ a.t()), rtol=1e-4, atol=1e-4)
    assert {n.split(".")[-3] for n, p in model.named_parameters() if p.grad is not None} == {"lora_A", "lora_B"}


BACKENDS = {
    "rewritten": compile_eager,
    "int8": lambda model: torch.compile(model, backend="int8"),
    "inductor": torch.compile,
}


@pytest.mark.parametrize("how", ["rewritten", *(pytest.param(n, marks=pytest.mark.slow) for n in ("int8", "inductor"))])
def test_forward_and_backward_compiled(how):
    model, inputs = llama(layers=1).eval().requires_grad_(False), ENTRIES["Llama"].inputs()
    quantize_(model, {"min_features": 0})
    model = lora(model, ["q_proj", "v_proj", "down_proj"])
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradients(run):
        loss = run(**inputs).logits.square().mean()
        return [loss, *torch.autograd.grad(loss, parameters)]

    want = gradients(model)
    got = gradients(BACKENDS[how](model))
    for actual, expected in zip(got, want, strict=True):
        assert (actual - expected).norm() <= 2e-2 * expected.norm()
    if how != "inductor":
        paths = {site.path for site in last_report().sites}
        assert "base_model.model.model.layers.0.self_attn.q_proj.base_layer" in paths


def test_merge_and_unmerge():
    model, inputs = int8_model()
    model = lora(model)
    before, codes = logits(model, inputs), {n: m.get_base_layer().weight.clone() for n, m in adapted(model).items()}
    model.merge_adapter(safe_merge=True)
    assert (logits(model, inputs) - before).norm() < 0.1 * before.norm()
    assert any(not torch.equal(m.get_base_layer().weight, codes[n]) for n, m in adapted(model).items())
    model.unmerge_adapter()
    assert all(torch.equal(m.get_base_layer().weight, codes[n]) for n, m in adapted(model).items())
    assert torch.equal(logits(model, inputs), before)
    merged = model.merge_and_unload()
    assert not adapted(merged)
    assert sum(isinstance(m, Int8Linear) for m in merged.modules()) == 14
    assert (logits(merged, inputs) - before).norm() < 0.1 * before.norm()


def test_a_broken_adapter_is_not_merged():
    model = lora(int8_model()[0], ["q_proj"])
    layer = next(iter(adapted(model).values()))
    codes = layer.get_base_layer().weight.clone()
    layer.lora_B["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="nothing was merged"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, codes)
    assert not layer.merged


def test_two_adapters_and_their_folders(tmp_path):
    model, inputs = int8_model()
    plain = copy.deepcopy(model)
    model = lora(model, ["q_proj"])
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(plain, tmp_path)
    assert torch.equal(logits(again, inputs), expected)
    again.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    again.set_adapter("other")
    assert not torch.equal(logits(again, inputs), expected)
    again.set_adapter("default")
    assert torch.equal(logits(again, inputs), expected)


def test_needs_no_import_where_peft_was_imported_first():
    script = """
import peft, torch, transformers
from int8compile import quantize_
config = transformers.LlamaConfig(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8
)
model = transformers.LlamaForCausalLM(config)
quantize_(model, {"min_features": 0})
peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear")).print_trainable_parameters()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_dora_is_refused():
    model, _ = int8_model()
    with pytest.raises(ValueError, match="use_dora"):
        get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))


def test_a_trainer_lowers_the_loss(tmp_path):
    transformers = pytest.importorskip("transformers")
    from int8compile.integrations.transformers import Int8Config

    model, inputs = ENTRIES["Llama"].make()
    model.save_pretrained(tmp_path / "float")
    config = Int8Config(min_features=0)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    model = prepare_model_for_kbit_training(model)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    codes = {n: m.get_base_layer().weight.clone() for n, m in adapted(model).items()}
    row = inputs["input_ids"][0]
    data = [{"input_ids": row, "labels": row}] * 8
    arguments = transformers.TrainingArguments(
        tmp_path / "out",
        max_steps=12,
        per_device_train_batch_size=2,
        learning_rate=2e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        gradient_checkpointing=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(m.get_base_layer().weight, codes[n]) for n, m in adapted(model).items())


@pytest.mark.slow
def test_int8_learns_as_float_does():
    """LoRA's losses on int8 weights beside those on the float ones, from the same adapters on the same rows.

    Random weights with planted outliers make int8's error larger than a trained model's: ``examples/lora.py``.
    """

    def losses(int8: bool) -> torch.Tensor:
        model, _ = ENTRIES["Llama"].make()
        model.requires_grad_(False)
        if int8:
            quantize_(model, {"min_features": 0})
        torch.manual_seed(2)
        targets = [n for n, m in model.named_modules() if n.endswith("_proj")]
        model = get_peft_model(model, LoraConfig(r=4, target_modules=targets))
        rows = torch.randint(3, 96, (4, 24), generator=torch.Generator().manual_seed(0))
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
        values = []
        for step in range(40):
            row = rows[step % 4].unsqueeze(0)
            loss = model(input_ids=row, labels=row).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            values.append(loss.detach())
        return torch.stack(values)

    ours, theirs = losses(int8=True), losses(int8=False)
    assert theirs[-8:].mean() < 0.6 * theirs[:4].mean()
    assert (ours[-8:].mean() - theirs[-8:].mean()).abs() < 0.05 * theirs[-8:].mean()


@pytest.mark.parametrize("name", ["T5", "BERT"])
def test_sequence_models_train_save_and_merge(tmp_path, name):
    """An encoder-decoder, and a classifier whose head is trained whole beside the adapters."""
    transformers = pytest.importorskip("transformers")
    from int8compile.integrations.transformers import Int8Config

    model, inputs = ENTRIES[name].make()
    inputs = {**inputs, "labels": torch.tensor([[4, 5, 6], [7, 8, 9]])}
    inputs.pop("decoder_input_ids", None)
    options = {"task_type": "SEQ_2_SEQ_LM"}
    model.config.decoder_start_token_id = 0  # which T5 puts before the labels
    if name == "BERT":
        model = transformers.BertForSequenceClassification(model.config)
        inputs["labels"] = torch.tensor([0, 1])
        options = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier"]}
    family = type(model)
    model.save_pretrained(tmp_path / "float")

    def base():
        config = Int8Config(min_features=0, llm_int8_skip_modules=["classifier"])
        return family.from_pretrained(tmp_path / "float", quantization_config=config)

    model = lora(prepare_model_for_kbit_training(base()), **options).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()
    want = logits(model, inputs)
    assert torch.equal(logits(again, inputs), want)
    merged = again.merge_and_unload()
    got = logits(merged, inputs)
    assert (got - want).norm() < 0.1 * want.norm()
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(family.from_pretrained(tmp_path / "merged"), inputs), got)


def test_modules_to_save_train_as_float_copies():
    """What is int8, or has int8 linears in it, when it is named: codes would stay, without a word, as they are."""
    transformers = pytest.importorskip("transformers")
    config = ENTRIES["RoBERTa"].make()[0].config
    model = transformers.RobertaForSequenceClassification(config).requires_grad_(False)
    quantize_(model, {"min_features": 0})
    names = ["classifier", "layer.1.output.dense"]
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["query"], modules_to_save=names, task_type="SEQ_CLS"))
    saved = {name: p for name, p in model.named_parameters() if "modules_to_save" in name}
    assert len(saved) == 6
    assert all(p.requires_grad and p.dtype == torch.float32 for p in saved.values())
    assert not any("modules_to_save" in name and isinstance(m, Int8Linear) for name, m in model.named_modules())
    model.train()(input_ids=torch.ones(2, 4, dtype=torch.long), labels=torch.tensor([0, 1])).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in saved.values())
    assert isinstance(model.base_model.model.classifier.original_module.dense, Int8Linear)


def test_lora_around_int8_experts():
    model, inputs = int8_model("gpt-oss")
    before = logits(model, inputs)
    model = lora(model).train()
    model(**inputs).logits.square().mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(grads) == 16
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads.values())
    with model.disable_adapter():
        assert torch.equal(logits(model.eval(), inputs), before)


def test_experts_to_save_train_as_float_copies():
    model, inputs = int8_model("Mixtral")
    names = ["layers.1.mlp.experts"]
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=names))
    saved = {name: p for name, p in model.named_parameters() if "modules_to_save" in name}
    assert sorted(name.rpartition(".")[2] for name in saved) == ["down_proj", "gate_up_proj"]
    assert all(p.requires_grad and p.dtype == torch.float32 for p in saved.values())
    model.train()(**inputs).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in saved.values())
