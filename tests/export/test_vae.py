"""diffusers' autoencoder as a graph: a small random one, saved to a folder, decodes alike in both."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest

from dydit.bundle.vae import VAE_DECODER, VAE_WEIGHTS
from dydit.errors import BackendError, CheckpointError, ConfigError
from dydit.export.vae import export_vae
from dydit.models.config import ModelConfig
from dydit.runtime.vae import VaeDecoder

pytestmark = pytest.mark.numerics

SCALE = 0.18215


def model_of(**changes) -> ModelConfig:
    values = {"hidden_size": 64, "depth": 2, "num_heads": 4, "patch_size": 2, "input_size": 8, "in_channels": 4}
    return ModelConfig(**{**values, "num_classes": 7, **changes})


@pytest.fixture(scope="module")
def exported(autoencoder, tmp_path_factory):
    out = tmp_path_factory.mktemp("decoder")
    return out, export_vae(str(autoencoder.folder), out, model_of())


def test_the_graph_decodes_as_the_autoencoder(autoencoder, exported):
    folder, entry = exported
    assert (entry.latent_channels, entry.tile, entry.upscale, entry.scaling_factor) == (4, 8, 2, SCALE)
    decoder = VaeDecoder(folder, entry)
    for count in (1, 3):
        latents = np.random.default_rng(count).standard_normal((count, 4, 8, 8)).astype(np.float32)
        pixels, wanted = decoder.decode(latents), autoencoder.decode(latents)
        assert pixels.shape == (count, 3, 16, 16)
        assert np.std(wanted) > 0.01 and np.linalg.norm(pixels - wanted) < 1e-5 * np.linalg.norm(wanted)


def test_larger_latents_are_decoded_in_tiles(autoencoder, exported):
    """Not what the whole would give, as attention and norms see a tile only, but near it, and without holes."""
    folder, entry = exported
    latents = np.random.default_rng(0).standard_normal((1, 4, 14, 11)).astype(np.float32)
    pixels, wanted = VaeDecoder(folder, entry).decode(latents), autoencoder.decode(latents)
    assert pixels.shape == wanted.shape == (1, 3, 28, 22)
    assert np.corrcoef(pixels.reshape(-1), wanted.reshape(-1))[0, 1] > 0.9


def test_the_graph_is_of_our_kind(exported):
    folder, _ = exported
    proto = onnx.load(folder / VAE_DECODER, load_external_data=False)
    assert proto.ir_version == 11 and [(each.domain, each.version) for each in proto.opset_import] == [("", 23)]
    kinds = {node.op_type for node in proto.graph.node}
    assert "Attention" not in kinds and {"Softmax", "Conv", "Resize"} <= kinds
    assert not any(node.metadata_props for node in proto.graph.node)
    assert all(each.type.tensor_type.elem_type == onnx.TensorProto.FLOAT for each in proto.graph.input)
    dims = [dim.dim_param or dim.dim_value for dim in proto.graph.input[0].type.tensor_type.shape.dim]
    assert dims == ["batch", 4, 8, 8]
    places = {
        entry.value for each in proto.graph.initializer for entry in each.external_data if entry.key == "location"
    }
    assert places == {VAE_WEIGHTS}
    assert {file.name for file in folder.iterdir()} == {VAE_DECODER, VAE_WEIGHTS}
    assert (folder / VAE_WEIGHTS).stat().st_size > 10_000


def test_what_does_not_fit_is_refused(autoencoder, tmp_path):
    source = str(autoencoder.folder)
    with pytest.raises(ConfigError, match="decodes latents of 4 channels, but the model has 8"):
        export_vae(source, tmp_path, model_of(in_channels=8))
    with pytest.raises(ConfigError, match="samples pixels of 3 channels itself; leave the VAE away"):
        export_vae(source, tmp_path, model_of(in_channels=3))
    with pytest.raises(ConfigError, match=r"tiles of 9 latents: expected 1\.\.8"):
        export_vae(source, tmp_path, model_of(), tile=9)
    with pytest.raises(CheckpointError, match="does not exist; give a folder that diffusers saved, or a hub name"):
        export_vae(str(tmp_path / "nowhere"), tmp_path, model_of())
    with pytest.raises(CheckpointError, match="is no AutoencoderKL in safetensors") as caught:
        export_vae(str(tmp_path), tmp_path, model_of())
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_weights_are_read_from_safetensors_alone(autoencoder, tmp_path):
    import torch

    (tmp_path / "config.json").write_bytes((autoencoder.folder / "config.json").read_bytes())
    torch.save(autoencoder.module.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="is no AutoencoderKL in safetensors"):
        export_vae(str(tmp_path), tmp_path / "out", model_of())


def test_only_a_hub_name_downloads(autoencoder, tmp_path, monkeypatch):
    from diffusers import AutoencoderKL

    asked = []

    def load_config(source, local_files_only):
        asked.append((source, local_files_only))
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr(AutoencoderKL, "load_config", load_config)
    for source, message in (
        ("owner/name", "owner/name was not found as an AutoencoderKL in safetensors: We couldn't connect to the hub"),
        (str(autoencoder.folder), "is no AutoencoderKL in safetensors"),
        ("owner/name/more", "does not exist; give a folder that diffusers saved, or a hub name OWNER/NAME"),
        ("/owner", "does not exist"),
    ):
        with pytest.raises(CheckpointError, match=message):
            export_vae(source, tmp_path, model_of())
    assert asked == [("owner/name", False), (str(autoencoder.folder), True)]


def respoiled(autoencoder, folder: Path, change) -> str:
    """A copy of the autoencoder, its configuration and weights changed in place."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(autoencoder.folder, folder)
    config, weights = folder / "config.json", folder / "diffusion_pytorch_model.safetensors"
    values, state = json.loads(config.read_text()), load_file(weights)
    change(values, state)
    config.write_text(json.dumps(values))
    save_file(state, weights)
    return str(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values, state: values.update(_class_name="VQModel"), "it is of class VQModel"),
        (lambda values, state: state.pop("decoder.conv_out.bias"), r"weight decoder\.conv_out\.bias is missing"),
        (lambda values, state: values.update(scaling_factor=0), "scaling_factor: Input should be greater than 0"),
        (lambda values, state: values.update(latents_mean=[0.0] * 4), "scales each latent channel by itself"),
    ],
    ids=["class", "weight", "scale", "mean"],
)
def test_an_autoencoder_of_another_kind_is_refused(autoencoder, tmp_path, change, message):
    """diffusers itself would load the first as it is, and fill the gap in the second with random numbers."""
    source = respoiled(autoencoder, tmp_path / "vae", change)
    with pytest.raises((CheckpointError, ConfigError), match=message) as caught:
        export_vae(source, tmp_path, model_of())
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]


def test_old_names_of_attention_weights_are_known(autoencoder, tmp_path):
    """Those of the published Stable Diffusion autoencoders."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(values, state):
        renamed = 0
        for name in [name for name in state if ".attentions." in name]:
            for new, ancient in old.items():
                if f".{new}." in name:
                    state[name.replace(f".{new}.", f".{ancient}.")] = state.pop(name)
                    renamed += 1
        assert renamed == 16

    source = respoiled(autoencoder, tmp_path / "vae", rename)
    out = tmp_path / "out"
    out.mkdir()
    decoder = VaeDecoder(out, export_vae(source, out, model_of()))
    latents = np.random.default_rng(5).standard_normal((1, 4, 8, 8)).astype(np.float32)
    wanted = autoencoder.decode(latents)
    assert np.linalg.norm(decoder.decode(latents) - wanted) < 1e-5 * np.linalg.norm(wanted)


@pytest.mark.parametrize("package", ["diffusers", "onnxscript"])
def test_without_a_package_of_the_extra(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, "onnxscript", ModuleType("onnxscript"))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BackendError, match=rf"^{package} cannot be imported .*: pip install 'dydit\[vae\]'"):
        export_vae(str(tmp_path), tmp_path, model_of())
