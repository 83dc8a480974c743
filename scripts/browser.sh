#!/usr/bin/env bash
# The browser in which the server's page is tested: installed where that may be done, else said how.
set -uo pipefail

has() { command -v "$1" >/dev/null; }
quietly() { DEBIAN_FRONTEND=noninteractive timeout 300 apt-get -qq "$@" >/dev/null 2>&1; }

if { has chromium || has google-chrome; } && has chromedriver; then exit 0; fi
if [[ $(id -u) == 0 ]] && has apt-get; then
    echo "installing Chromium, to test the server's page in it" >&2
    quietly update
    quietly install -y chromium chromium-driver && exit 0
fi
echo "the server's page will not be tested: there is no browser; install one with" >&2
echo "    sudo apt-get install -y chromium chromium-driver" >&2
