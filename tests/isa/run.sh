#!/usr/bin/env bash
# Run a command as on an older CPU: with AVX2 (no AVX-512, VNNI or AMX) and one thread.
# With ATEN_CPU_CAPABILITY=default PyTorch's own loops do without AVX2, too; that takes twice as long.
#
#     tests/isa/run.sh .venv/bin/python -m pytest -m numerics -p no:faulthandler
#
# oneDNN, ATen and MKL are told by their environment variables. ONNX Runtime's MLAS has none: what the CPU says is hidden
# from it (hide_instructions.c), where there is a C compiler and the CPU lets Linux do that; else this says so, and
# MLAS runs as it always does here.
set -euo pipefail

export OMP_NUM_THREADS=1 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
export ATEN_CPU_CAPABILITY=${ATEN_CPU_CAPABILITY:-avx2}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
source=$(dirname "${BASH_SOURCE[0]}")/hide_instructions.c
preload=()
if ${CC:-cc} -O1 -shared -fPIC -o "$work/hide.so" "$source" 2>"$work/said" &&
    env DYDIT_HIDE=avx512 LD_PRELOAD="$work/hide.so" true 2>>"$work/said"; then
    preload=(DYDIT_HIDE=avx512 LD_PRELOAD="$work/hide.so")
    echo "AVX2 alone: AVX-512, VNNI and AMX are hidden from all of it" >&2
else
    echo "AVX2 for PyTorch; ONNX Runtime runs on all that this CPU has, for it cannot be hidden here" >&2
fi
env "${preload[@]}" "$@"
