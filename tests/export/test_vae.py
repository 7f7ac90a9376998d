"""diffusers' autoencoder as a graph: a small random one, saved to a folder, decodes alike in both."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from dydit.bundle.vae import VAE_DECODER, VAE_WEIGHTS
from dydit.errors import BackendError, CheckpointError, ConfigError
from dydit.export.vae import export_vae, vae_files
from dydit.models.config import ModelConfig
from dydit.runtime.vae import VaeDecoder

SCALE = 0.18215


def model_of(**changes) -> ModelConfig:
    values = {"hidden_size": 64, "depth": 2, "num_heads": 4, "patch_size": 2, "input_size": 8, "in_channels": 4}
    return ModelConfig(**{**values, "num_classes": 7, **changes})


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory) -> tuple[Path, object]:
    """A random autoencoder of two levels in a folder, and the module."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'dydit[vae]'")
    import torch

    torch.manual_seed(3)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=SCALE,
    )
    folder = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(folder)
    return folder, vae.eval()


@pytest.fixture(scope="module")
def exported(autoencoder, tmp_path_factory):
    out = tmp_path_factory.mktemp("decoder")
    return out, export_vae(str(autoencoder[0]), out, model_of())


def expected(vae, latents: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return vae.decode(torch.from_numpy(latents) / SCALE, return_dict=False)[0].numpy()


def test_the_graph_decodes_as_the_autoencoder(autoencoder, exported):
    folder, entry = exported
    assert (entry.latent_channels, entry.tile, entry.upscale, entry.scaling_factor) == (4, 8, 2, SCALE)
    decoder = VaeDecoder(folder, entry)
    for count in (1, 3):
        latents = np.random.default_rng(count).standard_normal((count, 4, 8, 8)).astype(np.float32)
        pixels, wanted = decoder.decode(latents), expected(autoencoder[1], latents)
        assert pixels.shape == (count, 3, 16, 16)
        assert np.std(wanted) > 0.01 and np.linalg.norm(pixels - wanted) < 1e-5 * np.linalg.norm(wanted)


def test_larger_latents_are_decoded_in_tiles(autoencoder, exported):
    """Not what the whole would give, as attention and norms see a tile only, but near it, and without holes."""
    folder, entry = exported
    latents = np.random.default_rng(0).standard_normal((1, 4, 14, 11)).astype(np.float32)
    pixels, wanted = VaeDecoder(folder, entry).decode(latents), expected(autoencoder[1], latents)
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
    files = vae_files(folder)
    assert files.keys() == {VAE_DECODER, VAE_WEIGHTS} and files[VAE_WEIGHTS].bytes > 10_000


def test_what_does_not_fit_is_refused(autoencoder, tmp_path):
    source = str(autoencoder[0])
    with pytest.raises(ConfigError, match="decodes latents of 4 channels, but the model has 3"):
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

    folder, vae = autoencoder
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    torch.save(vae.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="is no AutoencoderKL in safetensors"):
        export_vae(str(tmp_path), tmp_path / "out", model_of())


def test_without_diffusers(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(BackendError, match=r"diffusers cannot be imported .*: pip install 'dydit\[vae\]'"):
        export_vae(str(tmp_path), tmp_path, model_of())
