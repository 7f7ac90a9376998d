"""The figures of a whole evaluation are those of torch-fidelity, and the same from a written reference."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dydit.errors import CheckpointError, ConfigError, OutputError
from dydit.evaluation.evaluate import EvaluateConfig, Evaluation, Metric, evaluate
from dydit.evaluation.frechet import Normal
from dydit.evaluation.images import open_images
from dydit.evaluation.inception import Features, Inception
from dydit.evaluation.reference import Reference
from tests.fixtures.fidelity import IMAGES, pictures


class Stages:
    """Records the progress."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int]] = []

    def stage(self, title: str, done: int, total: int) -> None:
        self.seen.append((title, done, total))


@pytest.fixture(scope="module")
def network(inception_file: Path) -> Inception:
    return Inception.load(inception_file)


@pytest.fixture(scope="module")
def features(network: Inception, samples_file: Path) -> Features:
    return network.features(open_images(samples_file), IMAGES, True)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("written") / "reference.npz"


@pytest.fixture(scope="module")
def stages() -> Stages:
    return Stages()


@pytest.fixture(scope="module")
def evaluation(
    inception_file: Path, samples_file: Path, reference_file: Path, written: Path, stages: Stages
) -> Evaluation:
    """All figures of `samples_file` against images, which are also written as a reference."""
    config = EvaluateConfig(inception=inception_file, allow_few=True, batch_size=4)
    evaluate(reference_file, None, config, new_reference=written)
    return evaluate(samples_file, reference_file, config, stages)


def test_features_are_those_of_torch_fidelity(
    inception_state: dict[str, Any], inception_file: Path, features: Features
) -> None:
    """Its extractor, with all of its layers, is the other side; the spatial features are recomputed from its blocks."""
    from torch.nn import functional

    from dydit.evaluation.inception import network_class

    own = network_class()("inception", ["2048"], feature_extractor_weights_path=str(inception_file))
    inputs: list[torch.Tensor] = []
    own.Mixed_6d.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    (pool,) = own(torch.from_numpy(pictures(1)[:2]).permute(0, 3, 1, 2))
    assert features.pool.shape == (IMAGES, 2048) and features.spatial is not None
    np.testing.assert_allclose(features.pool[:2], pool.numpy(), rtol=1e-5, atol=1e-5)
    assert features.pool.std(0).mean() > 0.01
    state = {name.removeprefix("Mixed_6d.branch1x1."): each for name, each in inception_state.items()}
    spatial = functional.batch_norm(
        functional.conv2d(inputs[0], state["conv.weight"]),
        *(state[f"bn.{name}"] for name in ("running_mean", "running_var", "weight", "bias")),
        eps=0.001,
    ).relu()
    expected = np.moveaxis(spatial[:, :7].numpy(), 1, 3).reshape(2, 2023)
    np.testing.assert_allclose(features.spatial[:2], expected, rtol=1e-5, atol=1e-5)
    assert features.spatial.std() > 0.1


def rotated(sets: list[torch.Tensor]) -> list[torch.Tensor]:
    """Features in the few coordinates of the space that they span: the same distance, in much less time."""
    together = torch.cat(sets).double()
    basis = torch.linalg.qr(together.T).Q
    return [each.double() @ basis for each in sets]


def test_figures_are_those_of_torch_fidelity(
    network: Inception,
    features: Features,
    evaluation: Evaluation,
    reference_file: Path,
    written: Path,
    fidelity: SimpleNamespace,
) -> None:
    other = network.features(open_images(reference_file), 4, True)
    pools = [torch.from_numpy(each.pool) for each in (features, other)]
    spatial = [torch.from_numpy(each.spatial) for each in (features, other)]
    statistics = fidelity.fid.fid_features_to_statistics
    theirs = [
        fidelity.fid.fid_statistics_to_metric(*(statistics(each) for each in rotated(sets)), verbose=False)
        for sets in (pools, spatial)
    ]
    logits = pools[0] @ network._network.fc.weight.T
    score = fidelity.isc.isc_features_to_metric(logits, splits=1, shuffle=False)["inception_score_mean"]
    precision, recall = fidelity.prc.calculate_precision_recall_full(*pools)
    kept = Reference.open(written)
    for own, array in ((kept.pool, other.pool), (kept.spatial, other.spatial)):
        assert own is not None and array is not None
        assert np.array_equal(own.mean, Normal.fit(array).mean)
        assert np.array_equal(own.covariance, Normal.fit(array).covariance)
    fid, sfid = (each["frechet_inception_distance"] for each in theirs)
    assert fid > 0.1 and sfid > 0.1 and score > 1
    assert evaluation.metrics == pytest.approx(
        {"fid": fid, "sfid": sfid, "is": score, "precision": precision, "recall": recall}, rel=1e-5
    )
    assert list(evaluation.metrics) == [each.value for each in Metric]


def test_progress_and_notes(evaluation: Evaluation, stages: Stages) -> None:
    counts = [("samples", 4, 6), ("samples", 6, 6), ("reference", 4, 7), ("reference", 7, 7)]
    assert stages.seen == counts
    *few, sizes = evaluation.notes
    assert len(few) == 2 and all("fid and sfid of fewer than 10,000" in note for note in few)
    assert "have images of different sizes" in sizes


def test_a_written_reference_gives_the_same_figures(
    evaluation: Evaluation, written: Path, samples_file: Path, inception_file: Path
) -> None:
    config = EvaluateConfig(inception=inception_file, allow_few=True, batch_size=4)
    metrics = (Metric.PRECISION, Metric.RECALL)  # equal statistics give equal distances, see the test above
    again = evaluate(samples_file, written, config.model_copy(update={"metrics": metrics}))
    assert again.metrics == {metric.value: evaluation.metrics[metric] for metric in metrics}
    assert again.reference is not None and again.reference["statistics"] and again.reference["images"] == IMAGES + 1
    with np.load(written) as file:
        shapes = {name: (file[name].dtype.name, file[name].shape) for name in file.files}
        assert np.array_equal(file["arr_0"], pictures(2, IMAGES + 1, 20))
    assert shapes == {
        "mu": ("float64", (2048,)),
        "sigma": ("float64", (2048, 2048)),
        "mu_s": ("float64", (2023,)),
        "sigma_s": ("float64", (2023, 2023)),
        "arr_0": ("uint8", (IMAGES + 1, 20, 20, 3)),
    }


def test_a_reference_keeps_evenly_spaced_images(features: Features, samples_file: Path, tmp_path, monkeypatch) -> None:
    from dydit.evaluation import reference

    monkeypatch.setattr(reference, "IMAGES", 3)
    assert reference.write_reference(tmp_path / "r.npz", features, open_images(samples_file), 4) == 3
    with np.load(tmp_path / "r.npz") as file:
        assert np.array_equal(file["arr_0"], pictures(1)[[0, 2, 5]])


# Refusals


def refused(samples: Path, reference: Path | None, weights: Path, message: str, **settings: Any) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate(samples, reference, EvaluateConfig(inception=weights, **settings))


def test_too_few_images_are_refused(samples_file: Path, reference_file: Path, tmp_path: Path) -> None:
    missing = tmp_path / "never read"
    refused(samples_file, reference_file, missing, "6 images are too few for fid and sfid: .* at least 2,049")
    np.savez(tmp_path / "three.npz", pictures(0, 3))
    np.savez(tmp_path / "one.npz", pictures(0, 1))
    refused(tmp_path / "three.npz", reference_file, missing, "3 images cannot be measured; at least 4", allow_few=True)
    refused(samples_file, tmp_path / "three.npz", missing, "three.npz: 3 images cannot be", metrics=("recall",))
    refused(tmp_path / "one.npz", None, missing, "1 image cannot be measured; at least 2")
    np.savez(tmp_path / "many.npz", np.zeros((2049, 4, 4, 3), np.uint8))
    refused(tmp_path / "many.npz", samples_file, missing, "samples.npz: 6 images are too few for fid", metrics=("fid",))


def test_a_reference_that_lacks_something_is_refused(samples_file: Path, tmp_path: Path) -> None:
    missing, statistics = tmp_path / "never read", tmp_path / "statistics.npz"
    np.savez(statistics, mu=np.zeros(2048), sigma=np.zeros((2048, 2048)))
    refused(samples_file, statistics, missing, r"holds no images \(arr_0\), which precision and recall need")
    refused(samples_file, statistics, missing, "holds neither mu_s and sigma_s nor images", metrics=("sfid", "is"))
    refused(samples_file, None, missing, "fid, recall compare samples with a reference", metrics=("fid", "recall"))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(768), "sigma": np.zeros((768, 768))}, r"mu is float64 \[768\], expected .* \[2048\]"),
        ({"mu": np.zeros(2048), "sigma": np.zeros(2048)}, r"sigma is float64 \[2048\]"),
        ({"mu": np.zeros(2048, int), "sigma": np.zeros((2048, 2048))}, "mu is int64"),
        ({"mu": np.full(2048, np.nan), "sigma": np.zeros((2048, 2048))}, "mu holds NaN"),
        ({"mu": np.zeros(2048), "sigma": np.tri(2048)}, "sigma is not symmetric"),
        ({"mu": np.zeros(2048)}, "has no array 'sigma'"),
        ({"latents": np.zeros(3)}, "expected the images as arr_0"),
    ],
)
def test_references_of_other_features_are_refused(
    arrays: dict[str, np.ndarray], message: str, samples_file: Path, tmp_path: Path
) -> None:
    np.savez(tmp_path / "reference.npz", **arrays)
    refused(samples_file, tmp_path / "reference.npz", tmp_path / "never read", message, metrics=("fid",))


def test_equal_images_are_refused(network: Inception, tmp_path: Path) -> None:
    np.savez(tmp_path / "equal.npz", np.repeat(pictures(0, 1), 2, 0))
    with pytest.raises(ConfigError, match="all images have the same Inception features"):
        network.features(open_images(tmp_path / "equal.npz"), 2, False)


def test_features_that_are_not_finite_are_refused(
    inception_state: dict[str, Any], samples_file: Path, tmp_path
) -> None:
    name = "Mixed_7c.branch1x1.bn.weight"
    torch.save({**inception_state, name: torch.full_like(inception_state[name], 3e38)}, tmp_path / "large.pth")
    np.savez(tmp_path / "two.npz", pictures(0, 2))
    with pytest.raises(ConfigError, match="the Inception features are not finite"):
        Inception.load(tmp_path / "large.pth").features(open_images(tmp_path / "two.npz"), 2, False)


class Payload:
    """Unpickling this would run code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("executed",))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_other_weights_are_refused(inception_state: dict[str, Any], tmp_path: Path, capsys) -> None:
    class Doubled(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    torch.jit.trace(Doubled(), torch.zeros(1)).save(tmp_path / "script.pt")
    few = {name: each for name, each in inception_state.items() if name != "fc.bias"}
    torch.save(few, tmp_path / "few.pth")
    torch.save({**few, "fc.bias": torch.zeros(1000)}, tmp_path / "shape.pth")
    torch.save({"fc.bias": torch.tensor([float("nan")])}, tmp_path / "nan.pth")
    torch.save({"model": {"fc.bias": torch.zeros(1)}}, tmp_path / "nested.pth")
    torch.save({"fc.bias": Payload()}, tmp_path / "code.pth")
    (tmp_path / "text.pth").write_text("text")
    for name, message in {
        "script.pt": "TorchScript program, which would be executed; use weights-inception-2015-12-05",
        "few.pth": "other layers than the Inception network of the FID .*fc.bias",
        "shape.pth": "other layers than the Inception network of the FID .*fc.bias",
        "nan.pth": "NaN or infinite values in fc.bias",
        "nested.pth": "holds something else than the tensors of a network",
        "code.pth": "can run code when it is opened, so it was not read",
        "text.pth": "is neither a torch.save file nor a safetensors file",
        "missing.pth": "is not a file; expected weights-inception-2015-12-05",
    }.items():
        with pytest.raises(CheckpointError, match=message) as raised:
            Inception.load(tmp_path / name)
        assert str(raised.value).startswith(str(tmp_path / name)) and "\n" not in str(raised.value)
    assert "executed" not in capsys.readouterr().out


def test_an_existing_reference_is_kept(samples_file: Path, tmp_path: Path) -> None:
    config = EvaluateConfig(inception=tmp_path / "never read")
    with pytest.raises(OutputError, match="exists already"):
        evaluate(samples_file, None, config, new_reference=samples_file)


def test_the_library_is_left_as_it_was(network: Inception) -> None:
    """Its package is imported without its `__init__` for a moment; nobody else sees that."""
    import sys

    assert "torch_fidelity" not in sys.modules or hasattr(sys.modules["torch_fidelity"], "calculate_metrics")
