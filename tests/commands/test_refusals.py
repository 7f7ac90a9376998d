"""Bad input: one clear line on standard error, exit code 2, and nothing written."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

CLASSES, STEPS = 7, 6


@pytest.fixture(scope="session")
def checkpoint(make_checkpoint, small_config) -> Path:
    return make_checkpoint(small_config.model_copy(update={"in_channels": 3})).path


@pytest.fixture(scope="session")
def exported(make_bundle, make_checkpoint, small_config) -> Path:
    model = make_checkpoint(small_config.model_copy(update={"in_channels": 3}))
    return make_bundle(model, steps=STEPS, max_subnets=2).path


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    """A bundle of its own, to be spoiled."""
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


def ended(done: subprocess.CompletedProcess[str]) -> Any:
    """What `run` returns, of a process."""
    return SimpleNamespace(code=done.returncode, out=done.stdout, err=done.stderr)


def contents(folder: Path) -> dict[str, str]:
    """Every entry below a folder, hidden ones too, with the hash of its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


def assert_refused(done: Any, *words: str) -> None:
    assert done.code == 2, done
    assert done.out == ""
    assert done.err.startswith("dydit: error: ") and done.err.count("\n") == 1 and done.err.endswith("\n"), done.err
    for word in words:
        assert word in done.err, done.err


def every_command(source: Path, out: Path) -> list[list[object]]:
    """Each command that reads `source` and writes `out`."""
    return [
        ["convert", source, "--out", out],
        ["export", source, "--out", out],
        ["sample", source, "--labels", "1", "--out", out],
        ["parity", source, "--against", source, "--out", out],
        ["bench", source, "--out", out],
        ["inspect", source, "--out", out],
    ]


NAMES = ["convert", "export", "sample", "parity", "bench", "inspect"]


@pytest.mark.parametrize("index", range(6), ids=NAMES)
def test_a_missing_file(run, tmp_path: Path, index: int) -> None:
    missing = tmp_path / "missing"
    assert_refused(run(*every_command(missing, tmp_path / "out")[index]), str(missing), "does not exist")
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("index", range(6), ids=NAMES)
@pytest.mark.parametrize("data", [b"", b"no checkpoint\n" * 99, b"PK\x03\x04" + bytes(200), bytes(range(256)) * 40])
def test_a_file_that_is_no_checkpoint(run, tmp_path: Path, index: int, data: bytes) -> None:
    file = tmp_path / "file.pt"
    file.write_bytes(data)
    before = contents(tmp_path)
    assert_refused(run(*every_command(file, tmp_path / "out")[index]), str(file))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("index", range(6), ids=NAMES)
def test_a_folder_that_holds_nothing_we_know(run, tmp_path: Path, index: int) -> None:
    (tmp_path / "folder").mkdir()
    assert_refused(run(*every_command(tmp_path / "folder", tmp_path / "out")[index]), "folder")
    assert contents(tmp_path) == {"folder": ""}


@pytest.mark.parametrize("labels", [str(CLASSES + 1), "0,99999", "-1", "all", "1,", "3-1", ""])
def test_a_label_out_of_range(run, exported: Path, tmp_path: Path, labels: str) -> None:
    assert_refused(run("sample", exported, "--labels", labels, "--out", tmp_path / "out"))
    assert contents(tmp_path) == {}


def test_a_label_out_of_range_is_told_the_range(run, exported: Path, tmp_path: Path) -> None:
    assert_refused(run("sample", exported, "--labels", "0-8", "--out", tmp_path / "out"), "label 8", "0..6")


def test_no_label_at_all(run, exported: Path, tmp_path: Path) -> None:
    assert_refused(run("sample", exported, "--out", tmp_path / "out"), "label")
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("steps", ["0", "-5", "1001", "2.5", "many", ""])
def test_steps_outside_1_to_1000(run, checkpoint: Path, tmp_path: Path, steps: str) -> None:
    assert_refused(run("export", checkpoint, "--steps", steps, "--out", tmp_path / "out"), "--steps")
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("scale", ["nan", "inf", "-1", "-inf", "strong"])
def test_a_guidance_scale_that_is_no_number_from_0(run, exported: Path, tmp_path: Path, scale: str) -> None:
    arguments = ["sample", exported, "--labels", "1", "--cfg-scale", scale, "--out", tmp_path / "out"]
    assert_refused(run(*arguments), "cfg")
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--num", "0"), ("--seed", "-1"), ("--seed", str(1 << 64)), ("--first-image", "-1"), ("--batch-size", "0")),
        *(("--batch-size", "17"), ("--threads", "-1"), ("--device", "tpu"), ("--noise-from", "missing.npz")),
    ],
)
def test_other_settings_out_of_range(run, exported: Path, tmp_path: Path, option: str, value: str) -> None:
    assert_refused(run("sample", exported, "--labels", "1", option, value, "--out", tmp_path / "out"))
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    "options",
    [
        ["--max-subnets", "0"],
        ["--memory-budget", "8"],
        ["--memory-budget", "1kB"],
        ["--per-step", "--max-subnets", "3"],
        ["--per-step", "--memory-budget", "1GiB"],
        ["--cfg-channels", "0"],
        ["--cfg-channels", "4"],
        ["--routing", "sliding"],
        ["--precision", "int4"],
        ["--sampler", "euler"],
        ["--max-batch", "0"],
        ["--num-heads", "3"],
        ["--unknown"],
    ],
    ids=" ".join,
)
def test_export_settings_that_do_not_fit(run, checkpoint: Path, tmp_path: Path, options: list[str]) -> None:
    assert_refused(run("export", checkpoint, "--steps", STEPS, *options, "--out", tmp_path / "out"))
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    "words", [["iterations=0"], ["iteration=5"], ["iterations"], ["model.depth=x"], ["lambda_target=nan"]]
)
def test_training_settings_that_do_not_fit(run, tmp_path: Path, words: list[str]) -> None:
    assert_refused(run("train", "--recipe", "digits", *words, "--out", tmp_path / "out"))
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("backend", ["ncnn", ""])
def test_a_backend_that_nobody_knows(run, exported: Path, tmp_path: Path, backend: str) -> None:
    arguments = ["sample", exported, "--labels", "1", "--backend", backend, "--out", tmp_path / "out"]
    assert_refused(run(*arguments), f"unknown backend {backend!r}", "available: onnxruntime, torch")
    assert contents(tmp_path) == {}


def test_a_bf16_bundle_on_the_cpu_of_onnxruntime(run, make_bundle, tmp_path: Path) -> None:
    path = make_bundle(precision="bf16", steps=STEPS, max_subnets=2).path
    assert_refused(
        run("sample", path, "--labels", "1", "--backend", "onnxruntime", "--out", tmp_path / "out"),
        "onnxruntime has no bf16 matrix products on the CPU; use backend='torch' (--backend torch), "
        "or a bundle in fp32 or fp16",
    )
    assert contents(tmp_path) == {}
    chosen = run("sample", path, "--labels", "1", "--out", tmp_path / "out")
    line = "backend: torch, because onnxruntime has no bf16 matrix products on the CPU\n"
    assert (chosen.code, chosen.err) == (0, line)


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_a_backend_that_is_not_there(run, exported: Path, tmp_path: Path, monkeypatch, backend: str) -> None:
    for module in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, module, None)
    for command in ("sample", "bench"):
        arguments = every_command(exported, tmp_path / "out")[NAMES.index(command)]
        done = run(*arguments, "--backend", backend)
        assert_refused(done)
        # bench asks in a process of its own, where a TensorRT that is installed is found, and no GPU or no engines
        assert "tensorrt" in (done.err if command == "sample" else done.err.lower())
        assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    ("package", "advice"), [("onnxruntime", "[cpu]'"), ("torch", "[export]'"), ("openvino", "[openvino]'")]
)
def test_a_backend_that_is_not_installed(run, exported, tmp_path: Path, monkeypatch, package: str, advice: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    arguments = ["sample", exported, "--labels", "1", "--backend", package, "--out", tmp_path / "out"]
    assert_refused(run(*arguments), advice)
    assert contents(tmp_path) == {}


def test_a_missing_package_is_named_with_its_extra(checkpoint: Path, tmp_path: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; from dydit.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "export", str(checkpoint), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert_refused(ended(done), "dydit export needs torch, which is not installed: pip install ", "[export]'")
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("kind", ["folder", "full folder", "file", "dangling link"])
@pytest.mark.parametrize("index", range(6), ids=NAMES)
def test_an_output_that_exists(run, checkpoint, exported, tmp_path: Path, index: int, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "dangling link":
        out.symlink_to(tmp_path / "nowhere")
    else:
        out.mkdir()
        if kind == "full folder":
            (out / "mine").write_text("mine")
    source = checkpoint if NAMES[index] in ("convert", "export") else exported
    arguments = every_command(source, out)[index]
    if NAMES[index] == "parity":
        arguments[arguments.index("--against") + 1] = checkpoint
    if kind == "folder" and NAMES[index] == "sample":
        pytest.skip("an empty folder is as good as none to a resumable run")
    before = contents(tmp_path)
    assert_refused(run(*arguments), str(out))
    assert contents(tmp_path) == before


def test_a_training_folder_that_is_taken(run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    before = contents(tmp_path)
    for options in ([], ["--resume"]):
        assert_refused(run("train", "--recipe", "digits-static", *options, "--out", tmp_path / "out"), "out")
        assert contents(tmp_path) == before


def test_a_quickstart_folder_that_holds_something_else(run, monkeypatch, tmp_path: Path) -> None:
    assets, out = tmp_path / "assets", tmp_path / "out"
    for folder, names in ((assets, ("dydit.safetensors", "dit.safetensors")), (out, ("mine",))):
        folder.mkdir()
        for name in names:
            (folder / name).write_text("mine")
    monkeypatch.setattr("dydit.quickstart.quickstart.ASSETS", assets)
    before = contents(tmp_path)
    for options in ([], ["--overwrite"]):
        assert_refused(run("quickstart", *options, "--out", out), str(out))
        assert contents(tmp_path) == before


def spoil(bundle: Path, how: str) -> None:
    manifest = bundle / "manifest.json"
    weights = bundle / "weights.bin"
    data = bytearray(weights.read_bytes())
    values = json.loads(manifest.read_text())
    if how == "one bit of the weights":
        data[len(data) // 2] ^= 1
        weights.write_bytes(data)
    elif how == "truncated weights":
        weights.write_bytes(data[: len(data) // 2])
    elif how == "weights missing":
        weights.unlink()
    elif how == "weights are a folder":
        weights.unlink()
        weights.mkdir()
    elif how == "another graph":
        shutil.copy(bundle / "conditioning.onnx", bundle / "subnet-0000.onnx")
    elif how == "truncated manifest":
        manifest.write_text(manifest.read_text()[:1000])
    elif how == "edited manifest":
        values["sampling"]["cfg_channels"] = 1
        manifest.write_text(json.dumps(values))
    elif how == "manifest of the future":
        manifest.write_text(json.dumps(values | {"schema_version": 4}))
    elif how == "manifest of another kind":
        manifest.write_text("[1, 2]")
    elif how == "manifest in no encoding":
        manifest.write_bytes(b"\xff\xfe\x00")
    elif how == "path upwards":
        values["files"]["../outside"] = values["files"]["weights.bin"]
        manifest.write_text(json.dumps(values))
    elif how == "absolute path":
        values["files"][str(weights)] = values["files"]["weights.bin"]
        manifest.write_text(json.dumps(values))
    elif how == "link to another file":
        (bundle.parent / "outside").write_bytes(data[::-1])
        weights.unlink()
        weights.symlink_to(bundle.parent / "outside")


SPOILT = {
    "one bit of the weights": "was changed",
    "truncated weights": "truncated",
    "weights missing": "is missing",
    "weights are a folder": "weights.bin",
    "another graph": "subnet-0000.onnx",
    "truncated manifest": "not JSON",
    "edited manifest": "was changed",
    "manifest of the future": "schema version 4",
    "manifest of another kind": "manifest.json",
    "manifest in no encoding": "manifest.json",
    "path upwards": "leads out of the bundle",
    "absolute path": "leads out of the bundle",
    "link to another file": "was changed",
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_tampered_bundle(run, bundle: Path, checkpoint: Path, tmp_path: Path, how: str) -> None:
    spoil(bundle, how)
    before = contents(tmp_path)
    for name in ("sample", "parity", "bench", "inspect"):
        arguments = every_command(bundle, tmp_path / "out")[NAMES.index(name)]
        if name == "parity":
            arguments[arguments.index("--against") + 1] = checkpoint
        assert_refused(run(*arguments), SPOILT[how])
        assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("environment", "word"),
    [
        ({"RANK": "0"}, "RANK without WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE without RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 and WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK=0 and WORLD_SIZE=0"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK='one'"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1'"),
        ({"RANK": "0", "WORLD_SIZE": ""}, "WORLD_SIZE=''"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "x"}, "LOCAL_RANK='x'"),
    ],
)
def test_what_a_launcher_does_not_say(run, monkeypatch, exported: Path, tmp_path: Path, environment, word) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert_refused(run("sample", exported, "--labels", "1", "--out", tmp_path / "out"), word)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("worker", ["2/2", "1", "-1/2", "0/0", "a/b", "1/2/3"])
def test_workers_that_do_not_exist(run, exported: Path, tmp_path: Path, worker: str) -> None:
    assert_refused(
        run("sample", exported, "--labels", "1", "--worker", worker, "--out", tmp_path / "out"), "--worker", worker
    )
    assert not (tmp_path / "out").exists()


def test_the_bundle_is_sound_before_it_is_spoilt(run, bundle: Path, tmp_path: Path) -> None:
    assert run("sample", bundle, "--labels", "1", "--out", tmp_path / "out", "--quiet").code == 0


ONE_BY_ONE = """
import contextlib, io, json, os, sys
from dydit.cli import main
told, disk = [], sys.argv[2]
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()) as out:
        code = main(["--quiet", *words])
    told.append((code, out.getvalue(), err.getvalue(), os.listdir(disk) if disk else []))
print(json.dumps(told))
"""


def one_by_one(calls: list[list[object]], disk: object = "") -> list[str]:
    """The words that run calls of `dydit` in one process of their own, for `all_ended`."""
    words = [[str(each) for each in call] for call in calls]
    return [sys.executable, "-B", "-c", ONE_BY_ONE, json.dumps(words), str(disk)]


def all_ended(done: subprocess.CompletedProcess[str]) -> list[tuple[Any, list[str]]]:
    """What `run` returns, of each call, and the listing of the disk after it."""
    assert (done.returncode, done.stderr) == (0, ""), done
    return [(SimpleNamespace(code=code, out=out, err=err), left) for code, out, err, left in json.loads(done.stdout)]


def on_a_disk_of_its_own(options: str, disk: Path, *calls: list[object]) -> list[tuple[Any, list[str]]]:
    """Run `dydit` with a file system mounted on `disk`, in a mount namespace that goes with the process."""
    disk.mkdir()
    isolate = ["unshare", "--mount"] + ([] if os.geteuid() == 0 else ["--map-root-user"])
    mount = f"mount -t tmpfs -o {options} tmpfs {shlex.quote(str(disk))}"
    if shutil.which("unshare") is None:
        pytest.skip("no unshare here, so no disk of its own")
    trial = subprocess.run([*isolate, "sh", "-c", mount], capture_output=True, text=True, check=False)
    if trial.returncode:
        pytest.skip(f"mounting is not permitted here: {trial.stderr.strip()}")
    script = f"{mount} && {shlex.join(one_by_one(list(calls), disk))}"
    return all_ended(subprocess.run([*isolate, "sh", "-c", script], capture_output=True, text=True, check=False))


def test_a_full_disk(checkpoint: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    sizes = ["--steps", 2, "--samples", 8, "--held-out", 8, "--quantile", 0.5, "--batch-size", 4]
    calls = [
        ["convert", checkpoint, "--out", disk / "out"],
        ["export", checkpoint, "--out", disk / "out"],
        ["calibrate", checkpoint, *sizes, "--out", disk / "c.json"],
    ]
    ends = on_a_disk_of_its_own("size=128k", disk, *calls)
    assert len(ends) == len(calls)
    for done, left in ends:
        assert_refused(done, "no space left", str(disk))
        assert left == []


def test_a_full_disk_while_sampling(exported: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    arguments = ["sample", exported, "--labels", "0-6", "--out", disk / "out"]
    ((done, left),) = on_a_disk_of_its_own("size=12k", disk, arguments)
    # What was sampled so far stays in the folder's working files, for the same command to go on from.
    assert_refused(done, "no space left", str(disk))
    assert left == ["out"]


def test_earlier_results_outlast_a_full_disk(run, exported: Path, tmp_path: Path) -> None:
    """What a run has finished stays when the disk fills up, and the same command goes on when there is room."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    arguments = ["sample", exported, "--labels", "0-6", "--num", 28, "--npz", "--quiet", "--out", tmp_path / "out"]
    call = [sys.executable, "-B", "-m", "dydit", *map(str, arguments), "--batch-size", "2"]
    done = subprocess.run(call, capture_output=True, text=True, check=False, preexec_fn=limit)
    assert_refused(ended(done), "File too large", "ulimit")
    pictures = {name: hash for name, hash in contents(tmp_path / "out").items() if name.endswith(".png")}
    assert len(pictures) == 28 + 1 and not [name for name in contents(tmp_path) if name.endswith(".part")]
    assert run(*arguments, "--batch-size", 2).code == 0
    assert pictures.items() <= contents(tmp_path / "out").items()


def test_a_read_only_disk(checkpoint: Path, exported: Path, tmp_path: Path) -> None:
    disk, names = tmp_path / "disk", ("convert", "export", "sample")
    sources = {"convert": checkpoint, "export": checkpoint, "sample": exported}
    calls = [every_command(sources[name], disk / "out")[NAMES.index(name)] for name in names]
    ends = on_a_disk_of_its_own("ro", disk, *calls)
    assert len(ends) == len(calls)
    for done, left in ends:
        assert_refused(done, "Read-only file system", str(disk))
        assert left == []


def test_a_file_that_may_not_grow(checkpoint: Path, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, 1 << 15))

    calls = [[command, checkpoint, "--out", tmp_path / command] for command in ("convert", "export")]
    ends = subprocess.run(one_by_one(calls), capture_output=True, text=True, check=False, preexec_fn=limit)
    assert len(all_ended(ends)) == len(calls)
    for done, _ in all_ended(ends):
        assert_refused(done, "File too large")
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("index", range(6), ids=NAMES)
def test_an_output_below_a_file(run, checkpoint, exported, tmp_path: Path, index: int) -> None:
    (tmp_path / "file").write_text("mine")
    source = checkpoint if NAMES[index] in ("convert", "export") else exported
    arguments = every_command(source, tmp_path / "file" / "out")[index]
    if NAMES[index] == "parity":
        arguments[arguments.index("--against") + 1] = checkpoint
    before = contents(tmp_path)
    assert_refused(run(*arguments), "file")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("command", ["convert", "export", "sample", "train"])
def test_an_output_where_nobody_may_write(run, checkpoint, exported, command: str) -> None:
    out = Path("/proc/dydit/out")
    if command == "train":
        done = run("train", "--recipe", "digits-static", "iterations=4", "--out", out)
    else:
        done = run(*every_command(exported if command == "sample" else checkpoint, out)[NAMES.index(command)])
    assert_refused(done, "/proc/dydit")
