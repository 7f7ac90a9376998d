"""What the scripts of benchmarks share."""

from __future__ import annotations

import pytest

from dydit.bench.scripts import kept_bundle
from dydit.diffusion.samplers import Sampler
from dydit.export.settings import ExportConfig


@pytest.mark.parametrize("sampler", [None, Sampler.DPM_SOLVER])
def test_a_bundle_is_exported_once_and_others_are_refused(make_checkpoint, tmp_path, sampler):
    config, folder = ExportConfig(steps=4, sampler=sampler, max_subnets=2), tmp_path / "bundle"
    first, other = make_checkpoint(), make_checkpoint(seed=1)
    assert kept_bundle(first.path, folder, config).manifest.checkpoint_sha256 == first.sha256
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert kept_bundle(first.path, folder, config).manifest.sampling.steps == 4
    for path, changes in ((other.path, {}), (first.path, {"steps": 5}), (first.path, {"sampler": Sampler.DDIM})):
        with pytest.raises(SystemExit, match="holds another model or another run; choose another --work"):
            kept_bundle(path, folder, config.model_copy(update=changes))
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
