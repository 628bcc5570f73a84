"""`limitfs reload` without a mount: what it makes of the answers."""

import pytest
from click.testing import CliRunner

from limitfs import mounting
from limitfs.cli import main
from limitfs.mounting import Health, Mount

SUMMARY = "1 applied, 1 kept, 0 waiting, 0 undone, 0 left, 0 tolerated, 0 refused\n"


@pytest.mark.parametrize(
    ("health", "text", "code", "stdout", "stderr"),
    [
        (
            Health.ANSWERS,
            "a:1: kept: x = 1\na:2: applied: y = 1\n" + SUMMARY,
            0,
            "a:2: applied: y = 1\n" + SUMMARY,
            "",
        ),
        (Health.ANSWERS, "a:1: refused: x = 1: no\n" + SUMMARY, 1, "a:1: refused: x = 1: no\n" + SUMMARY, ""),
        (Health.PRIVATE, "", 1, "", "limitfs: /limits: only root, or who mounted it, may reload the rules\n"),
        (Health.SILENT, "", 1, "", "limitfs: /limits does not answer\n"),
        (Health.STALE, "", 1, "", "limitfs: /limits stale: its daemon is gone\n"),
    ],
)
def test_reload(
    health: Health, text: str, code: int, stdout: str, stderr: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []

    def ask(path: str, *, command: str = "", **_others: object) -> tuple[Health, str]:
        asked.append((path, command))
        return health, text

    monkeypatch.setattr(mounting, "limitfs_mounts", lambda: [Mount("/limits", "fuse.limitfs", "limitfs")])
    monkeypatch.setattr(mounting, "ask", ask)
    done = CliRunner().invoke(main, ["reload"])
    assert (done.exit_code, done.stdout, done.stderr) == (code, stdout, stderr)
    assert asked == [("/limits/rules", "reload")]


def test_nothing_is_mounted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounting, "limitfs_mounts", list)
    done = CliRunner().invoke(main, ["reload"])
    assert (done.exit_code, done.stdout) == (1, "")
    assert "limitfs is not mounted" in done.stderr
