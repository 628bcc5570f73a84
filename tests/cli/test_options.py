"""What `-o` may say, and how a remount finds what is in force."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limitfs.errors import Invalid
from limitfs.options import KERNEL_FLAGS, Options, names

FOR_OTHERS = {
    *("rw", "suid", "dev", "exec", "atime", "diratime", "relatime", "norelatime", "strictatime", "nostrictatime"),
    *("async", "defaults", "auto", "noauto", "user", "nouser", "users", "nousers", "owner", "noowner", "group"),
    *("nogroup", "nofail", "_netdev", "x-systemd.automount", "x-systemd.requires=a.service", "X-mount.mkdir=755"),
    *("comment=mine", "user=somebody", "uhelper=hal"),
}


@pytest.mark.parametrize("word", sorted(FOR_OTHERS))
def test_what_is_for_others_changes_nothing(word: str) -> None:
    assert Options.parse([word]) == Options()


@pytest.mark.parametrize("word", sorted(KERNEL_FLAGS))
def test_the_kernel_is_told(word: str) -> None:
    assert Options.parse([word, word]).flags == {word}


@pytest.mark.parametrize(
    "word", ["sizelimit=3", "foo", "Rw", "rw=1", "noexec=1", "user_id=0", "remount", "flags=x", ""]
)
def test_an_unknown_name_is_refused_with_those_there_are(word: str) -> None:
    with pytest.raises(Invalid, match=re.escape(repr(word.partition("=")[0]))) as caught:
        Options.parse([word])
    assert all(name in caught.value.hint for name in names())


def test_sloppy_passes_over_names_but_not_over_values() -> None:
    assert Options.parse(["sizelimit=3", "hidepid=1"], sloppy=True) == Options(hidepid=1)
    with pytest.raises(Invalid, match="hidepid=7"):
        Options.parse(["hidepid=7"], sloppy=True)
    with pytest.raises(Invalid, match="read-only"):
        Options.parse(["ro"], sloppy=True)


@pytest.mark.parametrize(
    "word", ["hidepid", "hidepid=3", "max_open=-1", "max_open=", "hearing=loud", "allow_other=1", "rules=:"]
)
def test_a_bad_value_is_refused(word: str) -> None:
    with pytest.raises(Invalid, match=word.partition("=")[0]):
        Options.parse([word])


def test_the_last_one_counts() -> None:
    assert Options.parse(["hidepid=1", "noallow_other", "hidepid=2"]) == Options(hidepid=2, allow_other=False)
    assert Options.parse(["allow_other"], Options(hidepid=2, allow_other=False)) == Options(
        hidepid=2, allow_other=True
    )


def test_rules_and_state_are_for_a_daemon_that_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/usr")
    options = Options.parse(["rules=lib/limitfs.d:/etc/limitfs.d", "state=a:b"])
    assert (options.rules, options.state) == ("/usr/lib/limitfs.d:/etc/limitfs.d", "/usr/a:b")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    # Rules are the administrator's; the state is everybody's own.
    assert (Options().rules, Options().state) == ("none", "/run/user/1000/limitfs")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert Options().state == "none"


PATHS = st.text(st.characters(blacklist_categories=("Cs", "Cc"), blacklist_characters=",/:"), min_size=1).map(
    "/x{}".format
)


@given(
    st.builds(
        Options,
        allow_other=st.booleans(),
        hearing=st.sampled_from(["auto", "sampled"]),
        hidepid=st.integers(0, 2),
        max_watchers=st.integers(0),
        max_open=st.integers(0),
        log=st.none() | PATHS,
        rules=st.just("none") | st.lists(PATHS, min_size=1).map(":".join),
        state=st.just("none") | PATHS,
        flags=st.frozensets(st.sampled_from(sorted(KERNEL_FLAGS))),
    )
)
def test_what_is_in_force_can_be_read_back(options: Options) -> None:
    assert Options.parse(str(options).split(",")) == options
