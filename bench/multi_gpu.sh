#!/bin/bash
# Tests and measures one rank a GPU, on all GPUs of this machine, in less than nine minutes:
#
#     bash bench/multi_gpu.sh [DIRECTORY]      # results; bench/results/<date>-multi-gpu unless given
#
# PYTHON: an interpreter that has the package installed; unless it is given, `make` installs it in
# .venv. LIMIT: the seconds that all may take (530). CUDA_VISIBLE_DEVICES is respected. With one GPU
# two ranks share it under MPS: good for trying this script. NVLink multicast stays off.
#
# What fails does not stop what follows; the exit code is 1 where something failed. The directory has
# a log of every step, the reports (bench/README.md), plots, and crossovers.txt: the plan beside what
# was measured.
set -u
cd "$(dirname "$0")/.." || exit 2
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1
export PYTHONUNBUFFERED=1 GAN_CUDA_ARCHS="${GAN_CUDA_ARCHS:-native}"

out="${1:-bench/results/$(date +%F)-multi-gpu}"
mkdir -p "$out"
out="$(cd "$out" && pwd)"
rm -f "$out"/{links,sweep_*,others_*,crossovers}.json  # of an earlier run
start=$SECONDS limit="${LIMIT:-530}" failed=()

left() { echo $((limit - (SECONDS - start))); }

# step NAME SECONDS COMMAND...: runs it, with a limit of its own and that of all
step() {
  local name=$1 seconds=$2 begin=$SECONDS code
  shift 2
  if [ "$(left)" -lt 10 ]; then
    echo "$name: not run: no time is left"
    failed+=("$name")
    return 1
  fi
  [ "$seconds" -gt "$(left)" ] && seconds=$(left)
  echo "$ $*" >"$out/$name.txt"
  timeout --kill-after=5 "$seconds" "$@" >>"$out/$name.txt" 2>&1
  code=$?
  echo "$name: $([ $code = 0 ] && echo ok || echo "FAILED with $code"), $((SECONDS - begin)) s"
  [ $code = 0 ] || { failed+=("$name"); tail -n 15 "$out/$name.txt"; }
  return $code
}

topology() {
  nvidia-smi --query-gpu=index,name,driver_version,memory.total --format=csv
  nvidia-smi topo -m
  nvidia-smi topo -p2p n
  nvidia-smi topo -p2p a
  nvidia-smi nvlink --status
  return 0  # what a driver does not know is no failure
}
export -f topology

# ---- build ----

if [ -z "${PYTHON:-}" ]; then
  step build 240 make build || exit 1
  PYTHON="$PWD/.venv/bin/python"
fi
gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())') || exit 2
if [ "$gpus" -lt 1 ]; then
  echo "multi_gpu.sh: a machine with a GPU is required; got none; see bench/README.md" >&2
  exit 2
fi
most=$((gpus < 2 ? 2 : gpus > 8 ? 8 : gpus))
worlds=()
for n in 2 4 8; do [ "$n" -le "$most" ] && worlds+=("$n"); done
echo "$gpus GPUs; ranks: ${worlds[*]} and all between"

step build_links 150 "$PYTHON" -c "import sys; sys.path.insert(0, 'bench'); from harness import cmake; cmake.build('links')"
step topology 30 bash -c topology

# ---- links ----

step links 90 "$PYTHON" bench/links/run.py --json "$out/links.json"

# ---- tests ----

wanted=$(printf ' or %s-' "${worlds[@]}")
step tests 150 "$PYTHON" -m pytest -q -p no:cacheprovider tests/gpu/test_processes.py \
  -k "test_case and (${wanted:4})"
step faults 60 env PYTHONPATH=. "$PYTHON" tests/gpu/faults.py --runs killed --json "$out/faults.json"

step soak 100 "$PYTHON" -m gemma_ar_norm soak --minutes 1 --ranks "$most" --as processes

# ---- measurements ----

fused() { # fused NAME SECONDS RANKS OPTIONS...
  local name=$1 seconds=$2 ranks=$3
  shift 3
  step "$name" "$seconds" "$PYTHON" bench/bench_fused.py --ranks "$ranks" --json "$out/$name.json" "$@"
}

# Beside the others, at the sizes of decoding and prefill.
fused "others_$most" 90 "$most" --hidden 5120 --rows 1 8 25 64 256 1024
# The algorithms over all sizes; of the numbers of ranks between, fewer.
sweeps=() plots=no
"$PYTHON" -c 'import matplotlib' 2>/dev/null && plots=yes || echo "no plots: they need matplotlib"
sweep() { # sweep RANKS HIDDENS ROWS
  local name="sweep_$1" plot=()
  [ $plots = yes ] && plot=(--plot "$out/$name")
  # shellcheck disable=SC2086  # hidden sizes and rows are words
  fused "$name" 110 "$1" --hidden $2 --rows $3 --replays 20 --algorithms floor ours nccl \
    ${plot[@]+"${plot[@]}"}
  [ -s "$out/$name.json" ] && sweeps+=("$out/$name.json")
}
for n in "${worlds[@]}"; do
  sweep "$n" "2048 4096 5376 8192" "1 2 4 8 16 32 64 128 256 512 1024 2048 4096"
done
for ((n = 3; n <= most; n++)); do
  [[ " ${worlds[*]} " == *" $n "* ]] || sweep "$n" 4096 "1 16 64 256 1024"
done

links=()
[ -s "$out/links.json" ] && links=(--links "$out/links.json")
[ ${#sweeps[@]} -gt 0 ] && step crossovers 30 "$PYTHON" bench/crossovers.py "${sweeps[@]}" \
  ${links[@]+"${links[@]}"} --json "$out/crossovers.json" && cat "$out/crossovers.txt"

echo "$((SECONDS - start)) s; results in $out"
if [ ${#failed[@]} -gt 0 ]; then
  echo "FAILED: ${failed[*]}"
  exit 1
fi
