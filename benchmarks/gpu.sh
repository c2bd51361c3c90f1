#!/usr/bin/env bash
# What needs a GPU, in one command that takes at most LIMIT seconds: the tests marked gpu, a part of the benchmark under
# compute-sanitizer where that is there, and the head's benchmark against its peers.
#
#   bash benchmarks/gpu.sh [options of benchmarks.head]      PARTS="tests sanitizer head" chooses
#
# Everything goes to $OUT, after each row; the figures are kept by copying head.json and head.md to benchmarks/results/
# as DATE-head-DEVICE.json and .md. A part that fails does not keep the next from running; the exit code is then 1.
#
# Nothing is fetched. What the machine lacks is carried in a folder that git ignores:
#   .device/wheels*/*.whl      the peers and what they need; a wheel that is too large for one trip comes in pieces:
#                              split -b 45M -d -a 1 X.whl .device/wheels-a/X.whl.part, and some of them in wheels-b
#   .device/commit             the commit that is measured: git describe --always --dirty > .device/commit
set -euo pipefail
shopt -s nullglob
cd "$(dirname "${BASH_SOURCE[0]}")/.."

OUT=${OUT:-$PWD/.device/out}
LIMIT=${LIMIT:-570}
PARTS=${PARTS:-tests sanitizer head}
PYTHON=${PYTHON:-python3}
TEST_WORKERS=${TEST_WORKERS:-4}
TESTS_LIMIT=$((LIMIT * 35 / 100))
SANITIZER_LIMIT=$((LIMIT * 15 / 100))

mkdir -p "$OUT"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
failed=()

# part NAME SECONDS COMMAND...: runs it with its output in $OUT/NAME.log too, and remembers a failure
part() {
    local name=$1 seconds=$2 code=0
    shift 2
    echo "== $name, at most $seconds s"
    timeout --kill-after=10 "$seconds" "$@" 2>&1 | tee "$OUT/$name.log" || code=$?
    ((code == 0)) || failed+=("$name (exit code $code)")
}

install_wheels() {
    local wheels=(.device/wheels*/*.whl) piece
    mkdir -p "$scratch/joined"
    for piece in .device/wheels*/*.whl.part*; do
        cat "$piece" >>"$scratch/joined/$(basename "${piece%.part*}")"
    done
    wheels+=("$scratch"/joined/*.whl)
    ((${#wheels[@]} == 0)) && return
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
        --target "$scratch/site" "${wheels[@]}" || failed+=("the wheels")
}

surroundings() {
    nvidia-smi || true
    "$PYTHON" -c 'from fastforget import doctor; print(*map(": ".join, doctor.report()), sep="\n")'
    "$PYTHON" -m pip list --format=freeze >"$OUT/packages.txt" || true
}

gpu_tests() {
    local files
    # the other test files may need packages that this machine lacks
    mapfile -t files < <(grep -rlE 'mark\.gpu\b|kernel_device' tests --include='test_*.py')
    if ((${#files[@]} == 0)); then
        echo "no test is marked gpu"
        return 1
    fi
    part tests "$TESTS_LIMIT" "$PYTHON" -m pytest -m gpu -n "$TEST_WORKERS" -p no:cacheprovider \
        --junitxml="$OUT/tests.xml" "${files[@]}"
}

sanitizer() {
    if ! command -v compute-sanitizer >/dev/null; then
        echo "== sanitizer: there is no compute-sanitizer here" | tee "$OUT/sanitizer.log"
        return
    fi
    # without the caching allocator each tensor is an allocation of its own, whose bounds are checked
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 part sanitizer "$SANITIZER_LIMIT" \
        compute-sanitizer --tool memcheck --error-exitcode 3 \
        "$PYTHON" -m benchmarks.head --device cuda --tiny --here --no-memory --ignored 0.5 --p flat \
        --losses nll,kl,distance_cluster --contestants ours,ours_tail
    if [[ ${failed[-1]:-} == sanitizer* ]] && grep -q "Device not supported" "$OUT/sanitizer.log"; then
        echo "compute-sanitizer cannot work on this machine: not counted as a failure"
        unset 'failed[-1]'
    fi
}

head_benchmark() {
    local left=$((LIMIT - SECONDS - 15))
    ((left > 0)) || left=1
    part head $((left + 10)) "$PYTHON" -m benchmarks.head --device cuda --json "$OUT/head.json" --rounds 12 --warmup 2 \
        --limit 90 --budget "$left" "$@"
}

install_wheels
mkdir -p "$scratch/packages"
ln -s "$PWD/kernels" "$scratch/packages/fastforget_kernels" # where it is not installed, as pyproject.toml maps it
export PYTHONPATH="$PWD:$scratch/packages:$scratch/site${PYTHONPATH:+:$PYTHONPATH}"
export PATH="$PATH:/usr/local/cuda/bin" PYTHONUNBUFFERED=1 TRITON_INTERPRET=0 HF_HUB_OFFLINE=1
if [[ -f .device/commit ]]; then
    FASTFORGET_COMMIT=$(<.device/commit)
    export FASTFORGET_COMMIT
fi

surroundings 2>&1 | tee "$OUT/surroundings.log" || failed+=("surroundings")
for name in $PARTS; do
    case $name in
        tests) gpu_tests ;;
        sanitizer) sanitizer ;;
        head) head_benchmark "$@" ;;
        *)
            echo "unknown part $name"
            false
            ;;
    esac || failed+=("$name")
done

if ((${#failed[@]})); then
    printf '== failed: %s\n' "${failed[@]}"
    exit 1
fi
echo "== all parts ran, and nothing failed"
