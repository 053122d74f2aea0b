"""Calibrations as values and as files."""

import json

import pytest
import safetensors.torch

import int8compile
from int8compile import Calibration, Int8Config
from int8compile.calibration import CalibratedSite
from int8compile.errors import CalibrationError, OptionValueError

SITES = {
    "a.q": CalibratedSite(64, 32, (3, 9), error=0.25),
    "a.o": CalibratedSite(64, 64, ()),
    "b": CalibratedSite(128, 64, (0, 127), in_float=True),
}


def calibration() -> Calibration:
    return Calibration(SITES, {"model": "Tiny", "budget": 0.02})


def test_a_file_holds_all_of_it(tmp_path):
    made = calibration()
    for path in (tmp_path / "some.safetensors", tmp_path):
        written = made.save(path)
        read = Calibration.load(path)
        assert read == made
        assert (read.sites, read.about, read.path) == (SITES, made.about, str(written))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["calibration.safetensors", "some.safetensors"]
    assert Calibration.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def test_equal_ones_are_the_same_to_the_compile_caches():
    config = Int8Config(calibration=calibration())
    assert config.fingerprint() == Int8Config(calibration=calibration()).fingerprint()
    other = Calibration({**SITES, "b": CalibratedSite(128, 64, (1,))}, calibration().about)
    assert config.fingerprint() != Int8Config(calibration=other).fingerprint()
    assert config == Int8Config.make({"calibration": json.loads(json.dumps(config.to_dict()))["calibration"]})


def test_share_is_of_what_is_int8():
    assert calibration().share == 2 / 128


def test_a_site_is_found_by_any_of_its_paths_and_must_have_its_shape():
    made = calibration()
    assert made.site(64, 32, ["x", "a.q"]) == SITES["a.q"]
    assert made.site(64, 32, ["x"]) is None
    with pytest.raises(
        CalibrationError, match=r"Tiny .* was made for another model: a.q is 64 x 32 there and 64 x 48 "
    ):
        made.site(64, 48, ["a.q"])


@pytest.mark.parametrize(
    "site",
    [
        CalibratedSite(64, 32, (9, 3)),
        CalibratedSite(64, 32, (3, 3)),
        CalibratedSite(64, 32, (64,)),
        CalibratedSite(64, 32, (-1,)),
        CalibratedSite(0, 32, ()),
        CalibratedSite(64, 32, (1.0,)),
        CalibratedSite(200_000, 32, ()),
    ],
)
def test_sites_that_no_linear_can_have(site):
    with pytest.raises(
        CalibrationError, match=r"calibration of a: .*; expected positive sizes, and features in ascend"
    ):
        Calibration({"a": site})


def rewritten(path, change):
    """The file with other columns or another header."""
    with safetensors.safe_open(str(path), "pt") as file:
        header = json.loads(file.metadata()["int8compile_calibration"])
        columns = {name: file.get_tensor(name) for name in header["sites"]}
    change(header, columns)
    safetensors.torch.save_file(columns, path, {"int8compile_calibration": json.dumps(header)})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda header, columns: columns["a.q"].add_(1), "was changed after it was made"),
        (lambda header, columns: header["sites"]["a.o"].update(in_float=True), "was changed after it was made"),
        (lambda header, columns: header["about"].update(model="Other"), "was changed after it was made"),
        (lambda header, columns: columns.pop("a.q"), "columns and sites differ"),
        (lambda header, columns: header.update(version=2), "of version 2; expected 1"),
        (lambda header, columns: header.pop("sites"), "is no calibration"),
        (lambda header, columns: header["sites"]["b"].pop("in_features"), "is no calibration"),
        (lambda header, columns: columns["b"].add_(1), "is no calibration, or not whole .*expected positive sizes"),
    ],
)
def test_edited_files_are_refused(tmp_path, change, problem):
    path = calibration().save(tmp_path)
    rewritten(path, change)
    with pytest.raises(CalibrationError, match=problem):
        Calibration.load(path)


def test_truncated_and_other_files_are_refused(tmp_path):
    path = calibration().save(tmp_path)
    whole = path.read_bytes()
    for size in (0, 4, 8, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CalibrationError, match="is no calibration, or not whole"):
            Calibration.load(path)
    path.write_text("columns: [1, 2, 3]")
    with pytest.raises(CalibrationError, match="is no calibration, or not whole"):
        Calibration.load(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="there is no calibration"):
        Calibration.load(path)


def test_what_is_there_stays_until_a_new_one_is_whole(tmp_path, monkeypatch):
    path = calibration().save(tmp_path)

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        Calibration({}).save(path)
    assert Calibration.load(path) == calibration()
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_options_that_do_not_go_together():
    with pytest.raises(CalibrationError, match="calibration=3; expected a Calibration, or the path of one"):
        Int8Config(calibration=3)
    with pytest.raises(OptionValueError, match="expected None, as llm_int8_has_fp16_weight=True looks for outliers"):
        Int8Config(calibration=calibration(), llm_int8_has_fp16_weight=True)
    with pytest.raises(OptionValueError, match=r"outlier_policy='calibrated': .*calibration=\.\.\. is what names"):
        Int8Config(outlier_policy="calibrated")
    assert int8compile.Calibration is Calibration
