#!/usr/bin/env bash
# The rows of Fashion-MNIST's claim at 32×32 that tell the most, first seed first, on one GPU:
#
#   python -m experiments.make_data fashion_mnist DIR --size 32 …
#   bash experiments/claim_gpu.sh DIR OUT WORKDIRS [SECONDS]
#
# Ten runs at a time; on an H200 with 16 cores the first ten rows were there after 560 s, 15 after
# 810 s. After SECONDS (540) all are stopped, with a checkpoint; the same command goes on, and skips
# the rows that are there. SWEEP is another sweep's file, and NAMES are other runs:
#
#   SWEEP=experiments/claim_fashion_mnist_long.py NAMES='velocity_soft_k1_seed0 …' bash …
set -u
data=${1:?usage: bash experiments/claim_gpu.sh DIR OUT WORKDIRS [SECONDS]} out=${2:?} workdirs=${3:?}
python=${PYTHON:-python} sweep=${SWEEP:-experiments/claim_fashion_mnist.py}
export XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_PYTHON_CLIENT_MEM_FRACTION=.07
names() {
  if [ -n "${NAMES:-}" ]; then printf '%s\n' $NAMES; return; fi
  for seed in 0 1 2; do
    for truncation in soft_k1 fixed_1e-5 fixed_1e-3 fixed_1e-4 weight_k1 sigmoid; do
      case $seed$truncation in [12]fixed_1e-[34]) continue ;; esac
      for parametrization in velocity noise; do echo "${parametrization}_${truncation}_seed$seed"; done
    done
  done
}
mkdir -p "$out"
export end=$(($(date +%s) + ${4:-540})) data out workdirs python sweep
names | xargs -P 10 -I{} bash -c '
  left=$((end - $(date +%s)))
  [ $left -gt 10 ] && timeout -k 15 $left $python -m experiments.run "$sweep" --only "^{}$" \
    --out "$out" --workdirs "$workdirs" --set "data.path=$data" --set "eval.cache_dir=$out/cache" \
    >>"$out/{}.txt" 2>&1'
ls "$out/rows"
