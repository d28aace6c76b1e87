#!/usr/bin/env bash
# Measures a GPU in 8 minutes. Each result is one line of JSON in OUT/results.jsonl, on the disk before the next case begins.
#
#   bash tests/benchmarks/gpu.sh [OUT] [--rehearse] [--stages "3 5"] [--only TEXT] [--seconds 480]
#   python tests/benchmarks/gpu_table.py OUT/results.jsonl
#
# OUT is a new folder, by default $OUT, else runs/gpu. --rehearse runs all of it on a CPU, with small shapes and kernels
# that do nothing. --stages runs some stages, --only the cases whose name contains a text. --seconds is the time of all
# stages together. Environment: PYTHON (the interpreter), WHEELS (a folder of wheels that are unpacked, not installed),
# ORTHOTRAIN_COMMIT (where there is no git). Nothing is fetched from a network; without an installed orthotrain the
# checkout's own folders are linked.
set -u
root=$(cd "$(dirname "$0")/../.." && pwd)
out=${OUT:-runs/gpu} stages="1 2 3 4 5 6 7" only="" seconds=480 rehearse=()
while [ $# -gt 0 ]; do
    case $1 in
        --stages | --only | --seconds) [ $# -gt 1 ] || { echo "gpu.sh: $1 needs a value" >&2; exit 2; } ;;
    esac
    case $1 in
        --rehearse) rehearse=(--rehearse) ;;
        --stages) stages=$2; shift ;;
        --only) only=$2; shift ;;
        --seconds) seconds=$2; shift ;;
        -*) echo "gpu.sh: unknown option $1; see the first lines of $0" >&2; exit 2 ;;
        *) out=$1 ;;
    esac
    shift
done
for number in $stages; do
    case $number in [1-7]) ;; *) echo "gpu.sh: --stages $number: there are stages 1 to 7" >&2; exit 2 ;; esac
done
case $seconds in
    '' | *[!0-9]*) echo "gpu.sh: --seconds $seconds: take a whole number" >&2; exit 2 ;;
esac
limits=(0 25 55 75 55 95 90 85)  # seconds of the stages when all have 480
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
results=$out/results.jsonl log=$out/log.txt
if [ -e "$results" ]; then
    echo "gpu.sh: $results exists: move it, or name another folder" >&2
    exit 2
fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
trap 'kill $(jobs -p) 2>/dev/null; wait; exit 130' HUP INT TERM

[ -n "${PYTHON:-}" ] || PYTHON=$root/.venv/bin/python
[ -x "$(command -v "$PYTHON")" ] || PYTHON=python3
export ORTHOTRAIN_GPU_SCRATCH=$scratch ORTHOTRAIN_CACHE=$scratch/cache TRITON_CACHE_DIR=$scratch/triton
export TORCHINDUCTOR_CACHE_DIR=$scratch/inductor TORCHINDUCTOR_COMPILE_THREADS=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
mkdir "$scratch/wheels"
for wheel in "${WHEELS:-/nowhere}"/*.whl; do
    [ -e "$wheel" ] && "$PYTHON" -m zipfile -e "$wheel" "$scratch/wheels"
done
export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$scratch/wheels
if ! "$PYTHON" -P -c "import orthotrain" 2>/dev/null; then
    mkdir -p "$scratch/site/orthotrain"
    ln -s "$root"/framework/* "$root/plugins" "$root/kernels" "$root/configs" "$scratch/site/orthotrain/"
    export PYTHONPATH=$scratch/site:$PYTHONPATH
fi
if [ ${#rehearse[@]} -eq 0 ]; then
    # reads the packages from a disk that may be cold, before the time of the stages begins
    "$PYTHON" -P -c "import sys, torch; torch.cuda.is_available() or sys.exit(3); import orthotrain.modules" >>"$log" 2>&1
    if [ $? -eq 3 ]; then
        echo "gpu.sh: torch finds no GPU here; --rehearse runs everything on a CPU" >&2
        exit 2
    fi
fi

# stage NUMBER PART PARTS: one process; started again after it died, while its time lasts
stage() {
    local number=$1 part=$2 parts=$3 attempt code child=
    trap 'kill $child 2>/dev/null; exit 130' TERM
    local end=$((SECONDS + limits[number] * seconds / 480))
    for attempt in 1 2 3 4 5 6 7 8; do
        local left=$((end - SECONDS))
        [ $left -ge 2 ] || return
        timeout -k 3 $left "$PYTHON" -P "$root/tests/benchmarks/gpu/main.py" --stage "$number" --results "$results" \
            --seconds $left --part "$part" --parts "$parts" --only "$only" "${rehearse[@]}" >>"$log" 2>&1 &
        child=$!
        wait $child
        code=$?
        [ $code -eq 0 ] && return
        local why="exit code $code"
        [ $code -eq 124 ] || [ $code -eq 137 ] && [ $((end - SECONDS)) -lt 2 ] && why="its time of $left s was over"
        [ $code -eq 75 ] && why="the device answered no longer"
        printf '{"stage": %d, "case": "process %d.%d", "error": "%s"%s}\n' "$number" "$part" "$attempt" "$why" \
            "${rehearse:+, \"rehearsal\": true}" >>"$results"
    done
}

for number in $stages; do
    began=$SECONDS
    parts=1
    [ "$number" -eq 2 ] && [ ${#rehearse[@]} -eq 0 ] && parts=12
    for ((part = 0; part < parts; part++)); do
        stage "$number" "$part" "$parts" &
    done
    wait
    echo "stage $number: $((SECONDS - began)) s, $(grep -c "\"stage\": $number," "$results" 2>/dev/null) lines"
done
echo "wrote $results; tables: python tests/benchmarks/gpu_table.py $results"
