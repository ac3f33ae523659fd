#!/usr/bin/env bash
# Makes .venv with everything that nemovl needs, once; `make` calls it before every target.
#
# Done already: returns at once. Half made (an interrupted install) or out of date (pyproject.toml changed): continues.
# NEMOVL_PYTHON names the interpreter to use instead of looking for one.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
stamp="$venv/nemovl-complete"

die() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# True when the file is a working CPython 3.12 that can make virtual environments. It is run, not only found: a pyenv
# shim exists for versions that are not selected and fails, and Debian's python3 comes without venv.
usable() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1
}

candidates() {
    if [ -n "${NEMOVL_PYTHON:-}" ]; then
        printf '%s\n' "$NEMOVL_PYTHON"
        return
    fi
    type -ap python3.12 python3 python || true
    local pyenv_root="${PYENV_ROOT:-$HOME/.pyenv}"
    ls -1 "$pyenv_root"/versions/3.12*/bin/python3.12 2>/dev/null || true
}

# The second form downloads an interpreter; uv is asked last for that reason.
uv_python() {
    command -v uv >/dev/null 2>&1 || return 1
    uv python find --no-project 3.12 2>/dev/null ||
        { uv python install 3.12 >&2 && uv python find --no-project 3.12 2>/dev/null; }
}

find_python() {
    local candidate
    while IFS= read -r candidate; do
        if usable "$candidate"; then
            printf '%s\n' "$candidate"
            return 0
        fi
    done < <(candidates)
    # Not one of the candidates: those go on being listed after one was taken, and a download must not.
    [ -z "${NEMOVL_PYTHON:-}" ] && candidate="$(uv_python)" && usable "$candidate" && printf '%s\n' "$candidate"
}

fingerprint() {
    # The folder is part of it: an environment that was copied or moved points at its old place.
    { printf '%s\n' "$root"; cat "$root/pyproject.toml"; } | sha256sum | cut -d' ' -f1
}

intact() {
    usable "$venv/bin/python" && "$venv/bin/python" -m pip --version >/dev/null 2>&1 &&
        [ "$("$venv/bin/python" -c 'import sys; print(sys.prefix)')" = "$venv" ]
}

[ "$(uname -s) $(uname -m)" = "Linux x86_64" ] ||
    die "nemovl runs on Linux x86-64 (on Windows: WSL2); this is $(uname -s) $(uname -m)"

# A link leads to an environment that belongs elsewhere. It is used as it is: making it anew would empty that one.
if [ -L "$venv" ]; then
    usable "$venv/bin/python" && exit 0
    die "$venv is a link to $(readlink "$venv"), which has no working Python 3.12; set that one up, or remove the link"
fi

wanted="$(fingerprint)"
[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && exit 0

# Two `make` at once would install over each other: the second one waits, then finds the work done.
if command -v flock >/dev/null 2>&1; then
    exec 9<"$root/pyproject.toml"
    flock 9
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && exit 0
fi

if ! intact; then
    python="$(find_python)" || die "no working Python 3.12 found (looked on PATH, in pyenv and for uv).
Install one, for example with one of:
  sudo apt install python3.12 python3.12-venv
  pyenv install 3.12
  uv python install 3.12
or name it: NEMOVL_PYTHON=/path/to/python3.12 make demo"
    echo "making .venv with $("$python" --version) ($python)" >&2
    "$python" -m venv --clear "$venv" || die "$python could not make $venv; its message is above"
fi

rm -f "$stamp"
echo "installing nemovl and its dependencies into .venv (several minutes and about 8 GB the first time)" >&2
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "${root}[dev]" ||
    die "the installation stopped; its message is above. The same command continues it."
printf '%s\n' "$wanted" >"$stamp"
echo "ready" >&2
