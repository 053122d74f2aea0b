"""What helps to find out what happens: artifacts for tlparse, the log, and the switch that turns int8 off."""

import json
import logging

import pytest
import torch
from compiling import compile_eager
from torch import nn

import int8compile
from int8compile.errors import OptionValueError


@pytest.fixture
def artifacts():
    """What goes into torch's structured trace, by name."""
    found: dict[str, str] = {}

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            artifact = getattr(record, "metadata", {}).get("artifact")
            if artifact is not None:
                found[artifact["name"]] = record.payload

    handler, trace = Collect(), logging.getLogger("torch.__trace")
    trace.addHandler(handler)
    yield found
    trace.removeHandler(handler)


@torch.no_grad()
def test_tlparse_is_given_the_graph_and_the_report(artifacts):
    compile_eager(nn.Linear(3, 4))(torch.ones(2, 3))
    assert "int8compile.linear(" in artifacts["int8compile_graph"]
    assert json.loads(artifacts["int8compile_report"])["rewritten"] == 1


@torch.no_grad()
def test_disabled_means_float(monkeypatch, caplog):
    monkeypatch.setenv("INT8COMPILE_DISABLE", "1")
    model, x = nn.Linear(160, 160), torch.randn(3, 160)
    before = int8compile.last_report()
    actual = torch.compile(model, backend="int8")(x)
    torch.testing.assert_close(actual, model(x), rtol=1e-6, atol=1e-6)
    assert int8compile.last_report() is before
    assert "INT8COMPILE_DISABLE=1: the model is compiled in float" in caplog.text
    monkeypatch.setenv("INT8COMPILE_DISABLE", "yes")
    torch._dynamo.reset()
    with pytest.raises(Exception, match="INT8COMPILE_DISABLE='yes': expected 1, 0 or nothing") as raised:
        torch.compile(model, backend="int8")(x)
    assert isinstance(raised.value.__cause__ or raised.value.inner_exception, OptionValueError)
