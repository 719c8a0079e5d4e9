#!/usr/bin/env bash
# Everything that needs a GPU, in one command: build, tests, compute-sanitizer, benchmark.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: tools/gpu_suite.sh [--wheels DIR] [--out DIR]

Run on a machine with a GPU, from a copy of the repository; needs no network, and at most 12 minutes:

  1. install the wheels in DIR (megatron-core, liger-kernel and what they need), if given
  2. build the extension for this GPU, in place
  3. pytest tests/gpu
  4. compute-sanitizer memcheck and racecheck over the operators at small shapes
  5. megatron-deft bench loss --device cuda
  6. megatron-deft bench head --device cuda
  7. megatron-deft bench train, where megatron-core and transformers are installed

A stage that fails does not stop the later ones; the last lines say how each ended.

  --wheels DIR  *.whl files; they are installed beside the environment, not into it
  --out DIR     for GPU-DATE.json, head- and train-GPU-DATE.json (the measurements) and gpu_suite.log
                [$OUT, else tools/bench_results]
  -h, --help    show this

PYTHON names the interpreter [python3]: it needs a torch with CUDA, pytest, ninja and setuptools.
MEGATRON_DEFT_COMMIT says which commit a copy without .git is, for the measurements.
Exit codes: 0, 1 (a stage failed), 2 (no GPU, or a wrong argument).
TEXT
}

fail() {
    echo "gpu_suite: error: $*" >&2
    exit 2
}

wheels=""
out="${OUT:-tools/bench_results}"
while [[ $# -gt 0 ]]; do
    case "$1" in
        -h | --help) usage; exit 0 ;;
        --wheels | --out)
            [[ $# -ge 2 ]] || fail "$1 needs a folder"
            if [[ $1 == --wheels ]]; then wheels=$2; else out=$2; fi
            shift 2
            ;;
        *) fail "unknown argument $1: see tools/gpu_suite.sh --help" ;;
    esac
done
[[ -z $wheels || -d $wheels ]] || fail "--wheels $wheels: no such folder"
[[ -z $wheels ]] || wheels=$(realpath "$wheels")

python="${PYTHON:-python3}"
[[ $python != */* || $python == /* ]] || python="$PWD/$python"
gpu=$("$python" - 2>/dev/null <<'PY'
import torch
assert torch.cuda.is_available()
major, minor = torch.cuda.get_device_capability()
print(f"{major}.{minor} {torch.cuda.get_device_name()}")
PY
) || fail "no GPU that torch of '$python' can use here: nothing was built or run"
read -r arch name <<<"$gpu"

mkdir -p "$out"
out=$(realpath "$out")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
log="$out/gpu_suite.log"
: >"$log"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir "$scratch/site"
export PYTHONPATH="$scratch/site:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export TORCH_CUDA_ARCH_LIST="$arch"
echo "gpu_suite: $name, sm_$arch; log: $log"

results=()
failed=0

# record NAME RESULT, with RESULT "ok", "FAILED ..." or "skipped: ..."
record() {
    echo "gpu_suite: $1: $2"
    results+=("$(printf '%-10s %s' "$1" "$2")")
    [[ $2 != FAILED* ]] || failed=1
}

# attempt NAME SECONDS COMMAND...: run it into the log; sets `code` and `text`, its output
attempt() {
    local stage=$1 limit=$2 began=$SECONDS
    shift 2
    echo "gpu_suite: $stage ..."
    code=0
    timeout --kill-after=5 "$limit" "$@" >"$scratch/$stage" 2>&1 || code=$?
    took="$((SECONDS - began)) s"
    { echo "== $stage: exit code $code after $took"; cat "$scratch/$stage"; } >>"$log"
    text="$scratch/$stage"
}

# verdict NAME LINES: print the end of its output and record what `code` means
verdict() {
    tail -n "$2" "$text"
    case $code in
        0) record "$1" "ok ($took)" ;;
        124 | 137) record "$1" "FAILED: stopped after $took" ;;
        *) record "$1" "FAILED: exit code $code ($took)" ;;
    esac
}

# shellcheck disable=SC2329  # called by the `bash -c` below, under its time limit
install_wheels() {
    local wheel bad=0
    for wheel in "$wheels"/*.whl; do
        "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade \
            --target "$scratch/site" "$wheel" || { echo "not installed: ${wheel##*/}"; bad=1; }
    done
    return "$bad"
}

if [[ -n $wheels ]] && compgen -G "$wheels/*.whl" >/dev/null; then
    export -f install_wheels
    export wheels python scratch
    attempt wheels 40 bash -c install_wheels
    verdict wheels 5
else
    record wheels "skipped: no wheels given"
fi
for package in megatron-core liger-kernel; do
    "$python" -c "from importlib import metadata; metadata.version('$package')" 2>/dev/null ||
        echo "gpu_suite: $package is not installed: its rows of the benchmark stay empty"
done

# torch takes the folder above nvcc's for the toolkit's, which a link or a wrapper on the PATH is not
if [[ -z ${CUDA_HOME:-} ]]; then
    nvcc=$(command -v nvcc || true)
    for folder in ${nvcc:+"$(dirname "$(dirname "$(realpath "$nvcc")")")"} /usr/local/cuda{,-*}; do
        [[ -f $folder/include/cuda_runtime_api.h ]] && export CUDA_HOME="$folder" && break
    done
fi

# shellcheck disable=SC2329  # called by the `bash -c` below
build() {
    "$python" setup.py --quiet build_ext --inplace &&
        "$python" -c "from megatron_deft import _C; assert _C.cuda, 'built without CUDA kernels'"
}
export -f build
export python
export MEGATRON_DEFT_OPS=native  # nothing below may run the plain twins instead
attempt build 90 bash -c build
verdict build 5

attempt tests 70 "$python" -m pytest -p no:cacheprovider tests/gpu
verdict tests 15

read -r -d '' small_shapes <<'PY' || true
import torch
from megatron_deft.ops import native

IGNORE = -100
deft = [1.0, 0.0, 1e-6, -float("inf"), float("inf"), 0.0, 1.0, 0.0]
eaft = [0.0, 0.0, 0.0, -float("inf"), float("inf"), 1.0, 3.0, 20.0]
for dtype in (torch.bfloat16, torch.float32):
    for columns in (33, 5003, 128256):  # the last bytes of the tensor are the last row's
        logits = torch.randn(5, columns).to(dtype).cuda()
        labels = torch.tensor([0, columns - 2, IGNORE, columns, 7], device="cuda")
        rows = torch.rand(3, 5).cuda()
        for topk in (0, 20):
            native.row_stats(logits, labels, 0, columns - 1, IGNORE, topk)
        native.gate_grad(logits, labels, *rows, 0, columns - 1, IGNORE)
        for gate in (deft, eaft):
            native.row_stats_grad(logits, labels, gate, columns - 1, IGNORE)
        native.row_stats_grad_(logits, labels, eaft, columns - 1, IGNORE)
        native.scale_rows_(logits, labels, rows[0], IGNORE)
        native.gate_grad_(logits, labels, *rows, 0, columns - 1, IGNORE)
torch.cuda.synchronize()
print("small shapes: finished")
PY

sanitizer=$(command -v compute-sanitizer || true)
for folder in "${CUDA_HOME:-/usr/local/cuda}" /usr/local/cuda; do
    [[ -n $sanitizer || ! -x $folder/bin/compute-sanitizer ]] ||
        sanitizer=$folder/bin/compute-sanitizer
done
# memcheck sees the end of a tensor only when torch does not pool the memory
for tool in memcheck racecheck; do
    if [[ -z $sanitizer ]]; then
        record "$tool" "skipped: compute-sanitizer is not installed"
        continue
    fi
    attempt "$tool" 70 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" \
        --kernel-name kns=megatron_deft --error-exitcode 86 "$python" -c "$small_shapes"
    if ((code != 0)) && grep -qiE 'device not supported|failed to initialize|libraryNotLoaded' "$text"; then
        record "$tool" "skipped: compute-sanitizer cannot run here"
    elif ((code == 0)) && ! grep -q 'small shapes: finished' "$text"; then
        code=1
        verdict "$tool" 15
    else
        verdict "$tool" 6
    fi
done

result="${name//[^A-Za-z0-9._-]/-}-$(date -u +%Y-%m-%d).json"
attempt benchmark 190 "$python" tools/bench_loss.py --device cuda --json "$out/$result"
verdict benchmark 95
attempt head 60 "$python" -m megatron_deft bench head --device cuda --repetitions 10 \
    --json "$out/head-$result"
verdict head 60
if "$python" -c "import megatron.core, transformers" 2>/dev/null; then
    attempt train 120 "$python" -m megatron_deft bench train --repetitions 10 \
        --json "$out/train-$result"
    verdict train 12
else
    record train "skipped: megatron-core or transformers is not installed"
fi
for json in "$out/$result" "$out/head-$result" "$out/train-$result"; do
    [[ ! -f $json ]] || echo "gpu_suite: measurements: $json"
done

echo "gpu_suite: $name, ${SECONDS} s in all"
printf '  %s\n' "${results[@]}"
exit "$failed"
