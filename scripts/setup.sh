#!/usr/bin/env bash
# Makes .venv in the repository's root and installs the package from constraints.txt; nothing to do the second time.
# Usage: bash scripts/setup.sh [EXTRA]     EXTRA is an extra of pyproject.toml, such as dev.
# Steps are printed to stderr, so that the scripts that call this one keep stdout for their results.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extra="${1:-}"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_INPUT=1

step() { echo "setup: $*" >&2; }
fail() {
    step "$@"
    exit 1
}

find_python() {
    local name
    # The locked versions are tested on 3.11, so it comes first. A name may be a shim that runs nothing: try it.
    for name in python3.11 python3.12 python3.13 python3.14 python3 python; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            echo "$name"
            return
        fi
    done
    fail "Python 3.11 or newer is missing: python3.11 ... python3.14, python3 and python were tried. Install it and run this again."
}

# One stamp an extra: what was installed, and from which lock. The folder's path counts, for a .venv cannot be moved.
stamp_of() { { echo "$PWD extra=$1" && cat pyproject.toml constraints.txt scripts/setup.sh; } | .venv/bin/python -c \
    'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'; }

is_installed() { [ "$(cat ".venv/stamp-$1" 2>/dev/null)" = "$(stamp_of "$1")" ]; }

# -qq hides pip's warnings (of a machine's own settings), not its errors.
install() {
    .venv/bin/python -m pip install -qq -c constraints.txt "$@" || fail "pip could not install: $*. Its reason stands" \
        "above; it needs the network, or a package registry (pip config), and several GB of disk."
}

if ! .venv/bin/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
    python="$(find_python)"
    "$python" -c 'import venv, ensurepip' >/dev/null 2>&1 ||
        fail "$python has no venv module. On Debian and Ubuntu: apt-get install python3-venv"
    step "making .venv with $("$python" --version)"
    rm -rf .venv
    "$python" -m venv .venv || fail "$python -m venv .venv failed; its reason stands above"
fi

if is_installed "$extra"; then
    exit 0
fi
rm -f ".venv/stamp-$extra"
# Alone and first: its build is settled before anything that depends on it is looked at.
step "installing $(grep '^torch==' constraints.txt)"
install "$(grep '^torch==' constraints.txt)"
step "installing mechinterp${extra:+[$extra]} and what it needs, from constraints.txt (a minute or two)"
install --editable ".${extra:+[$extra]}"
# The extra holds the plain package, too.
for name in "" "$extra"; do stamp_of "$name" >".venv/stamp-$name"; done
step "done"
