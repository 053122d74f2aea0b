"""Whole models: what is found in each, and that it computes LLM.int8(), whoever compiles the rewritten graph."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from gold import BF16_BOUND, FP32_BOUND, emulate, int8_linear
from model_zoo import ZOO, BrokenByTorchError, Entry, Row, measure, tabulate
from small_modules import Mlp

# How much nearer to the emulation than to the float model the output must be.
FP32_RATIO, BF16_RATIO = 0.25, 0.5

# Inductor takes most of a minute for each, so only one of the families goes through it by default.
COMPILED_BY_DEFAULT = ("Llama",)


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest) -> Iterator[list[Row]]:
    """Collects what was measured and shows it as a table when all is done."""
    measured: list[Row] = []
    yield measured
    terminal = request.config.pluginmanager.getplugin("terminalreporter")
    capture = request.config.pluginmanager.getplugin("capturemanager")
    if terminal is not None and measured:
        with capture.global_and_fixture_disabled():
            terminal.write(f"\n\n{tabulate(measured)}")


def check_found(row: Row) -> None:
    """As many linears, in int8 and left for each reason, as the architecture has."""
    entry, report = row.entry, row.report
    assert (report.rewritten, dict(row.left)) == (entry.int8, entry.left), str(report)
    paths = [(site.path, site.detail) for site in report.sites]
    assert len(set(paths)) == len(paths), f"a linear was reported twice: {paths}"


def check_graphs(row: Row) -> None:
    """The backend adds neither graphs nor graph breaks."""
    assert row.ours == row.plain
    assert row.ours.breaks == len(row.report.breaks) == row.entry.breaks
    assert row.ours.graphs == len(row.report.graphs)


def check_output(row: Row) -> None:
    """The output is that of the emulation, not that of the float model, and outliers took part in it."""
    low = row.entry.autocast
    assert row.error <= (BF16_BOUND if low else FP32_BOUND)
    if row.entry.int8:
        assert row.error <= (BF16_RATIO if low else FP32_RATIO) * row.float_error
        assert row.outliers >= row.entry.int8 / 2


def measured(entry: Entry, **how: bool) -> Row:
    try:
        return measure(entry, **how)
    except BrokenByTorchError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.name)
def test_rewritten_model(entry: Entry, rows: list[Row]) -> None:
    row = measured(entry)
    rows.append(row)
    check_found(row)
    check_graphs(row)
    check_output(row)


@pytest.mark.parametrize(
    "entry",
    [pytest.param(e, marks=[] if e.name in COMPILED_BY_DEFAULT else pytest.mark.slow, id=e.name) for e in ZOO],
)
def test_compiled_model(entry: Entry) -> None:
    row = measured(entry, inductor=True)
    check_found(row)
    check_graphs(row)
    check_output(row)


# That the emulation can be believed.


def test_emulation_by_hand() -> None:
    x = torch.tensor([[1.27, 7.0, -0.644], [0.0, 1.0, 0.0]])
    weight = torch.tensor([[2.54, 0.1, 1.283]])
    bias = torch.tensor([10.0])
    # Row 0 without its outlier: scale 0.01, codes 127, 0, -64. Row 1 has an outlier column and nothing else.
    # The weight: scale 0.02, codes 127, 5, 64. Column 1 is multiplied in float: 7 and 1 times 5 * 0.02.
    by_hand = [[(127 * 127 - 64 * 64) * 0.01 * 0.02 + 7 * 0.1 + 10], [0.1 + 10]]
    out, columns = int8_linear(x, weight, bias, 6.0)
    torch.testing.assert_close(out, torch.tensor(by_hand))
    assert columns == 1

    # Threshold 0: scale 7 / 127, codes 23, 127, -12; and a row whose scale is its own 1 / 127.
    by_hand = [[(23 * 127 + 127 * 5 - 12 * 64) * 7 / 127 * 0.02 + 10], [127 * 5 / 127 * 0.02 + 10]]
    out, columns = int8_linear(x, weight, bias, 0.0)
    torch.testing.assert_close(out, torch.tensor(by_hand))
    assert columns == 0


def test_emulation_reaches_only_what_is_named() -> None:
    model, x = Mlp(), torch.randn(5, 32)
    with emulate(model, ["up"]) as tally:
        hidden = model.act(model.up(model.norm(x)))
        assert torch.equal(model.down(hidden), torch.nn.functional.linear(hidden, model.down.weight, model.down.bias))
    assert tally.calls == {"up": 1}
    assert "forward" not in vars(model.up), "the model is left as it was"


def test_emulation_misses_nothing() -> None:
    model = Mlp()
    with pytest.raises(LookupError, match="no parameter 'sideways'"), emulate(model, ["sideways"]):
        pass
    with pytest.raises(LookupError, match="nothing multiplied by up"), emulate(model, ["up", "down"]):
        model.down(torch.zeros(1, 64))
