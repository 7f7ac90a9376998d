"""Names of classes from a diffusers pipeline, through a checkpoint and a bundle, to a call."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from dydit.errors import ConfigError
from dydit.models.config import parse_config
from dydit.models.dit.config import DiTConfig
from dydit.runtime.class_labels import labels_of, names_of
from dydit.runtime.pipeline import DyDiTPipeline

NAMES = ("tench, Tinca tinca", "goldfish", "crane", "golden retriever", "crane", " hen ,", "Border collie")


@pytest.fixture(scope="module")
def model(small_config):
    return small_config.model_copy(update={"class_names": NAMES})


@pytest.fixture(scope="module")
def named(make_bundle, make_checkpoint, model):
    return make_bundle(make_checkpoint(model), steps=3)


def test_names_of_a_bundle_stand_for_their_numbers(named, make_bundle):
    assert named.manifest.model.class_names == NAMES
    with DyDiTPipeline.from_bundle(named.path, threads=1) as pipe:
        numbers = pipe([3, 0], seed=1, output_type="latent").latents
        for labels in (
            ["golden retriever", "Tinca tinca"],
            ("golden retriever", 0),
            np.array(["golden retriever", "tench"]),
            [" golden retriever ", np.int64(0)],
        ):
            assert np.array_equal(pipe(labels, seed=1, output_type="latent").latents, numbers)
        alone = pipe(3, seed=1, output_type="latent").latents
        assert np.array_equal(pipe("golden retriever", seed=1, output_type="latent").latents, alone)
        assert pipe.labels == {
            "Border collie": 6,
            "Tinca tinca": 0,
            "golden retriever": 3,
            "goldfish": 1,
            "hen": 5,
            "tench": 0,
        }
        assert list(pipe.labels) == sorted(pipe.labels)
        assert pipe.get_label_ids(["hen", "tench"]) == [5, 0] and pipe.get_label_ids("hen") == [5]
    plain = make_bundle(steps=3)
    with DyDiTPipeline.from_bundle(plain.path, threads=1) as pipe:
        assert pipe.labels == {} and np.array_equal(pipe([3, 0], seed=1, output_type="latent").latents, numbers)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("golden retreiver", "no class has the name 'golden retreiver'; did you mean 'golden retriever'"),
        ("BORDER COLLIE", "no class has the name 'BORDER COLLIE'; did you mean 'Border collie'"),
        ("zebra crossing", "no class has the name 'zebra crossing'; the pipeline's `labels` lists the names"),
        ("3", "no class has the name '3'; the pipeline's `labels` lists the names"),
        ("crane", "'crane' is a name of the classes 2, 4; give a number"),
        ("tench, Tinca tinca", "no class has the name 'tench, Tinca tinca'; did you mean"),
        ("", "no class has the name ''"),
        (b"hen", "must be a label or a list of labels, such as 20 or"),
        ({"hen"}, "must be a label or a list of labels"),
        ([["hen"]], "must be an integer such as 1, not"),
        ([None], "must be an integer such as 1, not None"),
        (8, "label 8 is outside 0..6, the classes of this model, or 7 for no class"),
        (-1, "-1 is outside"),
        (1 << 80, "is outside"),
    ],
)
def test_other_labels_are_refused_in_one_line(model, label, message):
    with pytest.raises(ConfigError) as caught:
        labels_of(label, model)
    said = str(caught.value)
    assert said.startswith("class_labels") and message in said and "\n" not in said
    with pytest.raises(ConfigError, match=r"^class_labels"):
        labels_of([0, label], model)


def test_a_model_without_a_null_class_takes_its_classes_alone(small_config):
    alone = small_config.model_copy(update={"null_class_row": False})
    assert labels_of(6, alone) == [6]
    with pytest.raises(ConfigError, match=r"class_labels: label 7 is outside 0\.\.6, the classes of this model$"):
        labels_of(7, alone)


def test_a_configuration_without_names_is_written_as_before(small_config, model):
    assert "class_names" not in small_config.model_dump() and "class_names" not in str(model)
    assert parse_config(DiTConfig, json.loads(model.model_dump_json())) == model and model.sizes == small_config.sizes
    assert names_of(small_config) == {}
    with pytest.raises(ConfigError, match="class_names has 2 names for 7 classes"):
        parse_config(DiTConfig, {**small_config.model_dump(), "class_names": ["a", "b"]})


class TestDiffusersFolder:
    """`id2label` of `model_index.json`, where the published DiT has it and `DiTPipeline.from_pretrained` reads it."""

    @pytest.fixture
    def folder(self, tmp_path):
        diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (pip install 'dydit[vae]')")
        torch.manual_seed(0)
        transformer = diffusers.DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=1,
            sample_size=8,
            num_embeds_ada_norm=7,
            norm_eps=1e-6,
        )
        torch.nn.init.normal_(transformer.proj_out_2.weight)
        shared = transformer.transformer_blocks[0].norm1.emb
        for block in transformer.transformer_blocks:
            block.norm1.emb.load_state_dict(shared.state_dict())
        pipeline = diffusers.DiTPipeline(
            transformer,
            diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=1, layers_per_block=1),
            diffusers.DDIMScheduler(beta_schedule="linear"),
        )
        pipeline.save_pretrained(tmp_path / "pipeline")
        self.state(tmp_path / "pipeline", {str(label): name for label, name in enumerate(NAMES)})
        return tmp_path / "pipeline"

    def state(self, folder, names):
        file = folder / "model_index.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "id2label": names}))

    def test_its_names_are_those_of_diffusers(self, folder, tmp_path):
        import diffusers

        from dydit.checkpoints.checkpoint import convert, load_checkpoint

        pipeline = diffusers.DiTPipeline.from_pretrained(folder)
        for each in (folder, folder / "transformer"):
            assert load_checkpoint(each).config.class_names == NAMES
        converted = convert(folder, tmp_path / "own.safetensors")
        assert converted.config.class_names == NAMES
        ours = {name: labels[-1] for name, labels in names_of(converted.config).items()}
        assert ours == {name: label for name, label in pipeline.labels.items() if name}

    @pytest.mark.parametrize(
        "names",
        [
            {str(label): "a name" for label in range(6)},
            {str(label): "a name" for label in range(1, 8)},
            {str(label): 5 for label in range(7)},
            ["a name"] * 7,
            "names",
            7,
        ],
    )
    def test_names_that_do_not_fit_are_left_out_with_a_note(self, folder, names):
        from dydit.checkpoints.checkpoint import load_checkpoint

        for value, noted in ((names, True), (None, False), ({}, False)):
            self.state(folder, value)
            checkpoint = load_checkpoint(folder)
            assert checkpoint.config.class_names is None
            note = "id2label of model_index.json does not name the 7 classes of the model, and is not used"
            assert (note in checkpoint.notes) is noted
