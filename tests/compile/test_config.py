"""Every option: its meaning is tested where it acts; here, what is accepted and how mistakes are told."""

import pytest
import torch
from torch import nn

from int8compile import Int8Config
from int8compile.errors import OptionNameError, OptionValueError


def test_defaults_are_bitsandbytes_own():
    config = Int8Config.make()
    assert config.llm_int8_threshold == 6.0
    assert config.llm_int8_skip_modules == ()
    assert config.llm_int8_has_fp16_weight is False


@pytest.mark.parametrize("threshold", [6, 6.0, 0, 2.5, torch.tensor(3.0).item()])
def test_any_real_threshold(threshold):
    assert Int8Config.make({"llm_int8_threshold": threshold}).llm_int8_threshold == float(threshold)


@pytest.mark.parametrize("modules", [["a"], ("a",), {"a"}, None])
def test_skip_modules_as_any_collection(modules):
    assert Int8Config.make({"llm_int8_skip_modules": modules}).llm_int8_skip_modules == (("a",) if modules else ())


def test_unknown_option_suggests_the_nearest():
    with pytest.raises(OptionNameError, match=r"unknown option 'threshold'. Did you mean 'llm_int8_threshold'\?"):
        Int8Config.make({"threshold": 6.0})
    with pytest.raises(
        OptionNameError,
        match=r"unknown option 'zzz'\. Known options: activation, attention, calibration, disable_passes, ",
    ):
        Int8Config.make({"zzz": 1})
    with pytest.raises(OptionNameError, match=r"Inductor's own go into options=\{'inductor': \{\.\.\.\}\}"):
        Int8Config.make({"max_autotune": True})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"llm_int8_threshold": "6"}, r"option llm_int8_threshold='6': expected a real number >= 0"),
        ({"llm_int8_threshold": -1}, "llm_int8_threshold=-1: expected a real number >= 0"),
        ({"llm_int8_threshold": float("nan")}, "llm_int8_threshold=nan"),
        ({"llm_int8_threshold": True}, "llm_int8_threshold=True"),
        ({"llm_int8_skip_modules": "lm_head"}, r"expected a list of strings, such as \['lm_head'\]"),
        ({"llm_int8_skip_modules": ["a", 3]}, "it holds 3"),
        ({"llm_int8_has_fp16_weight": 1}, "True or False"),
        ({"llm_int8_enable_fp32_cpu_offload": 1}, "expected True or False"),
        ({"min_features": -1}, "min_features=-1: expected an integer >= 0"),
        ({"min_features": 1.5}, "min_features=1.5"),
        ({"outlier_policy": "row"}, "expected one of 'column', 'element'"),
        (
            {"outlier_policy": "all"},
            "expected 'column', 'element' or 'none'; activation='float' is what leaves all activations",
        ),
        ({"activation": "int16"}, "activation='int16': expected one of 'int8', 'float'"),
        ({"llm_int8_weight_only_modules": "lm_head"}, r"expected a list of strings, such as \['lm_head'\]"),
        (
            {"llm_int8_weight_only_modules": ["lm_head"], "llm_int8_has_fp16_weight": True},
            r"llm_int8_weight_only_modules=\('lm_head',\): expected the default, as llm_int8_has_fp16_weight=True",
        ),
        ({"activation": "float", "llm_int8_has_fp16_weight": True}, "activation='float': expected the default, as"),
        ({"kernels": "fast"}, "expected one of 'auto', 'native', 'reference'"),
        (
            {"disable_passes": ["merg"]},
            "disable_passes='merg': expected names among expand, group_heads, attend, fold_queries, normalize",
        ),
        ({"mode": "fast"}, "expected one of 'default'"),
        ({"inductor": ["max_autotune"]}, "expected a dict of inductor's own options"),
        (
            {"release_weights": True, "llm_int8_has_fp16_weight": True},
            "release_weights=True: expected False, as llm_int8_has_fp16_weight=True",
        ),
        (["llm_int8_threshold"], "expected a dict, an Int8Config or a BitsAndBytesConfig"),
    ],
)
def test_bad_values_name_the_option_its_value_and_what_is_expected(options, message):
    with pytest.raises(OptionValueError, match=message):
        Int8Config.make(options)


def test_mode_from_torch_compile_and_from_options_must_agree():
    assert Int8Config.make(None, mode="max-autotune").mode == "max-autotune"
    assert Int8Config.make({"mode": "max-autotune"}, mode="max-autotune").mode == "max-autotune"
    with pytest.raises(OptionValueError, match=r"options\['mode'\], which is 'lite'"):
        Int8Config.make({"mode": "lite"}, mode="max-autotune")


def test_a_bitsandbytes_config_is_accepted():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BitsAndBytesConfig(
        load_in_8bit=True, llm_int8_threshold=5.0, llm_int8_skip_modules=["q_proj"], llm_int8_has_fp16_weight=False
    )
    config = Int8Config.make(theirs)
    assert config == Int8Config(llm_int8_threshold=5.0, llm_int8_skip_modules=("q_proj",))
    with pytest.raises(OptionValueError, match="expected an 8-bit BitsAndBytesConfig"):
        Int8Config.make(transformers.BitsAndBytesConfig(load_in_4bit=True))


def test_unknown_options_of_inductor_suggest_the_nearest():
    compiled = torch.compile(nn.Linear(4, 4), backend="int8", options={"inductor": {"max_autotun": True}})
    with pytest.raises(
        Exception, match=r"OptionValueError: option inductor=.*inductor's own options, such as 'max_autot"
    ):
        compiled(torch.ones(2, 4))


def test_errors_reach_the_user_through_dynamo_with_their_first_line():
    compiled = torch.compile(nn.Linear(4, 4), backend="int8", options={"treshold": 6.0})
    with pytest.raises(Exception, match=r"backend='int8' raised:\nOptionNameError: unknown option 'treshold'. Did you"):
        compiled(torch.ones(1, 4))


def test_fingerprint_tells_options_apart():
    texts = {
        Int8Config.make(options).fingerprint()
        for options in (None, {"llm_int8_threshold": 5}, {"min_features": 0}, {"outlier_policy": "element"})
    }
    texts |= {
        Int8Config(activation="float").fingerprint(),
        Int8Config(llm_int8_weight_only_modules=("a",)).fingerprint(),
    }
    assert len(texts) == 6
