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

from dydit.bundle.vae_entry import VAE_DECODER, VAE_WEIGHTS
from dydit.errors import BackendError, CheckpointError, ConfigError
from dydit.export import vae_graph
from dydit.export.vae_graph import export_vae
from dydit.export.vae_model import VaeOptions, load_vae
from dydit.models.config import ModelConfig
from dydit.models.dit.config import DiTConfig
from dydit.runtime.images.vae_decoder import VaeDecoder
from tests.fixtures.cuda_kernels import faults

pytestmark = pytest.mark.numerics

SCALE = 0.18215


def model_of(**changes) -> ModelConfig:
    values = {"hidden_size": 64, "depth": 2, "num_heads": 4, "patch_size": 2, "input_size": 8, "in_channels": 4}
    return DiTConfig(**{**values, "num_classes": 7, **changes})


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


def test_every_node_has_a_kernel_on_a_gpu(exported):
    """In ONNX Runtime, as `tests/export/test_cuda_kernels.py` demands of the other graphs."""
    folder, _ = exported
    assert faults(onnx.load(folder / VAE_DECODER, load_external_data=False)) == []


def test_what_does_not_fit_is_refused(autoencoder, tmp_path):
    source = str(autoencoder.folder)
    with pytest.raises(ConfigError, match="decodes latents of 4 channels, but the model has 8"):
        export_vae(source, tmp_path, model_of(in_channels=8))
    with pytest.raises(ConfigError, match="samples pixels of 3 channels and has no latents to decode; remove the VAE"):
        export_vae(source, tmp_path, model_of(in_channels=3))
    with pytest.raises(ConfigError, match=r"the tile has a side of 9 latents; expected 1\.\.8"):
        export_vae(source, tmp_path, model_of(), VaeOptions(tile=9))
    with pytest.raises(CheckpointError, match="no such file or folder"):
        export_vae(str(tmp_path / "nowhere"), tmp_path, model_of())
    with pytest.raises(CheckpointError, match="holds no autoencoder") as caught:
        export_vae(str(tmp_path), tmp_path, model_of())
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


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
        ({"_class_name": "UNet2DModel"}, "is of class UNet2DModel; expected AutoencoderKL or VQModel"),
        ({"_class_name": None}, "is of class None; expected"),
        ({"scaling_factor": 0}, "scaling_factor must be greater than 0"),
        ({"scaling_factor": None}, "scaling_factor must be a|states no scaling factor"),
        ({"shift_factor": float("nan")}, "shift_factor must be a finite number"),
        (
            {"latents_mean": [0.0] * 4},
            "latents_mean and latents_std must be given together, but only one of them is stated",
        ),
        ({"latents_std": [1.0] * 4}, "latents_mean and latents_std must be given together"),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0] * 3}, "expected 4, one for each latent channel"),
        ({"latents_mean": [0.0] * 4, "latents_std": [0.0] * 4}, r"latents_std holds 0\.0; expected numbers above 0"),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4, "shift_factor": 0.1}, "both shift latents"),
        ({"flip_latents": True}, "states flip_latents, which AutoencoderKL of diffusers .* does not know"),
        ({"norm_num_groups": 0}, "has a configuration that AutoencoderKL refuses"),
        ({"block_out_channels": []}, "has a configuration that AutoencoderKL refuses"),
        ({"use_post_quant_conv": False}, r"2 unknown \(post_quant_conv\.(weight|bias)"),
    ],
    ids=lambda change: "-".join(change) if isinstance(change, dict) else "",
)
def test_a_convention_that_is_stated_is_followed_or_refused(autoencoder, tmp_path, change, message):
    """diffusers itself would load most of these as they are."""
    source = respoiled(autoencoder, tmp_path / "vae", lambda values, state: values.update(change))
    with pytest.raises((CheckpointError, ConfigError), match=message) as caught:
        export_vae(source, tmp_path, model_of())
    assert "\n" not in str(caught.value) and str(tmp_path / "vae") in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]


def saved(module, folder: Path, **config) -> str:
    """The folder of an autoencoder; values of None are left out of its configuration."""
    module.save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps({name: each for name, each in values.items() if each is not None}))
    return str(folder)


def decoded(folder: Path, source: str, latents: np.ndarray, options: VaeOptions | None = None):
    """Our pixels of latents [n, C, 8, 8], and the manifest's entry of the decoder."""
    folder.mkdir()
    entry = export_vae(source, folder, model_of(in_channels=latents.shape[1], space="latents"), options)
    return VaeDecoder(folder, entry).decode(latents), entry


@pytest.fixture
def computed(monkeypatch, tmp_path):
    """`computed(source, latents, options=None)`: as `decoded`, but PyTorch runs what would be traced.

    For what an export reads and puts together. That graphs compute the same is held for a few decoders.
    """
    import torch

    def call(source: str, latents: np.ndarray, options: VaeOptions | None = None):
        made = []
        monkeypatch.setattr(vae_graph, "_trace", lambda decoder, entry: made.append(decoder))
        monkeypatch.setattr(vae_graph, "_save", lambda *_: None)
        entry = export_vae(source, tmp_path, model_of(in_channels=latents.shape[1], space="latents"), options)
        monkeypatch.undo()
        with torch.no_grad():
            return made[0].eval()(torch.from_numpy(latents)).numpy(), entry

    return call


def assert_near(ours: np.ndarray, wanted: np.ndarray) -> None:
    assert np.std(wanted) > 0.01 and np.linalg.norm(ours - wanted) < 1e-5 * np.linalg.norm(wanted)


def random_latents(channels: int = 4) -> np.ndarray:
    return np.random.default_rng(7).standard_normal((2, channels, 8, 8)).astype(np.float32)


def test_factors_are_used_as_diffusers_pipelines_do(autoencoder, computed, tmp_path):
    import torch

    latents = random_latents()
    z = torch.from_numpy(latents)
    mean, std = [0.5, -0.25, 0.0, 1.0], [1.0, 2.0, 0.5, 1.5]

    def decode(hidden):
        with torch.no_grad():
            return autoencoder.module.decode(hidden, return_dict=False)[0].numpy()

    shifted = saved(autoencoder.module, tmp_path / "shifted", scaling_factor=1.5, shift_factor=0.25)
    ours, entry = computed(shifted, latents)
    assert_near(ours, decode(z / 1.5 + 0.25))  # Stable Diffusion 3
    assert entry.scaling_words == "scaling factor 1.5, shift factor 0.25" and "codebook" not in entry.model_dump()

    each = saved(autoencoder.module, tmp_path / "each", scaling_factor=1.5, latents_mean=mean, latents_std=std)
    ours, entry = decoded(tmp_path / "b", each, latents)
    m, s = (torch.tensor(values).reshape(4, 1, 1) for values in (mean, std))
    assert_near(ours, decode(z * s / 1.5 + m))  # Stable Diffusion XL
    assert entry.latents_mean == tuple(mean) and "a mean and deviation for each channel" in entry.scaling_words

    ours, entry = computed(shifted, latents, VaeOptions(scale=0.5, shift=0.0))
    assert_near(ours, decode(z / 0.5))
    assert (entry.scaling_factor, entry.shift_factor) == (0.5, 0.0)


def test_a_scale_that_is_not_stated_is_assumed_for_the_first_autoencoders_alone(autoencoder, computed, tmp_path):
    import diffusers

    source = saved(autoencoder.module, tmp_path / "vae", scaling_factor=None)
    ours, entry = computed(source, random_latents())
    assert_near(ours, autoencoder.decode(random_latents()))
    assert (
        entry.scale_assumed and "diffusers' default: the autoencoder's configuration states none" in entry.scaling_words
    )
    later = diffusers.AutoencoderKL(block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=16, norm_num_groups=2)  # fmt: skip
    source = saved(later, tmp_path / "later", scaling_factor=None)
    with pytest.raises(ConfigError, match="states no scaling factor, which its latents need; give"):
        decoded(tmp_path / "b", source, random_latents(16))


def test_a_shift_without_a_convolution_before_the_decoder(tmp_path):
    import diffusers
    import torch

    torch.manual_seed(2)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,), latent_channels=5, norm_num_groups=4, scaling_factor=0.7, shift_factor=0.3,
        use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False)  # fmt: skip
    latents = random_latents(5)
    ours, entry = decoded(tmp_path / "a", saved(vae.eval(), tmp_path / "vae"), latents)
    with torch.no_grad():
        assert_near(ours, vae.decode(torch.from_numpy(latents) / 0.7 + 0.3, return_dict=False)[0].numpy())
    assert entry.upscale == 1


@pytest.mark.parametrize("norm", ["group", "spatial"])
def test_latents_go_through_a_codebook(tmp_path, norm):
    """diffusers' `VQModel`, as latent diffusion's `vq-f4`; its latents are those of the codebook's vectors."""
    import diffusers
    import torch

    torch.manual_seed(4)
    vae = diffusers.VQModel(
        block_out_channels=(32,),
        latent_channels=3 if norm == "spatial" else 4,
        vq_embed_dim=3,
        num_vq_embeddings=32,
        norm_type=norm,
    )
    with torch.no_grad():
        vae.quantize.embedding.weight.normal_()
    latents = random_latents(3)
    source = saved(vae.eval(), tmp_path / "vq", scaling_factor=None)
    with pytest.raises(ConfigError, match="states no scaling factor"):
        decoded(tmp_path / "a", source, latents)
    ours, entry = decoded(tmp_path / "b", source, latents, VaeOptions(scale=1))
    with torch.no_grad():
        wanted = vae.decode(torch.from_numpy(latents), return_dict=False)[0].numpy()
        raw = vae.decode(torch.from_numpy(latents), force_not_quantize=True, return_dict=False)[0].numpy()
    assert_near(ours, wanted)
    assert np.linalg.norm(raw - wanted) > 0.01 * np.linalg.norm(wanted), "the codebook matters"
    assert (entry.latent_channels, entry.codebook, entry.upscale) == (3, 32, 1)
    with pytest.raises(ConfigError, match="decodes latents of 3 channels, but the model has 4"):
        decoded(tmp_path / "c", source, random_latents(4), VaeOptions(scale=1))
    with pytest.raises(CheckpointError, match="decodes indices of its codebook"):
        decoded(tmp_path / "d", saved(vae, tmp_path / "indices", lookup_from_codebook=True), latents)


def test_a_decoder_that_overflows_is_refused(autoencoder, tmp_path):
    """Its pictures would be black."""

    def spoil(values, state):
        state["decoder.conv_in.weight"].fill_(3e38)

    source = respoiled(autoencoder, tmp_path / "vae", spoil)
    with pytest.raises(ConfigError, match="decodes random latents to NaN or infinite pixels"):
        export_vae(source, tmp_path, model_of())


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

    loaded = load_vae(respoiled(autoencoder, tmp_path / "vae", rename)).module.state_dict()
    read = ("decoder.", "post_quant_conv.")
    wanted = {name: each for name, each in autoencoder.module.state_dict().items() if name.startswith(read)}
    assert len(wanted) > 60 and all(loaded[name].equal(each) for name, each in wanted.items())


@pytest.mark.parametrize("package", ["diffusers", "onnxscript"])
def test_without_a_package_of_the_extra(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, "onnxscript", ModuleType("onnxscript"))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BackendError, match=rf"^{package} cannot be imported .*: pip install 'dydit\[vae\]'"):
        export_vae(str(tmp_path), tmp_path, model_of())
