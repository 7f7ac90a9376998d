"""Adds a decoder to an existing bundle of latents, without exporting its checkpoint again.

The manifest is replaced last, by a rename. Until then the bundle is the old one, which lists no decoder. Files that a
killed call left in the folder are never read, and the next call replaces them. Subnetworks, weights and built engines
do not change.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from dydit.bundle.bundle import Bundle
from dydit.bundle.manifest import MANIFEST, FileEntry, Manifest
from dydit.bundle.vae_entry import VAE_DECODER, VAE_WEIGHTS
from dydit.errors import ConfigError
from dydit.export.vae_graph import export_vae
from dydit.export.vae_model import VaeOptions
from dydit.files import explained, fsync_path, sha256_of, write_atomic
from dydit.locks import FileLock

PREFIX, SUFFIX = ".decoder.", ".part"  # name of the folder, inside the bundle, in which a decoder is written


def attach_vae(path: Path, source: str, options: VaeOptions | None = None) -> Bundle:
    """Add the decoder of the autoencoder `source` to the bundle at `path`, and return the bundle.

    The bundle's digest changes, because its images do. Raises `ConfigError` if the bundle already has a decoder or
    states that it samples pixels, `OutputError` if it cannot be written or another process adds a decoder to it, and
    what `export_vae` raises.
    """
    with _alone(path):
        manifest = Bundle.open(path, verify=False).manifest
        if manifest.vae is not None:
            raise ConfigError(
                f"{path} already has a decoder, from {manifest.vae.source}; export the checkpoint again for another one"
            )
        model = manifest.model.stating(None, decoded=True)
        for part in path.glob(f"{PREFIX}*{SUFFIX}"):  # left by a killed call
            shutil.rmtree(part, ignore_errors=True)
        with explained(path), tempfile.TemporaryDirectory(prefix=PREFIX, suffix=SUFFIX, dir=path) as name:
            folder = Path(name)
            vae = export_vae(source, folder, model, options)
            files = dict(manifest.files)
            for name in (VAE_DECODER, VAE_WEIGHTS):
                files[name] = FileEntry(bytes=(folder / name).stat().st_size, sha256=sha256_of(folder / name))
            values = manifest.model_dump(exclude={"digest"}) | {
                "model": model.model_dump(),
                "vae": vae.model_dump(),
                "files": {name: entry.model_dump() for name, entry in sorted(files.items())},
                "tools": {**manifest.tools, "diffusers": version("diffusers")},
            }
            changed = Manifest.model_validate(values)
            for name in (VAE_DECODER, VAE_WEIGHTS):
                with open(folder / name, "rb") as file:
                    os.fsync(file.fileno())
                os.replace(folder / name, path / name)
        fsync_path(path)
        write_atomic(path / MANIFEST, changed.to_json().encode())
    return Bundle.open(path, verify=False)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Lock a bundle's folder, so that only one process adds a decoder. No lock if the file system has none."""
    if not path.is_dir():  # `Bundle.open` reports this
        yield
        return
    with contextlib.ExitStack() as stack:
        with explained(path):
            stack.enter_context(FileLock(path).require(f"another process is adding a decoder to {path}; wait for it"))
        yield
