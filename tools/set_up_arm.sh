#!/usr/bin/env bash
# Fetches the C++ packages of 64-bit Arm into build/arm-packages, for preset cpu-arm. Touches nothing of the system:
# apt-get keeps its lists of that architecture in build/ too. Needs Debian or a relative of it.
set -euo pipefail
cd "$(dirname "$0")/.."
target=build/arm-packages
packages=(libhwy-dev libhwy1 libfmt-dev libfmt9 libgtest-dev libgmock-dev librapidcheck-dev nlohmann-json3-dev)

rm -rf "$target"
mkdir -p "$target/apt/lists/partial" "$target/apt/cache/archives/partial"
options=(-qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o APT::Sandbox::User=
  -o "Dir::State::Lists=$PWD/$target/apt/lists" -o "Dir::Cache=$PWD/$target/apt/cache")
apt-get "${options[@]}" update
(cd "$target/apt" && apt-get "${options[@]}" download "${packages[@]}")
for package in "$target"/apt/*.deb; do
  dpkg -x "$package" "$target"
done
rm -rf "$target/apt"
