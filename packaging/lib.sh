# shellcheck shell=bash
# What quickstart, uninstall and test share. Sourced, after `set -euo pipefail`.

CHECKOUT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
# Only this: quickstart must not be led by what the caller's Python is told.
unset PYTHONPATH PYTHONHOME
export PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1

# Where an installation is: one rule, as in sysctr/paths.py.
SYSCTR_ROOT=${SYSCTR_ROOT:-}
if [ -n "$SYSCTR_ROOT" ]; then
    SYSCTR_ROOT=$(realpath --no-symlinks --canonicalize-missing -- "$SYSCTR_ROOT")
    export SYSCTR_ROOT
    PREFIX=$SYSCTR_ROOT/opt LAUNCHER=$SYSCTR_ROOT/bin/sysctr
    ETC=$SYSCTR_ROOT/etc LIB=$SYSCTR_ROOT/lib RUN=$SYSCTR_ROOT/run LOG=$SYSCTR_ROOT/log
else
    unset SYSCTR_ROOT
    PREFIX=/opt/sysctr LAUNCHER=/usr/local/bin/sysctr
    ETC=/etc/sysctr LIB=/var/lib/sysctr RUN=/run/sysctr LOG=/var/log/sysctr
fi
COMPLETION=/usr/share/bash-completion/completions/sysctr
UNITS=/etc/systemd/system
# In the order of starting.
SERVICES=(sysctr-supervisor.service sysctrd.service sysctr-containers.service)
SYSCTL=/etc/sysctl.d/90-sysctr.conf
# Kept by an uninstall without --purge, so that a later one still knows what was brought.
CHANGES=$LIB/changes
export PREFIX ETC LIB RUN LOG LAUNCHER COMPLETION UNITS SERVICES SYSCTL CHANGES

say() { printf '%s\n' "$*"; }
warn() { printf '%s\n' "$*" >&2; }
die() {
    warn "$*"
    exit 1
}

has_systemd() { [ -d /run/systemd/system ]; }

# The host's name and whether it is one that sysctr is tested on.
host_name() (
    # shellcheck source=/dev/null
    . /etc/os-release 2>/dev/null || true
    printf '%s' "${PRETTY_NAME:-an unknown system}"
)
host_is_supported() (
    # shellcheck source=/dev/null
    . /etc/os-release 2>/dev/null || return 1
    case "${ID:-} ${VERSION_ID:-}" in
    "debian 12" | "debian 13" | "ubuntu 24.04") return 0 ;;
    *) return 1 ;;
    esac
)

# Those of the named Debian packages that are not installed, one on each line.
missing_packages() {
    local package
    for package in "$@"; do
        # shellcheck disable=SC2016 # a format of dpkg-query
        case $(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null || true) in
        installed) ;;
        *) say "$package" ;;
        esac
    done
}

has_package_lists() { compgen -G '/var/lib/apt/lists/*_Packages*' >/dev/null; }

# Install packages; the lists are fetched only if there are none or they turn out to be too old.
install_packages() {
    local -a get=(apt-get -q -y -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0)
    if ! has_package_lists; then
        "${get[@]}" update
        "${get[@]}" install --no-install-recommends "$@"
    elif ! "${get[@]}" install --no-install-recommends "$@"; then
        "${get[@]}" update
        "${get[@]}" install --no-install-recommends "$@"
    fi
}

# A dead one stays mounted, and one that hangs would make us hang: hence the other process and its time-out.
lxcfs_is_mounted() {
    grep -q ' /var/lib/lxcfs fuse\.lxcfs ' /proc/self/mounts &&
        timeout --kill-after=1 5 ls /var/lib/lxcfs/proc >/dev/null 2>&1
}

# Start a program that stays when this script and its terminal are gone: leave_running LOG PROGRAM ARGUMENT…
# Its own session, and no descriptor of ours: whoever reads what we print would wait for the end of that program.
leave_running() {
    (
        exec </dev/null >>"$1" 2>&1
        for fd in /proc/"$BASHPID"/fd/*; do
            fd=${fd##*/}
            [ "$fd" -le 2 ] || exec {fd}>&-
        done
        exec setsid "${@:2}"
    ) &
}

# Start lxcfs by whatever starts services here; 1 when it cannot run.
start_lxcfs() {
    lxcfs_is_mounted && return 0
    [ -e /dev/fuse ] || return 1
    # What a dead one left; a new one would be mounted over it.
    while grep -q ' /var/lib/lxcfs fuse\.lxcfs ' /proc/self/mounts; do
        umount --lazy /var/lib/lxcfs || return 1
    done
    if has_systemd; then
        systemctl enable --quiet lxcfs.service && systemctl restart lxcfs.service || return 1
    else
        mkdir -p /var/lib/lxcfs
        leave_running /var/log/lxcfs.log lxcfs --pidfile=/run/lxcfs.pid /var/lib/lxcfs
    fi
    for _ in $(seq 50); do
        lxcfs_is_mounted && return 0
        sleep 0.1
    done
    return 1
}

# A hash of everything that an installation is made of, so that the same sources are installed once.
source_hash() {
    (
        cd "$CHECKOUT" || exit
        /usr/bin/python3 -I -V
        find sysctr templates tui packaging/sysctr pyproject.toml -type f \
            ! -name '*.pyc' -print0 | sort -z | xargs -0 sha256sum
    ) | sha256sum | cut -c1-12
}

sysctr_version() { sed -n 's/^__version__ = "\(.*\)"$/\1/p' "$CHECKOUT/sysctr/__init__.py"; }
