#!/usr/bin/env bash
# The tables of docs/speed.md, for one GPU of 80 GB:
#
#   bash benchmarks/gpu.sh OUT [ours|peers]          on a GPU; without a word both, one after the other
#   bash benchmarks/gpu.sh OUT [ours|peers] --smoke  the same parts, small, on any machine
#
# `peers` are what training is compared with: no kernels, and PyTorch, if that is installed. On an
# H100 each took five to eight minutes. The parts of each compile side by side, and then measure one
# after the other, alone. OUT gets a log of each part, and tables.md of all that are there; it is
# copied to results/gpu.
set -u
out=${1:?usage: bash benchmarks/gpu.sh OUT [ours|peers] [--smoke]}
python=${PYTHON:-python}
first=128 second=512 train="" profile="--profile 40" sample="--pc_steps 100" kernels=""
which=ours,peers
case ${2:-} in ours | peers) which=$2 && shift ;; esac
smoke=${2:-}
case $smoke in '' | --smoke) ;; *) echo "$smoke is neither ours, peers nor --smoke" >&2 && exit 2 ;; esac
if [ -n "$smoke" ]; then
  first=2 second=4 train="--nf 32 --num_res_blocks 1" profile="" kernels="--small"
  sample="--nf 32 --num_res_blocks 1 --pc_steps 2 --tolerance 0.1 --nll_steps 32"
fi
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
    torch128) part $1 train --batch $first $train --peer torch --only_peer ;;
    train_xla) XLA_PYTHON_CLIENT_MEM_FRACTION=.2 part $1 train --batch $first $train --no_kernels ;;
    edm128) part $1 train --batch $first $train --peer edm --only_peer ;;
  esac
}
group() {
  names=$* turns=$(mktemp -d) parts=""
  for name in $names; do start $name & parts="$parts $!"; done
  for process in $parts; do wait $process || failed=1; done
}
case $which in *ours*) group train128 train512 samplers kernels ;; esac
peers=train_xla
if $python -c 'import torch' 2>/dev/null; then peers="torch128 edm128 train_xla"; fi
case $which in *peers*) group $peers ;; esac
table() { for name; do grep -sh '^|' "$out/$name.txt"; done | awk '!seen[$0]++'; }
{
  grep -sh '^JAX\|^a large' "$out/train128.txt" "$out/train_xla.txt" | head -n 2
  printf '\n%s\n' "$(table train128 train512 train_xla torch128 edm128)"
  for name in samplers kernels; do
    [ ! -s "$out/$name.txt" ] || printf '\n%s\n' "$(table $name)"
  done
} | tee "$out/tables.md"
exit $failed
