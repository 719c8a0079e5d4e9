#!/usr/bin/env bash
# Train on several machines with torchrun: run the same line on each of them.
#
#   NNODES=4 ENDPOINT=node1:29500 examples/torchrun_multinode.sh CONFIG [KEY=VALUE ...]
#
# The machines see one file system. They meet at ENDPOINT, in any order. When ranks die, all start again
# and go on from the newest whole checkpoint; when a machine is lost, the others wait for it: run the line
# there again, or on another machine. When that of ENDPOINT is lost, run it everywhere, with --resume.
# SIGUSR1 or SIGTERM to this script: the ranks end their step, save and stop.
#
#   NNODES         machines [1]
#   ENDPOINT       HOST:PORT on one of them, reachable from all; the port is free
#   NPROC_PER_NODE ranks on each [one per GPU, 1 without]
#   MAX_RESTARTS   how often ranks of a machine may die [3]
#   JOIN_SECONDS   how long to wait for all machines, at the start and after one was lost [900]
#   JOB_ID         a name that no other run at this ENDPOINT has [megatron_deft]
#   NODE_RANK      0 where ENDPOINT is, 1 elsewhere; only where its name does not tell
#   ADDRESS        of this machine for the others, where they cannot resolve its hostname
#   IFNAME         network interface of the first meeting, such as eth0, where the wrong one is chosen
#   GRACE          seconds that ranks have to save after SIGTERM [300]
#
# Logs: RUN/logs/HOST/agent.log, and RUN/logs/HOST/JOB_ID_*/attempt_N/LOCAL_RANK/{stdout,stderr}.log
set -euo pipefail

fail() {
  echo "torchrun_multinode.sh: error: $1" >&2
  exit 2
}

[ $# -gt 0 ] || fail "usage: NNODES=4 ENDPOINT=node1:29500 $0 CONFIG [KEY=VALUE ...]"
command -v torchrun > /dev/null || fail "torchrun is not on the PATH: activate the environment"
command -v pkill > /dev/null || fail "pkill is not on the PATH, and hands signals on: install procps"

# Ranks are told again and again: those that start later too. One that hears it twice does not mind.
agent='' asked='' terms=0
# shellcheck disable=SC2329
remind() {
  trap '' USR1 TERM
  while kill -0 "$agent" 2> /dev/null; do
    pkill -USR1 -P "$agent" || true
    sleep 1
  done
}
# shellcheck disable=SC2329
pass_on() {
  signalled=yes
  [ "$1" != TERM ] || terms=$((terms + 1))
  if [ -n "$agent" ] && [ -z "$asked" ]; then remind & fi
  asked=yes
  if [ -n "$agent" ] && [ "$terms" -ge 2 ]; then
    kill -TERM "$agent" # first, or it would start again what is stopped
    pkill -KILL -P "$agent"
  fi || true
}
trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM

nodes=${NNODES:-1}
endpoint=${ENDPOINT:-localhost:0}
[ "$nodes" = 1 ] || [ -n "${ENDPOINT:-}" ] || fail "NNODES=$nodes needs ENDPOINT=HOST:PORT, the same everywhere"
gpus=$(nvidia-smi --list-gpus 2> /dev/null | wc -l) || gpus=0
processes=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}

# Everything is checked before anything starts: a mistake is one line here, not one for each restart.
checked=$(trap '' USR1 TERM; python -m megatron_deft train "$@" --dry-run \
  --nproc-per-node "$processes" --nnodes "$nodes" --rdzv-endpoint "$endpoint") || exit $?
run_dir=$(python -c 'import sys, yaml; print(yaml.safe_load(sys.stdin)["run_dir"])' <<< "$checked")
logs=$run_dir/logs/$(hostname)
mkdir -p -- "$logs"

# Ranks make their store anew at each start. One that the agent keeps holds addresses of the dead.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Ranks that have this long to save when the agent is told to stop (torchrun gives 30 s).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${GRACE:-300}
# Each rank would start a thread per core; data preparation has processes of its own.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# One queue per GPU: communication is launched before the computation that hides it (megatron-core
# asks for this with tensor parallelism before Blackwell).
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# Warnings of NCCL, such as a network card that it could not use; INFO shows which it uses.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
if [ -n "${IFNAME:-}" ]; then
  export NCCL_SOCKET_IFNAME=$IFNAME # how GPUs find one another, and their traffic without InfiniBand
  export GLOO_SOCKET_IFNAME=$IFNAME # checkpoints, and all traffic of CPU ranks
fi
# NCCL finds InfiniBand by itself. Where it takes wrong cards: NCCL_IB_HCA=mlx5_0,mlx5_1 (which cards),
# NCCL_IB_GID_INDEX=3 (RoCE), NCCL_IB_DISABLE=1 (none: TCP). They are passed on when set.

conf=join_timeout=${JOIN_SECONDS:-900},read_timeout=300
case ${NODE_RANK:-} in
  "") ;;
  0) conf+=,is_host=true ;;
  *) conf+=,is_host=false ;;
esac

exec 3> >(
  trap '' USR1 TERM INT
  exec tee -a -- "$logs/agent.log"
)
tee=$!
# The agent must survive the signal that only its ranks understand. It is blocked, not ignored: ranks
# inherit that, and a signal that comes before they listen waits for them.
block='import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
signal.signal(signal.SIGUSR1, signal.SIG_DFL)
os.execvp("torchrun", ["torchrun", *sys.argv[1:]])'
(
  trap '' USR1
  exec python -c "$block" --nnodes "$nodes" --nproc-per-node "$processes" --max-restarts "${MAX_RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-id "${JOB_ID:-megatron_deft}" \
    --rdzv-conf "$conf" ${ADDRESS:+--local-addr "$ADDRESS"} \
    --log-dir="$logs" --tee 3 -m megatron_deft.train "$@"
) >&3 2>&1 3>&- &
agent=$!
exec 3>&-

[ -z "$asked" ] || remind &
code=0 signalled=yes
while [ "$signalled" = yes ]; do # a signal ends `wait` before the agent does
  signalled=no now=0
  wait "$agent" || now=$?
  [ "$now" = 127 ] || code=$now # 127: had been waited for already
done
wait "$tee" || true
exit "$code"
