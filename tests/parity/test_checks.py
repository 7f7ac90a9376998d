"""Verdicts on made-up comparisons: values and decisions are judged apart, and the departure is named."""

from __future__ import annotations

import numpy as np
import pytest

from dydit.bundle.stored_weights import Precision
from dydit.parity.checks import judge, locate, locate_in_run
from dydit.parity.comparison import StepComparison, StepValues, compare_step, count_flips, picture_error, relative_l2
from dydit.parity.tolerances import AGREEMENT_FROM, CHECKS, tolerances
from dydit.reports.parity_report import Status

TIMESTEPS = np.array([999, 666, 333, 0])
LAYERS, IMAGES = 3, 2

FP32, FP16 = tolerances(Precision.FP32), tolerances(Precision.FP16)


def compared(step, values=(1e-7, 1e-7), flips=None, margin=1e-6, decisions=1000):
    """`flips`: {(block, image): tokens}."""
    counts, margins = np.zeros((LAYERS, IMAGES), np.int64), np.zeros((LAYERS, IMAGES))
    for where, number in (flips or {}).items():
        counts[where], margins[where] = number, margin
    return StepComparison(step, np.array(values), np.array(values) * 10, counts, margins, decisions)


def all_steps(**changed):
    return [changed.get(f"s{step}", compared(step)) for step in range(4)]


def test_the_table_gives_every_hop_a_bar_and_a_reason():
    assert [each.check for each in CHECKS] == ["masks", "weights", "sliced", "step", "run"]
    assert all(each.reason and each.title and each.measure for each in CHECKS)
    assert (FP32["step"].limit, FP32["run"].limit, FP32["masks"].limit) == (1e-5, 1e-3, 0)


def test_relative_l2_by_hand():
    reference = np.array([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1.0, 1.0]], np.float32)
    value = np.array([[3.0, 4.5], [1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [np.nan, 1.0]], np.float32)
    assert relative_l2(value, reference).tolist() == [0.1, 0.0, 0.0, np.inf, np.inf]


def test_flips_belong_to_images_and_margins_are_in_units_of_the_blocks_logits():
    logits = np.ones((2, 4, 5), np.float32)  # rows: images 0 and 1 with their labels, then both without
    logits[1] *= 10
    logits[1, 3, 2] = -0.5
    tokens = logits > 0
    tokens[1, 3, 2] = True
    tokens[0, 0, 4] = False
    flips, margins = count_flips(tokens, logits, 2)
    assert flips.tolist() == [[1, 0], [0, 1]]
    assert margins[0].tolist() == [1.0, 0.0]
    assert margins[1, 1] == pytest.approx(0.5 / np.sqrt((19 * 100 + 0.25) / 20))


def test_the_contribution_is_what_is_left_without_the_latents():
    rng = np.random.default_rng(0)
    x, part = rng.standard_normal((2, 2, 4, 8, 8))
    error = np.zeros_like(part)
    error[1] = 1e-3 * part[1]
    ours, reference = (StepValues(x, 50 * x + each, None) for each in (part + error, part))
    result = compare_step(3, ours, reference, 50.0, None)
    assert result.contributions == pytest.approx([0, 1e-3], abs=1e-9)
    assert 0 < result.values[1] < 1e-4
    assert result.decisions == 0 and not result.flips.any()


def test_a_wrong_history_counts_by_what_it_adds_to_the_next_step():
    rng = np.random.default_rng(0)
    x, x_prev, history = rng.standard_normal((3, 2, 4, 8, 8))
    error = np.zeros_like(history)
    error[1] = 1e-3 * x_prev[1]
    reference = StepValues(x, x_prev, None, next_history=history)
    wrong = StepValues(x, x_prev * (1 + 1e-5), None, next_history=history + error)
    for c_history, expected in ((0.0, 1e-5), (-0.5, 5e-4), (1e-3, 1e-5)):
        result = compare_step(3, wrong, reference, 1.0, None, c_history=c_history)
        assert result.values == pytest.approx([1e-5, expected], rel=1e-6)
    none = StepValues(x, x_prev, None)
    size = relative_l2(x_prev - 0.5 * history, x_prev)
    assert compare_step(3, none, reference, 1.0, None, c_history=-0.5).values == pytest.approx(size), "none is zeros"
    assert not compare_step(3, none, reference, 1.0, None).values.any()
    lost = StepValues(x, x_prev, None, next_history=np.full_like(history, np.nan))
    assert compare_step(3, lost, reference, 1.0, None, c_history=-0.5).values.tolist() == [np.inf, np.inf]


def test_everything_agrees():
    verdict = judge(FP32["step"], all_steps(s2=compared(2, (1e-7, 9e-6))), TIMESTEPS)
    check = verdict.check
    assert check.status is Status.PASSED and check.flips == 0 and check.decisions == 4000
    assert (check.worst, check.worst_step, check.worst_image) == (9e-6, 2, 1)
    assert (verdict.step, verdict.image) == (2, 1), "the worst is what one looks into"
    assert check.per_step == (1e-7, 1e-7, 9e-6, 1e-7) and check.per_image == (1e-7, 9e-6)


@pytest.mark.parametrize("value", [1.1e-5, np.inf])
def test_a_value_over_the_bar_fails_and_its_first_step_is_named(value):
    verdict = judge(FP32["step"], all_steps(s1=compared(1, (1e-7, value)), s3=compared(3, (0.5, 1e-7))), TIMESTEPS)
    assert verdict.check.status is Status.FAILED
    assert (verdict.step, verdict.image) == (1, 1)
    assert verdict.check.worst == (0.5 if np.isfinite(value) else None)
    verdict.check.model_dump_json()


def test_a_tie_sets_its_image_and_step_aside():
    check = judge(FP32["step"], all_steps(s1=compared(1, (0.3, 1e-7), {(2, 0): 1})), TIMESTEPS).check
    assert check.status is Status.PASSED and check.flips == 1
    assert check.per_step[1] == 1e-7 and check.per_image == (1e-7, 1e-7)
    (image,) = check.flipped_images
    assert (image.image, image.step, image.timestep, image.block, image.tie) == (0, 1, 666, 2, True)
    assert image.value == 0.3


def test_a_flip_that_is_no_tie_fails():
    verdict = judge(FP32["step"], all_steps(s2=compared(2, flips={(1, 1): 1}, margin=1e-3)), TIMESTEPS)
    assert verdict.check.status is Status.FAILED and "not a near-tie" in verdict.check.detail
    assert (verdict.step, verdict.image) == (2, 1)


def test_later_blocks_may_follow_from_a_tie():
    comparison = compared(1, (0.3, 1e-7), {(0, 0): 1, (2, 0): 5})
    comparison.margins[2, 0] = 2.0
    assert judge(FP32["step"], all_steps(s1=comparison), TIMESTEPS).check.status is Status.PASSED


def test_in_a_run_an_image_is_set_aside_from_its_flip_on():
    flip, after = compared(1, (0.2, 1e-7), {(2, 0): 1}), compared(2, (0.4, 1e-7), {(0, 0): 9}, margin=1.0)
    check = judge(FP32["run"], all_steps(s1=flip, s2=after, s3=compared(3, (0.5, 5e-4))), TIMESTEPS).check
    assert check.status is Status.PASSED and check.worst == 5e-4 and check.per_image == (None, 5e-4)
    assert [(each.image, each.step, each.flips) for each in check.flipped_images] == [(0, 1, 10)]
    alone = judge(FP32["step"], all_steps(s1=flip, s2=after), TIMESTEPS).check
    assert alone.status is Status.FAILED, "where steps stand alone nothing follows from an earlier one"


def test_a_runs_bar_is_on_its_end():
    passing = judge(FP32["run"], all_steps(s1=compared(1, (0.2, 0.2))), TIMESTEPS)
    assert passing.check.status is Status.PASSED
    failing = judge(FP32["run"], all_steps(s2=compared(2, (1e-7, 2e-3)), s3=compared(3, (1e-7, 2e-3))), TIMESTEPS)
    check = locate_in_run(failing, TIMESTEPS)
    assert check.status is Status.FAILED and check.departure.step == 2 and check.departure.timestep == 333


@pytest.mark.parametrize(("decisions", "status"), [(AGREEMENT_FROM // 4, Status.FAILED), (1000, Status.PASSED)])
def test_too_many_ties_fail_where_there_are_enough_to_tell(decisions, status):
    steps = [compared(step, decisions=decisions) for step in range(4)]
    steps[1] = compared(1, (0.1, 1e-7), {(1, 0): 12}, decisions=decisions)
    assert judge(FP32["step"], steps, TIMESTEPS).check.status is status


def test_below_fp32_flips_are_judged_by_their_share_and_set_no_image_aside():
    flips = {(0, 0): 1, (0, 1): 1}
    steps = all_steps(s1=compared(1, (0.01, 0.019), flips, margin=3.0))
    check = judge(FP16["step"], steps, TIMESTEPS).check
    assert check.status is Status.PASSED and check.worst == 0.019 and check.flips == 2 and "2 of" in check.detail
    over = all_steps(s1=compared(1, (0.01, 0.021), flips, margin=3.0))
    check = judge(FP16["step"], over, TIMESTEPS).check
    assert check.status is Status.FAILED and "the tolerance is 0.02" in check.detail
    many = [compared(step, decisions=AGREEMENT_FROM) for step in range(4)]
    many[2] = compared(2, flips={(1, 0): int(0.005 * 4 * AGREEMENT_FROM)}, decisions=AGREEMENT_FROM)
    assert judge(FP16["step"], many, TIMESTEPS).check.status is Status.FAILED, (
        "0.5 % of the decisions, the tolerance is 0.1 %"
    )
    assert judge(tolerances(Precision.BF16)["step"], many, TIMESTEPS).check.status is Status.PASSED


@pytest.mark.parametrize(("decibels", "status"), [(36, Status.PASSED), (34, Status.FAILED)])
def test_below_fp32_a_run_is_judged_by_the_psnr_of_its_pictures(decibels, status):
    pixels = np.zeros((1, 1, 4, 4), np.float32)
    error = picture_error(pixels + 2 * 10 ** (-decibels / 20), pixels, 2.0)
    check = judge(FP16["run"], all_steps(s3=compared(3, (1e-3, float(error[0])))), TIMESTEPS).check
    assert check.status is status and f"PSNR {decibels}.0 dB" in check.detail
    assert "35.0 dB" in check.detail or status is Status.PASSED


def test_a_pictures_error_by_hand():
    reference = np.array([[0.0, 4.0], [0.0, 4.0], [1.0, 1.0], [0.0, 1.0]], np.float32)
    value = reference + np.array([[2.0, 0.0], [1.0, -1.0], [0.0, 0.0], [np.nan, 0.0]], np.float32)
    assert picture_error(value, reference, 2.0).tolist() == [np.sqrt(2) / 2, 0.5, 0.0, np.inf]
    assert picture_error(value, reference, None).tolist() == [np.sqrt(2) / 4, 0.25, 0.0, np.inf], (
        "in the reference's range"
    )


def test_nothing_left_to_compare_is_said():
    flips = {(0, 0): 1, (0, 1): 1}
    check = judge(FP32["run"], all_steps(s0=compared(0, (0.1, 0.1), flips)), TIMESTEPS).check
    assert (
        check.worst is None
        and "every image has a token that is routed differently" in check.detail
        and check.per_step == (None,) * 4
    )


class TestLocate:
    def sides(self, change_block=None, flip_block=None):
        rng = np.random.default_rng(1)
        x = rng.standard_normal((IMAGES, 4, 4, 4)).astype(np.float32)
        residuals = rng.standard_normal((LAYERS, 2 * IMAGES, 5, 8)).astype(np.float32)
        tokens = rng.random((LAYERS, 2 * IMAGES, 5)) > 0.5
        ours, routed = residuals.copy(), tokens.copy()
        if change_block is not None:
            ours[change_block:, 3] *= 1.001  # image 1, its row without label
        if flip_block is not None:
            routed[flip_block, 3, 0] ^= True
        return StepValues(x, x, routed, ours), StepValues(x, x, tokens, residuals)

    def failed(self):
        return judge(FP32["step"], all_steps(s1=compared(1, (1e-7, 0.1))), TIMESTEPS)

    def test_the_first_block_that_differs(self):
        check = locate(self.failed(), *self.sides(change_block=1), timestep=666)
        assert (check.departure.step, check.departure.block) == (1, 1)
        assert check.per_block[0] == 0 and check.per_block[1] == pytest.approx(7e-4, rel=0.9)

    def test_an_image_that_is_not_concerned_is_not_looked_at(self):
        verdict = judge(FP32["step"], all_steps(s1=compared(1, (0.1, 1e-7))), TIMESTEPS)
        check = locate(verdict, *self.sides(change_block=1), timestep=666)
        assert check.departure.block is None and "after the last block" in check.departure.where

    def test_a_token_that_flips_first(self):
        check = locate(self.failed(), *self.sides(change_block=1, flip_block=1), timestep=666)
        assert check.departure.block == 1 and "routed differently" in check.departure.where

    def test_a_hop_that_passed_has_blocks_but_no_departure(self):
        check = locate(judge(FP32["step"], all_steps(), TIMESTEPS), *self.sides(), timestep=999)
        assert check.per_block == (0.0,) * LAYERS and check.departure is None
