"""A bundle whose checkpoint was trained in another way is stale."""

from __future__ import annotations

import dataclasses

from dydit.diffusion.process import Process
from dydit.export.exporter import stale_reasons


def test_another_training_makes_a_bundle_stale(make_bundle, make_checkpoint) -> None:
    manifest, checkpoint = make_bundle().manifest, make_checkpoint()

    def reasons(process: Process) -> list[str]:
        config = checkpoint.config.model_copy(update={"process": process})
        return stale_reasons(manifest, dataclasses.replace(checkpoint, config=config))

    assert reasons(Process(schedule="flow", prediction="velocity")) == [
        "the training differs: predicts epsilon; linear betas from 0.0001 to 0.02 in the bundle, predicts velocity; "
        "flow matching on the linear path in the checkpoint"
    ]
    assert reasons(Process()) == reasons(Process(betas=(0.0001, 0.02))) == [], "it was assumed, and now it is stated"
