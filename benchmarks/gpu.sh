#!/usr/bin/env bash
# What needs a GPU, in one command that takes at most LIMIT seconds (a fresh machine's 5 minutes): the tests marked gpu,
# eight shapes of the tiles, and the head's benchmark against its peers; or whole steps. GPU time is scarce: each part
# has a limit of its own, prints as it goes, and leaves what it has found so far.
#
#   bash benchmarks/gpu.sh [options of benchmarks.head]      PARTS="tests tiles head" chooses; "sanitizer" is another
#   PARTS=step STEP="--shape opt-1.3b --bits 8" bash benchmarks/gpu.sh
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

OUT=${OUT:-$PWD/.device/out} LIMIT=${LIMIT:-300} PARTS=${PARTS:-tests tiles head} PYTHON=${PYTHON:-python3}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$OUT" "$scratch/joined" "$scratch/packages"
failed=()

# part NAME SECONDS COMMAND...: runs it for so long or what is left of LIMIT, with its output in $OUT/NAME.log too; a
# %LIMIT% in the command becomes the seconds in which it should end by itself
part() {
    local name=$1 most=$2 left=$((LIMIT - SECONDS - 5)) code=0
    shift 2
    most=$((left < 1 ? 1 : left < most ? left : most))
    echo "== $name, at most $most s"
    timeout --kill-after=5 "$most" "${@/\%LIMIT\%/$((most > 24 ? most - 12 : most))}" 2>&1 | tee "$OUT/$name.log" || code=$?
    ((code == 0)) || failed+=("$name (exit code $code)")
}

wheels=(.device/wheels*/*.whl)
for piece in .device/wheels*/*.whl.part*; do
    cat "$piece" >>"$scratch/joined/$(basename "${piece%.part*}")"
done
wheels+=("$scratch"/joined/*.whl)
if ((${#wheels[@]})); then
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
        --target "$scratch/site" "${wheels[@]}" || failed+=("the wheels")
fi
packages=""
# where nvidia-cutlass-dsl keeps what QuACK imports: its .pth file, which says so, counts in site-packages alone
for piece in "$scratch"/site/nvidia_cutlass_dsl/*_packages; do
    packages="$packages:$piece"
done
ln -s "$PWD/kernels" "$scratch/packages/fastforget_kernels" # where it is not installed, as pyproject.toml maps it
export PYTHONPATH="$PWD:$scratch/packages:$scratch/site$packages${PYTHONPATH:+:$PYTHONPATH}"
export PATH="$PATH:/usr/local/cuda/bin" PYTHONUNBUFFERED=1 TRITON_INTERPRET=0 HF_HUB_OFFLINE=1
if [[ -f .device/commit ]]; then
    FASTFORGET_COMMIT=$(<.device/commit)
    export FASTFORGET_COMMIT
fi
nvidia-smi || true
"$PYTHON" -c 'from fastforget import doctor; print(*map(": ".join, doctor.report()), sep="\n")' || failed+=("doctor")
"$PYTHON" -m pip list --format=freeze >"$OUT/packages.txt" || true

head=("$PYTHON" -m benchmarks.head --device cuda)
for name in $PARTS; do
    case $name in
        tests) # of the other test files some need packages that this machine lacks
            mapfile -t files < <(grep -rlE 'mark\.gpu\b|kernel_device' tests --include='test_*.py')
            part tests 110 "$PYTHON" -m pytest -m gpu -n "${TEST_WORKERS:-4}" -p no:cacheprovider \
                -p benchmarks.tell_failures -q --tb=short --junitxml="$OUT/tests.xml" "${files[@]}"
            ;;
        tiles) part tiles 40 "${head[@]}" tiles --json "$OUT/tiles.json" --rounds 5 --warmup 1 --no-memory --limit %LIMIT% ;;
        # what compiles for long comes last in a row, and is then said to be missing
        head) part head 150 "${head[@]}" --losses nll,kl --ignored 0 --p flat --json "$OUT/head.json" --rounds 8 \
            --warmup 2 --limit %LIMIT% "$@" ;;
        step) # shapes are built in the process; STEP_SECONDS, 90 to 240, for all of them
            # shellcheck disable=SC2086  # several words
            part step "${STEP_SECONDS:-240}" "$PYTHON" -m benchmarks.step --device cuda --methods grad_diff --batches 1 \
                --rounds 4 --warmup 1 --json "$OUT/step.json" --limit %LIMIT% \
                ${STEP:---shape llama-3.1-8b --bits 8 --sequences 4 --length 1024 --rank 16}
            ;;
        sanitizer) # without the caching allocator each tensor is an allocation of its own, whose bounds are checked
            PYTORCH_NO_CUDA_MEMORY_CACHING=1 part sanitizer 80 compute-sanitizer --tool memcheck --error-exitcode 3 \
                "${head[@]}" --tiny --no-memory --ignored 0.5 --p flat --losses nll,kl,distance_cluster \
                --contestants ours,ours_known
            ;;
        *) failed+=("unknown part $name") ;;
    esac
done

if ((${#failed[@]})); then
    printf '== failed: %s\n' "${failed[@]}"
    exit 1
fi
echo "== all parts ran, and nothing failed"
