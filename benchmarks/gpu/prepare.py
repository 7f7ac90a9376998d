"""The models and bundles that are measured; all are made on this machine, with random weights but for the digits."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from bounds import dense_work, step_work
from settings import (
    CFG_SCALE,
    FLOPS_RATIO,
    MERGED,
    MERGED_32,
    PER_STEP,
    PLANS,
    SEED,
    SLIDING,
    Settings,
    Work,
    asset,
    small_config,
)
from small import SMALL_LABELS, SMALL_STEPS, small_batch, small_noise

from dydit.bench.bench import spread_steps
from dydit.bundle.bundle import Bundle
from dydit.bundle.manifest import PlanKind, Routing
from dydit.bundle.stored_weights import Precision
from dydit.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from dydit.checkpoints.fit import expected_shapes
from dydit.diffusion.schedule import Schedule
from dydit.export.exporter import export
from dydit.export.settings import ExportConfig
from dydit.models.synthetic import synthetic_model
from dydit.runtime.backends.registry import open_backend
from dydit.runtime.loop import MemoryStore, StepRunner, sample
from dydit.runtime.resident import ResidentSubnets

Emit = Callable[[str, Any], None]
SLACK = 1.15
"""Token slots of a block: the largest share that a measured step routed, and so much more."""
PLAN_SETTINGS: dict[str, dict[str, Any]] = {
    MERGED: {"max_subnets": 16},
    MERGED_32: {"max_subnets": 32},
    SLIDING: {"plan": PlanKind.SLIDING},
    PER_STEP: {"plan": PlanKind.PER_STEP},
}


def make_models(settings: Settings, work: Work) -> dict[str, Any]:
    """The dynamic model and the static one of the same sizes, and what the former decides (`decide`)."""
    if settings.model == "digits":
        for dynamic in (True, False):
            shutil.copyfile(asset(dynamic), work.checkpoint(dynamic))
    else:
        config = settings.config
        model = synthetic_model(config, seed=0, flops_ratio=FLOPS_RATIO)
        save_checkpoint(work.checkpoint(True), model, config)
        state, static = model.state_dict(), config.without_routers()
        save_checkpoint(work.checkpoint(False), {name: state[name] for name in expected_shapes(static)}, static)
    return {"bytes": work.checkpoint(True).stat().st_size, **decide(settings, work)}


def decide(settings: Settings, work: Work) -> dict[str, Any]:
    """What the measured steps decide: masks, and the tokens of one image with guidance, on normal noise, in fp32.

    They are kept for the exports; what they ask of each batch is returned (`bounds.step_work`).
    """
    import torch

    from dydit.models.synthetic import recorded_pass

    checkpoint = load_checkpoint(work.checkpoint(True))
    config, device = checkpoint.config, settings.device
    model = checkpoint.model().to(device).eval()
    steps = spread_steps(settings.steps, settings.measured)
    timesteps = Schedule.respaced(settings.steps).timesteps[::-1]
    generator = torch.Generator().manual_seed(SEED)
    y = torch.tensor([0, config.null_class], device=device)
    each_mask, tokens = [], []
    for step in steps:
        x = torch.randn(1, config.in_channels, config.input_size, config.input_size, generator=generator)
        t = torch.full((2,), int(timesteps[step]), device=device)
        _, recording = recorded_pass(model, x.repeat(2, 1, 1, 1).to(device), t, y)
        made = recording.decisions()
        each_mask.append(made.units[0].cpu().numpy() > 0)
        tokens.append(made.tokens.float().mean(dim=(1, 2)).cpu().numpy())
    masks = np.stack(each_mask)
    np.savez(work.decisions, masks=masks, tokens=np.stack(tokens), steps=np.asarray(steps))
    item = settings.item_bytes
    return {
        "steps": list(steps),
        "token_share": float(np.stack(tokens).mean()),
        "work": {
            str(batch): {
                "dynamic": step_work(config, masks, np.stack(tokens), batch, item).to_json(),
                "dense": dense_work(config, batch, item).to_json(),
            }
            for batch in settings.batches
        },
    }


def capacities(settings: Settings, work: Work) -> tuple[int, ...]:
    """Token slots of a row, by block."""
    with np.load(work.decisions) as kept:
        share = kept["tokens"].max(axis=0)
    most = settings.config.tokens
    return tuple(int(min(most, np.ceil(SLACK * each * most))) for each in share)


def make_bundles(settings: Settings, work: Work, emit: Emit, plans: Sequence[str]) -> None:
    """Bundles of the models that are timed, each told of when it is complete."""
    for plan in plans:
        emit(plan, make_bundle(settings, work, plan))


def make_bundle(settings: Settings, work: Work, plan: str) -> dict[str, Any]:
    """One of `PLANS`; where it is there already, a run that was stopped has made it, and it stays."""
    assert plan in PLANS
    if work.bundle(plan).is_dir():
        return _facts(Bundle.open(work.bundle(plan)))
    shared = {"steps": settings.steps, "precision": settings.precision, "max_batch": max(settings.batches)}
    if plan in PLAN_SETTINGS:
        chosen = {**PLAN_SETTINGS[plan], "routing": Routing.CAPACITY, "capacities": capacities(settings, work)}
    else:
        chosen = {}
    checkpoint = load_checkpoint(work.checkpoint(plan in PLAN_SETTINGS))
    bundle = export(checkpoint, work.bundle(plan), ExportConfig.model_validate({**shared, **chosen}))
    return _facts(bundle)


def _facts(bundle: Bundle) -> dict[str, Any]:
    size = sum(entry.bytes for entry in bundle.manifest.files.values())
    return {"subnets": len(bundle.manifest.subnets), "bytes": size}


def make_small(work: Work) -> dict[str, Any]:
    """The small model in three precisions, and what ONNX Runtime on the CPU makes of it in fp32, step by step."""
    config = small_config()
    save_checkpoint(work.small_checkpoint, synthetic_model(config, seed=0, flops_ratio=FLOPS_RATIO), config)
    checkpoint = load_checkpoint(work.small_checkpoint)
    for precision in (Precision.FP32, Precision.FP16, Precision.BF16):
        shutil.rmtree(work.small(precision), ignore_errors=True)
        chosen = ExportConfig(
            steps=SMALL_STEPS, max_subnets=4, routing=Routing.CAPACITY, precision=precision, max_batch=len(SMALL_LABELS)
        )
        export(checkpoint, work.small(precision), chosen)
    bundle = Bundle.open(work.small(Precision.FP32))
    backend = open_backend("onnxruntime", bundle)
    batch, noise = small_batch(), small_noise(bundle)
    with ResidentSubnets(backend, 2) as subnets:
        runner = StepRunner(backend, subnets, SMALL_LABELS, CFG_SCALE)
        latents = [noise.initial(batch)]
        for step in range(SMALL_STEPS):
            latents.append(runner.run(step, latents[-1], noise.step(batch, step), batch.labels).x_prev)
        store = MemoryStore()
        sample(runner, [batch], noise, store)
    assert np.allclose(store.load(0), latents[-1]), "the loop and its steps differ"
    np.savez(work.reference, latents=np.stack(latents))
    return {"steps": SMALL_STEPS, "images": len(SMALL_LABELS)}
