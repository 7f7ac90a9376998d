"""The calibration file: it comes back as written, byte for byte, and refuses what it is not of."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from dydit.calibrate.activation_ranges import ActivationRanges
from dydit.calibrate.calibration_file import Calibration, OverflowRates, TokenCalibration, plan_sha256, read_calibration
from dydit.calibrate.capacity import CapacityConfig
from dydit.calibrate.mixed_precision import CurvePoint, Quality, Sensitivity
from dydit.calibrate.range_methods import Method
from dydit.diffusion.samplers import Sampler, SamplerConfig, Spacing
from dydit.errors import CalibrationError
from dydit.quantization.smoothing import Smoothing

RATES = OverflowRates(images=20, trials=100, rate=0.01, upper=0.04, repeated_steps=0.02, mlp_ratio=1.06)
CHECKPOINT, PLAN = "a" * 64, "b" * 64
SAMPLING = SamplerConfig(steps=3)


def calibration(**changes: Any) -> Calibration:
    tokens = TokenCalibration(
        tokens=16,
        settings=CapacityConfig(),
        mean_ratio=((0.5, 0.25),) * 3,
        capacities=((9, 4), (8, 16)),
        predicted=RATES,
        held_out=RATES,
    )
    values: dict[str, Any] = {
        **{"checkpoint_sha256": CHECKPOINT, "steps": 3, "sampler": Sampler.DDPM, "plan_sha256": PLAN},
        **{"cfg_scales": (1.5, 4.0), "seed": 0, "held_out_seed": 1, "tokens": tokens},
    }
    return Calibration.model_validate({**values, **changes})


def ranges(**more: Any) -> ActivationRanges:
    values = (((1.0,) * 4,) * 2,) * 2
    return ActivationRanges(method=Method.MINMAX, images=20, thresholds=values, clipped=values, **more)


SMOOTHED = ranges(smoothing=Smoothing(blocks=({"proj": "0a19", "fc2": "00"}, {})))
ACTIVATIONS = {"tokens": None, "tokens and activations": ranges(), "smoothed activations": SMOOTHED}


@pytest.mark.parametrize("activations", ACTIVATIONS.values(), ids=ACTIVATIONS.keys())
def test_it_comes_back_as_written(tmp_path, activations):
    made = calibration(activations=activations)
    path = tmp_path / "calibration.json"
    path.write_text(made.to_json())
    assert read_calibration(path) == made and read_calibration(path).to_json() == made.to_json()
    values = json.loads(made.to_json())
    assert list(values) == sorted(values) and ("activations" in values) == (activations is not None)
    assert made.tokens.largest == (9, 16)
    if activations is not None:
        assert ("migration" in values["activations"]) == (activations is SMOOTHED), "older files stay what they were"


@pytest.mark.parametrize(
    ("of", "words"),
    [
        (("c" * 64, SAMPLING, PLAN), r"another checkpoint \(its SHA-256 differs\)"),
        ((CHECKPOINT, SamplerConfig(), PLAN), "3 steps of ddpm, not 250 steps of ddpm"),
        ((CHECKPOINT, SamplerConfig(steps=3, sampler=Sampler.DDIM), PLAN), "3 steps of ddpm, not 3 steps of ddim"),
        (
            (CHECKPOINT, SamplerConfig(steps=3, spacing=Spacing.TRAILING), PLAN),
            "3 steps of ddpm, not 3 steps of ddpm, spacing trailing",
        ),
        ((CHECKPOINT, SAMPLING, "d" * 64), r"another plan \(its segments or masks differ\)"),
    ],
)
def test_what_differs_is_named(of, words):
    with pytest.raises(CalibrationError, match=f"^the calibration is for {words}; run `dydit calibrate` with"):
        calibration().require(*of)
    calibration().require(CHECKPOINT, SAMPLING, PLAN)


def test_a_sampler_with_settings_is_that_sampler_with_those_settings():
    settings = {"sampler": Sampler.DDIM, "spacing": Spacing.TRAILING, "eta": 0.5}
    made, asked = calibration(**settings), SamplerConfig(steps=3, **settings)
    assert made.sampling == asked
    made.require(CHECKPOINT, asked, PLAN)
    for other in (SamplerConfig(steps=3, sampler=Sampler.DDIM, spacing=Spacing.TRAILING), SAMPLING):
        with pytest.raises(
            CalibrationError, match=r"^the calibration is for 3 steps of ddim, spacing trailing, eta 0.5"
        ):
            made.require(CHECKPOINT, other, PLAN)


def test_the_hash_of_a_plan_changes_with_bounds_and_masks():
    masks = np.arange(48).reshape(3, 16) % 3 > 0
    other, same = masks.copy(), plan_sha256((0, 1, 3), masks)
    other[2, 15] ^= True
    assert same == plan_sha256([np.int64(0), 1, 3], masks.copy())
    assert len({same, plan_sha256((0, 2, 3), masks), plan_sha256((0, 1, 3), other)}) == 3
    assert plan_sha256((0, 1, 3), masks.reshape(4, 12)) != same


MOVED = ("activations", "migration", "blocks")


def spoil(path: tuple[Any, ...], value: Any) -> str:
    values = json.loads(calibration(activations=SMOOTHED).to_json())
    place = values
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(values)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not a calibration: not JSON"),
        ("{", "is not a calibration: not JSON"),
        ("[]", "schema version None, expected 1"),
        (spoil(("schema_version",), 2), "schema version 2, expected 1; calibrate again"),
        (spoil(("more",), 1), "more is not a known setting"),
        (spoil(("tokens", "capacities", 0, 1), 17), r"a capacity is outside 1\.\.16"),
        (spoil(("tokens", "capacities", 0, 1), 0), r"a capacity is outside 1\.\.16"),
        (spoil(("tokens", "capacities", 0), [4]), "the same number of blocks"),
        (spoil(("tokens", "capacities"), []), "the same number of blocks"),
        (spoil(("tokens", "mean_ratio", 0, 0), 1.5), "mean_ratio.0.0"),
        (spoil(("tokens", "mean_ratio", 0, 0), float("nan")), "mean_ratio.0.0"),
        (spoil(("tokens", "held_out", "rate"), float("inf")), "held_out.rate"),
        (spoil(("steps",), 4), "expected one row of token ratios for each step"),
        (spoil(("steps",), 1001), "steps must be at most 1000, not 1001"),
        (spoil(("sampler",), "heun"), "sampler must be 'ddpm', "),
        (spoil(("spacing",), "karras"), "spacing must be 'linspace', "),
        (spoil(("eta",), 1.5), "eta must be at most 1, not 1.5"),
        (spoil(("held_out_seed",), 0), "held_out_seed must differ from seed"),
        (spoil(("checkpoint_sha256",), "short"), "checkpoint_sha256"),
        (spoil(("cfg_scales",), []), "cfg_scales"),
        (spoil(MOVED, [{"qkv": "0b"}, {}]), r"activations.migration.blocks.0.qkv must match the pattern"),
        (spoil(MOVED, [{"fc2": ""}, {}]), r"blocks.0.fc2 must match the pattern"),
        (spoil(MOVED, [{}]), "the smoothing and the thresholds have different numbers of blocks"),
        (spoil(MOVED, []), "migration.blocks"),
    ],
)
def test_a_file_that_is_none(tmp_path, text, words):
    path = tmp_path / "calibration.json"
    path.write_text(text)
    with pytest.raises(CalibrationError, match=words) as caught:
        read_calibration(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(CalibrationError, match="does not exist; `dydit calibrate` makes it"):
        read_calibration(tmp_path / "missing")
    with pytest.raises(CalibrationError, match="cannot be read"):
        read_calibration(tmp_path)


def test_nan_is_never_written():
    with pytest.raises(ValueError, match="JSON"):
        calibration().model_copy(update={"cfg_scales": (float("nan"),)}).to_json()


QUALITY = Quality(psnr_least=31.0, psnr_median=40.0)
POINT = CurvePoint(layers=12, share=0.75, bound=1.6, quality=QUALITY)


def searched(**changes: Any) -> Sensitivity:
    values: dict[str, Any] = {
        **{"precision": "int8-static", "target_psnr": 30.0, "images": 8, "layers": 16, "chosen": POINT},
        **{"peak": "2, pixels in [-1, 1]", "losses": (((0.1,) * 4,) * 2,) * 2, "curve": (POINT,)},
        **{"held_out": QUALITY, "held_out_holds": True},
    }
    return Sensitivity.model_validate({**values, **changes})


def kept(*rows: bool) -> ActivationRanges:
    return ranges().model_copy(update={"in_16_bits": ((rows, (False,) * 4), ((False,) * 4,) * 2)})


def having_lost(losses: Any) -> Calibration:
    return calibration(activations=ranges(), sensitivity=searched(losses=losses))


def test_layers_that_stay_in_16_bits_come_back_as_written(tmp_path):
    made = calibration(activations=kept(True, False, False, True), sensitivity=searched())
    path = tmp_path / "calibration.json"
    path.write_text(made.to_json())
    back = read_calibration(path)
    assert back == made and back.to_json() == made.to_json()
    assert back.activations.fp16_layers.sum() == 2 and back.activations.fp16_layers.shape == (2, 2, 4)
    assert not ranges().fp16_layers.any() and ranges().fp16_layers.shape == (2, 2, 4)
    back.require_searched("int8-static")
    calibration(activations=ranges()).require_searched("fp8")
    with pytest.raises(
        CalibrationError, match="were searched for int8-static, not for fp8; run `dydit calibrate` with"
    ):
        back.require_searched("fp8")


def test_files_without_a_search_are_as_they_were():
    values = json.loads(calibration(activations=ranges()).to_json())
    assert sorted(values["activations"]) == ["clipped", "images", "method", "percentile", "thresholds"]
    assert "sensitivity" not in values


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: calibration(sensitivity=searched()), "there are no activation ranges"),
        (lambda: searched(target_fd_ratio=1.1), "one target"),
        (lambda: searched(target_psnr=None), "one target"),
        (lambda: searched(curve=()), "not on the curve"),
        (lambda: searched(losses=(((0.1,) * 3, (0.1,) * 4),)), "every block must have losses of the same layers"),
        (lambda: searched(losses=()), "every block must have losses of the same layers"),
        (lambda: having_lost((((0.1,) * 3,) * 2,) * 2), "losses and activation ranges have different shapes"),
        (lambda: having_lost((((0.1,) * 4,) * 3,) * 2), "losses and activation ranges have different shapes"),
        (lambda: having_lost((((0.1,) * 4,) * 2,)), "losses and activation ranges have different shapes"),
        (lambda: searched(precision="fp16"), "precision"),
        (
            lambda: ActivationRanges.model_validate(kept(True).model_dump()),
            "in_16_bits and thresholds have different shapes",
        ),
        (
            lambda: ActivationRanges.model_validate({**ranges().model_dump(), "in_16_bits": (((False,) * 4,) * 2,)}),
            "in_16_bits and thresholds have different shapes",
        ),
    ],
)
def test_a_search_that_does_not_hold_together(make, words):
    with pytest.raises(ValueError, match=words):
        make()
