#!/usr/bin/env bash
# A base image from Debian packages, for machines that reach no container registry:
#   dpo-base:bookworm    Python and certificates
# Usage: base.sh [ENGINE]     (docker, podman or nerdctl)
set -euo pipefail
engine=${1:-docker}
name=dpo-base:bookworm
"$engine" image inspect "$name" >/dev/null 2>&1 && { echo "$name is there"; exit; }
command -v mmdebstrap >/dev/null || { echo "mmdebstrap was not found: apt-get install mmdebstrap" >&2; exit 1; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-0}
mmdebstrap --quiet --variant=minbase --include=python3,ca-certificates \
    --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
    bookworm "$folder/base.tar"
"$engine" import "$folder/base.tar" "$name" >/dev/null
echo "$name made"
