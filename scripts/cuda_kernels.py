"""What ONNX Runtime's CUDA provider runs, and where it places the nodes of graphs, read from a wheel without a GPU.

    python scripts/cuda_kernels.py table WHEEL [FILE]       rewrite FILE, by default tests/fixtures/cuda_kernels.json
    python scripts/cuda_kernels.py place WHEEL BUNDLE ...   copies and nodes on the CPU, of each graph of the bundles

WHEEL is one of onnxruntime-gpu for this Python (`pip download --no-deps onnxruntime-gpu`). Its provider library is
loaded beside libraries that are compiled here, have the names and functions of CUDA's, and compute nothing. That is
enough to read the provider's kernel registry and to create sessions, which place nodes and insert copies as on a GPU.
It is not enough to run anything, and says nothing about results or speed.

Needs Linux, cc, nm and the packages onnx and numpy; onnxruntime need not be installed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TABLE = HERE.parent / "tests" / "fixtures" / "cuda_kernels.json"
OPSET = 23
CAPABILITY = (8, 9)
_OPEN_END = 2**31 - 1

READ_KERNELS = """
import json, onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as state
kernels = [each for each in state.get_all_opkernel_def() if each.provider == "CUDAExecutionProvider"]
rows = [(each.domain, each.op_name, *each.version_range, each.type_constraints) for each in kernels]
print(json.dumps({"version": onnxruntime.__version__, "rows": rows}))
"""

PLACE = """
import json, os, sys, tempfile
import onnxruntime
sys.path.insert(0, os.environ["DYDIT"])
from dydit.runtime.backends.device_copies import copies

cuda = ("CUDAExecutionProvider", {"use_tf32": "0"})
for path in sys.argv[1:]:
    answer = {"graph": path, "copies": [], "on_cpu": []}
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 4, 1
        options.optimized_model_filepath = os.path.join(folder, "optimised.onnx")
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        try:
            session = onnxruntime.InferenceSession(path, options, providers=[cuda])
        except Exception as error:
            answer["copies"] = [f"cannot be loaded: {error}"]
        else:
            assert session.get_providers()[0] == cuda[0], "the provider was not started"
            answer["copies"] = [str(each) for each in copies(options.optimized_model_filepath)]
            if hasattr(session, "get_provider_graph_assignment_info"):  # since 1.25
                parts = [part for part in session.get_provider_graph_assignment_info() if part.ep_name != cuda[0]]
                answer["on_cpu"] = sorted({node.op_type for part in parts for node in part.get_nodes()})
    print(json.dumps(answer))
"""


class Wheel:
    """An unpacked wheel of onnxruntime-gpu with stand-ins for the libraries that it needs, in `folder`."""

    def __init__(self, wheel: Path, folder: Path):
        self.name, self.folder = wheel.name, folder
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder / "wheel")
        self._stand_ins(folder / "libraries")

    def python(self, code: str, *arguments: str) -> str:
        """Run Python code with this onnxruntime; returns its standard output."""
        variables = {"PYTHONPATH": str(self.folder / "wheel"), "LD_LIBRARY_PATH": str(self.folder / "libraries")}
        variables |= {"DYDIT": str(HERE.parent), "ORT_DISABLE_TELEMETRY": "1"}
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(command, env={**os.environ, **variables}, check=True, stdout=-1, text=True).stdout

    def _stand_ins(self, folder: Path) -> None:
        folder.mkdir()
        needed: dict[str, set[str]] = defaultdict(set)
        for library in (self.folder / "wheel" / "onnxruntime" / "capi").glob("libonnxruntime_providers_*.so"):
            symbols = [line.split()[-1] for line in _lines("nm", "-D", library) if re.match(r"\s+[Uw] ", line)]
            plain = {each for each in symbols if re.match(r"(cu[A-Z]|(create|get|initLib)\w*(Infer|Nv|Plugin))", each)}
            for name in re.findall(r"\[(lib\S+)\]", "\n".join(_lines("readelf", "-d", library))):
                if re.match(r"lib(cu|nv)", name):
                    versioned = {each.split("@")[0] for each in symbols if each.endswith(f"@{name}")}
                    needed[name] |= versioned or plain
        for name, functions in needed.items():
            self._compile(folder, name, functions)

    def _compile(self, folder: Path, name: str, functions: set[str]) -> None:
        """A shared library whose functions do nothing. Those of CUDA's have symbol versions of the library's name."""
        code = ""
        if name.startswith("libcudart."):
            code = (HERE / "cuda_stand_in.c").read_text()
            functions = functions - set(re.findall(r"\b(\w+)\([^)]*\) \{", code))
        for each in sorted(functions):
            if "Create" in each and "create" not in each:
                code += f"int {each}(void **made) {{ static char handle[64]; *made = handle; return 0; }}\n"
            else:
                code += f"long {each}() {{ return 0; }}\n"
        (folder / "code.c").write_text(code)
        (folder / "versions").write_text(f"{name} {{ global: *; }};\n")
        release = int(name.rpartition(".")[2]) * 1000
        values = [f"-DMAJOR={CAPABILITY[0]}", f"-DMINOR={CAPABILITY[1]}", f"-DRELEASE={release}"]
        made = ["-shared", "-fPIC", "-w", "-o", folder / name, folder / "code.c", f"-Wl,-soname,{name}"]
        versions = [] if name.startswith("libnv") else [f"-Wl,--version-script={folder / 'versions'}"]
        subprocess.run(["cc", *values, *made, *versions], check=True)


def kernel_table(wheel: Wheel) -> dict[str, Any]:
    """The kernels of the standard operators of opset 23: of each, the types that it takes, by type parameter.

    ONNX Runtime takes a kernel that was registered for the release of the operator that the opset has, or for a closed
    range of releases with it in; a kernel for "this release and later" does not serve a later release.
    """
    import onnx

    read = json.loads(wheel.python(READ_KERNELS).splitlines()[-1])
    kernels: dict[str, list[dict[str, list[str]]]] = defaultdict(list)
    for domain, operator, start, end, types in read["rows"]:
        if domain or not onnx.defs.has(operator):
            continue
        try:
            since = onnx.defs.get_schema(operator, OPSET).since_version
        except onnx.defs.SchemaError:
            continue
        if start == since or (start < since <= end and end < _OPEN_END):
            kernels[operator].append({name: sorted(map(_short, each)) for name, each in sorted(types.items())})
    return {
        "source": wheel.name,
        "version": read["version"],
        "written": f"by scripts/cuda_kernels.py on {datetime.now(UTC).date().isoformat()}",
        "opset": OPSET,
        "kernels": {operator: _merged(each) for operator, each in sorted(kernels.items())},
    }


def placed(wheel: Wheel, bundles: list[Path]) -> list[dict[str, Any]]:
    """Of every graph of the bundles: the copies between host and device, and the operators placed on the CPU."""
    graphs = [str(path) for bundle in bundles for path in sorted(bundle.glob("*.onnx"))]
    return [json.loads(line) for line in wheel.python(PLACE, *graphs).splitlines() if line.startswith("{")]


def _merged(kernels: list[dict[str, list[str]]]) -> list[str]:
    """Kernels as text, `T=float,float16 T1=int64`. Those of one type parameter are one line."""
    if all(len(each) == 1 for each in kernels) and len({next(iter(each)) for each in kernels}) == 1:
        (name,) = kernels[0]
        kernels = [{name: sorted({taken for each in kernels for taken in each[name]})}]
    return sorted({" ".join(f"{name}={','.join(taken)}" for name, taken in each.items()) for each in kernels})


def _short(type_name: str) -> str:
    return re.sub(r"^tensor\((.*)\)$", r"\1", type_name)


def _lines(*command: Any) -> list[str]:
    return subprocess.run(command, check=True, stdout=-1, text=True).stdout.splitlines()


def main(command: str, wheel: str, *rest: str) -> int:
    """Run a command; returns 1 if a graph has copies."""
    with tempfile.TemporaryDirectory() as folder:
        opened = Wheel(Path(wheel), Path(folder))
        if command == "table":
            target = Path(rest[0]) if rest else TABLE
            target.write_text(json.dumps(kernel_table(opened), indent=1) + "\n")
            return 0
        found = placed(opened, [Path(each) for each in rest])
        for each in found:
            print(f"{each['graph']}: on the CPU {', '.join(each['on_cpu']) or 'nothing'}", *each["copies"], sep="\n  ")
        print(f"{len(found)} graphs, {sum(len(each['copies']) for each in found)} copies")
        return int(any(each["copies"] for each in found))


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in ("table", "place"):
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
