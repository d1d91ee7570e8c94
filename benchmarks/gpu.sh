#!/usr/bin/env bash
# The tables of docs/speed.md for one GPU, in one call of under ten minutes:
#
#   bash benchmarks/gpu.sh OUT            on a GPU; the peers are measured if PyTorch is installed
#   bash benchmarks/gpu.sh OUT --smoke    the same parts, small, on any machine
#
# All parts compile side by side; then each measures alone. OUT gets a log of each, and tables.md.
set -u
out=${1:?usage: bash benchmarks/gpu.sh OUT [--smoke]}
python=${PYTHON:-python}
mkdir -p "$out"
turns=$(mktemp -d)
names="train128 train512 samplers kernels"
$python -c 'import torch' 2>/dev/null && names="$names torch128 edm128"
first=128 second=512 train="" sample="--pc_steps 100" kernels="" profile="--profile 40"
if [ "${2:-}" = --smoke ]; then
  train="--nf 32 --num_res_blocks 1" profile="" first=2 second=4 kernels="--small"
  sample="--nf 32 --num_res_blocks 1 --pc_steps 2 --tolerance 0.1 --nll_steps 32"
fi
export XLA_PYTHON_CLIENT_PREALLOCATE=false

# A part: its name, its module and flags. It is ready for the others at its end at the latest.
part() {
  BENCHMARK_TURNS="$turns $1 $names" $python -m "benchmarks.$2" "${@:3}" >"$out/$1.txt" 2>&1
  status=$?
  touch "$turns/$1"
  [ $status = 0 ] || { echo "$1 failed; see $out/$1.txt" >&2; touch "$turns/failed"; }
}
for name in $names; do
  case $name in
    train128) part $name train --batch $first $train $profile ;;
    train512) part $name train --batch $second $train ;;
    samplers) part $name sample --batch $first $sample ;;
    kernels) part $name kernels $kernels ;;
    torch128) part $name train --batch $first $train --peer torch --only_peer ;;
    edm128) part $name train --batch $first $train --peer edm --only_peer ;;
  esac &
done
wait
{
  grep -h '^JAX' "$out/train128.txt"
  for table in "train128 train512 torch128 edm128" samplers kernels; do
    echo
    for name in $table; do grep -sh '^|' "$out/$name.txt"; done | awk '!seen[$0]++'
  done
} | tee "$out/tables.md"
[ ! -e "$turns/failed" ]
