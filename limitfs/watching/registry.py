"""All watchers, and the choice of who hears for each.

Arming comes in here from the tree: `set_condition` asks the sources in order of surety and takes the first
that hears the want. What a user may have is counted here too.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from limitfs.errors import Invalid, Quota, Unsupported
from limitfs.hearing.source import Armed, Guarantee, LooksAgain, Refused, Source
from limitfs.resources.members import collection, concerns, members, starts_as_each, total
from limitfs.resources.model import Partition, Partitions, Process, Processes, Resource, Several, System, Target
from limitfs.watching.condition import Condition
from limitfs.watching.watcher import PRIVATE, Emit, Surroundings, Watcher

log = logging.getLogger(__name__)

HEARING = ("auto", "sampled")
"""What a `hearing` file takes."""


class Registry:
    """Makes, finds, arms and ends watchers.

    Args:
        sources: best first; the last hears everything.
        surroundings: clocks and descriptions for the watchers.
        emit: is given every record.
        watch_death: has a function called when the process of a target ends; returns a function that cancels
            that. Raises Gone.
        quota: armed and named watchers a user other than root may have.
        hearing: what a new watcher's `hearing` says.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        surroundings: Surroundings,
        emit: Emit,
        watch_death: Callable[[Target, Callable[[], None]], Callable[[], None]],
        quota: int,
        hearing: str = "auto",
    ) -> None:
        # Found out once, by trying, when the mount begins.
        tried = [(source, source.missing()) for source in sources]
        self.missing = {source.name: why for source, why in tried if why is not None}
        self.sources = [source for source, why in tried if why is None]
        self.surroundings = surroundings
        self.quota = quota
        self.hearing = hearing
        self._emit = emit
        self._watch_death = watch_death
        self._watchers: dict[tuple[Target, str], dict[str | None, Watcher]] = {}
        self._private: set[Watcher] = set()
        self._held: Counter[int] = Counter()
        self._holders: dict[Watcher, int] = {}
        self._deaths: dict[Watcher, Callable[[], None]] = {}
        self.ended: Callable[[Watcher], None] = lambda _watcher: None
        """Called when a watcher has ended for good (its target did, or it was removed)."""
        self.changed: Callable[[Watcher], None] = lambda _watcher: None
        """Called when a watcher was made, armed, disarmed, set otherwise, or removed."""

    # Finding

    def __iter__(self) -> Iterator[Watcher]:
        for named in self._watchers.values():
            yield from named.values()
        yield from self._private

    def find(self, target: Target, resource: Resource, name: str | None) -> Watcher | None:
        """The watcher on that path, if one was made."""
        return self._watchers.get((target, resource.name), {}).get(name)

    def names(self, target: Target, resource: Resource) -> list[str]:
        """The named watchers on `resource` of `target`."""
        return [name for name in self._watchers.get((target, resource.name), {}) if name is not None]

    # Making

    def own(self, target: Target, resource: Resource, path: str) -> Watcher:
        """The resource's own watcher, made when it is first needed; unarmed it costs nobody's quota."""
        found = self.find(target, resource, None)
        return found or self._keep(self._new(target, resource, path, None))

    def make_named(self, target: Target, resource: Resource, path: str, name: str, owner: int) -> Watcher:
        """A further watcher. Raises Quota, Gone."""
        watcher = self._new(target, resource, path, name)
        self._hold(watcher, owner)
        self._follow_process(watcher)
        self._keep(watcher)
        self.changed(watcher)
        return watcher

    def make_private(self, target: Target, resource: Resource, path: str, owner: int) -> Watcher:
        """A watcher that lives as long as one open file. Raises Quota."""
        watcher = self._new(target, resource, path, PRIVATE)
        self._hold(watcher, owner)
        self._private.add(watcher)
        return watcher

    def _new(self, target: Target, resource: Resource, path: str, name: str | None) -> Watcher:
        each = starts_as_each(resource, target)
        watcher = Watcher(target, resource, path, name, 0, each, self.surroundings, self._emit)
        watcher.hearing = self.hearing
        watcher.finished = self._finished
        watcher.unheard = self._arm_otherwise
        return watcher

    def _keep(self, watcher: Watcher) -> Watcher:
        self._watchers.setdefault((watcher.target, watcher.resource.name), {})[watcher.name] = watcher
        return watcher

    def follow(self, watcher: Watcher) -> None:
        """Have `watcher` end with its target though it is not armed: somebody reads it.

        Raises:
            Gone: the target has ended; an unused watcher is forgotten.
        """
        try:
            self._follow_process(watcher)
        except BaseException:
            self.drop_unused(watcher)
            raise

    # Arming

    def set_condition(self, watcher: Watcher, condition: Condition | None, user: int) -> None:
        """Arm `watcher` for `user` with `condition`, or disarm it with None.

        Raises:
            Gone: the target has ended.
            Quota: the user has as many watchers as allowed.
            Impossible: the condition cannot be held against the target's limit.
            Unsupported: the mode makes no sense here.
        """
        if condition is None:
            self._disarm(watcher)
            return
        self._refuse_senseless(watcher)
        if watcher not in self._holders:
            self._hold(watcher, user)
        watcher.begin(condition)
        try:
            self._follow_process(watcher)
            watcher.attach(self._arm_best(watcher))
        except BaseException:
            self._disarm(watcher)
            raise
        self.changed(watcher)

    def set_mode(self, watcher: Watcher, each: bool) -> None:
        """Choose each or sum; an armed watcher is armed again. Raises as `set_condition`."""
        if each == watcher.each:
            return
        before, watcher.each = watcher.each, each
        try:
            self._rearm(watcher)
        except BaseException:
            watcher.each = before
            raise
        self.changed(watcher)

    def set_hearing(self, watcher: Watcher, hearing: str) -> None:
        """Allow or decline kernel hooks; an armed watcher is armed again. Raises Invalid."""
        if hearing not in HEARING:
            raise Invalid(f"{hearing!r} is no way of hearing", f"one of: {', '.join(HEARING)}")
        watcher.hearing = hearing
        self._rearm(watcher)
        self.changed(watcher)

    def limit_changed(self, target: Process | Partition, resource: Resource) -> None:
        """The limit of `target` was set here: who takes a percentage of it judges anew. Raises as arming."""
        for watcher in [w for w in self if w.resource is resource and w.condition is not None]:
            assert watcher.condition is not None
            assert watcher.heard is not None
            amount = watcher.condition.amount
            if amount is None or not amount.percent or not concerns(watcher.heard, watcher.each, target):
                continue
            if isinstance(watcher.armed, LooksAgain) and isinstance(target, Process):
                watcher.armed.look_again(target)
            elif watcher.armed is not None and watcher.armed.period is None:
                self._rearm(watcher)

    def _rearm(self, watcher: Watcher) -> None:
        if watcher.condition is not None:
            self.set_condition(watcher, watcher.condition, watcher.owner)

    def _refuse_senseless(self, watcher: Watcher) -> None:
        resource, target = watcher.resource, watcher.target
        if not watcher.each and isinstance(target, Several) and not resource.summable:
            raise Unsupported(f"a sum of {resource.name} makes no sense", "write `each` to `mode`")

    def _arm_best(self, watcher: Watcher) -> Armed:
        want = watcher.want()
        if not want.each:
            want.levels(want.target)  # refuse an impossible percentage before anything is armed
        for source in self.choices(want.resource, want.target, want.each, watcher.hearing):
            try:
                return source.arm(want, watcher)
            except Refused as refusal:
                log.info("%s declines %s of %s: %s", source.name, want.resource.name, want.target, refusal)
        raise Unsupported(f"nothing here can hear {want.resource.name}")

    def _arm_otherwise(self, watcher: Watcher) -> None:
        """Have a watcher, whose source says that it misses members, heard by one that misses none."""
        try:
            watcher.detach()
            watcher.attach(self._arm_best(watcher))
        except BaseException:
            self._disarm(watcher)
            raise
        if watcher.each and watcher.heard is not None:
            there = set(members(watcher.heard))
            for member, _value in watcher.in_alarm():
                if member not in there:  # it ended or left in between
                    watcher.gone(member)

    def choices(self, resource: Resource, target: Target, each: bool, hearing: str) -> Iterator[Source]:
        """The sources that hear this, best first; who declined hooks gets none that is exact."""
        heard = collection(target) if each else total(resource, target)
        for source in self.sources:
            declined = hearing == "sampled" and source.guarantee is Guarantee.EXACT
            if not declined and source.hears(resource, heard, each):
                yield source

    # Ending

    def remove(self, watcher: Watcher) -> None:
        """End a watcher for good: rmdir, the last close of a private one, the end of its target."""
        watcher.end()
        self._release(watcher)
        cancel = self._deaths.pop(watcher, None)
        if cancel is not None:
            cancel()
        self._private.discard(watcher)
        key = (watcher.target, watcher.resource.name)
        named = self._watchers.get(key, {})
        if named.get(watcher.name) is watcher:
            del named[watcher.name]
            if not named:
                del self._watchers[key]
        self.changed(watcher)
        self.ended(watcher)

    def drop_unused(self, watcher: Watcher) -> None:
        """Forget a resource's own watcher that was never armed."""
        if watcher.name is None and watcher.since is None:
            self.remove(watcher)

    def _disarm(self, watcher: Watcher) -> None:
        watcher.end()
        if watcher.name is None:
            self._release(watcher)
        self.changed(watcher)

    def _finished(self, watcher: Watcher) -> None:
        """A watcher says that its target has ended, or that it has rung `once`."""
        if watcher.ended:
            self.remove(watcher)
        else:
            self._disarm(watcher)

    def _follow_process(self, watcher: Watcher) -> None:
        """Hear of the end of the process that the watcher stands on; nothing to do for what never ends."""
        if watcher not in self._deaths and not isinstance(watcher.target, System | Partitions | Processes):
            self._deaths[watcher] = self._watch_death(watcher.target, lambda: self._target_ended(watcher))

    def _target_ended(self, watcher: Watcher) -> None:
        watcher.gone(watcher.target)
        if not watcher.ended:
            watcher.ended = True
            self.remove(watcher)

    # Quotas

    def held_by(self, user: int) -> int:
        """How many watchers `user` has."""
        return self._held[user]

    def _hold(self, watcher: Watcher, user: int) -> None:
        if user != 0 and self._held[user] >= self.quota:
            raise Quota(
                f"user {user} has {self.quota} watchers already", "disarm one, or mount with max_watchers=N"
            )
        watcher.owner = user
        self._holders[watcher] = user
        self._held[user] += 1

    def _release(self, watcher: Watcher) -> None:
        user = self._holders.pop(watcher, None)
        if user is not None:
            self._held[user] -= 1
            if not self._held[user]:
                del self._held[user]
