"""The helper of mount(8): what `mount -t limitfs none DIR -o …` runs, by way of mount/mount.limitfs.

Its arguments and exit codes are those that mount(8) gives to helpers: 0 mounted, 1 wrong usage or an option that
is not known, 8 interrupted, 32 not mounted.
"""

import logging
import os
import subprocess
import sys
from collections.abc import Sequence

import click

from limitfs import cli, mounting
from limitfs.errors import LimitsError
from limitfs.mounting import MountError
from limitfs.options import KERNEL_FLAGS, Options

WRONG_USAGE = 1
INTERRUPTED = 8
FAILED = 32

_KERNELS = ("user_id=", "group_id=", "max_read=", "default_permissions")
"""What mountinfo adds, and mount(8) repeats when it remounts."""
_ATIMES = {"noatime", "relatime", "strictatime"}
"""Of these the last one counts."""
_FLAGS = KERNEL_FLAGS | _ATIMES
"""What a remount may change: the kernel does it by itself."""


def main(arguments: Sequence[str]) -> int:
    """Do what mount(8) asks for; give its exit code."""
    try:
        _helper.main(list(arguments), prog_name="mount.limitfs", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return WRONG_USAGE
    except (MountError, LimitsError) as error:
        click.echo(f"mount.limitfs: {mounting.explain(error)}", err=True)
        return WRONG_USAGE if isinstance(error, LimitsError) else FAILED
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    return 0


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("source")
@click.argument("directory", metavar="DIR")
@click.option("options", "-o", multiple=True, metavar="OPT[,OPT…]", help="Mount options.")
@click.option("-f", "fake", is_flag=True, help="Fake it: check options and DIR, and mount nothing.")
@click.option("-n", "no_mtab", is_flag=True, help="Write no /etc/mtab: it is never written.")
@click.option("-s", "sloppy", is_flag=True, help="Pass over options that are not known.")
@click.option("-v", "verbose", is_flag=True, help="Say what is done.")
@click.option("-t", "fstype", type=click.Choice(["limitfs", "fuse.limitfs"]), help="The type of the filesystem.")
@click.option("-N", "namespace", metavar="NS", help="Refused: see nsenter(1).")
def _helper(
    source: str,
    directory: str,
    options: tuple[str, ...],
    fake: bool,
    no_mtab: bool,
    sloppy: bool,
    verbose: bool,
    fstype: str | None,
    namespace: str | None,
) -> None:
    """Mount limitfs at DIR, for mount(8); SOURCE may be anything."""
    del source, no_mtab, fstype
    if namespace is not None:
        raise click.UsageError(f"-N: not here; use nsenter --mount={namespace} mount -t limitfs none {directory}")
    words = [word for group in options for word in group.split(",") if word]
    mountpoint = mounting.resolve(directory)
    if "remount" in words:
        _remount(mountpoint, [word for word in words if word != "remount"], fake=fake, sloppy=sloppy)
        done = "remounted"
    else:
        chosen = Options.parse(words, sloppy=sloppy)
        if not fake:
            cli.make_way(mountpoint)
            cli.start(mountpoint, chosen, logging.WARNING)
        elif not mounting.is_mounted(mountpoint) and not os.path.isdir(mountpoint):
            raise MountError(f"{mountpoint} is not a directory")
        done = "mounted"
    if verbose:
        click.echo(f"mount.limitfs: {mountpoint} {'could be ' if fake else ''}{done}.")


def _remount(mountpoint: str, words: list[str], *, fake: bool, sloppy: bool) -> None:
    """Let the kernel change its flags; refuse to change what a daemon is started with.

    Raises:
        Invalid: an option that is not known.
        MountError: an option that would have to change, or nothing is mounted.
    """
    if not mounting.is_mounted(mountpoint):
        raise MountError(f"limitfs is not mounted at {mountpoint}")
    in_force = _in_force(mountpoint)
    asked = Options.parse((word for word in words if not word.startswith(_KERNELS)), in_force, sloppy=sloppy)
    before, after = (set(str(options).split(",")) - KERNEL_FLAGS for options in (in_force, asked))
    if changed := sorted(after - before):
        raise MountError(
            f"cannot change while it is mounted: {', '.join(changed)}",
            f"unmount it, and mount it again; now it is {', '.join(sorted(before - after)) or 'not set'}",
        )
    if not fake:
        earlier = [word for word in words if word in _ATIMES][:-1]
        _change_flags(mountpoint, _FLAGS.intersection(words).difference(earlier))


def _in_force(mountpoint: str) -> Options:
    options = mounting.facts(mountpoint).get("options")
    if options is None:
        raise MountError(f"{mountpoint} does not tell its mount options", "see `limitfs status`")
    return Options.parse(options.split(","))


def _change_flags(mountpoint: str, flags: set[str]) -> None:
    """Set these flags, and take away those that are left out: mount(8) has put together what should hold."""
    words = ",".join(["remount", *sorted(flags | {"nosuid", "nodev"})])
    # -i: not by way of us again; ignore: what holds now is not to be added.
    command = ["mount", "-i", "--options-mode=ignore", "-t", mounting.FSTYPE, "-o", words, "limitfs", mountpoint]
    done = subprocess.run(command, env={**os.environ, "LC_ALL": "C"}, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise MountError(done.stderr.strip() or "mount failed")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
