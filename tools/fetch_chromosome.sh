#!/usr/bin/env bash
# Puts a bacterial chromosome where `make demo-chromosome` reads it: tools/fetch_chromosome.sh FILE.
# It is in Debian's package kleborate-examples; nothing is installed, no root is needed.
set -euo pipefail
file=$1
package=kleborate-examples
inside=usr/share/doc/kleborate/examples/data/MGH78578.fna.xz

if [[ ! -f /$inside ]]; then
  stop() {
    printf '==> Cannot fetch a chromosome: %s\n    Give any FASTA file instead:\n        make demo-chromosome FASTA=genome.fa.gz\n' "$1" >&2
    exit 1
  }
  command -v apt-get >/dev/null && command -v dpkg >/dev/null || stop "$package comes through apt-get, which is not here"
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  (cd "$folder" && apt-get -qq -o APT::Sandbox::User= download "$package") ||
    stop "apt-get download $package failed (try: sudo apt-get update)"
  dpkg -x "$folder"/*.deb "$folder"
fi
mkdir -p "$(dirname "$file")"
cp "${folder:-}/$inside" "$file"
echo "==> $file: Klebsiella pneumoniae MGH 78578, from $package"
