#!/bin/bash
# Makes a Debian 13 in a folder, with Python 3.13 and NDIF's own server, for tests/ndif/test_ndif.py. As root, on Debian:
#   bash tests/ndif/setup.sh [FOLDER]        2.5 GB, about ten minutes; FOLDER is /var/tmp/circuitfind-ndif if left out
# torch is Debian's, for CPUs (2.6): the package on PyPI brings gigabytes of CUDA.
set -euo pipefail
root=${1:-/var/tmp/circuitfind-ndif}
here=$(cd "$(dirname "$0")" && pwd)

command -v debootstrap > /dev/null || { apt-get update -q && apt-get install -y -q debootstrap; }
if [ ! -e "$root/etc/debian_version" ]; then
    debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv,redis-server trixie "$root"
fi
cp /etc/resolv.conf /etc/hosts "$root/etc/"
cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/" # this machine's, which pip is told of
grep -E '^(transformers|tokenizers|huggingface_hub|nnsight|numpy|scipy|safetensors|accelerate|pydantic|einops)==' \
    "$here/../../constraints.txt" > "$root/srv/constraints.txt"

# In namespaces of its own, so that nothing stays mounted.
unshare --mount --pid --fork --kill-child bash -euc '
    mount --rbind /dev "$0/dev"
    mount -t proc proc "$0/proc"
    export DEBIAN_FRONTEND=noninteractive PIP_CONSTRAINT=/srv/constraints.txt
    chroot "$0" apt-get update -q
    chroot "$0" apt-get install -y -q --no-install-recommends python3-torch libopenblas0-pthread
    chroot "$0" python3 -m venv --system-site-packages /srv/ndif
    chroot "$0" /srv/ndif/bin/pip install -q "ndif[api,ray]==0.1.2" "moto[server]" einops scipy
' "$root"
chroot "$root" /srv/ndif/bin/pip list 2> /dev/null | grep -E '^(ndif|nnsight|ray|torch|transformers) '
