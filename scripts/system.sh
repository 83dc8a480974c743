#!/usr/bin/env bash
# What some tests want of the system: a browser for the server's page, a second compiler and an ARM
# processor for the native engine. Installed where that may be done, else said how.
set -uo pipefail

has() { command -v "$1" >/dev/null; }
quietly() { DEBIAN_FRONTEND=noninteractive timeout 300 apt-get -qq "$@" >/dev/null 2>&1; }

missing() {
    { has chromium || has google-chrome; } && has chromedriver || echo chromium chromium-driver
    has clang++ || echo clang
    has aarch64-linux-gnu-g++ || echo g++-aarch64-linux-gnu
    has qemu-aarch64 || echo qemu-user
}

packages=$(missing | xargs)
[[ -z $packages ]] && exit 0
if [[ $(id -u) == 0 ]] && has apt-get; then
    echo "installing $packages, for the tests" >&2
    quietly update
    # shellcheck disable=SC2086
    quietly install -y --no-install-recommends $packages && exit 0
fi
echo "some tests are left out; for all of them install what they want of the system:" >&2
echo "    sudo apt-get install -y $packages" >&2
