#!/bin/sh
# Runs a stage in the current folder, in the image the mounted /app, as the owner of that folder, so that whatever it
# writes is the caller's own. Arguments:
#
#   --flags ...                go to train_lora_local.py
#   [python] NAME.py ...       a script of this image, also where the folder holds one of that name
#   anything else              is run as it is: bash, wandb sync, python -c ...
set -eu

code=$(dirname "$0")
user=$(id -u)

say() {
    echo "container: $*" >&2
}

if [ "$user" -eq 0 ] && [ -z "${STONEY_RL_PRIVILEGES_DROPPED-}" ]; then
    # A folder of root's (root called, or a rootless engine, where root is the caller) keeps root, with no capability.
    export STONEY_RL_PRIVILEGES_DROPPED=1
    exec setpriv --reuid="$(stat -c %u .)" --regid="$(stat -c %g .)" --clear-groups \
        --bounding-set=-all --inh-caps=-all --no-new-privs -- "$0" "$@"
fi
unset STONEY_RL_PRIVILEGES_DROPPED

# Downloads and caches stay with the folder, or --rm would throw gigabytes away. An unknown user has no name, and
# PyTorch asks for one.
export HOME="$PWD/.home" USER="${USER:-user-$user}"
if ! mkdir -p "$HOME" 2>/dev/null || ! [ -w "$HOME" ]; then
    say "$PWD can't be written by user $user (it is user $(stat -c %u .)'s); mount a folder of your own, or leave out --user"
    exit 2
fi

if command -v nvidia-smi >/dev/null; then
    gpus=$(nvidia-smi --query-gpu=driver_version,name,memory.free,memory.total --format=csv,noheader 2>&1) || true
    say "user $user; GPU (driver, name, free, total memory): $gpus"
    if [ "${gpus%%.*}" -lt 580 ] 2>/dev/null; then
        say "driver ${gpus%%,*} is too old for CUDA 13: PyTorch won't see the GPU; update the host's driver to 580 or newer"
    fi
else
    say "user $user; no GPU: give docker run --gpus all, and the host driver 580 or newer and NVIDIA Container Toolkit"
fi

case ${1-} in
    -*) set -- python "$code/train_lora_local.py" "$@" ;;
    *.py) set -- python "$@" ;;
esac
script=${2-}
if [ "${1-}" = python ] && [ "$script" = "${script##*/}" ] && [ -f "$code/$script" ]; then
    shift 2
    set -- python "$code/$script" "$@"
fi
exec "$@"
