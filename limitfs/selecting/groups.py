"""Groups: processes that a user chose by a condition, as directories below `group/`."""

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable, Iterator

from limitfs.errors import Busy, Exists, Gone, LimitsError, Quota
from limitfs.hearing.connector import Connector
from limitfs.hearing.deaths import Deaths
from limitfs.hearing.membership import Moves, untold
from limitfs.hearing.reactor import Reactor
from limitfs.resources import model
from limitfs.resources.model import Process
from limitfs.selecting.columns import Column, Look, Row
from limitfs.selecting.expression import Expression
from limitfs.selecting.language import parse
from limitfs.selecting.live import Live, present
from limitfs.selecting.pattern import Pattern

log = logging.getLogger(__name__)

Told = Callable[[Process], None]

QUOTA = 64
"""Groups a user other than root may have, unless an option says otherwise."""
WORK = 1024
"""Instructions that the patterns in all groups of a user other than root may have together."""
AT_ONCE = 16_000_000
"""Work that searching for the members of one group may be, where nobody has it kept up to date: 130 ms at most."""


class Group(model.Group):
    """Processes for which a condition is true, of those that its owner may look at.

    While somebody follows it, it is kept up to date; else its members are found when they are asked for, and it
    costs nothing. Made by `Groups.make`.

    Attributes:
        name: the directory's.
        number: never used twice while the daemon runs.
        owner: uid of who made it.
        all_users: whether it may hold everybody's processes, not just those of its owner.
    """

    def __init__(self, groups: "Groups", name: str, number: int, owner: int, all_users: bool) -> None:
        self.name = name
        self.number = number
        self.owner = owner
        self._groups = groups
        self._live = groups.live
        self.all_users = all_users
        self._choose(None)
        self._members: dict[Process, None] = {}
        self._open: dict[Process, None] = {}
        self._followers: dict[_Following, None] = {}

    # As users know it

    @property
    def select(self) -> str:
        """The condition in its canonical form; "" in the beginning: no members."""
        return "" if self._expression is None else self._expression.text

    def set_select(self, text: str) -> None:
        """Choose the members anew, by the condition `text`; "" for none.

        Raises:
            Invalid, Impossible: see `limitfs.selecting.language.parse`; all stays as it was.
            Quota: the patterns of the owner would be too many, or too large.
        """
        text = text.removesuffix("\0").strip()
        expression = parse(text) if text else None
        self._groups.check_work(self, expression.work if expression is not None else 0)
        self._choose(expression)
        if not self._followers:
            return
        if self._expression is not None:
            self._live.add(self)
            return
        self._live.remove(self)
        self._open.clear()
        for process in tuple(self._members):
            self._take(process, False)

    @property
    def hearing(self) -> str:
        """How membership is known: "on demand", or what tells, with commas between."""
        if self not in self._live:
            return "on demand"
        if self._live.sampled:
            return "sampled"
        hook = ["sched_process"] if "partition" in self.asks and "partition" in self._live.told else []
        return ", ".join(["connector", *hook, *(["sampled"] if self.looks else [])])

    @property
    def period(self) -> float | None:
        """Seconds between two looks; None where nothing is looked at."""
        return self._live.period if self in self._live and (self.looks or self._live.sampled) else None

    @property
    def behind(self) -> bool:
        """Whether some who belong may not be known yet, as not all that decides is told by the kernel."""
        return self in self._live and (self.looks or self._live.sampled or self._live.late(self))

    @property
    def followed(self) -> bool:
        """Whether somebody follows it: a watcher is armed on it."""
        return bool(self._followers)

    def close(self) -> None:
        """End the group.

        Raises:
            Busy: somebody follows it.
        """
        if self._followers:
            raise Busy(f"watchers are armed on group {self.name!a}", "write off to their thresholds first")
        self._groups.forget(self)

    # For those who measure it

    def processes(self) -> Collection[Process]:
        """The members now.

        Raises:
            Gone: the group was removed.
            Busy: it would take too long to find them.
        """
        if self._groups.find(self.name) is not self:
            raise Gone(f"group {self.name!a} was removed")
        if self in self._live:
            return tuple(self._members)
        if self._expression is None:
            return ()
        return list(self._search())

    def follow(self, joined: Told, left: Told) -> Callable[[], None]:
        """Be told of members that come (those that are there: at once) and go; returns what ends that.

        `left` is also called for a newborn process that is no member: a source that has children inherit their
        parent's membership, until it knows better, knows better then.

        Raises:
            Anything that `joined` raises for those that are there; nobody follows then.
        """
        if not self._followers and self._expression is not None:
            self._live.add(self)
        following = _Following(self, joined, left)
        self._followers[following] = None
        try:
            for process in tuple(self._members):
                if following in self._followers and process in self._members:
                    joined(process)
        except BaseException:
            following.end()
            raise
        return following.end

    def unfollow(self, following: "_Following") -> None:
        """Tell one follower no more; without any, nothing is kept."""
        self._followers.pop(following, None)
        if not self._followers:
            self._live.remove(self)
            self._members.clear()
            self._open.clear()

    # For `Live`

    @property
    def asks(self) -> frozenset[str]:
        """The names of the columns that it depends on; "owner" where only one user's processes count."""
        return self._asks

    @property
    def looks(self) -> bool:
        """Whether some of these change without the kernel telling."""
        return bool(self._untold) and not self._untold <= self._live.told

    def hold(self, row: Row, newborn: bool = False) -> bool:
        """Take the process of `row` in or out; whether that changed anything. Never raises."""
        process = row.process
        matches, is_open = self._judge(row)
        if is_open:
            self._open[process] = None
        else:
            self._open.pop(process, None)
        return self._take(process, matches, newborn)

    def open(self) -> Iterable[Process]:
        """Processes for which only what is not told decides."""
        return tuple(self._open)

    def drop(self, process: Process) -> None:
        """It has ended."""
        self._open.pop(process, None)
        self._take(process, False)

    @property
    def searches(self) -> bool:
        """Whether it has a pattern, so that judging may have to wait."""
        return self.work > 0

    @property
    def work(self) -> int:
        """Instructions of its patterns."""
        return self._work

    # Inside

    def _choose(self, expression: Expression | None) -> None:
        """Keep what is asked of every group at each event, of which there may be thousands."""
        columns: frozenset[Column] = frozenset() if expression is None else expression.columns
        self._expression = expression
        self._work = 0 if expression is None else expression.work
        self._asks = frozenset(column.name for column in columns) | (frozenset() if self.all_users else {"owner"})
        self._untold = frozenset(column.name for column in columns if not column.told)

    def _search(self) -> Iterator[Process]:
        """Among all processes. Raises Busy."""
        look, before = Look(), Pattern.spent
        for process, stat in present():
            if self._judge(Row(process, stat, look))[0]:
                yield process
            if Pattern.spent - before > AT_ONCE:
                raise Busy(
                    f"finding the members of group {self.name!a} takes too long to be done at once",
                    "arm a watcher on it, and they are known; or write smaller patterns to select",
                )

    def _judge(self, row: Row) -> tuple[bool, bool]:
        """Whether the process belongs here, and whether that may change though the kernel tells nothing."""
        expression = self._expression
        try:
            if expression is None or not (self.all_users or row.owner == self.owner):
                return False, False
            row.check()
            settled = expression.judge(row, told=True)
            if settled is not None:
                return settled, False
            return expression.matches(row), True
        except LimitsError:  # it ended, or is hidden from us
            return False, False

    def _take(self, process: Process, matches: bool, newborn: bool = False) -> bool:
        changed = matches is not (process in self._members)
        if changed and matches:
            self._members[process] = None
        elif changed:
            del self._members[process]
        if changed or (newborn and not matches):
            for following in tuple(self._followers):
                if following in self._followers:
                    following.tell(process, matches)
        return changed


class _Following:
    """One who follows a group."""

    __slots__ = ("_group", "_joined", "_left")

    def __init__(self, group: Group, joined: Told, left: Told) -> None:
        self._group = group
        self._joined = joined
        self._left = left

    def tell(self, process: Process, joined: bool) -> None:
        try:
            (self._joined if joined else self._left)(process)
        except Exception:  # the others who follow must hear it all the same
            log.exception("told of %s, a follower of group %s failed", process, self._group.name)

    def end(self) -> None:
        """Be told no more; may be called twice."""
        self._group.unfollow(self)


class Groups:
    """All groups, by name.

    Args:
        reactor, connector, deaths, moves: what membership is heard with.
        quota: groups that a user other than a master may have.
        masters: users whose groups may hold everybody's processes, and who have no quota.
    """

    def __init__(
        self,
        reactor: Reactor,
        connector: Connector,
        deaths: Deaths,
        quota: int = QUOTA,
        masters: Container[int] = (0,),
        moves: Moves = untold,
    ) -> None:
        self.live = Live(reactor, connector, deaths, moves)
        self.quota = quota
        self._masters = masters
        self._named: dict[str, Group] = {}
        self._held: Counter[int] = Counter()
        self._numbers = itertools.count(1)

    def __iter__(self) -> Iterator[Group]:
        return iter(tuple(self._named.values()))

    def __len__(self) -> int:
        return len(self._named)

    def find(self, name: str) -> Group | None:
        """The group of that name."""
        return self._named.get(name)

    def make(self, name: str, owner: int) -> Group:
        """A group without members, for `owner`.

        Raises:
            Exists: there is one of that name, whoever's.
            Quota: the user has as many as allowed.
        """
        if name in self._named:
            raise Exists(f"there is a group {name!a} already")
        master = owner in self._masters
        if not master and self._held[owner] >= self.quota:
            raise Quota(f"user {owner} has {self.quota} groups already", "remove one, or mount with max_groups=N")
        group = self._named[name] = Group(self, name, next(self._numbers), owner, master)
        self._held[owner] += 1
        return group

    def check_work(self, group: Group, work: int) -> None:
        """Raises Quota where the patterns of a user, of which `group` is to have so many, would be too much."""
        if group.all_users or not work:
            return
        others = sum(each.work for each in self if each.owner == group.owner and each is not group)
        if others + work > WORK:
            raise Quota(
                f"the regular expressions in groups of user {group.owner} would have {others + work} instructions",
                f"at most {WORK} together, of which these are {work}; write shorter ones, or fewer",
            )

    def forget(self, group: Group) -> None:
        """Drop a group that was closed; harmless when called twice."""
        if self._named.get(group.name) is group:
            del self._named[group.name]
            self._held[group.owner] -= 1
            if not self._held[group.owner]:
                del self._held[group.owner]
