# shellcheck shell=bash
# Sourced by the findings: "$folder", temporary, with an environment of its own in "$folder/venv"; `install PACKAGE==VERSION ...`.
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"

install() {
    DS_BUILD_OPS=0 "$folder/venv/bin/pip" install --quiet "$@"
}
