#!/usr/bin/env bash
# A container engine of this checkout's own, for machines (CI) where none runs. Needs root and the
# package docker.io; nothing of another engine is touched.
#   eval "$(images/engine.sh start)"     sets DOCKER_HOST; does nothing where an engine answers
#   images/engine.sh stop                ends it and removes all it stored
# DPO_ENGINE_DIR is its folder (default: dpo-engine under TMPDIR or /tmp).
set -euo pipefail
folder=${DPO_ENGINE_DIR:-${TMPDIR:-/tmp}/dpo-engine}
socket=unix://$folder/docker.sock

answers() { DOCKER_HOST=${1:-} docker info >/dev/null 2>&1; }

start() {
    command -v docker >/dev/null && command -v dockerd >/dev/null || {
        echo "no container engine is installed: make setup-system (Debian, as root)" >&2
        return 1
    }
    if answers "${DOCKER_HOST:-}"; then
        echo "a container engine answers already" >&2
        return
    fi
    if ! answers "$socket"; then
        [ "$(id -u)" = 0 ] || { echo "only root can start a container engine" >&2; return 1; }
        mkdir -p "$folder"
        # 1024 files: software that closes every possible descriptor takes minutes with the default
        setsid dockerd --host "$socket" --data-root "$folder/data" --exec-root "$folder/exec" \
            --pidfile "$folder/pid" --default-ulimit nofile=1024:1024 \
            </dev/null >"$folder/log" 2>&1 &
        for _ in $(seq 120); do
            answers "$socket" && break
            kill -0 $! 2>/dev/null || break
            sleep 0.5
        done
        answers "$socket" || {
            echo "dockerd did not start; its last lines:" >&2
            tail -5 "$folder/log" >&2
            return 1
        }
        echo "started a container engine in $folder" >&2
    fi
    echo "export DOCKER_HOST=$socket"
}

stop() {
    local pid
    pid=$(cat "$folder/pid" 2>/dev/null || true)
    if [ -n "$pid" ] && kill "$pid" 2>/dev/null; then
        for _ in $(seq 120); do
            kill -0 "$pid" 2>/dev/null || break
            sleep 0.5
        done
    fi
    ! answers "$socket" || { echo "the engine in $folder did not end" >&2; return 1; }
    # the engine leaves its network namespace mounted
    awk -v folder="$folder/" 'index($2, folder) == 1 {print $2}' /proc/mounts | sort -r \
        | while read -r mount; do umount "$mount"; done
    rm -rf "$folder"
}

case ${1:-} in
    start) start ;;
    stop) stop ;;
    *) sed -n '2,6s/^# //p' "$0" >&2; exit 2 ;;
esac
