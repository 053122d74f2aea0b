"""``int8compile quantize``: the same folder as from_pretrained and save_pretrained make, written file by file."""

import json
import os

import pytest
import torch
from model_zoo import ZOO, output
from safetensors.torch import load_file
from typer.testing import CliRunner

from int8compile.checkpoints import comparison, convert
from int8compile.checkpoints.comparison import compare
from int8compile.checkpoints.convert import quantize_folder
from int8compile.cli import app
from int8compile.errors import CheckpointError, OptionValueError
from int8compile.integrations.transformers import Int8Config, save_pretrained, take_over_bitsandbytes

ENTRIES = {entry.name: entry for entry in ZOO}
CONFIG = Int8Config(min_features=0)


def float_folder(tmp_path, name="Llama", dtype=torch.float32, **how):
    model, inputs = ENTRIES[name].make()
    folder = tmp_path / "float"
    model.to(dtype).save_pretrained(folder, **how)
    (folder / "tokenizer.json").write_text("{}")
    return folder, type(model), inputs


def entries_of(folder):
    return {key: t for file in folder.glob("*.safetensors") for key, t in load_file(file).items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "BERT", "T5", "Whisper", "Mixtral", "gpt-oss", "DeepSeek-V3"])
@pytest.mark.parametrize("how", [{}, {"max_shard_size": "40KB"}])
def test_is_what_from_pretrained_and_save_pretrained_make(tmp_path, name, how):
    folder, family, inputs = float_folder(tmp_path, name, **how)
    done = quantize_folder(folder, tmp_path / "int8", CONFIG)
    loaded = family.from_pretrained(folder, quantization_config=CONFIG)
    assert sum(s.rewritten for s in done.sites) == loaded.hf_quantizer.report.rewritten
    again, info = family.from_pretrained(tmp_path / "int8", output_loading_info=True)
    assert not any(info.values())
    assert same(again.state_dict(), loaded.state_dict())
    loaded.save_pretrained(tmp_path / "saved", **how)
    assert same(entries_of(tmp_path / "int8"), entries_of(tmp_path / "saved"))
    with torch.no_grad():
        assert torch.equal(output(again(**inputs)), output(loaded(**inputs)))
    assert (tmp_path / "int8" / "tokenizer.json").exists()
    assert not list((tmp_path / "int8").glob("*.part"))
    assert done.bytes_after < done.bytes_before


@pytest.mark.parametrize("dtype", [torch.bfloat16])
@pytest.mark.parametrize("format", ["int8compile", "bitsandbytes", "compressed-tensors"])
def test_every_format_is_what_save_pretrained_writes(tmp_path, dtype, format):
    folder, family, _ = float_folder(tmp_path, dtype=dtype)
    quantize_folder(folder, tmp_path / "streamed", CONFIG, format)
    save_pretrained(family.from_pretrained(folder, quantization_config=CONFIG), tmp_path / "saved", format=format)
    assert same(entries_of(tmp_path / "streamed"), entries_of(tmp_path / "saved"))
    read = [
        json.loads((tmp_path / n / "config.json").read_text())["quantization_config"] for n in ("streamed", "saved")
    ]
    assert read[0] == read[1]


@pytest.mark.parametrize("format", ["int8compile", "bitsandbytes", "compressed-tensors"])
def test_weights_only(tmp_path, format):
    """Float in formats that quantise every activation; in our own with the options that say so."""
    folder, family, inputs = float_folder(tmp_path)
    config = Int8Config(min_features=0, llm_int8_weight_only_modules=["lm_head", "up_proj"])
    done = quantize_folder(folder, tmp_path / "int8", config, format)
    details = {site.path.rpartition(".")[2]: (site.rewritten, site.detail) for site in done.sites}
    ours = format == "int8compile"
    assert details["up_proj"] == ((True, "weights only") if ours else (False, f"float to {format}"))
    assert details["down_proj"] == (True, "")
    written = entries_of(tmp_path / "int8")["model.layers.0.mlp.up_proj.weight"]
    assert written.dtype == (torch.int8 if ours else torch.float32)
    if ours:
        loaded = family.from_pretrained(folder, quantization_config=config)
        again = family.from_pretrained(tmp_path / "int8")
        assert again.model.layers[0].mlp.up_proj.outlier_policy == again.lm_head.outlier_policy == "all"
        with torch.no_grad():
            assert torch.equal(output(again(**inputs)), output(loaded(**inputs)))
    else:
        with pytest.raises(OptionValueError, match="expected 'int8compile': the others quantise activations"):
            quantize_folder(folder, tmp_path / "none", Int8Config(activation="float"), format)


def test_a_killed_run_leaves_nothing_that_loads_and_is_resumed(tmp_path, monkeypatch):
    folder, family, _ = float_folder(tmp_path, max_shard_size="40KB")
    real, written = os.replace, []

    def replace(source, target):
        if str(target).endswith(".safetensors"):
            if len(written) == 2:
                raise KeyboardInterrupt
            written.append(target)
        real(source, target)

    monkeypatch.setattr(convert.os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        quantize_folder(folder, tmp_path / "int8", CONFIG)
    with pytest.raises(Exception, match=r"no file named model\.safetensors|Unrecognized"):
        family.from_pretrained(tmp_path / "int8")
    monkeypatch.undo()
    with pytest.raises(OptionValueError, match="same source and options"):
        quantize_folder(folder, tmp_path / "int8", Int8Config(min_features=1))
    assert quantize_folder(folder, tmp_path / "int8", CONFIG).resumed == 2
    quantize_folder(folder, tmp_path / "whole", CONFIG)
    assert same(entries_of(tmp_path / "int8"), entries_of(tmp_path / "whole"))
    family.from_pretrained(tmp_path / "int8")
    with pytest.raises(OptionValueError, match="does not exist or is empty"):
        quantize_folder(folder, tmp_path / "int8", CONFIG)


def test_pickled_weights_are_read_without_running_anything(tmp_path):
    folder, _, _ = float_folder(tmp_path)
    quantize_folder(folder, tmp_path / "int8", CONFIG)
    entries = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(entries, folder / "pytorch_model.bin")
    quantize_folder(folder, tmp_path / "from_bin", CONFIG)
    assert same(entries_of(tmp_path / "from_bin"), entries_of(tmp_path / "int8"))
    torch.save({"a": Int8Config()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: the file cannot be read"):
        quantize_folder(folder, tmp_path / "evil", CONFIG)
    assert not (tmp_path / "evil").exists()


def test_bad_sources_are_refused_by_file_and_key(tmp_path):
    folder, _, _ = float_folder(tmp_path, max_shard_size="40KB")
    first = sorted(folder.glob("*.safetensors"))[0]
    whole = first.read_bytes()
    first.write_bytes(whole[:-50])
    with pytest.raises(CheckpointError, match=rf"{first.name}: the file cannot be read"):
        quantize_folder(folder, tmp_path / "int8", CONFIG)
    first.unlink()
    with pytest.raises(CheckpointError, match=f"{first.name} is missing"):
        quantize_folder(folder, tmp_path / "int8", CONFIG)
    first.write_bytes(whole)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    with pytest.raises(
        CheckpointError, match=r"safetensors: model\.layers\.\d\.mlp\.\w+\.weight is .*as the model has it"
    ):
        quantize_folder(folder, tmp_path / "int8", CONFIG)
    with pytest.raises(OptionValueError, match="format='q4'"):
        quantize_folder(folder, tmp_path / "x", CONFIG, "q4")
    with pytest.raises(OptionValueError, match=r"model\.safetensors"):
        quantize_folder(tmp_path, tmp_path / "x", CONFIG)
    assert not (tmp_path / "x").exists()


def test_the_command(tmp_path):
    folder, family, _ = float_folder(tmp_path)
    target = tmp_path / "int8"
    arguments = ["quantize", str(folder), str(target), "--min-features", "0", "--skip", "o_proj", "--verify", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["linears"], told["int8"]) == (15, 12)
    assert 0 < told["verify"]["relative_error"] < 0.2
    assert told["verify"]["top_1_agreement"] > 0.5
    assert "o_proj" in family.from_pretrained(target).hf_quantizer.config.llm_int8_skip_modules
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 1
    assert "does not exist or is empty" in again.stderr


def test_the_command_in_bitsandbytes_format(tmp_path):
    folder, family, _ = float_folder(tmp_path)
    arguments = ["quantize", str(folder), str(tmp_path / "bnb"), "--min-features", "0", "--format", "bitsandbytes"]
    result = CliRunner().invoke(app, [*arguments, "--verify"])
    assert result.exit_code == 0, result.output
    assert "14 of 15 linears in int8" in result.stdout
    assert "the same best one" in result.stdout
    take_over_bitsandbytes()
    try:
        family.from_pretrained(tmp_path / "bnb")
    finally:
        take_over_bitsandbytes(False)


def test_what_cannot_be_verified_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    folder, _, _ = float_folder(tmp_path)
    monkeypatch.setattr(comparison.importlib.util, "find_spec", lambda name: None)
    arguments = ["quantize", str(folder), str(tmp_path / "int8"), "--format", "compressed-tensors", "--verify"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "pip install compressed-tensors" in " ".join(result.stderr.split())
    assert not (tmp_path / "int8").exists()


@pytest.mark.parametrize("name", ["ViT", "Whisper", "T5"])
def test_verifies_models_that_take_pixels_and_sounds(tmp_path, name):
    folder, _, _ = float_folder(tmp_path, name)
    quantize_folder(folder, tmp_path / "int8", CONFIG)
    assert 0 < compare(folder, tmp_path / "int8", "int8compile").error < 0.2


def test_verifies_compressed_tensors(tmp_path):
    pytest.importorskip("compressed_tensors")
    folder, _, _ = float_folder(tmp_path)
    quantize_folder(folder, tmp_path / "int8", CONFIG, "compressed-tensors")
    assert 0 < compare(folder, tmp_path / "int8", "compressed-tensors").error < 0.3


@pytest.mark.parametrize("name", ["Mixtral", "gpt-oss"])
@pytest.mark.parametrize("format", ["int8compile", "bitsandbytes"])
def test_verifies_mixtures(tmp_path, name, format):
    folder, _, _ = float_folder(tmp_path, name)
    arguments = ["quantize", str(folder), str(tmp_path / "int8"), "--min-features", "0", "--format", format, "--verify"]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["linears"], told["int8"]) == (13, 12 if format == "int8compile" else 8)
    assert 0 < told["verify"]["relative_error"] < 0.2


def test_a_mixture_that_transformers_could_not_read_is_not_verified(tmp_path, monkeypatch):
    folder, _, _ = float_folder(tmp_path, "Mixtral")
    monkeypatch.setattr(comparison.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(OptionValueError, match="reads no int8 experts of that format"):
        compare(folder, tmp_path / "int8", "compressed-tensors")


def test_carries_along_all_that_is_no_weight(tmp_path):
    folder, _, _ = float_folder(tmp_path)
    kept = ["chat_template.jinja", "modeling_own.py", "1_Pooling/config.json", "2_Dense/config.json"]
    kept.append("2_Dense/model.safetensors")
    left = ["optimizer.pt", "onnx/model.onnx", "original/consolidated.00.pth", ".cache/x.json", ".gitattributes"]
    for name in [*kept, *left]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    target = folder / "int8"
    quantize_folder(folder, target, CONFIG)
    assert all((target / name).read_text() == name for name in kept)
    assert not any((target / name).exists() for name in left)
    assert not (target / "int8").exists()


def test_broken_descriptions_are_named(tmp_path):
    folder, _, _ = float_folder(tmp_path, max_shard_size="40KB")
    index = folder / "model.safetensors.index.json"
    whole = index.read_text()
    for broken in ('{"weight_map"', "{}", "[]"):
        index.write_text(broken)
        with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json: weight_map cannot be read"):
            quantize_folder(folder, tmp_path / "int8", CONFIG)
    for strange in ("../float/model.safetensors", "a/b.safetensors", "/etc/passwd", "", "..", 3):
        index.write_text(json.dumps({"weight_map": {"a": strange, "b": "x.safetensors"}}))
        with pytest.raises(CheckpointError, match=r"weight_map names .*; expected names of files in"):
            quantize_folder(folder, tmp_path / "int8", CONFIG)
    index.write_text(whole)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["OwnForCausalLM"]}))
    with pytest.raises(OptionValueError, match=r"architectures='OwnForCausalLM'.*trust_remote_code"):
        quantize_folder(folder, tmp_path / "int8", CONFIG)
    for broken in ("{", json.dumps({**config, "model_type": "own"})):
        (folder / "config.json").write_text(broken)
        with pytest.raises(CheckpointError, match=r"config\.json: the file cannot be read"):
            quantize_folder(folder, tmp_path / "int8", CONFIG)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: the file cannot be read"):
        quantize_folder(folder, tmp_path / "int8", CONFIG)
    assert not (tmp_path / "int8").exists()


def test_a_skip_that_names_nothing_is_told(tmp_path):
    folder, _, _ = float_folder(tmp_path)
    result = CliRunner().invoke(app, ["quantize", str(folder), str(tmp_path / "int8"), "--skip", "oo_proj"])
    assert result.exit_code == 0, result.output
    assert "names no linear: oo_proj" in result.stderr
    target = str(tmp_path / "again")
    result = CliRunner().invoke(app, ["quantize", str(folder), target, "--weight-only", "oo_proj"])
    assert "names no linear: oo_proj" in result.stderr
