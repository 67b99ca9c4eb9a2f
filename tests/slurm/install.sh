#!/usr/bin/env bash
# What `make test-slurm` needs beside Python: Slurm's daemons, from Debian's slurm-wlm (14 MB). Does nothing where they are.
set -euo pipefail

missing=0
for program in slurmctld slurmd munged; do command -v $program >/dev/null || missing=1; done
[ $missing = 1 ] || exit 0
[ "$(id -u)" = 0 ] || { echo "make test-slurm starts Slurm's daemons and needs root for it" >&2; exit 1; }
command -v apt-get >/dev/null || { echo "make test-slurm needs slurmctld, slurmd and munged, and knows how to install them with apt-get alone" >&2; exit 1; }

echo "installing slurm-wlm and munge"
policy=/usr/sbin/policy-rc.d # keeps Debian's packages from starting services of their own
if [ ! -e $policy ]; then
    printf '#!/bin/sh\nexit 101\n' >$policy
    chmod 755 $policy
    trap 'rm -f $policy' EXIT
fi
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge >/dev/null
