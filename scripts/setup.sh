#!/usr/bin/env bash
# Sourced by scripts/demo and scripts/test: `qlora_setup run` or `qlora_setup dev` leaves a .venv with the tested versions.
# Knows how .venv is made and when it is still current; knows nothing of what runs in it.
# Invariant: .venv/qlora-stamp exists only beside a complete installation, so whatever lacks it is made anew.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
constraints=$root/scripts/constraints.txt
pytorch_cpu_index=https://download.pytorch.org/whl/cpu
pythons=(python3 python3.14 python3.13 python3.12 python3.11 python3.10)

say() { printf '%s\n' "$*" >&2; }

# every stop says what failed, why, and what to do
fail() {
  say "error: $1"
  say "  why: $2"
  say "  fix: $3"
  exit 1
}

# a driver that does not answer is no GPU
has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }

# the build of PyTorch for this machine; elsewhere than on Linux there is only one
torch_build() { if [ "$(uname -s)" = Linux ] && ! has_gpu; then echo cpu; else echo default; fi; }

# `python3` may be a launcher that names no interpreter, so it is run rather than only looked up
is_supported() { "$1" -I -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' >/dev/null 2>&1; }

find_python() {
  local candidate
  [ -z "${PYTHON:-}" ] || pythons=("$PYTHON")
  for candidate in "${pythons[@]}"; do
    if is_supported "$candidate"; then
      echo "$candidate"
      return
    fi
  done
  fail "no Python from 3.10 to 3.14 found" "tried: ${pythons[*]}" \
    "install one, or name it: PYTHON=/path/to/python3.12 $0"
}

# what the installation was made for, in the words of the Python given; a moved folder has dead paths in its scripts
interpreter() { "$1" -I -c 'import sys; print("{}.{} {}".format(*sys.version_info[:2], sys.argv[1]))' "$venv" 2>/dev/null; }

files_hash() {
  "$venv/bin/python" -I - "$constraints" "$root/pyproject.toml" 2>/dev/null <<'PY'
import hashlib, sys
print(hashlib.sha256(b"\0".join(open(path, "rb").read() for path in sys.argv[1:])).hexdigest())
PY
}

# the stamp's fields: extras, build of PyTorch, hash of the files that decide the versions, Python and place
write_stamp() {
  printf '%s %s %s %s\n' "$1" "$2" "$(files_hash)" "$(interpreter "$venv/bin/python")" >"$venv/qlora-stamp.new"
  mv "$venv/qlora-stamp.new" "$venv/qlora-stamp"
}

# complete and made for this machine, this place and this Python: what is missing can be installed into it
is_whole() {
  local build made_for
  [ -r "$venv/qlora-stamp" ] && [ -x "$venv/bin/qlora" ] || return 1
  read -r _ build _ made_for <"$venv/qlora-stamp" || return 1
  [ "$made_for" = "$(interpreter "$venv/bin/python")" ] || return 1
  [ -z "${PYTHON:-}" ] || [ "$made_for" = "$(interpreter "$PYTHON")" ] || return 1
  [ "$build" = default ] || [ "$(torch_build)" = cpu ]
}

is_current() {
  local extras hash
  is_whole || return 1
  read -r extras _ hash _ <"$venv/qlora-stamp"
  [ "$hash" = "$(files_hash)" ] && { [ "$extras" = dev ] || [ "$extras" = "$1" ]; }
}

make_venv() {
  local python=$1
  "$python" -I -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$python cannot make a virtual environment" "its modules venv and ensurepip are not installed" \
      "on Debian and Ubuntu: sudo apt install python3-venv; or name another Python: PYTHON=... $0"
  [ ! -e "$venv" ] || say "setup: .venv is incomplete or made for something else: making it anew"
  rm -rf "$venv"
  say "setup: making .venv with $("$python" -V 2>&1)"
  "$python" -m venv "$venv" >&2 ||
    fail "could not make $venv" "the lines above come from $python -m venv" "check the free space and the rights there"
}

# a success is silent; of a failure pip_failed shows the end
pip_install() {
  PIP_USER=0 "$venv/bin/python" -m pip install --disable-pip-version-check --no-input --progress-bar off "$@" \
    >"$venv/qlora-pip.log" 2>&1
}

pip_failed() {
  tail -n 15 "$venv/qlora-pip.log" | sed 's/^/  pip: /' >&2
  fail "pip could not install $1" "its last lines are above, all of them in .venv/qlora-pip.log" \
    "check the connection, the free space and pip's configuration (pip config list), then run this again"
}

has_torch() {
  case $("$venv/bin/python" -I -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null) in
    "$1" | "$1"+*) ;;
    *) return 1 ;;
  esac
}

# A bare torch brings gigabytes of CUDA on Linux. The CPU build is looked for where pip is configured to look first.
# Alone, because with constraints pip calls a wheel out of reach a conflict.
install_torch() {
  local pin
  pin=$(grep '^torch==' "$constraints")
  has_torch "${pin#*==}" && return
  if [ "$1" = cpu ]; then
    say "setup: installing PyTorch for the CPU (${pin#*==}; about 200 MB, a few minutes)"
    pip_install --no-deps "$pin+cpu" && return
    pip_install --no-deps "$pin+cpu" --extra-index-url "$pytorch_cpu_index" --retries 1 --timeout 20 && return
    say "setup: no CPU build within reach; installing the default one, which may be several gigabytes"
  else
    say "setup: installing PyTorch (${pin#*==}; up to several gigabytes, several minutes)"
  fi
  pip_install --no-deps "$pin" || pip_failed PyTorch
}

# What builds the package is pinned too: that pip takes from the environment, under a name that depends on its age, and
# as a list split at blanks, hence the relative path.
install_package() {
  cd "$root"
  PIP_CONSTRAINT=scripts/constraints.txt PIP_BUILD_CONSTRAINT=scripts/constraints.txt pip_install -e "$1" ||
    pip_failed "the pinned packages"
}

install_all() {
  local build python target=.
  build=$(torch_build)
  python=$(find_python) || exit 1
  is_whole || make_venv "$python"
  rm -f "$venv/qlora-stamp"
  install_torch "$build"
  [ "$1" = run ] || target=".[$1]"
  say "setup: installing the versions in scripts/constraints.txt (a minute or two)"
  install_package "$target"
  write_stamp "$1" "$build"
  say "setup: .venv is ready after $SECONDS s"
}

# Two set-ups at once would trample each other. The lock is held on a file that is there anyway and is let go at the end.
qlora_setup() {
  unset PYTHONHOME PYTHONPATH # packages of another installation would shadow the pinned ones
  is_current "$1" || (
    if command -v flock >/dev/null && ! flock -n 9; then
      say "setup: another set-up is at work in this folder; waiting for it"
      flock 9
    fi
    is_current "$1" || install_all "$1"
  ) 9<"$constraints"
}
