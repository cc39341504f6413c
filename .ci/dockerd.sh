#!/usr/bin/env bash
# Starts a Docker engine of its own for the sandbox tests, waits until it answers and prints its DOCKER_HOST.
#   .ci/dockerd.sh          start (or find it running); prints unix:///run/cabochon-docker/docker.sock
#   .ci/dockerd.sh stop     stop it; its data stays for the next start
#   .ci/dockerd.sh wipe     stop it and delete its data
# As root; installs docker.io and bubblewrap with apt-get where they are missing. No network is given to any container, so the
# engine is started without bridge and firewall rules. Everything it says goes to $LOG.
set -euo pipefail

RUN=${CABOCHON_DOCKER_RUN:-/run/cabochon-docker}
DATA=${CABOCHON_DOCKER_DATA:-/var/lib/cabochon-docker}
LOG=$RUN/dockerd.log
SOCKET=$RUN/docker.sock
export DOCKER_HOST=unix://$SOCKET

say() { echo "dockerd.sh: $*" >&2; }
answers() { curl -sf --max-time 5 --unix-socket "$SOCKET" http://engine/_ping > /dev/null 2>&1; }
alive() { [ -s "$RUN/docker.pid" ] && kill -0 "$(cat "$RUN/docker.pid")" 2> /dev/null; }

stop() {
    if alive; then
        kill "$(cat "$RUN/docker.pid")" 2> /dev/null || true
        for _ in $(seq 100); do alive || break; sleep 0.1; done
        if alive; then kill -9 "$(cat "$RUN/docker.pid")" 2> /dev/null || true; fi
    fi
    # containerd, shims and mounts outlive an engine that was killed; all of ours name our folder
    local process
    for process in /proc/[0-9]*; do
        if tr '\0' ' ' 2> /dev/null < "$process/cmdline" | grep -qE "^[^ ]*containerd[^ ]* .*$RUN/exec/"; then
            kill -9 "${process#/proc/}" 2> /dev/null || true
        fi
    done
    awk '{print $2}' /proc/mounts | grep -E "^($DATA-|$RUN/)" | sort -r | xargs -r umount -l 2> /dev/null || true
    rm -f "$RUN/docker.pid" "$SOCKET"
}

install() {
    local missing=()
    command -v dockerd > /dev/null || missing+=(docker.io)
    command -v bwrap > /dev/null || missing+=(bubblewrap)
    command -v curl > /dev/null || missing+=(curl)
    [ ${#missing[@]} -eq 0 ] && return
    if [ "$(id -u)" != 0 ]; then say "not root, cannot install ${missing[*]}"; exit 1; fi
    say "installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq >&2
    apt-get install -y -qq --no-install-recommends "${missing[@]}" >&2
}

try_start() { # storage driver as the argument
    say "starting dockerd with storage driver $1"
    mkdir -p "$RUN" "$DATA-$1"
    setsid dockerd -H "$DOCKER_HOST" --data-root "$DATA-$1" --exec-root "$RUN/exec" --pidfile "$RUN/docker.pid" \
        --storage-driver "$1" --iptables=false --ip6tables=false --bridge=none --ip-forward=false --ip-masq=false \
        --log-driver none --group root < /dev/null > "$LOG" 2>&1 &
    for _ in $(seq 150); do
        if answers; then return 0; fi
        sleep 0.2
        if ! alive && [ "$(jobs -r | wc -l)" = 0 ]; then break; fi
    done
    say "it did not answer with $1: $(grep -iE 'failed|error|fatal' "$LOG" | tail -2 | cut -c1-300)"
    stop
    return 1
}

case ${1:-start} in
    stop) stop ;;
    wipe) stop; rm -rf "$DATA-overlay2" "$DATA-vfs" ;;
    start)
        install
        if ! answers; then
            if [ "$(id -u)" != 0 ]; then say "not root, cannot start an engine"; exit 1; fi
            stop
            for driver in ${CABOCHON_DOCKER_DRIVERS:-overlay2 vfs}; do
                if try_start "$driver"; then break; fi
            done
        fi
        answers || { say "no engine; its log is $LOG"; exit 1; }
        echo "$DOCKER_HOST"
        ;;
    *) say "unknown command ${1}: start, stop or wipe"; exit 2 ;;
esac
