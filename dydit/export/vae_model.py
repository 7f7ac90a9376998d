"""Loads the decoder or the encoder of diffusers' `AutoencoderKL` or `VQModel`, and says how its latents are scaled.

Every convention that the autoencoder's configuration can state is followed or refused.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dydit.bundle.vae_entry import VaeEntry
from dydit.checkpoints.fit import require_fit
from dydit.errors import CheckpointError, ConfigError, one_line
from dydit.export import vae_source
from dydit.export.vae_source import VaeFiles, find_vae, read_json, require_packages
from dydit.export.vae_weights import infer_config, read_decoder, read_encoder
from dydit.extras import quiet_log, require
from dydit.models.config import parse_config
from dydit.models.meta import without_memory
from dydit.validation import Strict

KINDS = ("AutoencoderKL", "VQModel")
_PARTS = {"decoder": ("decoder.", "post_quant_conv.", "quantize."), "encoder": ("encoder.", "quant_conv.")}


class VaeOptions(Strict):
    """How to export an autoencoder's decoder; `VaeEntry` says how the factors are used.

    `tile`: side of the latents that are decoded at once; by default the side of the model's latents, at most 64.
    `scale`, `shift`: replace those of the autoencoder's configuration, which a file of weights does not have.
    """

    tile: int | None = None
    scale: float | None = None
    shift: float | None = None


@dataclass(frozen=True)
class LoadedVae:
    """A diffusers autoencoder of which one half, the decoder or the encoder, has its weights.

    `config`: its settings, with defaults. `stated`: names of the settings in its configuration file; None if there is
    no such file and the settings come from the shapes of weights.
    """

    module: Any
    config: Mapping[str, Any]
    stated: frozenset[str] | None

    @property
    def quantised(self) -> bool:
        """Whether latents are replaced by vectors of a codebook."""
        return "num_vq_embeddings" in self.config

    @property
    def latent_channels(self) -> int:
        """Channels of the latents; with a codebook, channels of its vectors."""
        width: int = self.config.get("vq_embed_dim") or self.config["latent_channels"]
        return width

    def scaling_factor(self) -> tuple[float | None, bool]:
        """The scaling factor, and whether it is diffusers' default; None if it is not known.

        The autoencoders of Stable Diffusion 1 do not state it, and theirs became diffusers' default. The default is
        assumed only for them: later autoencoders, and those with a codebook, have other factors.
        """
        stated = self.stated or frozenset()
        if "scaling_factor" in stated:
            return self.config["scaling_factor"], False
        if self.stated is not None and not self.quantised and self.latent_channels == 4:
            return self.config["scaling_factor"], True
        return None, False


def vae_entry(source: str, vae: LoadedVae, options: VaeOptions, tile: int) -> VaeEntry:
    """How latents are scaled for an autoencoder. Raises `ConfigError` if neither its files nor the options say so."""
    config = vae.config
    scale, assumed = vae.scaling_factor() if options.scale is None else (options.scale, False)
    if scale is None:
        raise ConfigError(
            f"{source} states no scaling factor, which its latents need; give --vae-scale (0.18215 "
            "for Stable Diffusion 1 and 2, 0.13025 for XL, 1 for most autoencoders with a codebook)"
        )
    values = {
        "latent_channels": vae.latent_channels,
        "tile": tile,
        "upscale": 2 ** (len(config["block_out_channels"]) - 1),
        "scaling_factor": scale,
        "shift_factor": (config.get("shift_factor") or 0.0) if options.shift is None else options.shift,
        "source": source,
        "latents_mean": config.get("latents_mean"),
        "latents_std": config.get("latents_std"),
        "codebook": config["num_vq_embeddings"] if vae.quantised else None,
        "scale_assumed": assumed,
    }
    try:
        return parse_config(VaeEntry, values)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def require_source(source: str) -> None:
    """Check without a download that `source` can be what `load_vae` needs. Raises what `load_vae` raises."""
    require_packages()
    with _named(source):
        vae_source.require_source(source)


def load_vae(source: str) -> LoadedVae:
    """An autoencoder's decoder in fp32, with attention written out. The encoder takes no memory."""
    require_packages()
    with _named(source):
        return _load(find_vae(source), "decoder")


def load_vae_encoder(source: str) -> LoadedVae:
    """An autoencoder's encoder in fp32. The decoder takes no memory."""
    require("encoding images with an autoencoder", ("diffusers",))
    with _named(source):
        return _load(find_vae(source), "encoder")


@contextlib.contextmanager
def _named(source: str) -> Iterator[None]:
    """Put the name of a source before errors about its files."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"--vae {source}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"--vae {source}: cannot be read: {error.strerror or error}") from error


def _load(files: VaeFiles, half: Literal["decoder", "encoder"]) -> LoadedVae:
    values = None if files.config is None else read_json(files.config)
    module = None if values is None else _build(values)  # refuses another class before its weights are read
    state = read_decoder(files.weights) if half == "decoder" or module is None else read_encoder(files.weights)
    if module is None or values is None:
        values = infer_config(state)
        module = _build(values)
        state = state if half == "decoder" else read_encoder(files.weights)
    shapes = {name: tuple(each.shape) for name, each in module.state_dict().items()}
    require_fit(state, {name: shape for name, shape in shapes.items() if name.startswith(_PARTS[half])})
    module.load_state_dict(state, strict=False, assign=True)
    return LoadedVae(module.eval(), dict(module.config), frozenset(values) if files.config else None)


def _build(values: Mapping[str, Any]) -> Any:
    """The module that a configuration describes, without memory for its weights."""
    import diffusers
    from diffusers.models.attention_processor import Attention, AttnProcessor

    kind = values.get("_class_name")
    if kind not in KINDS:
        raise CheckpointError(f"is of class {kind}; expected {' or '.join(KINDS)}, diffusers' autoencoders")
    build = getattr(diffusers, kind)
    settings = {name: value for name, value in values.items() if not name.startswith("_")}
    known = inspect.signature(build.__init__).parameters
    if unknown := [name for name, value in settings.items() if name not in known and value is not None]:
        raise CheckpointError(
            f"states {unknown[0]}, which {kind} of diffusers {diffusers.__version__} does not know; a newer one may"
        )
    if settings.get("lookup_from_codebook"):
        raise CheckpointError("decodes indices of its codebook, which is not supported; expected latents")
    try:
        with without_memory(), quiet():
            module = build(**{name: value for name, value in settings.items() if name in known})
    except Exception as error:  # settings from a file can make the constructors raise anything
        raise CheckpointError(f"has a configuration that {kind} refuses: {one_line(error)[:300]}") from error
    for part in module.modules():
        if isinstance(part, Attention):
            part.set_processor(AttnProcessor())
    return module


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide the exporter's messages about packages that are not needed."""
    with quiet_log("torch.onnx"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
