#!/usr/bin/env bash
# Base images from Debian packages, for machines that reach no container registry:
#   dpo-base:bookworm         Python and certificates
#   dpo-base-build:bookworm   the same with Python's venv module, to install packages with
# Usage: base.sh [ENGINE]     (docker or podman)
set -euo pipefail
engine=${1:-docker}
command -v mmdebstrap >/dev/null || { echo "mmdebstrap was not found: apt-get install mmdebstrap" >&2; exit 1; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-0}

make_base() {
    local name=$1 packages=$2
    "$engine" image inspect "$name" >/dev/null 2>&1 && { echo "$name is there"; return; }
    mmdebstrap --quiet --variant=minbase --include="$packages" \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
        bookworm "$folder/base.tar"
    "$engine" import "$folder/base.tar" "$name" >/dev/null
    echo "$name made"
}

make_base dpo-base:bookworm python3,ca-certificates
make_base dpo-base-build:bookworm python3,python3-venv,ca-certificates
