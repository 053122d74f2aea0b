"""``calibrate``: what it chooses, what it is used by, and what it refuses."""

import copy
import pickle

import pytest
import torch
from torch import nn

import int8compile
from int8compile import Int8Linear, calibrate
from int8compile.calibrating.choosing import choices, spend, worst
from int8compile.calibrating.observing import ROWS, Sample
from int8compile.errors import CalibrationError
from int8compile.report import Reason

OUTLIERS = (7, 40)


class Block(nn.Module):
    """q and k read one activation, which has outlier columns; so do the two after it, which has none."""

    def __init__(self, inner: int = 256) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(128, 128), nn.Linear(128, 128)
        self.up, self.down = nn.Linear(128, inner, bias=False), nn.Linear(inner, 128)
        self.unused = nn.Linear(128, 128)

    def forward(self, x):
        return self.down(torch.relu(self.up(torch.tanh(self.q(x)) * torch.tanh(self.k(x)))))


def model(seed: int = 0) -> Block:
    torch.manual_seed(seed)
    return Block().eval().requires_grad_(False)


def batches(count: int = 3, seed: int = 1, scale: float = 60.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(2, 16, 128, generator=generator) for _ in range(count)]
    for x in made:
        x[..., list(OUTLIERS)] *= scale
    return made


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


def test_the_columns_with_outliers_are_chosen_for_all_that_read_them():
    made = calibrate(model(), batches(), budget=0.02)
    assert made.sites["q"].columns == made.sites["k"].columns
    assert set(OUTLIERS) <= set(made.sites["q"].columns)
    assert made.share <= 0.02
    assert made.about["unreached"] == ["unused"]
    assert "unused" not in made.sites
    assert (made.about["batches"], made.about["rows"], made.about["model"]) == (3, 96, "Block")


def test_no_budget_is_no_columns_and_more_is_never_worse():
    errors = []
    for budget in (0.0, 0.01, 0.03, 0.1):
        made = calibrate(model(), batches(), budget=budget)
        assert made.share <= budget
        errors.append(sum(site.error for site in made.sites.values()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 20 * errors[2]


def test_a_batch_is_a_tensor_or_arguments():
    of = [calibrate(model(), kind) for kind in (batches(), [(x,) for x in batches()], [{"x": x} for x in batches()])]
    assert of[0].sites == of[1].sites == of[2].sites
    assert calibrate(torch.compile(model()), iter(batches())).sites == of[0].sites


def test_the_model_is_left_as_it_was():
    subject = model().train()
    subject.down.eval()
    before = {name: value.clone() for name, value in subject.state_dict().items()}
    calibrate(subject, batches())
    assert [m.training for m in (subject, subject.q, subject.down)] == [True, True, False]
    assert all(torch.equal(value, before[name]) for name, value in subject.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in subject.modules())
    with pytest.raises(CalibrationError):
        calibrate(subject, [batches()[0], 3])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in subject.modules())
    assert subject.training


def test_every_way_of_int8_uses_it(tmp_path):
    subject, x = model(), batches(1, seed=5)[0]
    path = calibrate(subject, batches()).save(tmp_path)
    options = {"calibration": str(path)}
    in_place = copy.deepcopy(subject)
    report = int8compile.quantize_(in_place, options)
    assert report.calibrations == [f"calibration {path} ({int8compile.Calibration.load(path).digest[:8]})"]
    assert report.uncalibrated == 1
    assert "not in the calibration" in next(site.detail for site in report.sites if site.path == "unused")
    assert "look for outliers" in str(report)
    assert isinstance(in_place.q, Int8Linear)
    assert in_place.q.outlier_policy == "calibrated"
    assert in_place.unused.outlier_policy == "column"
    want = subject(x)
    plain = copy.deepcopy(subject)
    int8compile.quantize_(plain, {"outlier_policy": "none"})
    assert error(in_place(x), want) < error(plain(x), want) / 3
    compiled = torch.compile(subject, backend="int8", options=options)
    torch.testing.assert_close(compiled(x), in_place(x), rtol=1e-4, atol=1e-4)
    assert int8compile.last_report().calibrations == report.calibrations
    program = int8compile.export(subject, (x,), config=options)
    torch.testing.assert_close(program.module()(x), in_place(x), rtol=1e-4, atol=1e-4)


def test_a_row_is_the_same_in_any_batch_under_every_way():
    subject, x = model(), batches(1, seed=5)[0].flatten(0, 1)
    options = {"calibration": calibrate(subject, batches(), config={"min_features": 0})}
    int8compile.quantize_(subject, options)
    whole = subject.q(x)
    assert all(torch.equal(subject.q(row), whole[i : i + 1]) for i, row in enumerate(x.split(1)))


def test_columns_follow_the_weight_of_a_module():
    subject, other = model(), model(seed=3)
    options = {"calibration": calibrate(subject, batches())}
    for each in (subject, other):
        int8compile.quantize_(each, options)
    subject.load_state_dict(other.state_dict())
    x = batches(1)[0]
    assert torch.equal(subject(x), other(x))
    for each in (subject, other):
        each.q.int8_weight = each.k.int8_weight
    before = subject.q(x)
    subject.q._buffers["weight"] = -subject.q.weight  # as accelerate does it
    torch.testing.assert_close(subject.q(x) - subject.q.bias, subject.q.bias - before)
    subject.q.weight.neg_()
    assert torch.equal(subject.q(x), before)
    assert torch.equal(copy.deepcopy(subject).q(x), before)
    assert torch.equal(pickle.loads(pickle.dumps(subject.q))(x), before)
    subject.q.weight.data.neg_()  # which no version counts
    torch.testing.assert_close(subject.q(x) - subject.q.bias, subject.q.bias - before)
    with torch.inference_mode():
        subject.q.weight = -subject.q.weight
        assert torch.equal(subject.q(x), before)
        subject.q.weight.neg_()  # nor this
        torch.testing.assert_close(subject.q(x) - subject.q.bias, subject.q.bias - before)


@pytest.mark.parametrize("backend", ["eager", "int8"])
def test_columns_follow_the_weight_of_a_compiled_module(backend):
    subject = model()
    int8compile.quantize_(subject, {"calibration": calibrate(subject, batches())})
    q, x = subject.q, batches(1)[0]
    compiled = torch.compile(copy.copy(q), backend=backend, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), q(x))
        for write in (q.weight.neg_, q.weight[7].zero_, lambda: q.weight.data[9].neg_()):  # one row, or uncounted
            before = q(x)
            write()
            assert torch.equal(compiled(x), q(x))
            assert not torch.equal(q(x), before)


def test_float_weights_are_bought_where_int8_changes_most():
    made = calibrate(model(), batches(), budget=0.0, max_float_weights=0.2)
    in_float = {path for path, site in made.sites.items() if site.in_float}
    assert in_float == {"q"} or in_float == {"k"}
    subject = model()
    report = int8compile.quantize_(subject, {"calibration": made})
    assert {site.path for site in report.sites if site.reason is Reason.CALIBRATED} == in_float
    assert all(isinstance(subject.get_submodule(path), nn.Linear) for path in in_float)
    compiled = torch.compile(model(), backend="int8", options={"calibration": made})
    compiled(batches(1)[0])
    reasons = {site.path: site.reason for site in int8compile.last_report().sites}
    assert {path for path, reason in reasons.items() if reason is Reason.CALIBRATED} == in_float


@pytest.mark.parametrize(
    ("subject", "given", "problem"),
    [
        (model, lambda: [], "batches is empty"),
        (model, lambda: torch.zeros(2, 128), "batches is Tensor; expected a list of batches"),
        (model, lambda: {"x": torch.zeros(2, 128)}, "batches is dict; expected a list of batches"),
        (model, lambda: 3, "batches is int; expected a list of batches"),
        (model, lambda: [3], "a batch is int; expected a tensor, or the model's arguments"),
        (model, lambda: [()], "a batch is tuple and empty"),
        (model, lambda: [torch.full((2, 128), float("nan"))], "q is given NaN or infinite values in batch 0"),
        (model, lambda: [*batches(1), torch.full((2, 128), float("inf"))], "q is given NaN .* in batch 1"),
        (lambda: nn.Sequential(nn.Linear(8, 8)), batches, r"no linear of the model becomes int8 \(TOO_SMALL\)"),
        (lambda: nn.Sequential(nn.ReLU()), batches, r"no linear of the model becomes int8 \(it has none\)"),
        (lambda: print, batches, "model is builtin_function_or_method; expected a torch.nn.Module"),
        (lambda: Elsewhere(), batches, "none of 1 linears was called by 3 batches"),
    ],
)
def test_what_it_refuses(subject, given, problem):
    with pytest.raises(CalibrationError, match=problem):
        calibrate(subject(), given())


class Elsewhere(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(128, 128)

    def forward(self, x):
        return x


@pytest.mark.parametrize("share", [-0.1, 1.5, "2%", True])
def test_shares_lie_between_0_and_1(share):
    for name in ("budget", "max_float_weights"):
        with pytest.raises(CalibrationError, match=rf"calibrate\(..., {name}="):
            calibrate(model(), batches(), **{name: share})


def test_a_calibration_of_another_model_is_an_error():
    made = calibrate(model(), batches())
    with pytest.raises(CalibrationError, match="was made for another model: up is 128 x 256 there and 128 x 384 here"):
        int8compile.quantize_(Block(384).requires_grad_(False), {"calibration": made})
    compiled = torch.compile(Block(384).requires_grad_(False), backend="int8", options={"calibration": made})
    with pytest.raises(Exception, match=r"CalibrationError: .* was made for another model"):
        compiled(batches(1)[0])
    elsewhere = nn.Sequential(nn.Linear(128, 128)).requires_grad_(False)
    report = int8compile.quantize_(elsewhere, {"calibration": made})
    assert (report.rewritten, report.uncalibrated) == (1, 1)


@pytest.mark.parametrize("pieces", [[1] * 3000, [700] * 7, [5, 5000, 1, 90], [3]])
def test_a_sample_is_evenly_spaced_and_does_not_grow(pieces):
    sample, at = Sample(), 0
    for count in pieces:
        rows = sample.rows(count) + at
        sample.keep(rows, 2 * rows)
        at += count
    kept, twice = sample.all()
    steps = set(kept.diff().tolist())
    assert kept[0] == 0
    assert len(steps) <= 1
    assert len(kept) <= 2 * ROWS
    assert len(kept) >= min(at, ROWS // 2)
    assert torch.equal(twice, 2 * kept)


def test_columns_are_worth_having_together():
    """Two columns of equal size: one of them alone is worth nothing."""
    magnitudes, columns = torch.tensor([[9.0, 9.0, 1.0]] * 4), torch.tensor([[5, 2, 7]] * 4)
    offer = choices(magnitudes, columns, in_features=40, scale=2.0)
    assert offer.errors[:3] == [162.0, 162.0, 2.0]
    assert sorted(offer.columns[:2]) == [2, 5]
    assert spend([offer], [1], 1) == [0]
    assert spend([offer], [1], 2) == [2]
    assert spend([offer, offer], [1, 2], 2) == [2, 0]
    assert spend([offer, offer], [1, 2], 6) == [2, 2]


def test_floats_go_by_error_for_an_element():
    assert worst([1.0, 3.0, 0.0, 2.0], [10, 10, 1, 2], 12) == [3, 1]
    assert worst([1.0], [10], 9) == []
