#!/usr/bin/env bash
# What tests need beyond .venv: a browser that opens the report, and SLURM. Installs what is missing where it may (root,
# apt-get: Debian 12); elsewhere it says so, and the tests concerned are skipped. Does nothing where all is there.
set -euo pipefail
PATH="$PATH:/usr/sbin"

packages=()
need() { command -v "$1" >/dev/null || packages+=("${@:2}"); }

need chromium chromium chromium-driver fonts-dejavu-core
need slurmctld slurmctld
need slurmd slurmd
need sbatch slurm-client
need munged munge
need slurmdbd slurmdbd
need mariadbd mariadb-server-core
if [ ${#packages[@]} = 0 ]; then exit 0; fi

export DEBIAN_FRONTEND=noninteractive
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "tests that need them are skipped; as root: apt-get install ${packages[*]}" >&2
elif ! { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${packages[@]}"; }; then
  echo "could not be installed, tests that need them are skipped: ${packages[*]}" >&2
fi
