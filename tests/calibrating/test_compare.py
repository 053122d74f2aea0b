"""``compare``: what int8 changes, linear by linear."""

import json
import math

import pytest
import torch
from torch import nn

from int8compile import Calibration, compare
from int8compile.calibration import CalibratedSite
from int8compile.errors import CalibrationError


class Language(nn.Module):
    """Token ids to logits; a linear with outliers, one without, and one that is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 128)
        self.rough, self.smooth, self.head = nn.Linear(128, 128), nn.Linear(128, 128), nn.Linear(128, 50)
        self.unused = nn.Linear(128, 128)
        self.embedding.weight.data[:, 5] *= 80

    def forward(self, input_ids):
        hidden = self.smooth(torch.tanh(self.rough(self.embedding(input_ids))))
        return Output(self.head(hidden))


class Output:
    def __init__(self, logits):
        self.logits = logits


def model() -> Language:
    torch.manual_seed(0)
    return Language().eval().requires_grad_(False)


def batches(count: int = 2) -> list[torch.Tensor]:
    return list(torch.randint(0, 50, (count, 2, 12), generator=torch.Generator().manual_seed(1)))


def test_the_linear_with_outliers_is_the_worst_without_their_columns():
    result = compare(model(), batches(), {"outlier_policy": "none"})
    sites = {site.path: site for site in result.sites}
    assert list(sites) == ["rough", "smooth", "unused"]
    assert sites["rough"].sqnr < sites["smooth"].sqnr - 10
    assert sites["rough"].outlier_columns == sites["smooth"].outlier_columns == 0
    with_columns = compare(model(), batches(), None)
    again = {site.path: site for site in with_columns.sites}
    assert again["rough"].sqnr > sites["rough"].sqnr + 10
    assert again["rough"].outlier_columns >= 1
    assert (sites["unused"].sqnr, sites["unused"].loss) == (None, None)
    logits = torch.cat([model()(batch).logits[:, :-1].flatten(0, 1) for batch in batches()])
    targets = torch.cat([batch[:, 1:].flatten() for batch in batches()])
    assert math.isclose(result.loss, float(nn.functional.cross_entropy(logits, targets)), rel_tol=1e-5)


def test_columns_of_a_calibration_are_counted():
    calibration = Calibration({"rough": CalibratedSite(128, 128, (5, 6))})
    result = compare(model(), batches(), {"calibration": calibration}, each=False)
    assert {site.path: site.outlier_columns for site in result.sites}["rough"] == 2
    assert all(site.loss is None for site in result.sites)


def test_the_loss_is_the_users_or_how_far_the_output_is_from_float():
    subject = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128)).requires_grad_(False)
    given = [{"input": torch.randn(6, 128)}]
    apart = compare(subject, given)
    assert apart.loss == 0.0
    assert 0 < apart.int8_loss < 1e-3
    assert all(0 < site.loss <= 2 * apart.int8_loss for site in apart.sites)
    own = compare(subject, given, loss=lambda x, output: output.sum() + x.shape[0])
    assert math.isclose(own.loss, float(subject(given[0]["input"]).sum()) + 6, rel_tol=1e-5)


def test_the_table_and_json_say_the_same():
    result = compare(model(), batches(), each=False)
    read = json.loads(result.to_json())
    assert [site["path"] for site in read["sites"]] == [site.path for site in result.sites]
    text = str(result)
    assert all(site.path in text for site in result.sites)
    assert "in float" in text
    assert read["sites"][-1]["sqnr"] is None


def test_the_model_is_left_as_it_was():
    subject = model().train()
    before = {name: value.clone() for name, value in subject.state_dict().items()}
    compare(subject, batches())
    assert subject.training
    assert all(torch.equal(value, before[name]) for name, value in subject.state_dict().items())
    assert not any(module._forward_hooks for module in subject.modules())


def test_what_it_refuses():
    with pytest.raises(CalibrationError, match=r"compare\(model, batches\): batches is empty"):
        compare(model(), [])
    with pytest.raises(CalibrationError, match="a batch is int; expected a tensor"):
        compare(model(), [3])
    with pytest.raises(CalibrationError, match="llm_int8_has_fp16_weight=True has no int8 weights"):
        compare(model(), batches(), {"llm_int8_has_fp16_weight": True})
