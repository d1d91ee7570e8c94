#!/usr/bin/env bash
# In how many seconds each of two processes notices that the other's machine is gone: two network
# namespaces with a cable between them, which is pulled. As root, on Linux:
#
#   bash benchmarks/lost_machine.sh
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
clean() { ip netns del A 2>/dev/null || true; ip netns del B 2>/dev/null || true; }
clean; trap clean EXIT
ip netns add A; ip netns add B
ip link add va type veth peer name vb
ip link set va netns A; ip link set vb netns B
ip -n A addr add 10.9.0.1/24 dev va; ip -n B addr add 10.9.0.2/24 dev vb
ip -n A link set lo up; ip -n A link set va up; ip -n B link set lo up; ip -n B link set vb up
watch='
import sys, time
from runtime.peers import Peers
index = int(sys.argv[1])
peers = Peers(index, 2)
peers.join("10.9.0.1", 7777, 20) if index else peers.gather(7777, 20)
time.sleep(120)'
ip netns exec A "$python" -c "$watch" 0 & first=$!
ip netns exec B "$python" -c "$watch" 1 & second=$!
sleep 8; ip -n B link set vb down; pulled=$(date +%s)
for process in $first $second; do
  wait "$process" || echo "ended with $? after $(($(date +%s) - pulled)) s"
done
