# shellcheck shell=sh disable=SC2034 # whoever reads this uses its variables
# What mount/up, mount/down and tests/run share. Read with `.`; expects `set -eu`, and $checkout.

say() { printf '%s\n' "$*"; }
warn() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() {
    warn "$1"
    if [ $# -gt 1 ]; then printf '  %s\n' "$2" >&2; fi
    exit 1
}

# what is needed to build and run limitfs; and what builds and loads its kernel hooks
needed_packages='fuse3 libfuse3-dev pkg-config gcc libc6-dev python3-venv python3-dev'
hook_packages='clang llvm libbpf-dev'

need_root() {
    [ "$(id -u)" -eq 0 ] || die "this needs root" "try: sudo $0"
}

# quietly WHAT COMMAND…: run it, show its output only if it fails
quietly() {
    quietly_what=$1
    shift
    quietly_log=$(mktemp)
    if "$@" >"$quietly_log" 2>&1 </dev/null; then
        rm -f "$quietly_log"
        return 0
    fi
    cat "$quietly_log" >&2
    rm -f "$quietly_log"
    warn "$quietly_what failed (see above)"
    return 1
}

# absent PACKAGE…: print those that are not installed
absent() {
    for package; do
        dpkg -s "$package" 2>/dev/null | grep -q '^Status: .* installed$' || printf '%s ' "$package"
    done
}

apt_install() {
    DEBIAN_FRONTEND=noninteractive
    export DEBIAN_FRONTEND
    apt-get -q update && apt-get -q install -y --no-install-recommends "$@"
}

# install_packages PACKAGE…: those that are missing; on another distribution, trust that they are there
install_packages() {
    if ! command -v dpkg >/dev/null || ! command -v apt-get >/dev/null; then
        warn "not a Debian: make sure that you have what Debian calls $*"
        return 0
    fi
    missing=$(absent "$@")
    [ -n "$missing" ] || return 0
    say "installing $missing"
    # shellcheck disable=SC2086 # a list of names
    quietly "apt-get install" apt_install $missing
}

install_hook_packages() {
    # shellcheck disable=SC2086
    install_packages $hook_packages || warn "going on without kernel hooks: some resources will be sampled"
}

# make_venv DIR: a virtual environment of the system's Python that works
make_venv() {
    /usr/bin/python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        die "/usr/bin/python3 is missing or older than 3.11" "Debian 12 or later has it"
    "$1/bin/python" -m pip --version >/dev/null 2>&1 || quietly "making $1" /usr/bin/python3 -m venv --clear "$1"
}

# fingerprint PATH…: a hash of the files at and below these paths, and of what else decides the result of a build
fingerprint() {
    {
        for path; do
            [ ! -e "$path" ] || find "$path" -type f ! -path '*/__pycache__/*' ! -name '*.bpf.o' -print0
        done | LC_ALL=C sort -z | xargs -0 sha256sum
        /usr/bin/python3 --version
        command -v clang || :
    } | sha256sum | cut -d ' ' -f 1
}

# install_changed VENV FINGERPRINT ARGUMENT…: pip install, unless that was done with the same fingerprint
install_changed() {
    stamp=$1/.limitfs-installed
    [ "$(cat "$stamp" 2>/dev/null)" != "$2" ] || return 0
    install_venv=$1 install_mark=$2
    shift 2
    say "installing limitfs into $install_venv"
    rm -f "$stamp"
    quietly "pip install" "$install_venv/bin/python" -m pip install --disable-pip-version-check "$@"
    printf '%s\n' "$install_mark" >"$stamp"
}

need_fuse() {
    [ -c /dev/fuse ] || modprobe fuse 2>/dev/null || :
    [ -c /dev/fuse ] || die "there is no /dev/fuse" "load the module fuse; in a container, add --device /dev/fuse"
}

# parse_arguments ARGUMENT…: what mount/up and mount/down have in common; sets at, boot, venv, and purge where allowed
parse_arguments() {
    at=/limits
    boot=
    purge=
    while [ $# -gt 0 ]; do
        case $1 in
        --at)
            [ $# -ge 2 ] || wrong "--at needs a directory"
            at=$2
            shift
            ;;
        --at=*) at=${1#--at=} ;;
        --boot) boot=yes ;;
        --purge)
            [ "${may_purge-}" ] || wrong "unknown argument: $1"
            purge=yes
            ;;
        -h | --help)
            usage
            exit 0
            ;;
        *) wrong "unknown argument: $1" ;;
        esac
        shift
    done
    [ -n "$at" ] || wrong "--at needs a directory"
    at=$(canonical "$(absolute "$at")")
    venv=$(absolute "${LIMITFS_VENV:-/opt/limitfs/venv}")
}

wrong() {
    warn "$1"
    usage >&2
    exit 2
}

absolute() {
    case $1 in
    /) printf '/' ;;
    /*) printf '%s' "${1%/}" ;;
    *) printf '%s/%s' "${PWD%/}" "${1%/}" ;;
    esac
}

# mount_entry DIR: its lines of mountinfo; fails without any
mount_entry() {
    grep -F -e " $(printf '%s' "$1" | sed 's/\\/\\134/g; s/ /\\040/g') " /proc/self/mountinfo
}

# canonical PATH: as mountinfo has it, without touching a mount that may hang
canonical() {
    parent=$(readlink -m -- "$(dirname -- "$1")")
    place=${parent%/}/$(basename -- "$1")
    if ! mount_entry "$place" >/dev/null && [ -L "$place" ]; then place=$(readlink -m -- "$place"); fi
    printf '%s' "$place"
}

# the command, and the record of the mount points that mount/up made
link=/usr/local/bin/limitfs
# the manual, below share/ of the virtual environment and of /usr/local
pages='man/man5/limitfs.5 man/man5/limitfs.d.5 man/man8/limitfs.8 man/man8/mount.limitfs.8'
made=/var/lib/limitfs/made

# what mounts it when the machine starts
helper=/usr/sbin/mount.limitfs
remount_helper=/usr/sbin/mount.fuse.limitfs
unit=/etc/systemd/system/limitfs.service
script=/etc/init.d/limitfs
settings=/etc/default/limitfs
log=/var/log/limitfs.log
shipped_rules=/usr/lib/limitfs.d
own_rules=/etc/limitfs.d

has_package() { [ -z "$(absent limitfs)" ]; }
runs_systemd() { [ -d /run/systemd/system ]; }

is_mounted() { mount_entry "$at" | grep -qF ' - fuse.limitfs '; }

# unmount_limitfs: gently, or else detach it
unmount_limitfs() {
    if [ -x "$venv/bin/limitfs" ]; then
        "$venv/bin/limitfs" umount "$at" || detach "$venv/bin/limitfs" umount --lazy
    else
        umount -c "$at" || detach umount -c -l
    fi
    say "limitfs is unmounted from $at"
}

detach() {
    ! is_mounted && return
    say "detaching it: who still uses it gets an error"
    "$@" "$at"
}
