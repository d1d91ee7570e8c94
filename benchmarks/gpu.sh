#!/usr/bin/env bash
# The tables of docs/speed.md for one GPU of 80 GB, in one call of under ten minutes:
#
#   bash benchmarks/gpu.sh OUT            on a GPU; the peers too, if PyTorch is installed, and
#                                         jax-triton's normalisation kernels, if that is
#   bash benchmarks/gpu.sh OUT --smoke    the same parts, small, on any machine
#
# The parts of a group compile side by side, and then measure one after the other, each alone. OUT
# gets a log of each part, and tables.md, which is copied to results/gpu.
set -u
out=${1:?usage: bash benchmarks/gpu.sh OUT [--smoke]}
python=${PYTHON:-python}
first=128 second=512 train="" profile="--profile 40" sample="--pc_steps 100" kernels=""
if [ "${2:-}" = --smoke ]; then
  first=2 second=4 train="--nf 32 --num_res_blocks 1" profile="" kernels="--small"
  sample="--nf 32 --num_res_blocks 1 --pc_steps 2 --tolerance 0.1 --nll_steps 32"
fi
port=""
if [ "${2:-}" != --smoke ] && $python -c 'import jax_triton' 2>/dev/null; then port=port; fi
export XLA_PYTHON_CLIENT_PREALLOCATE=false
mkdir -p "$out"
failed=0

# part NAME MODULE FLAGS…: the others of $names wait for it to its end at the most
part() {
  BENCHMARK_TURNS="$turns $1 $names" $python -m "benchmarks.$2" "${@:3}" >"$out/$1.txt" 2>&1
  status=$?
  touch "$turns/$1"
  [ $status = 0 ] || echo "$1 failed; see $out/$1.txt" >&2
  return $status
}
# Each with the share of the memory that it may take while all of its group are there.
start() {
  case $1 in
    train128) XLA_PYTHON_CLIENT_MEM_FRACTION=.12 part $1 train --batch $first $train $profile ;;
    train512) XLA_PYTHON_CLIENT_MEM_FRACTION=.35 part $1 train --batch $second $train ;;
    samplers) XLA_PYTHON_CLIENT_MEM_FRACTION=.15 part $1 sample --batch $first $sample ;;
    kernels) XLA_PYTHON_CLIENT_MEM_FRACTION=.1 part $1 kernels $kernels ;;
    port) XLA_PYTHON_CLIENT_MEM_FRACTION=.1 part $1 kernels --backend norm_triton ;;
    torch128) part $1 train --batch $first $train --peer torch --only_peer ;;
    edm128) part $1 train --batch $first $train --peer edm --only_peer ;;
  esac
}
group() {
  names=$* turns=$(mktemp -d) parts=""
  for name in $names; do start $name & parts="$parts $!"; done
  for process in $parts; do wait $process || failed=1; done
}
group train128 train512 samplers kernels $port
if $python -c 'import torch' 2>/dev/null; then group torch128 edm128; fi
{
  grep -h '^JAX\|^a large' "$out/train128.txt"
  for table in "train128 train512 torch128 edm128" samplers kernels $port; do
    echo
    for name in $table; do grep -sh '^|' "$out/$name.txt"; done | awk '!seen[$0]++'
  done
} | tee "$out/tables.md"
exit $failed
