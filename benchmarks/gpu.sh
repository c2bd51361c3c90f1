#!/usr/bin/env bash
# What needs a GPU, in one command that takes at most LIMIT seconds (a fresh machine's 5 minutes): the tests marked gpu,
# eight shapes of the tiles, and the head's benchmark against its peers. GPU time is scarce: each part has a limit of
# its own, prints as it goes, and leaves what it has found so far.
#
#   bash benchmarks/gpu.sh [options of benchmarks.head]      PARTS="tests tiles head" chooses; "sanitizer" is another
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
LIMIT=${LIMIT:-300}
PARTS=${PARTS:-tests tiles head}
PYTHON=${PYTHON:-python3}
TEST_WORKERS=${TEST_WORKERS:-4}
TESTS_LIMIT=110 TILES_LIMIT=40 HEAD_LIMIT=150 SANITIZER_LIMIT=80

mkdir -p "$OUT"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
failed=()

# most SECONDS: so many, or what is left of LIMIT
most() {
    local left=$((LIMIT - SECONDS - 5))
    echo $((left < 1 ? 1 : left < $1 ? left : $1))
}

# part NAME SECONDS COMMAND...: runs it with its output in $OUT/NAME.log too, and remembers a failure
part() {
    local name=$1 seconds code=0
    seconds=$(most "$2")
    shift 2
    echo "== $name, at most $seconds s"
    timeout --kill-after=5 "$seconds" "$@" 2>&1 | tee "$OUT/$name.log" || code=$?
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
    # where nvidia-cutlass-dsl keeps what QuACK imports: its .pth file, which says so, counts in site-packages alone
    for piece in "$scratch"/site/nvidia_cutlass_dsl/*_packages; do
        packages="$packages:$piece"
    done
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
    part tests "$TESTS_LIMIT" "$PYTHON" -m pytest -m gpu -n "$TEST_WORKERS" -p no:cacheprovider -p benchmarks.tell_failures \
        -q --tb=short --junitxml="$OUT/tests.xml" "${files[@]}"
}

tile_shapes() {
    part tiles "$TILES_LIMIT" "$PYTHON" -m benchmarks.tiles --device cuda --json "$OUT/tiles.json" \
        --budget $((TILES_LIMIT - 12))
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
        --losses nll,kl,distance_cluster --contestants ours,ours_known
    if [[ ${failed[-1]:-} == sanitizer* ]] && grep -q "Device not supported" "$OUT/sanitizer.log"; then
        echo "compute-sanitizer cannot work on this machine: not counted as a failure"
        unset 'failed[-1]'
    fi
}

head_benchmark() {
    local seconds
    seconds=$(most "$HEAD_LIMIT")
    # a row's limit leaves every shape its turn; what compiles for long comes last in it, and is then said to be missing
    part head "$HEAD_LIMIT" "$PYTHON" -m benchmarks.head --device cuda --json "$OUT/head.json" --rounds 8 --warmup 2 \
        --losses nll,kl --ignored 0 --p flat --limit 26 --budget $((seconds > 20 ? seconds - 10 : seconds)) "$@"
}

packages=""
install_wheels
mkdir -p "$scratch/packages"
ln -s "$PWD/kernels" "$scratch/packages/fastforget_kernels" # where it is not installed, as pyproject.toml maps it
export PYTHONPATH="$PWD:$scratch/packages:$scratch/site$packages${PYTHONPATH:+:$PYTHONPATH}"
export PATH="$PATH:/usr/local/cuda/bin" PYTHONUNBUFFERED=1 TRITON_INTERPRET=0 HF_HUB_OFFLINE=1
if [[ -f .device/commit ]]; then
    FASTFORGET_COMMIT=$(<.device/commit)
    export FASTFORGET_COMMIT
fi

surroundings 2>&1 | tee "$OUT/surroundings.log" || failed+=("surroundings")
for name in $PARTS; do
    case $name in
        tests) gpu_tests ;;
        tiles) tile_shapes ;;
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
