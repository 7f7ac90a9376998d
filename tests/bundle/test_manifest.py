"""Masks survive packing, manifests survive JSON, and slots translate back to units of the checkpoint."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dydit.bundle.manifest import Manifest, SamplingEntry, SegmentEntry, pack_mask, parse_manifest, unpack_mask
from dydit.bundle.vae_entry import VAE_DECODER, VAE_WEIGHTS
from dydit.diffusion.coefficients import NOISE, sampling_run
from dydit.diffusion.samplers import Sampler, SamplerConfig
from dydit.errors import BundleError
from dydit.models.config import Routers
from dydit.planning.masks import freeze_masks

LAW = settings(max_examples=25, deadline=None)
COUNTS = st.integers(1, 140)


@LAW
@given(st.lists(st.booleans(), min_size=1, max_size=140))
def test_masks_survive_packing(bits):
    mask = np.array(bits)
    text = pack_mask(mask)
    assert len(text) == 2 * ((len(bits) + 7) // 8)
    back = unpack_mask(text, len(bits))
    assert back.dtype == bool
    np.testing.assert_array_equal(back, mask)


def test_packing_is_big_endian():
    assert pack_mask(np.array([True, False, False, False, False, True])) == "84"


@LAW
@given(st.text("0123456789abcdef xyz", max_size=8), COUNTS)
def test_text_that_is_no_mask_is_refused(text, count):
    try:
        fits = len(bytes.fromhex(text)) == (count + 7) // 8
    except ValueError:
        fits = False
    if fits:
        assert unpack_mask(text, count).shape == (count,)
    else:
        with pytest.raises(BundleError, match=r"^manifest: a mask "):
            unpack_mask(text, count)


def test_manifest_survives_json(make_bundle, tmp_path):
    manifest = make_bundle().manifest
    path = tmp_path / "manifest.json"
    path.write_text(manifest.to_json())
    assert parse_manifest(path) == manifest
    assert path.read_bytes() == (make_bundle().path / "manifest.json").read_bytes()
    assert json.loads(path.read_text())["schema_version"] == 3


@pytest.mark.parametrize("routers", [Routers.FIRST_ON, Routers.ALL_ROUTED])
def test_checkpoint_masks_are_those_of_the_model(make_bundle, make_checkpoint, small_config, routers):
    checkpoint = make_checkpoint(small_config.model_copy(update={"routers": routers}), seed=3)
    manifest = make_bundle(checkpoint).manifest
    expected = freeze_masks(checkpoint.model(), np.array(manifest.sampling.timesteps))
    np.testing.assert_array_equal(manifest.checkpoint_masks(), expected)
    assert manifest.unit_order != manifest.model.units.every_unit, "the slots are in an order of their own"
    assert (manifest.step_masks() != expected).any()


def test_what_steps_compute_holds_what_they_need(make_bundle):
    """The union of a segment's masks, and nothing else."""
    manifest = make_bundle().manifest
    executed, masks = manifest.executed_masks(), manifest.step_masks()
    assert executed.shape == masks.shape and executed.dtype == bool
    for segment in manifest.plan.segments:
        union = masks[segment.first : segment.first + segment.count].any(axis=0)
        assert (executed[segment.first : segment.first + segment.count] == union).all()
    assert (executed != masks).any()


def test_a_decoder_is_part_of_the_manifest(vae_bundle, tmp_path):
    manifest = vae_bundle.manifest
    assert {VAE_DECODER, VAE_WEIGHTS} <= manifest.files.keys() and "diffusers" in manifest.tools
    path = tmp_path / "manifest.json"
    path.write_text(manifest.to_json())
    assert parse_manifest(path) == manifest
    other = manifest.vae.model_copy(update={"scaling_factor": 1.0})
    assert manifest.model_copy(update={"vae": other}).compute_digest() != manifest.digest


def test_a_manifest_without_a_decoder_is_as_it_was_before_there_were_any(make_bundle):
    """Bundles of that time have no such field, and their digests must hold."""
    manifest = make_bundle().manifest
    values = json.loads(manifest.to_json())
    assert manifest.vae is None and "vae" not in values
    kept = {name: value for name, value in values.items() if name != "digest"}
    assert hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest() == values["digest"]
    explicit = Manifest.model_validate({**values, "vae": None})
    assert explicit == manifest and explicit.compute_digest() == manifest.digest


def test_segment_steps():
    assert list(SegmentEntry(first=3, count=2, subnet=0).steps) == [3, 4]


def test_timesteps_run_from_noise_to_image(make_bundle):
    sampling = make_bundle().manifest.sampling
    assert list(sampling.timesteps) == sorted(sampling.timesteps, reverse=True)
    assert sampling.timesteps[0] == 999 and sampling.timesteps[-1] == 0
    assert sampling.coefficients[-1][NOISE] == 0 and sampling.coefficients[0][NOISE] == 1
    assert not sampling.multistep


@pytest.mark.parametrize(
    "chosen",
    [{}, {"sampler": "ddim", "eta": 0.25, "spacing": "trailing"}, {"sampler": "dpm-solver++", "spacing": "leading"}],
    ids=["ddpm", "ddim", "dpm-solver++"],
)
def test_a_sampling_run_follows_from_its_settings(make_bundle, chosen):
    """The settings that are stored give the times and the coefficients that are stored, to the last bit."""
    manifest = make_bundle(steps=6, **chosen).manifest
    sampling = manifest.sampling
    assert sampling.config == SamplerConfig.model_validate({"steps": 6, **chosen})
    run = sampling_run(manifest.model.diffusion, sampling.config, manifest.model.learn_sigma)
    assert SamplingEntry.of(sampling.config, run, sampling.cfg_channels) == sampling
    np.testing.assert_array_equal(sampling.timesteps, run.times)
    np.testing.assert_array_equal(sampling.coefficients, run.coefficients.astype(np.float32))
    assert sampling.multistep == (sampling.sampler is Sampler.DPM_SOLVER)


def test_fields_have_no_defaults_that_hide_a_loss(make_bundle):
    """Every field but the digest must be there, so that a manifest cut short is noticed."""
    values = json.loads(make_bundle().manifest.to_json())
    for field in values.keys() - {"digest"}:
        kept = {key: value for key, value in values.items() if key != field}
        with pytest.raises(ValueError, match=field):
            Manifest.model_validate(kept)
