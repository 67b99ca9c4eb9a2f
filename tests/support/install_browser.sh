#!/usr/bin/env bash
# What tests in a browser need beside Python: Chromium, from the packages of Debian (100 MB). Does nothing where there is one.
set -euo pipefail

for program in chromium chromium-browser google-chrome; do
    if command -v $program >/dev/null; then exit 0; fi
done
[ "$(id -u)" = 0 ] || { echo "make browser installs chromium and needs root for it" >&2; exit 1; }
command -v apt-get >/dev/null || { echo "make browser knows how to install chromium with apt-get alone" >&2; exit 1; }

echo "installing chromium"
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null
