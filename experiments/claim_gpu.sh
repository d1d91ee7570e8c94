#!/usr/bin/env bash
# The rows of Fashion-MNIST's claim at 32×32 that tell the most, first seed first, on one GPU:
#
#   python -m experiments.make_data fashion_mnist DIR --size 32 …
#   bash experiments/claim_gpu.sh DIR OUT WORKDIRS [SECONDS]
#
# Ten runs at a time, after the first has taken its first step: what it has compiled and tried is
# then in JAX's cache for the others. (On an H100 with 16 cores eight that begin at once take their
# first steps after 180 s; alone, the first does so after 90 s, of which it decodes images for 26,
# and the second 35 s later, or 25 s after it was resumed. All together, or any one of them alone,
# train at 16,000 to 17,700 images/s.) After SECONDS (540) all are stopped, with a checkpoint; the
# same command goes on, and skips the rows that are there.
# SWEEP is another sweep's file, and NAMES are other runs:
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
run() {
  left=$((end - $(date +%s)))
  [ $left -gt 10 ] && timeout -k 15 $left $python -m experiments.run "$sweep" --only "^$1$" \
    --out "$out" --workdirs "$workdirs" --set "data.path=$data" --set "eval.cache_dir=$out/cache" \
    >>"$out/$1.txt" 2>&1
}
mkdir -p "$out"
export -f run
export end=$(($(date +%s) + ${4:-540})) data out workdirs python sweep
first=$(names | head -n 1)
run "$first" &
while kill -0 $! 2>/dev/null && ! grep -qs ' step [0-9]' "$out/$first.txt"; do sleep 1; done
names | tail -n +2 | xargs -P 9 -I{} bash -c 'run {}'
wait
ls "$out/rows"
