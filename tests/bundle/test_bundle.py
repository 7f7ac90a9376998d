"""Opening a bundle refuses, in one clear line, whatever is missing, damaged, tampered with or outside the folder."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dydit.bundle.bundle import Bundle
from dydit.bundle.manifest import Manifest
from dydit.errors import BundleError

AGAIN = "export the bundle again"
Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def folder(make_bundle, tmp_path) -> Path:
    """A copy of a bundle, to be damaged."""
    target = tmp_path / "bundle"
    shutil.copytree(make_bundle().path, target)
    return target


def digest_of(values: dict[str, Any]) -> str:
    kept = {key: value for key, value in values.items() if key != "digest"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def rewrite(folder: Path, change: Change, sign: bool = True) -> None:
    """Edit the manifest; with `sign`, as somebody would who knows how the digest is made."""
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    assert values["digest"] == digest_of(values)
    change(values)
    if sign:
        values["digest"] = digest_of(values)
    path.write_text(json.dumps(values))


def refusal(path: Path, **options: bool) -> str:
    with pytest.raises(BundleError) as caught:
        Bundle.open(path, **options)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and len(message.replace(str(path), "")) < 800
    return message


def flip_byte(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_untouched_copy_opens(folder, make_bundle):
    assert Bundle.open(folder).manifest == make_bundle().manifest
    assert Bundle.open(str(folder)).path == folder
    rewrite(folder, lambda values: None)
    Bundle.open(folder)


def test_reads_weights_masks_and_files(make_bundle, make_checkpoint):
    bundle = make_bundle()
    state = make_checkpoint().state
    np.testing.assert_array_equal(bundle.weight("pos_embed"), state["pos_embed"][0])
    with pytest.raises(ValueError, match="read-only"):
        bundle.weight("pos_embed")[0, 0] = 1
    steps, units = bundle.manifest.sampling.steps, 3 * 2 * 4
    assert bundle.masks.shape == (steps, units) and bundle.masks.dtype == bool
    gates = bundle.step_gates(3)
    assert gates.dtype == np.float32 and gates.shape == (units,)
    np.testing.assert_array_equal(gates, bundle.masks[3])
    assert bundle.file("weights.bin") == bundle.path / "weights.bin"
    with pytest.raises(BundleError, match="the manifest lists no file 'other'"):
        bundle.file("other")


def test_not_a_bundle(tmp_path, folder):
    assert refusal(tmp_path / "nowhere").endswith(
        f"export a bundle with `dydit export CHECKPOINT --out {tmp_path}/nowhere`"
    )
    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path / "empty") == f"{tmp_path}/empty is not a bundle: it has no manifest.json"
    message = refusal(folder / "weights.bin")
    assert message.endswith("is not a bundle: a bundle is a folder, written by `dydit export`")
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").mkdir()
    assert "manifest.json cannot be read: Is a directory" in refusal(folder)


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"\xff\xfe{}", b'{"schema_version": 3,}', b"[" * 200_000, b"9" * 5000],
    ids=["empty", "cut", "not-utf8", "comma", "deep", "long-number"],
)
def test_manifest_that_is_not_json(folder, text):
    (folder / "manifest.json").write_bytes(text)
    message = refusal(folder)
    assert "manifest.json is damaged: not JSON (" in message and message.endswith(AGAIN)


@pytest.mark.parametrize(
    "text",
    ["[]", "3", '"x"', "null", "{}", '{"schema_version": 1}', '{"schema_version": 2}', '{"schema_version": "3"}'],
)
def test_other_schema_versions(folder, text):
    (folder / "manifest.json").write_text(text)
    assert "but this dydit reads 3; export the bundle again" in refusal(folder)


@pytest.mark.parametrize("size", [0.3, 0.99])
def test_truncated_manifest(folder, size):
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * size)])
    assert "is damaged: not JSON" in refusal(folder)


EDITS: dict[str, Change] = {
    "coefficient": lambda m: m["sampling"]["coefficients"][0].__setitem__(0, 1.25),
    "timestep": lambda m: m["sampling"]["timesteps"].__setitem__(0, 998),
    "mask": lambda m: m["masks"].__setitem__(0, m["masks"][1]),
    "hash": lambda m: m["files"]["weights.bin"].__setitem__("sha256", "0" * 64),
    "batch": lambda m: m.__setitem__("max_batch", 17),
    "digest": lambda m: m.__setitem__("digest", "0" * 64),
    "no-digest": lambda m: m.pop("digest"),
    "checkpoint": lambda m: m.__setitem__("checkpoint_sha256", "0" * 64),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_edited_manifest_is_noticed(folder, edit):
    rewrite(folder, edit, sign=False)
    assert refusal(folder).endswith(f"was changed after it was written (its digest differs); {AGAIN}")


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda m: m.update(extra=1), "extra is not a known setting"),
        (lambda m: m["model"].update(width=1), "model.width is not a known setting"),
        (lambda m: m["subnets"][0].update(x=1), "subnets.0.x is not a known setting"),
        (lambda m: m.pop("masks"), "masks is missing"),
        (
            lambda m: m["sampling"].update(sampler="heun"),
            "sampling.sampler must be 'ddpm', 'ddim', 'dpm-solver++', 'euler' or 'euler-maruyama', not 'heun'",
        ),
        (
            lambda m: m["sampling"].update(spacing="karras"),
            "sampling.spacing must be 'linspace', 'leading' or 'trailing', not 'karras'",
        ),
        (lambda m: m["sampling"].update(eta=1.5), "sampling.eta must be at most 1, not 1.5"),
        (
            lambda m: m["sampling"].update({name: m["sampling"][name] * 300 for name in ("timesteps", "coefficients")}),
            "sampling.timesteps must have at most 1000 entries",
        ),
        (
            lambda m: m["sampling"]["timesteps"].__setitem__(0, float("nan")),
            "sampling.timesteps.0 must be a finite number",
        ),
        (lambda m: m.update(precision="fp12"), "precision must be"),
        (lambda m: m.update(routing="sparse"), "routing must be 'dynamic', 'capacity' or 'dense'"),
        (lambda m: m["files"]["weights.bin"].update(bytes=-1), "files.weights.bin.bytes must be at least"),
        (lambda m: m["files"]["weights.bin"].update(sha256="../../x"), "files.weights.bin.sha256 must match"),
        (lambda m: m["model"].update(num_heads=5), "hidden_size 64 is not a multiple of num_heads 5"),
        (lambda m: m["sampling"]["timesteps"].pop(), "timesteps and coefficients differ in length"),
        (lambda m: m["sampling"]["coefficients"][2].pop(), "sampling: a step does not have 8 coefficients"),
        (lambda m: m["masks"].pop(), "is not valid: the number of masks is not the number of sampling steps"),
        (lambda m: m["unit_order"][0][0].__setitem__(0, m["unit_order"][0][0][1]), "unit_order is not a permutation"),
        (lambda m: m["unit_order"][2][1].pop(), "unit_order is not a permutation"),
        (lambda m: m["unit_order"].pop(), "the lists of units do not match the blocks and unit groups"),
        (lambda m: m["unit_order"][1].pop(), "the lists of units do not match the blocks and unit groups"),
        (
            lambda m: m["subnets"][0]["units"].pop(),
            "the lists of units do not match the blocks and unit groups",
        ),
        (
            lambda m: m["subnets"][0]["units"][1].append([]),
            "the lists of units do not match the blocks and unit groups",
        ),
        (lambda m: m["subnets"][0]["units"][0][0].append(4), "a subnetwork's units are not ascending slots"),
        (lambda m: m["subnets"][0]["units"][2][1].insert(0, -1), "a subnetwork's units are not ascending slots"),
        (lambda m: m["subnets"][0]["units"][1].__setitem__(0, [1, 0]), "a subnetwork's units are not ascending slots"),
        (lambda m: m["subnets"][0]["units"][1].__setitem__(1, [0, 0]), "a subnetwork's units are not ascending slots"),
        (
            lambda m: m["plan"]["segments"].pop(),
            "the plan's segments do not cover the sampling steps once each, in order",
        ),
        (
            lambda m: m["plan"]["segments"][0].update(count=10**15),
            "the plan's segments do not cover the sampling steps",
        ),
        (lambda m: m["plan"]["segments"].reverse(), "the plan's segments do not cover the sampling steps"),
        (lambda m: m["plan"]["segments"][0].update(subnet=99), "the plan names a subnetwork that does not exist"),
        (lambda m: m["files"].pop("conditioning.onnx"), "file 'conditioning.onnx' is used but not listed"),
        (lambda m: m["subnets"][0].update(file="other.onnx"), "file 'other.onnx' is used but not listed"),
        (lambda m: m["subnets"][0].update(full_file="full.onnx"), "file 'full.onnx' is used but not listed"),
        (lambda m: m["weights"]["pos_embed"].update(dtype="object"), "weights.pos_embed.dtype must be"),
        (
            lambda m: m["weights"]["pos_embed"].update(shape=[-4, 64]),
            "weights.pos_embed.shape.0 must be",
        ),
        (
            lambda m: m["sampling"]["coefficients"][0].__setitem__(0, float("nan")),
            "sampling.coefficients.0.0 must be a finite",
        ),
        (lambda m: m["plan"].update(macs=float("inf")), "plan.macs must be a finite"),
    ],
)
def test_inconsistent_manifest_is_refused_even_when_signed(folder, change, where):
    rewrite(folder, change)
    message = refusal(folder)
    assert where in message and message.endswith(AGAIN)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda m: m["files"].pop("vae_decoder.onnx"), "file 'vae_decoder.onnx' is used but not listed"),
        (lambda m: m["files"].pop("vae_weights.bin"), "file 'vae_weights.bin' is used but not listed"),
        (lambda m: m["vae"].update(latent_channels=8), "decodes latents of 8 channels, but the model has 4"),
        (
            lambda m: m["vae"].update(tile=9),
            "the tile has a side of 9 latents; expected 1..8, the side",
        ),
        (lambda m: m["vae"].update(upscale=0), "vae.upscale must be at least 1, not 0"),
        (lambda m: m["vae"].update(scaling_factor=float("inf")), "vae.scaling_factor must be"),
        (lambda m: m["vae"].pop("source"), "vae.source is missing"),
    ],
)
def test_a_decoder_that_does_not_fit_is_refused_even_when_signed(vae_bundle, tmp_path, change, where):
    folder = shutil.copytree(vae_bundle.path, tmp_path / "bundle")
    rewrite(folder, change)
    assert where in refusal(folder)


def test_a_model_of_pixels_has_no_decoder(make_bundle, make_checkpoint, small_config, vae_bundle, tmp_path):
    pixels = make_bundle(make_checkpoint(small_config.model_copy(update={"in_channels": 3})))
    folder = shutil.copytree(pixels.path, tmp_path / "bundle")
    files = {name: vae_bundle.manifest.files[name].model_dump() for name in ("vae_decoder.onnx", "vae_weights.bin")}
    for name in files:
        shutil.copy(vae_bundle.path / name, folder / name)
    rewrite(folder, lambda m: (m.update(vae=vae_bundle.manifest.vae.model_dump()), m["files"].update(files)))
    assert "the model samples pixels of 3 channels" in refusal(folder)


def test_a_damaged_decoder_is_noticed(vae_bundle, tmp_path):
    folder = shutil.copytree(vae_bundle.path, tmp_path / "bundle")
    flip_byte(folder / "vae_weights.bin", 1000)
    assert refusal(folder).endswith(f"vae_weights.bin was changed (its SHA-256 differs); {AGAIN}")


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "a/../../evil", "..", "a\\b", "", "."])
def test_paths_that_leave_the_bundle(folder, name):
    (folder.parent / "evil").write_bytes(b"")
    entry = {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    rewrite(folder, lambda m: m["files"].update({name: entry}))
    message = refusal(folder)
    assert f"path {name!r} leads out of the bundle" in message


@pytest.mark.parametrize("name", ["two\nlines", "nul\0", "escape\x1b[2J"])
def test_names_that_no_exporter_writes(folder, name):
    rewrite(folder, lambda m: m["files"].update({name: {"bytes": 0, "sha256": "0" * 64}}))
    assert f"path {name!r} is not a file name" in refusal(folder)
    rewrite(folder, lambda m: m["files"].update({name: {"bytes": -1, "sha256": "0" * 64}}))
    refusal(folder)


def test_name_too_long_for_the_file_system(folder):
    rewrite(folder, lambda m: m["files"].update({"x" * 300: {"bytes": 0, "sha256": "0" * 64}}))
    assert "cannot be read: [Errno 36] File name too long" in refusal(folder)


def test_files_that_are_links(folder):
    outside = folder.parent / "blob"
    (folder / "weights.bin").rename(outside)
    (folder / "weights.bin").symlink_to(outside)
    assert Bundle.open(folder).weight("pos_embed").size
    outside.write_bytes(bytes(outside.stat().st_size))
    assert "weights.bin was changed (its SHA-256 differs)" in refusal(folder)


def test_symlink_loop(folder):
    (folder / "conditioning.onnx").unlink()
    (folder / "conditioning.onnx").symlink_to("conditioning.onnx")
    refusal(folder)


def test_a_bundle_may_itself_be_a_symlink(folder):
    link = folder.parent / "link"
    link.symlink_to(folder)
    assert Bundle.open(link).manifest == Bundle.open(folder).manifest


@pytest.mark.parametrize("name", ["weights.bin", "conditioning.onnx", "subnet-0000.onnx"])
def test_damaged_files(folder, name):
    path = folder / name
    original = path.read_bytes()
    flip_byte(path, len(original) // 2)
    assert refusal(folder).endswith(f"{name} was changed (its SHA-256 differs); {AGAIN}")
    Bundle.open(folder, verify=False)
    for data in (original[:-1], original + b"\0", b""):
        path.write_bytes(data)
        for verify in (True, False):
            message = refusal(folder, verify=verify)
            assert message.endswith(
                f"{name} has {len(data)} bytes, but the manifest says {len(original)} (truncated or replaced); {AGAIN}"
            )
    path.unlink()
    assert refusal(folder).endswith(f"{name} is missing; {AGAIN}")
    path.mkdir()
    assert refusal(folder).endswith(f"{name} is missing; {AGAIN}")


def test_weights_beyond_the_end_of_the_file(folder):
    rewrite(folder, lambda m: m["weights"]["pos_embed"].update(offset=10**9))
    assert refusal(folder).endswith(f"weight pos_embed lies outside weights.bin; {AGAIN}")


def test_files_that_are_not_listed_do_not_matter(folder):
    """Engines are built beside the graphs later."""
    (folder / "engines").mkdir()
    (folder / "engines" / "plan").write_bytes(b"x")
    Bundle.open(folder)


def test_masks_that_are_no_masks(folder):
    bundle = Bundle.open(folder)
    for text, complaint in (
        ("zz" * 3, "a mask is not hexadecimal: 'zzzzzz'"),
        ("00", "a mask has 1 bytes, expected 3"),
    ):
        masks = (text, *bundle.manifest.masks[1:])
        broken = Bundle(folder, bundle.manifest.model_copy(update={"masks": masks}))
        with pytest.raises(BundleError, match=complaint):
            _ = broken.masks


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_digest_covers_every_field(make_bundle):
    manifest = make_bundle().manifest
    assert manifest.digest == manifest.compute_digest()
    other = {"tools": {}, "max_batch": 99, "checkpoint_sha256": "x", "routing": None, "masks": ()}
    other["plan"] = manifest.plan.model_copy(update={"macs": 1.0})
    other["model"] = manifest.model.model_copy(update={"depth": 99})
    for field in Manifest.model_fields.keys() - {"digest"}:
        changed = manifest.model_copy(update={field: other.get(field, {})})
        assert changed.compute_digest() != manifest.digest, field
