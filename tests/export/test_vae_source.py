"""Autoencoders in the forms that people have them: pipelines, single files, variants, shards, pickles, hub names."""

from __future__ import annotations

import json
import re
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest

from dydit.errors import CheckpointError, ConfigError
from dydit.export.vae_graph import export_decoder
from dydit.export.vae_model import VaeOptions, load_vae, load_vae_encoder, require_source
from dydit.export.vae_source import find_vae, main_weights
from dydit.export.vae_weights import read_decoder
from dydit.runtime.images.vae_decoder import VaeDecoder

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'dydit[vae]'")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def state(autoencoder) -> dict:
    return {name: tensor.clone() for name, tensor in autoencoder.module.state_dict().items()}


@pytest.fixture
def folder(autoencoder, tmp_path) -> Path:
    """A folder with the configuration alone, to be filled with weights."""
    made = tmp_path / "vae"
    made.mkdir()
    shutil.copy(autoencoder.folder / "config.json", made)
    return made


def decoder_of(source: str | Path) -> dict:
    return {name: each for name, each in load_vae(str(source)).module.state_dict().items() if not each.is_meta}


def assert_same(source: str | Path, state: dict, rounded=lambda tensor: tensor) -> None:
    """The source gives the decoder's weights of `state`, and of nothing else."""
    found = decoder_of(source)
    wanted = {name: each for name, each in state.items() if name.startswith(("decoder.", "post_quant_conv."))}
    assert found.keys() == wanted.keys()
    for name, each in wanted.items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], rounded(each)), name


def save_sharded(state: dict, folder: Path, variant: str = "") -> None:
    from safetensors.torch import save_file

    dot, names, places = (f".{variant}" if variant else ""), sorted(state), {}
    for part in (0, 1):
        file = f"diffusion_pytorch_model{dot}-{part + 1:05d}-of-00002.safetensors"
        save_file({name: state[name] for name in names[part::2]}, folder / file)
        places |= dict.fromkeys(names[part::2], file)
    index = {"metadata": {}, "weight_map": places}
    (folder / f"diffusion_pytorch_model.safetensors.index{dot}.json").write_text(json.dumps(index))


def test_weights_in_every_form_of_a_folder(state, folder):
    from safetensors.torch import save_file

    def half(tensor):
        return tensor.half().float()

    forms = {
        "plain": (lambda: save_file(state, folder / WEIGHTS), None),
        "bin": (lambda: torch.save(state, folder / "diffusion_pytorch_model.bin"), None),
        "old pickle": (
            lambda: torch.save(state, folder / "diffusion_pytorch_model.bin", _use_new_zipfile_serialization=False),
            None,
        ),
        "variant": (
            lambda: save_file(
                {name: each.half() for name, each in state.items()},
                folder / "diffusion_pytorch_model.fp16.safetensors",
            ),
            half,
        ),
        "shards": (lambda: save_sharded(state, folder), None),
        "shards of a variant": (lambda: save_sharded(state, folder, "non_ema"), None),
    }
    for save, rounded in forms.values():
        save()
        assert_same(folder, state, rounded or (lambda tensor: tensor))
        for file in folder.glob("diffusion*"):
            file.unlink()


def test_full_precision_comes_before_variants():
    whole, half, pickled = WEIGHTS, WEIGHTS.replace(".s", ".fp16.s"), "diffusion_pytorch_model.bin"
    assert main_weights([half, pickled, whole]) == whole
    assert main_weights([half, pickled]) == pickled
    assert main_weights([half, "config.json", "diffusion_pytorch_model.fp16-00001-of-00002.safetensors"]) == half
    assert main_weights(["config.json", "model.safetensors"]) is None
    with pytest.raises(CheckpointError, match="in the variants ema, fp16; give the file of one"):
        main_weights([half, WEIGHTS.replace(".s", ".ema.s")])


def test_a_pipelines_folder(autoencoder, state, tmp_path):
    pipeline = tmp_path / "pipeline"
    shutil.copytree(autoencoder.folder, pipeline / "vae")
    (pipeline / "transformer").mkdir()
    (pipeline / "model_index.json").write_text('{"_class_name": "DiTPipeline", "vae": ["diffusers", "AutoencoderKL"]}')
    assert_same(pipeline, state)
    assert_same(pipeline / "vae", state)
    (pipeline / "vae").rename(pipeline / "vqvae")
    assert_same(pipeline, state)


def test_one_file_with_its_configuration_beside_it(autoencoder, state, folder):
    torch.save({"state_dict": state, "epoch": 3}, folder / "mine.ckpt")
    assert_same(folder / "mine.ckpt", state)
    torch.save({f"first_stage_model.{name}": each for name, each in state.items()}, folder / "whole.pt")
    assert_same(folder / "whole.pt", state)
    save_sharded(state, folder)
    assert_same(folder / "diffusion_pytorch_model.safetensors.index.json", state)


LDM_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def as_latent_diffusion(state: dict, levels: int) -> dict:
    """Decoder and encoder under the names of the original code, whose `up.0` is the finest level."""
    renamed = {}
    for name, each in state.items():
        if name.startswith(("decoder.", "encoder.")):
            name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
            name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("conv_norm_out", "norm_out")
            name = re.sub(r"up_blocks\.(\d)", lambda match: f"up.{levels - 1 - int(match[1])}", name)
            name = (
                name.replace(".resnets.", ".block.")
                .replace(".attentions.", ".attn.")
                .replace("upsamplers.0", "upsample")
                .replace("downsamplers.0", "downsample")
                .replace("down_blocks.", "down.")
            )
            name = name.replace("conv_shortcut", "nin_shortcut")
            if ".attn" in name:
                for new, old in LDM_ATTENTION.items():
                    name = name.replace(f".{new}.", f".{old}.")
                if each.ndim == 2:
                    each = each[:, :, None, None]
        renamed[name] = each
    return renamed


@pytest.fixture(scope="module")
def wide():
    """One of three levels with attention in the coarsest, wide enough for the 32 groups of the original code."""
    torch.manual_seed(5)
    return diffusers.AutoencoderKL(
        block_out_channels=(32, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
        layers_per_block=1,
        latent_channels=4,
    ).eval()


@pytest.fixture
def original(wide, tmp_path) -> Path:
    """Its checkpoint as the original code writes it."""
    state = as_latent_diffusion(wide.state_dict(), 3)
    assert {
        "decoder.mid.attn_1.q.weight",
        "decoder.up.2.attn.1.proj_out.bias",
        "decoder.up.0.block.1.norm1.weight",
    } <= {*state} and "decoder.up.1.upsample.conv.weight" in state
    file = tmp_path / "model.ckpt"
    torch.save({"state_dict": {**state, "loss.logvar": torch.zeros(())}, "global_step": 7}, file)
    return file


def test_an_original_checkpoint_of_latent_diffusion(wide, original, tmp_path):
    """Names, attention as convolutions, and the configuration, which is read off the shapes."""
    with pytest.raises(ConfigError, match=r"model\.ckpt states no scaling factor.*give --vae-scale"):
        export_decoder(str(original), tmp_path, 4, 8)
    assert_same(original, wide.state_dict())
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, ours = (each.decode(latents, return_dict=False)[0] for each in (wide, load_vae(str(original)).module))
    assert wanted.std() > 0.01 and (ours - wanted).norm() < 1e-5 * wanted.norm()


def encoded(module, images):
    with torch.no_grad():
        drawn = module.encode(images).latent_dist
    return torch.cat([drawn.mean, drawn.std])


def test_the_encoder_alone_is_read(wide, original, autoencoder, state, tmp_path):
    from safetensors.torch import save_file

    assert {"encoder.down.0.downsample.conv.weight", "encoder.down.1.block.0.norm1.weight"} <= {
        *torch.load(original)["state_dict"]
    }
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for source, whole in ((original, wide), (autoencoder.folder, autoencoder.module)):
        vae = load_vae_encoder(str(source))
        wanted = encoded(whole, images)
        assert wanted.std() > 0.01 and (encoded(vae.module, images) - wanted).norm() < 1e-5 * wanted.norm()
        assert all(
            each.is_meta == name.startswith(("decoder.", "post_")) for name, each in vae.module.named_parameters()
        )
    (tmp_path / "halves").mkdir()
    shutil.copy(autoencoder.folder / "config.json", tmp_path / "halves")
    file = tmp_path / "halves" / "half.safetensors"
    save_file({name: each for name, each in state.items() if not name.startswith("decoder.")}, file)
    difference = encoded(load_vae_encoder(str(file)).module, images) - wanted
    assert difference.norm() < 1e-5 * wanted.norm()
    with pytest.raises(CheckpointError, match=r"holds no decoder of an autoencoder: no decoder\.conv_in\.weight"):
        load_vae(str(file))
    save_file({name: each for name, each in state.items() if not name.startswith("encoder.")}, file)
    with pytest.raises(
        CheckpointError, match=r"--vae .*holds no encoder of an autoencoder: no encoder\.conv_in\.weight"
    ):
        load_vae_encoder(str(file))


@pytest.mark.release
def test_an_original_checkpoint_of_latent_diffusion_is_exported(wide, original, tmp_path):
    entry = export_decoder(str(original), tmp_path, 4, 8, VaeOptions(scale=0.5, shift=0.25))
    assert (entry.upscale, entry.scaling_factor, entry.shift_factor, entry.scale_assumed) == (4, 0.5, 0.25, False)
    latents = np.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype(np.float32)
    with torch.no_grad():
        wanted = wide.decode(torch.from_numpy(latents) / 0.5 + 0.25, return_dict=False)[0].numpy()
    pixels = VaeDecoder(tmp_path, entry).decode(latents)
    assert wanted.std() > 0.01 and np.linalg.norm(pixels - wanted) < 1e-5 * np.linalg.norm(wanted)


def test_a_file_in_diffusers_names_without_a_configuration(wide, tmp_path):
    from safetensors.torch import save_file

    save_file(wide.state_dict(), tmp_path / "vae.safetensors")
    loaded = load_vae(str(tmp_path / "vae.safetensors"))
    for name in ("block_out_channels", "layers_per_block", "latent_channels", "up_block_types"):
        assert list(np.atleast_1d(loaded.config[name])) == list(np.atleast_1d(wide.config[name])), name
    assert loaded.stated is None


class Planted:
    def __init__(self, trap: Path):
        self.trap = trap

    def __reduce__(self):
        return Path.touch, (self.trap,)


def test_nothing_in_a_pickle_is_run(state, folder, tmp_path):
    trap = tmp_path / "trap"
    torch.save({**state, "extra": Planted(trap)}, folder / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        load_vae(str(folder))
    assert not trap.exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: state.pop("decoder.conv_out.bias"), r"1 missing \(decoder\.conv_out\.bias\)"),
        (lambda state: state.update({"decoder.more": torch.zeros(1)}), r"1 unknown \(decoder\.more\)"),
        (lambda state: state["decoder.conv_out.bias"].fill_(float("nan")), "NaN or infinite values in 1 tensor"),
        (
            lambda state: state.update({"decoder.conv_out.bias": torch.zeros(4)}),
            r"conv_out\.bias is \[4\], expected \[3\]",
        ),
        (
            lambda state: state.update({"decoder.conv_out.bias": "text"}),
            "conv_out.bias, which is not a dense",
        ),
        (lambda state: state.clear(), r"holds no decoder of an autoencoder: no decoder\.conv_in\.weight"),
        (
            lambda state: (
                state.update({f"{a}.decoder.conv_in.weight": state["decoder.conv_in.weight"] for a in "ab"})
                or state.pop("decoder.conv_in.weight")
            ),
            "holds several autoencoders",
        ),
    ],
    ids=["missing", "unknown", "nan", "shape", "type", "none", "several"],
)
def test_weights_that_do_not_fit(state, folder, spoil, message):
    spoil(state)
    torch.save(state, folder / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_vae(str(folder))
    assert str(caught.value).startswith(f"--vae {folder}: ") and "\n" not in str(caught.value)


def test_what_a_folder_lacks(autoencoder, state, folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"a config\.json without weights: expected diffusion_pytorch_model"):
        load_vae(str(folder))
    save_sharded(state, folder)
    (folder / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"lacks diffusion_pytorch_model-00002-of-00002\.safetensors, one of its 2"
    ):
        load_vae(str(folder))
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    for text in ("{}", '{"weight_map": {"a": "../evil.bin"}}', '{"weight_map": {}}'):
        index.write_text(text)
        with pytest.raises(CheckpointError, match="that does not list files in the same folder"):
            load_vae(str(folder))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match=r"holds no autoencoder: expected config\.json in it, or in its vae/"):
        load_vae(str(empty))
    index.unlink()
    torch.save(state, folder / "diffusion_pytorch_model.bin")
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"a config\.json that is not JSON"):
        load_vae(str(folder))


@pytest.fixture
def no_network(monkeypatch):
    """Every connection is counted and fails at once, as without a network."""
    asked = []

    def refuse(*arguments, **_):
        asked.append(arguments)
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return asked


@pytest.mark.parametrize(
    "source",
    [
        "./owner/name",
        "../vae",
        "/no/vae",
        "~/vae",
        "vae",
        "a/b/c",
        "owner/vae.safetensors",
        "owner/vae.ckpt",
        "here/vae",
        "owner/",
        "owner\\name",
        "owner/na me",
        "https://huggingface.co/owner/name",
    ],
)
def test_a_mistyped_path_is_not_looked_up(source, no_network, tmp_path, monkeypatch):
    """`here/vae` has the form of a hub name, but `here` is a folder here."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for ask in (require_source, load_vae):
        with pytest.raises(CheckpointError, match=r"no such file or folder \(a model on the Hugging Face hub is named"):
            ask(source)
    assert not no_network


def test_a_home_is_expanded(autoencoder, tmp_path, monkeypatch):
    shutil.copytree(autoencoder.folder, tmp_path / "vae")
    monkeypatch.setenv("HOME", str(tmp_path))
    require_source("~/vae")
    assert find_vae("~/vae").config == tmp_path / "vae" / "config.json"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of the hub's library."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def cached_snapshot(cache: Path, vae: Path, place: str = "") -> None:
    """What a download of OWNER/NAME leaves: links into a folder of blobs."""
    repository, commit = cache / "models--owner--name", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "blobs").mkdir()
    snapshot = repository / "snapshots" / commit / place
    snapshot.mkdir(parents=True)
    for file in vae.iterdir():
        blob = repository / "blobs" / file.name
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(blob)


def test_without_a_network_what_was_downloaded_serves(autoencoder, state, cache, no_network):
    with pytest.raises(
        CheckpointError, match=r"^--vae owner/name: no such file or folder; the hub cannot be reached"
    ) as caught:
        load_vae("owner/name")
    assert no_network and "\n" not in str(caught.value)
    cached_snapshot(cache, autoencoder.folder, "vae")
    assert_same("owner/name", state)


def test_offline_asks_nobody(autoencoder, state, cache, no_network, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set, and the model was not downloaded before"):
        load_vae("owner/name")
    cached_snapshot(cache, autoencoder.folder)
    assert_same("owner/name", state)
    assert not no_network


def test_from_the_hub_only_what_is_needed_is_downloaded(autoencoder, state, tmp_path, monkeypatch):
    """A pipeline of many parts: of the autoencoder the configuration, and one form of the weights."""
    import huggingface_hub

    names = ["model_index.json", "unet/diffusion_pytorch_model.safetensors", "config.json", "vae/config.json"]
    names += [f"vae/diffusion_pytorch_model{form}" for form in (".fp16.safetensors", ".safetensors", ".bin")]

    class Api:
        def model_info(self, name, timeout):
            assert name == "owner/name" and timeout <= 10
            siblings = [type("Sibling", (), {"rfilename": each}) for each in names]
            return type("Info", (), {"siblings": siblings, "sha": "abc"})

    fetched = []

    def download(source, name, revision):
        fetched.append((source, name, revision))
        return str(autoencoder.folder / name.removeprefix("vae/"))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert_same("owner/name", state)
    assert fetched == [("owner/name", f"vae/{name}", "abc") for name in ("config.json", WEIGHTS)]


def test_the_encoder_is_not_read_into_memory(autoencoder):
    found = read_decoder(find_vae(str(autoencoder.folder)).weights)
    assert found and not any(name.startswith(("encoder.", "quant_conv.")) for name in found)
    assert load_vae(str(autoencoder.folder)).module.encoder.conv_in.weight.is_meta
