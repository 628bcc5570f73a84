/* SPDX-License-Identifier: GPL-2.0 OR MIT */
/*
 * Thresholds, hysteresis and the decision "crossed", for all programs.
 *
 * Who includes this defines before:
 *   FIRST_KIND, LAST_KIND, SUMS
 *	what it measures, and whether that is ever added up
 *   static __s64 measure(struct task_struct *task, __u32 kind);
 *	the value now, from truth, never a running count
 *   static void bounds(struct task_struct *task, __u32 kind, struct range *r);
 *	what the value can be at all, for less than measuring costs
 *
 * Order. Every event is judged after the change that caused it. The state is
 * read, then the value, and the state turns only if nobody turned it since:
 * so no excursion counts twice. Whoever turns it measures once more, until
 * nothing turns: so a value that was out of date by then is put right by the
 * same event, and a change that comes later sees the turned state in its own.
 *
 * Totals. What a process adds is one word, its share: in which cgroup, and how
 * much. Who finds it out of date exchanges it, and adds the difference to the
 * total of every scope that it was or is in, so a total is the sum of all
 * shares whatever the order of things. Then one looks again: so who was
 * overtaken by a move or by the end of the process undoes what he did.
 */
#ifndef LIMITFS_JUDGE_H
#define LIMITFS_JUDGE_H

/* Other processors may turn a state between measuring and turning. */
#define ROUNDS 64
#define TOTAL_ROUNDS 8
#define SHARE_ROUNDS 4
#define PEAK_ROUNDS 4

/* The tree of cgroups is never deeper; scopes are the first LIMITFS_DEPTH. */
#define DEEPEST 256

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, LIMITFS_CONFIGS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u64);
	__type(value, struct config);
} configs SEC(".maps");

/* Apart from `configs`, so that a new level does not reset it. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, LIMITFS_STATES);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct member);
	__type(value, struct state);
} states SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, LIMITFS_STATES);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct share);
	__type(value, __u64);
} shares SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 2 * LIMITFS_CONTAINERS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct total);
	__type(value, __s64);
} totals SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, LIMITFS_CONTAINERS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct container);
} containers SEC(".maps");

/* Kept by user space; a child is in the groups of its parent until user space says otherwise. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, LIMITFS_STATES);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct member);	/* without a watch */
	__type(value, struct membership);
} memberships SEC(".maps");

/* Processes whose end was heard lately; of use only where the kernel does not say who is the last. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct member);	/* without a watch */
	__type(value, __u64);
} ended SEC(".maps");

/* A wake-up with details; what counts is in `states`. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, LIMITFS_RING);
} records SEC(".maps");

volatile struct control control;

static const struct state fresh;
static const __u64 nothing;

struct range {
	__s64 low;
	__s64 high;
};

/* Whose value it is, and who made it so. */
struct subject {
	struct member member;
	__u32 tid;
	__u32 uid;
	char comm[LIMITFS_COMM];
	bool quiet;	/* user space looks for itself */
};

static __always_inline __s64 measure(struct task_struct *task, __u32 kind);
static __always_inline void bounds(struct task_struct *task, __u32 kind, struct range *r);
static __always_inline bool is_alone(void);

/*
 * Nearly every event is about the current task, whose pointers can be followed
 * directly. That is quicker than BPF_CORE_READ(), which serves elsewhere: for
 * each the verifier searches all types of the kernel, 2 ms of loading each.
 */
static __always_inline bool is_current(__u64 task)
{
	return task == bpf_get_current_task();
}

static __always_inline __u64 start_of(struct task_struct *task)
{
	return BPF_CORE_READ(task, group_leader, start_boottime) / LIMITFS_TICK;
}

static __always_inline void describe(struct subject *s, struct task_struct *task)
{
	s->tid = BPF_CORE_READ(task, pid);
	s->uid = BPF_CORE_READ(task, real_cred, euid.val);
	bpf_probe_read_kernel_str(s->comm, sizeof(s->comm), &task->comm);
}

/* NULL: the ring is full; to be followed by `drop`. */
static __always_inline struct record *reserve(__u32 what, __s64 value, __u64 flips)
{
	struct record *r = bpf_ringbuf_reserve(&records, sizeof(*r), 0);

	if (!r)
		return NULL;
	r->time = bpf_ktime_get_ns();
	r->what = what;
	r->value = value;
	r->flips = flips;
	r->parent = 0;
	return r;
}

/*
 * The ring did not take a record. Called when all that stands for the record is
 * in the maps: whoever sees the new number finds it there. Who reads the ring
 * looks at the number afterwards; so where it is still full he will, and where
 * he has read it meanwhile, he is woken.
 */
static __always_inline void drop(void)
{
	struct record *r;

	__sync_fetch_and_add(&control.dropped, 1);
	r = reserve(LIMITFS_WAKE, 0, 0);
	if (r)
		bpf_ringbuf_submit(r, 0);
}

static __always_inline struct record *new_record(__u32 what, __s64 value, __u64 flips)
{
	struct record *r = reserve(what, value, flips);

	if (!r)
		drop();
	return r;
}

/*
 * The functions that are not static are verified once, by themselves, instead
 * of once for each path to each call: that is 50 ms instead of seconds to load.
 * They must take it that a pointer is NULL.
 *
 * 0: to be followed by `drop`.
 */
__noinline int ring(const struct subject *s, __u32 what, __s64 value, __u64 flips)
{
	struct record *r;

	if (!s)
		return 0;
	r = reserve(what, value, flips);
	if (!r)
		return 0;
	r->start = s->member.start;
	r->watch = s->member.watch;
	r->tgid = s->member.tgid;
	r->tid = s->tid;
	r->uid = s->uid;
	__builtin_memcpy(r->comm, s->comm, sizeof(r->comm));
	bpf_ringbuf_submit(r, 0);
	return 1;
}

/* About a total; who changed it is the current task. */
__noinline int ring_total(__u32 watch, __u64 scope, __u32 what, __s64 value, __u64 flips)
{
	struct record *r = new_record(what, value, flips);
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();

	if (!r)
		return 0;
	r->start = scope;
	r->watch = watch;
	r->tgid = 0;
	r->tid = BPF_CORE_READ(task, pid);
	r->uid = BPF_CORE_READ(task, real_cred, euid.val);
	bpf_get_current_comm(r->comm, sizeof(r->comm));
	bpf_ringbuf_submit(r, 0);
	return 1;
}

/* A map takes no more. The first that user space does not know of wakes it. */
static __always_inline void overflow(void)
{
	if (__sync_fetch_and_add(&control.full, 1) == control.heard)
		ring_total(0, 0, LIMITFS_FULL, 0, 0);
}

/* A watch whose shares are resolved. */
struct levels {
	__s64 enter;
	__s64 leave;
	__u32 down;
	__u32 change;
};

/* The most extreme level: no value is ever beyond it. */
static __always_inline __s64 never(bool down)
{
	return down ? -1 : (__s64)(~0ULL >> 1);
}

static __always_inline __u64 limit_of(struct task_struct *task, const struct watch *w)
{
	struct signal_struct *signal;
	__u64 limit = 0;

	if (!(w->flags & (LIMITFS_ENTER_SHARE | LIMITFS_LEAVE_SHARE)))
		return 0;
	signal = BPF_CORE_READ(task, signal);
	bpf_probe_read_kernel(&limit, sizeof(limit), &signal->rlim[w->rlimit & 15].rlim_cur);
	return limit;
}

__noinline int resolve(struct levels *l, const struct watch *w, __u64 limit)
{
	__u64 share = LIMITFS_SHARE, part;

	if (!l || !w)
		return 0;
	l->down = w->flags & LIMITFS_DOWN;
	l->change = w->flags & LIMITFS_CHANGE;
	l->enter = w->enter;
	l->leave = w->leave;
	if (!(w->flags & (LIMITFS_ENTER_SHARE | LIMITFS_LEAVE_SHARE)))
		return 0;
	/* No limit, or one beyond all use: a share of it is never reached. */
	if (!limit || limit >> 33) {
		l->enter = l->leave = never(l->down);
		return 0;
	}
	if (w->flags & LIMITFS_ENTER_SHARE) {
		part = limit * (__u64)w->enter;
		/* >= and < round up, > and <= down; then one step for > and <. */
		if (!l->down)
			l->enter = (w->flags & LIMITFS_STRICT) ? part / share + 1
							       : (part + share - 1) / share;
		else
			l->enter = (w->flags & LIMITFS_STRICT) ? (__s64)((part + share - 1) / share) - 1
							       : part / share;
	}
	if (w->flags & LIMITFS_LEAVE_SHARE) {
		part = limit * (__u64)w->leave;
		l->leave = l->down ? (part + share - 1) / share : part / share;
	}
	/* One of them may be a share and the other not: never let them meet. */
	if (!l->down && l->leave >= l->enter)
		l->leave = l->enter - 1;
	if (l->down && l->leave <= l->enter)
		l->leave = l->enter + 1;
	return 0;
}

/* Whether `value` turns a state that is at `flips`. */
__noinline int turns(const struct levels *l, __u64 flips, __s64 value)
{
	if (!l)
		return 0;
	if (l->change)
		return 1;
	if (flips & 1)
		return l->down ? value >= l->leave : value <= l->leave;
	return l->down ? value <= l->enter : value >= l->enter;
}

static __always_inline struct state *state_of(const struct member *m)
{
	struct state *st = bpf_map_lookup_elem(&states, m);

	if (st)
		return st;
	bpf_map_update_elem(&states, m, &fresh, BPF_NOEXIST);
	st = bpf_map_lookup_elem(&states, m);
	if (!st)
		overflow();
	return st;
}

static __always_inline __u64 flips_of(const struct state *st)
{
	return st ? *(volatile const __u64 *)&st->flips : 0;
}

/* What comes of taking a value in; but for 0 measure again. */
#define OVERTAKEN 1	/* another processor turned the state */
#define TURNED 2	/* to be told, unless quiet: user space looks for itself */

/* Take `value` in, measured while the state was at `flips` or later. */
static __always_inline int take_in(struct state *st, const struct levels *l, bool quiet, __u64 flips, __s64 value)
{
	__s64 before = __sync_lock_test_and_set(&st->value, value);

	if (quiet)
		st->told = 1;
	/* What is there at first is no change, but the first value of who is new is. */
	if (l->change && (quiet || (before == value && (flips || st->told))))
		return 0;
	if (!l->change && !turns(l, flips, value))
		return 0;
	if (__sync_val_compare_and_swap(&st->flips, flips, flips + 1) != flips)
		return OVERTAKEN;
	/* Before the record: who reads the record finds the state told. */
	st->told = 1;
	return TURNED;
}

/* Other processors may raise it at the same time. */
static __always_inline void raise_peak(struct state *st, __s64 value)
{
	__s64 before;
	int i;

	for (i = 0; i < PEAK_ROUNDS; i++) {
		before = *(volatile __s64 *)&st->peak;
		if (value <= before || __sync_val_compare_and_swap(&st->peak, before, value) == before)
			return;
	}
}

__noinline int take(struct state *st, const struct levels *l, const struct subject *s, __u64 flips, __s64 value)
{
	int done;

	if (!st || !l || !s)
		return 0;
	raise_peak(st, value);
	done = take_in(st, l, s->quiet, flips, value);
	if (done == TURNED && !s->quiet && !ring(s, LIMITFS_CROSSED, value, flips + 1))
		drop();
	return done;
}

static __always_inline bool is_last(struct task_struct *task)
{
	/* do_exit() has counted this thread out already. */
	return BPF_CORE_READ(task, signal, live.counter) == 0;
}

/* Cgroups */

/* Who the process of a task is. */
static __always_inline void identify(struct member *m, __u64 task)
{
	struct task_struct *at = (struct task_struct *)task;

	if (is_current(task)) {
		at = bpf_get_current_task_btf();
		m->tgid = at->tgid;
		m->start = at->group_leader->start_boottime / LIMITFS_TICK;
		return;
	}
	m->tgid = BPF_CORE_READ(at, tgid);
	m->start = start_of(at);
}

/* Where a process belongs is told by its first thread, also where the others were moved away from it. */
static __always_inline struct cgroup *cgroup_of(struct task_struct *task)
{
	if (!bpf_core_field_exists(task->cgroups))
		return NULL;
	return BPF_CORE_READ(task, group_leader, cgroups, dfl_cgrp);
}

static __always_inline __u64 id_of(struct cgroup *cgroup)
{
	return cgroup ? BPF_CORE_READ(cgroup, kn, id) : LIMITFS_EVERY;
}

struct climb {
	__u64 at;	/* a cgroup */
	struct container container;
};

static long climb(__u32 index, struct climb *c)
{
	struct cgroup *at = (struct cgroup *)c->at;
	__u32 level = BPF_CORE_READ(at, level);

	/* The root has the same number everywhere. Masked for the verifier. */
	if (level > 0 && level < LIMITFS_DEPTH) {
		barrier_var(level);
		c->container.scopes[level % LIMITFS_DEPTH] = id_of(at);
	}
	c->at = (__u64)BPF_CORE_READ(at, self.parent, cgroup);
	return level == 0 || !c->at;
}

/* Keep the ancestors of a cgroup; 0: it is the root of a kernel without cgroups. */
__noinline int find_ancestors(__u64 cgroup)
{
	struct climb c = { .at = cgroup };
	struct cgroup *leaf = (struct cgroup *)cgroup;
	__u32 key;

	c.container.leaf = id_of(leaf);
	c.container.count = leaf ? BPF_CORE_READ(leaf, level) + 1 : 1;
	if (c.container.count > LIMITFS_DEPTH)
		c.container.count = LIMITFS_DEPTH;
	c.container.scopes[0] = LIMITFS_EVERY;
	if (leaf)
		bpf_loop(DEEPEST, climb, &c, 0);
	key = c.container.leaf;
	if (bpf_map_update_elem(&containers, &key, &c.container, BPF_ANY))
		overflow();
	return 0;
}

static __always_inline struct container *container_of_task(struct task_struct *task)
{
	struct cgroup *cgroup = cgroup_of(task);
	__u64 id = id_of(cgroup);
	__u32 key = id;
	struct container *c = bpf_map_lookup_elem(&containers, &key);

	if (c && c->leaf == id)
		return c;
	find_ancestors((__u64)cgroup);
	return bpf_map_lookup_elem(&containers, &key);
}

static __always_inline __u64 scope_in(const struct container *c, __u32 level)
{
	if (!c || level >= LIMITFS_DEPTH || level >= c->count)
		return 0;
	/* Masked for verifiers before 6.2. */
	barrier_var(level);
	return c->scopes[level % LIMITFS_DEPTH];
}

static __always_inline const struct container *container_by(__u32 key)
{
	return key ? bpf_map_lookup_elem(&containers, &key) : NULL;
}

/*
 * What goes from round to round and from watch to watch. The loops are
 * bpf_loop() (since 5.17): the verifier looks at each body once.
 */
struct turning {
	struct task_struct *task;	/* of the event; what it has is measured */
	struct task_struct *owner;	/* whose state it is, and has the same */
	struct subject *subject;
	struct state *state;
	struct levels levels;
	struct member member;	/* of the subject; before 6.2 maps take no key from elsewhere than this stack */
	__u32 kind;
};

struct judging {
	__u64 task;
	__u64 owner;
	const struct container *container;
	struct membership *membership;
	struct subject subject;
	__u32 planting;	/* from this watch on quietly; 0: none */
	__u32 first;	/* of the scopes beyond the process */
};

/* 1 ends the loop. */
static long judge_round(__u32 index, struct turning *t)
{
	/* First the state, then the value: what was counted once is not counted again. */
	__u64 flips = flips_of(t->state);
	__s64 value = measure(t->task, t->kind);

	if (turns(&t->levels, flips, value)) {
		/* What ends has ended for good: no state may come after that. */
		if (is_last(t->owner))
			return 1;
		/* Only now, for it costs more than all the rest. */
		if (!t->subject->tid)
			describe(t->subject, t->task);
		/* A state is made when it first turns. */
		if (!t->state)
			t->state = state_of(&t->member);
	}
	if (!t->state)
		return 1;
	return !take(t->state, &t->levels, t->subject, flips, value);
}

/* Judge a process, `owner`, by one watch. Not static: see above. */
__noinline int judge_watch(__u64 task, __u64 owner, const struct watch *w, struct subject *s, __u32 planting)
{
	struct turning t = { .task = (void *)task, .owner = (void *)owner, .subject = s };
	struct range r = {};
	__u64 flips;

	if (!w || !s || w->flags & LIMITFS_SUM)
		return 0;
	t.kind = w->kind;
	s->member.watch = w->id;
	s->quiet = planting && w->id >= planting;
	t.member = s->member;
	resolve(&t.levels, w, limit_of(t.owner, w));
	t.state = bpf_map_lookup_elem(&states, &t.member);
	flips = flips_of(t.state);
	bounds(t.task, t.kind, &r);
	/* A new peak is measured too, once it is sure. */
	if (turns(&t.levels, flips, r.low) || turns(&t.levels, flips, r.high) || (t.state && r.low > t.state->peak))
		bpf_loop(ROUNDS, judge_round, &t, 0);
	return 0;
}

/* Scopes of a process: itself, every process, its cgroups below the root, its groups. */
#define SCOPE_EVERY 1
#define SCOPE_CGROUPS 2
#define SCOPE_GROUPS (SCOPE_CGROUPS + LIMITFS_DEPTH - 1)
#define SCOPES (SCOPE_GROUPS + LIMITFS_GROUPS)

/* The number of one of them; 0: there is none. */
__noinline __u64 scope_of(__u32 index, __u32 tgid, const struct container *c, const struct membership *m)
{
	__u32 group;

	if (index == 0)
		return LIMITFS_PROCESS | tgid;
	if (index == SCOPE_EVERY)
		return LIMITFS_EVERY;
	if (index < SCOPE_GROUPS)
		return scope_in(c, index - SCOPE_CGROUPS + 1);
	index -= SCOPE_GROUPS;
	if (!m || index >= LIMITFS_GROUPS)
		return 0;
	barrier_var(index);
	group = *(volatile const __u32 *)&m->groups[index % LIMITFS_GROUPS];
	return group ? LIMITFS_GROUP | group : 0;
}

/* As many scopes as may matter. */
static __always_inline __u32 scopes_of(const struct container *c, const struct membership *m, __u32 wide)
{
	if (m)
		return SCOPES;
	return c && wide & LIMITFS_WIDE_CGROUPS ? SCOPE_CGROUPS + c->count - 1 : SCOPE_CGROUPS;
}

/* Totals */

static __always_inline __s64 *total_of(__u32 ledger, __u64 scope)
{
	struct total key = { .ledger = ledger, .scope = scope };
	__s64 *sum = bpf_map_lookup_elem(&totals, &key);

	if (sum)
		return sum;
	bpf_map_update_elem(&totals, &key, &nothing, BPF_NOEXIST);
	sum = bpf_map_lookup_elem(&totals, &key);
	if (!sum)
		overflow();
	return sum;
}

/* What one share changes, and who judges that. */
struct shift {
	const struct container *before;	/* NULL: it was nowhere */
	const struct container *after;
	__u64 scope;	/* at first that of a group, or 0 */
	__s64 taken;	/* from the scopes of `before` */
	__s64 given;	/* to those of `after` */
	__u32 ledger;
	__u32 kind;
	__u32 planting;	/* as in `judging` */
};

/* By how much the scope changes that is the other one's at that level; the scope that it was and is in at once. */
static __always_inline __s64 change_of(const struct shift *s, bool after, __u32 level)
{
	bool same = scope_in(s->before, level) == scope_in(s->after, level);

	if (after)
		return same ? s->given - s->taken : s->given;
	return same ? 0 : -s->taken;
}

/* The scopes of `after` come first, then those of `before`. */
static __always_inline __s64 find_change(__u32 index, struct shift *s)
{
	bool after = index < LIMITFS_DEPTH;
	__u32 level = index % LIMITFS_DEPTH;

	if (s->scope & LIMITFS_GROUP)
		return s->given - s->taken;
	s->scope = scope_in(after ? s->after : s->before, level);
	return s->scope ? change_of(s, after, level) : 0;
}

/* Judge a total by one watch, if that is about it. Not static: see above. */
__noinline int judge_sum(const struct watch *w, const __s64 *sum, __u64 scope, __u32 kind, __u32 planting)
{
	struct member m = { .start = scope };
	struct levels levels = {};
	struct state *st;
	__u64 flips;
	__s64 value;
	bool quiet;
	int i, done;

	if (!w || !(w->flags & LIMITFS_SUM) || w->kind != kind)
		return 0;
	resolve(&levels, w, 0);
	m.watch = w->id;
	quiet = planting && w->id >= planting;
	st = bpf_map_lookup_elem(&states, &m);
	for (i = 0; i < TOTAL_ROUNDS; i++) {
		flips = flips_of(st);
		value = sum ? *(volatile const __s64 *)sum : 0;
		if (!turns(&levels, flips, value))
			break;
		if (!st)
			st = state_of(&m);
		if (!st)
			break;
		done = take_in(st, &levels, quiet, flips, value);
		if (!done)
			break;
		if (done == TURNED && !quiet)
			ring_total(w->id, scope, LIMITFS_CROSSED, value, flips + 1);
	}
	return 0;
}

/* Judge a total by what is watched in `config`. */
static __always_inline void judge_total(struct shift *s, const __s64 *sum, __u64 config)
{
	const struct config *c = bpf_map_lookup_elem(&configs, &config);
	__u32 i;

	if (!c)
		return;
	for (i = 0; i < LIMITFS_WATCHES && i < *(volatile const __u32 *)&c->count; i++)
		judge_sum(&c->watches[i], sum, s->scope, s->kind, s->planting);
}

static long change_level(__u32 index, struct shift *s)
{
	__s64 change = find_change(index, s);
	__s64 *sum = change ? total_of(s->ledger, s->scope) : NULL;

	if (!sum)
		return 0;
	__sync_fetch_and_add(sum, change);
	judge_total(s, sum, s->scope);
	if (control.wide & LIMITFS_WIDE_TOTALS && s->scope < LIMITFS_GROUP && s->scope != LIMITFS_EVERY)
		judge_total(s, sum, LIMITFS_EVERY_CGROUP);
	return 0;
}

/* Shares */

static __always_inline bool is_summed(void)
{
	return SUMS && control.wide & LIMITFS_WIDE_SUMS;
}

static __always_inline bool is_in(const struct member *key, __u32 group)
{
	const struct membership *m = bpf_map_lookup_elem(&memberships, key);
	int i;

	if (m)
		for (i = 0; i < LIMITFS_GROUPS; i++)
			if (*(volatile const __u32 *)&m->groups[i] == group)
				return true;
	return false;
}

/* How many threads live, and in which cgroup its process is. */
static __always_inline __u32 leaf_now(__u64 task, __u32 *live)
{
	struct task_struct *at = (struct task_struct *)task;

	if (is_current(task) && bpf_core_field_exists(at->cgroups)) {
		at = bpf_get_current_task_btf();
		*live = at->signal->live.counter;
		return at->group_leader->cgroups->dfl_cgrp->kn->id;
	}
	*live = BPF_CORE_READ(at, signal, live.counter);
	return id_of(cgroup_of(at));
}

/* The upper half of a share: where the process of a task is now; 0: ended, or not in the group. */
__noinline __u32 whereabouts(__u64 task, const struct share *key, __u32 *live)
{
	struct member member = {};
	__u32 leaf;

	if (!key || !live)
		return 0;
	leaf = leaf_now(task, live);
	if (!*live)
		return 0;
	if (!key->group)
		return leaf;
	member.tgid = key->tgid;
	member.start = key->start;
	return is_in(&member, key->group);
}

enum how {
	AS_IT_IS,
	MOVED,	/* nothing can be measured, it has only moved */
	ENDED,
};

/* Whose shares are to be brought up to date. */
struct keeping {
	__u64 task;
	__u64 owner;	/* a task_struct, as `task` */
	struct membership *membership;
	struct member member;	/* who it is, without a watch */
	__u32 how;
};

#define CHANGED 1
#define NOWHERE 2
#define UNKNOWN 4	/* in a cgroup whose ancestors are to be found first */

/*
 * Bring a share up to date, change the totals by the difference, and judge
 * them. Not static: see above. `kind` holds also how, above it.
 */
__noinline int exchange(__u64 *share, const struct share *key, __u64 task, __u64 owner, __u32 kind)
{
	struct shift s = { .kind = kind % LIMITFS_KINDS };
	__u32 how = kind / LIMITFS_KINDS, where = 0, live = 0, rounds;
	__u64 before, value = 0;

	if (!share || !key)
		return 0;
	if (how != ENDED) {
		/*
		 * First the value, then whether the process lives and where it
		 * is: what it had before it ended or went counts for nobody.
		 * Of a first thread that has ended the others know the value.
		 */
		value = how == MOVED ? *share : measure((void *)task, s.kind);
		where = whereabouts(owner, key, &live);
	}
	if (!key->group) {
		s.after = container_by(where);
		if (where && !s.after)
			return UNKNOWN;
	}
	value = where ? (__u64)where << 32 | (__u32)value : 0;
	before = __sync_lock_test_and_set(share, value);
	if (before == value)
		return where ? 0 : NOWHERE;
	s.ledger = key->ledger;
	s.taken = (__s32)before;
	s.given = (__s32)value;
	rounds = 2 * LIMITFS_DEPTH;
	if (key->group) {
		s.scope = LIMITFS_GROUP | key->group;
		rounds = 1;
	} else if (before >> 32 == where) {
		s.before = s.after;
		rounds = s.after ? s.after->count : 0;
	} else {
		s.before = container_by(before >> 32);
	}
	bpf_loop(rounds, change_level, &s, 0);
	/* Nobody else can have changed it meanwhile, and who moves it looks himself. */
	if (live == 1 && before >> 32 == where && is_current(owner) && is_alone())
		return 0;
	return where ? CHANGED : CHANGED | NOWHERE;
}

/* Not static: see above. */
__noinline int find_container(__u64 owner)
{
	return !!container_of_task((struct task_struct *)owner);
}

#define KINDS (LAST_KIND - FIRST_KIND + 1)

/* One share: of one kind, in its cgroup (first) or in one of its groups. */
static long keep(__u32 index, struct keeping *k)
{
	struct share key = { .tgid = k->member.tgid, .start = k->member.start };
	__u32 kind = FIRST_KIND + index % KINDS, slot = index / KINDS;
	__u64 *share;
	__u32 live = 0;
	int i, done;

	if (slot > LIMITFS_GROUPS || kind >= LIMITFS_KINDS)
		return 1;
	key.ledger = control.ledgers[kind];
	if (!key.ledger)
		return 0;
	if (slot) {
		if (!k->membership)
			return 1;
		slot--;
		barrier_var(slot);
		key.group = *(volatile const __u32 *)&k->membership->groups[slot % LIMITFS_GROUPS];
		if (!key.group)
			return 0;
	}
	share = bpf_map_lookup_elem(&shares, &key);
	if (!share) {
		if (k->how != AS_IT_IS || !whereabouts(k->owner, &key, &live))
			return 0;
		bpf_map_update_elem(&shares, &key, &nothing, BPF_NOEXIST);
		share = bpf_map_lookup_elem(&shares, &key);
		if (!share) {
			overflow();
			return 0;
		}
	}
	/*
	 * Again where it changed: another processor may have put in a newer
	 * value meanwhile. Unrolled, as verifiers before 6.2 take no loop that
	 * is entered in its middle, which is how the compiler makes this one.
	 */
#pragma unroll
	for (i = 0; i < SHARE_ROUNDS; i++) {
		done = exchange(share, &key, k->task, k->owner, kind + k->how * LIMITFS_KINDS);
		if (done & UNKNOWN)
			find_container(k->owner);
		else if (!(done & CHANGED))
			break;
	}
	if (done & NOWHERE)
		bpf_map_delete_elem(&shares, &key);
	return 0;
}

/* Ends, of a process or of its being somewhere */

/* Those whose watches end, and where. */
struct ending {
	const struct config *config;
	const struct container *from;
	const struct container *to;
	const struct membership *membership;
	bool single;	/* `config` is of one process or one cgroup */
	bool present;	/* it is the current task whose process ends */
	struct subject subject;
};

/* What the current task still has: its peak, if it was never near a level. Not static: see above. */
__noinline int raise_last(struct state *st, __u32 kind)
{
	if (st)
		raise_peak(st, measure(bpf_get_current_task_btf(), kind));
	return 0;
}

static long end_one(__u32 index, struct ending *e)
{
	struct subject *s = &e->subject;
	const struct watch *w;
	struct state *st;

	if (index >= LIMITFS_WATCHES)
		return 1;
	w = &e->config->watches[index];
	/* Of a cgroup its totals end, of a process what it was a member for. */
	if (!(w->flags & LIMITFS_SUM) != !!s->member.tgid)
		return 0;
	s->member.watch = w->id;
	st = bpf_map_lookup_elem(&states, &s->member);
	/* Only what user space knows is worth waking it, unless it asked for just that one. */
	if (!e->single && (!st || !st->told))
		return 0;
	if (st) {
		st->gone = LIMITFS_ENDS;
		/* All others are always measured. */
		if (FIRST_KIND == LIMITFS_MEMORY && e->present)
			raise_last(st, w->kind);
	}
	if (ring(s, LIMITFS_GONE, st ? st->peak : 0, flips_of(st))) {
		bpf_map_delete_elem(&states, &s->member);
		return 0;
	}
	st = state_of(&s->member);
	if (st)
		st->gone = LIMITFS_UNTOLD;
	drop();
	return 0;
}

static __always_inline void end_config(struct ending *e, __u64 scope, bool single)
{
	e->config = bpf_map_lookup_elem(&configs, &scope);
	e->single = single;
	if (e->config && (!e->config->start || e->config->start == e->subject.member.start))
		bpf_loop(e->config->count, end_one, e, 0);
}

static long end_scope(__u32 index, struct ending *e)
{
	end_config(e, scope_of(index, e->subject.member.tgid, e->from, e->membership), index == 0);
	return 0;
}

static long depart_level(__u32 level, struct ending *e)
{
	__u64 scope = scope_in(e->from, level);

	if (scope && scope != scope_in(e->to, level))
		end_config(e, scope, false);
	return !scope;
}

/* A process is no longer a member of the scopes that it has left. */
__noinline int depart(const struct share *process, __u32 from, __u32 to)
{
	struct ending e = {};

	if (!process || from == to)
		return 0;
	e.subject.member.tgid = process->tgid;
	e.subject.member.start = process->start;
	e.from = container_by(from);
	e.to = container_by(to);
	bpf_loop(LIMITFS_DEPTH, depart_level, &e, 0);
	return 0;
}

/*
 * There is a state because of the cgroup `leaf` that a process, `owner`, is in,
 * or was a moment ago: keep which, for when it leaves.
 */
__noinline int place(__u64 owner, __u32 leaf)
{
	struct task_struct *task = (struct task_struct *)owner;
	struct share key = { .tgid = BPF_CORE_READ(task, tgid), .start = start_of(task) };
	const struct container *now;
	__u64 *where, word;

	where = bpf_map_lookup_elem(&shares, &key);
	if (!where) {
		bpf_map_update_elem(&shares, &key, &nothing, BPF_NOEXIST);
		where = bpf_map_lookup_elem(&shares, &key);
		if (!where) {
			overflow();
			return 0;
		}
	}
	word = __sync_lock_test_and_set(where, (__u64)leaf << 32 | 1);
	if (word)
		depart(&key, word >> 32, leaf);
	now = container_of_task(task);
	if (now && (__u32)now->leaf != leaf) {
		__sync_lock_test_and_set(where, now->leaf << 32 | 1);
		depart(&key, leaf, now->leaf);
	}
	if (is_last(task))
		bpf_map_delete_elem(&shares, &key);
	return 0;
}

/* It was moved: is it a member of what it has left? */
__noinline int follow(__u64 owner)
{
	struct task_struct *task = (struct task_struct *)owner;
	struct share key = { .tgid = BPF_CORE_READ(task, tgid), .start = start_of(task) };
	const struct container *now;
	__u64 *where, word;

	where = bpf_map_lookup_elem(&shares, &key);
	now = container_of_task(task);
	if (!where || !now)
		return 0;
	word = __sync_lock_test_and_set(where, now->leaf << 32 | 1);
	depart(&key, word >> 32, now->leaf);
	return 0;
}

/* Events */

/*
 * What is watched on one process. The bit spares all others the map, which
 * would be most of what they pay; some share theirs with a watched one.
 */
static __always_inline const struct config *config_of(__u32 tgid)
{
	__u64 scope = LIMITFS_PROCESS | tgid;
	__u32 slot = tgid % LIMITFS_MARKS;

	if (!(control.marks[slot / 32] >> slot % 32 & 1))
		return NULL;
	return bpf_map_lookup_elem(&configs, &scope);
}

/* Whether anything is to be heard of this process. */
static __always_inline bool concerns(__u32 tgid)
{
	return control.wide || config_of(tgid);
}

/* The number that a pointer is: the verifier lets none be computed with. */
static __always_inline __u64 number_of(void *pointer)
{
	void *volatile spilled = pointer;
	__u64 number = 0;

	bpf_probe_read_kernel(&number, sizeof(number), (const void *)&spilled);
	return number;
}

/* The process of a task. */
static __always_inline __u64 process_number(struct task_struct *task)
{
	return (__u64)BPF_CORE_READ(task, group_leader);
}

/* By all watches of a scope. */
static __always_inline void judge_config(struct judging *j, const struct config *c)
{
	__u32 i;

	/* Volatile, so that the compiler leaves the loop as the verifier understands it. */
	for (i = 0; i < LIMITFS_WATCHES && i < *(volatile const __u32 *)&c->count; i++)
		judge_watch(j->task, j->owner, &c->watches[i], &j->subject, j->planting);
}

/* Of a scope beyond the process itself. */
static long judge_scope(__u32 index, struct judging *j)
{
	__u64 scope = scope_of(j->first + index, 0, j->container, j->membership);
	const struct config *c = bpf_map_lookup_elem(&configs, &scope);

	if (c)
		judge_config(j, c);
	return 0;
}

/*
 * By what is watched on the process, `c`, and beyond. Not static: see above.
 * To be called by `look_as`; returns what is to be placed.
 */
__noinline __u32 judge_as(__u64 task, __u64 owner, const struct config *c, __u32 planting)
{
	struct judging j = { .task = task, .owner = owner, .planting = planting };
	__u32 wide = control.wide & ~LIMITFS_WIDE_SUMS;

	identify(&j.subject.member, owner);
	/* Nothing as well, but nothing that the verifier counts on. */
	j.subject.tid = control.zero;
	/* A number that is used again is another process. */
	if (c && c->start == j.subject.member.start)
		judge_config(&j, c);
	if (!wide)
		return 0;
	j.first = wide & LIMITFS_WIDE_EVERY ? SCOPE_EVERY : SCOPE_CGROUPS;
	j.subject.member.watch = 0;
	if (wide & LIMITFS_WIDE_CGROUPS)
		j.container = container_of_task((struct task_struct *)owner);
	if (wide & LIMITFS_WIDE_GROUPS)
		j.membership = bpf_map_lookup_elem(&memberships, &j.subject.member);
	if (planting && j.membership)
		j.membership->seen = 1;
	bpf_loop(scopes_of(j.container, j.membership, wide) - j.first, judge_scope, &j, 0);
	/* Something has turned, perhaps because of its cgroup. */
	return j.subject.tid && j.container ? j.container->leaf : 0;
}

/* The same for sums; apart, as the stack of a program is small. */
__noinline int count_as(__u64 task, __u64 owner, __u32 how)
{
	struct keeping k = { .task = task, .owner = owner, .how = how };

	identify(&k.member, owner);
	if (control.wide & LIMITFS_WIDE_GROUPS)
		k.membership = bpf_map_lookup_elem(&memberships, &k.member);
	bpf_loop(k.membership ? KINDS * (1 + LIMITFS_GROUPS) : KINDS, keep, &k, 0);
	return 0;
}

/*
 * Something of `task` has changed, or may have; judge what it means for the
 * process of `owner`, which has the same: its own, or a partner.
 */
static __always_inline void look_as(__u64 task, __u64 owner, __u32 tgid, __u32 planting)
{
	const struct config *c = config_of(tgid);
	__u32 leaf;

	if (!c && !control.wide)
		return;
	leaf = judge_as(task, owner, c, planting);
	if (leaf)
		place(owner, leaf);
	if (is_summed())
		count_as(task, owner, AS_IT_IS);
}

/* Something of the current task has changed. */
static __always_inline void look(void)
{
	__u64 task = bpf_get_current_task();

	look_as(task, task, bpf_get_current_task_btf()->tgid, 0);
}

/* Something of the process of `task` has changed. */
static __always_inline void look_at_process(struct task_struct *task)
{
	__u64 process = process_number(task);

	look_as(process, process, task->tgid, 0);
}

/* A child begins in the groups of its parent. Called before `look`. */
static __always_inline void inherit(struct task_struct *parent, struct task_struct *child)
{
	struct member from = { .tgid = parent->tgid }, to = { .tgid = child->tgid };
	struct membership *m;

	if (!(control.wide & LIMITFS_WIDE_GROUPS) || from.tgid == to.tgid)
		return;
	from.start = start_of(parent);
	to.start = start_of(child);
	m = bpf_map_lookup_elem(&memberships, &from);
	if (m && bpf_map_update_elem(&memberships, &to, m, BPF_NOEXIST))
		overflow();
}

/* The watches on a process that ends. */
__noinline int end_watches(void)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct ending e = {
		.present = true,
		.subject = { .member = { .tgid = task->tgid, .start = start_of(task) } },
	};
	struct share placed = { .tgid = e.subject.member.tgid, .start = e.subject.member.start };
	__u64 scope = LIMITFS_PROCESS | placed.tgid;
	__u32 wide = control.wide;

	describe(&e.subject, task);
	if (wide & LIMITFS_WIDE_CGROUPS) {
		e.from = container_of_task(task);
		bpf_map_delete_elem(&shares, &placed);
	}
	if (wide & LIMITFS_WIDE_GROUPS)
		e.membership = bpf_map_lookup_elem(&memberships, &e.subject.member);
	bpf_loop(scopes_of(e.from, e.membership, wide), end_scope, &e, 0);
	e.config = bpf_map_lookup_elem(&configs, &scope);
	if (e.config && e.config->start == placed.start)
		bpf_map_delete_elem(&configs, &scope);
	return 0;
}

#define EEXIST 17

/*
 * Whether it is with this thread that its process ends, at sched_process_exit
 * (its context). Once for each process: of threads that end together, all but
 * the first may find that none is left, so where the kernel does not say who
 * was the last, it is who asks first.
 */
static __always_inline bool ends_process(unsigned long long *context, struct task_struct *task)
{
	struct member key = { .tgid = task->tgid };

	/* Volatile: to read it is forbidden where there is none. */
	if (bpf_core_type_exists(btf_trace_sched_process_exit___last))
		return *(volatile unsigned long long *)&context[1];
	if (!is_last(task))
		return false;
	key.start = start_of(task);
	return bpf_map_update_elem(&ended, &key, &nothing, BPF_NOEXIST) != -EEXIST;
}

/* The current task is the last thread of its process, and ends. */
static __always_inline void end(void)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct member member = { .tgid = task->tgid };

	if (!concerns(member.tgid))
		return;
	end_watches();
	if (is_summed())
		count_as(0, bpf_get_current_task(), ENDED);
	if (control.wide & LIMITFS_WIDE_GROUPS) {
		member.start = start_of(task);
		bpf_map_delete_elem(&memberships, &member);
	}
}

/* A process was moved to another cgroup, of this or of another hierarchy. */
SEC("?tp_btf/cgroup_attach_task")
int BPF_PROG(cgroup_attach_task, struct cgroup *to, const char *path, struct task_struct *task)
{
	__u64 process = process_number(task);
	bool ended = BPF_CORE_READ(task, group_leader, flags) & PF_EXITING;

	if (control.wide & LIMITFS_WIDE_CGROUPS)
		follow(process);
	if (!ended)
		look_as(process, process, task->tgid, 0);
	else if (is_summed())
		count_as(process, process, MOVED);
	return 0;
}

static __always_inline bool is_unified(struct cgroup *cgroup)
{
	return BPF_CORE_READ(cgroup, root, hierarchy_id) == 0;
}

/* Nobody is in it any more. */
SEC("?tp_btf/cgroup_rmdir")
int BPF_PROG(cgroup_rmdir, struct cgroup *cgroup)
{
	__u64 id = BPF_CORE_READ(cgroup, kn, id);
	struct ending e = { .subject = { .member = { .start = id } } };
	struct total key = { .scope = id };
	__u32 kind, low = id;

	if (!control.wide || !is_unified(cgroup))
		return 0;
	end_config(&e, id, true);
	end_config(&e, LIMITFS_EVERY_CGROUP, false);
	bpf_map_delete_elem(&containers, &low);
	for (kind = FIRST_KIND; kind <= LAST_KIND; kind++) {
		key.ledger = control.ledgers[kind];
		bpf_map_delete_elem(&totals, &key);
	}
	return 0;
}

/* Not static: see above. */
__noinline int judge_scope_total(__u64 scope, __u64 config, __u32 planting)
{
	struct shift s = { .scope = scope, .planting = planting };
	struct total key = { .scope = scope };
	__u32 kind;

	if (!SUMS)
		return 0;
#pragma unroll
	for (kind = FIRST_KIND; kind <= LAST_KIND; kind++) {
		s.kind = kind;
		s.ledger = key.ledger = control.ledgers[kind];
		judge_total(&s, bpf_map_lookup_elem(&totals, &key), config);
	}
	return 0;
}

/* Less can be worse. */
SEC("?tp_btf/cgroup_mkdir")
int BPF_PROG(cgroup_mkdir, struct cgroup *cgroup)
{
	if (control.wide & LIMITFS_WIDE_TOTALS && is_unified(cgroup))
		judge_scope_total(id_of(cgroup), LIMITFS_EVERY_CGROUP, 0);
	return 0;
}

/* For user space */

/* No more than there are numbers: PID_MAX_LIMIT. */
#define NUMBERS (1 << 22)

/* Addresses of task_structs; volatile, as the stack of `visit` has no room for them. */
struct visiting {
	__u64 first;
	volatile __u64 at;
	volatile __u64 thread;
};

struct searching {
	__u64 process;
	__u64 at;
	__u64 found;
};

static long search_living(__u32 index, struct searching *s)
{
	struct task_struct *at = (struct task_struct *)s->at, *process = (struct task_struct *)s->process;
	__u64 next, head;

	if (!(BPF_CORE_READ(at, flags) & PF_EXITING)) {
		s->found = s->at;
		return 1;
	}
	next = (__u64)BPF_CORE_READ(at, thread_node.next);
	head = (__u64)BPF_CORE_READ(process, signal) + bpf_core_field_offset(struct signal_struct, thread_head);
	s->at = next - bpf_core_field_offset(struct task_struct, thread_node);
	return next == head || !next;
}

/* A thread that lives: the first, or one that speaks for it where it has ended. 0: none. */
__noinline __u64 living_thread(__u64 process)
{
	struct searching s = { .process = process, .at = process };

	bpf_loop(NUMBERS, search_living, &s, 0);
	return s.found;
}

/* Whether that is the process that `look_at` is for. */
__noinline int is_sought(__u64 process)
{
	struct task_struct *task = (struct task_struct *)process;
	__u32 tgid = BPF_CORE_READ(task, tgid);

	if (!tgid || is_last(task))
		return 0;
	return !control.pid || (control.pid == tgid && control.start == start_of(task));
}

/* 1 ends the loop. */
static long visit(__u32 index, struct visiting *v)
{
	struct task_struct *at = (struct task_struct *)v->at;

	if (is_sought(v->at)) {
		v->thread = living_thread(v->at);
		if (v->thread) {
			control.seen++;
			look_as(v->thread, v->at, BPF_CORE_READ(at, tgid), control.plant);
		}
		if (control.pid)
			return 1;
	}
	at = (struct task_struct *)v->at;
	v->at = (__u64)BPF_CORE_READ(at, tasks.next) - bpf_core_field_offset(struct task_struct, tasks);
	return v->at == v->first;
}

/*
 * Do for every process that there is, or for one, what an event would. Watches
 * that are new tell nothing meanwhile: user space looks at their states then.
 * That it is an iterator is only so that it runs under RCU: the processes are
 * found in their own list, in which there are those, too, that iterators hide.
 */
SEC("?iter/task")
int look_at(void *ctx)
{
	struct visiting v = { .first = process_number(bpf_get_current_task_btf()) };

	if (!control.wanted)
		return 0;
	control.wanted = 0;
	v.at = v.first;
	bpf_loop(NUMBERS, visit, &v, 0);
	return 0;
}

/* Judge a total by watches that are new; user space looks at their states then. */
SEC("?syscall")
int plant(struct planting *argument)
{
	/* A copy: the verifier wants plain offsets into the argument. */
	struct planting a = *argument;

	judge_scope_total(a.scope, a.config, a.watch);
	return 0;
}

static long leave_one(__u32 index, struct keeping *k)
{
	return keep(KINDS + index, k);
}

/* Its share in the cgroup comes first, and stays. */
__noinline int end_shares(__u32 tgid, __u64 start, __u32 group)
{
	struct membership only = { .groups = { group } };
	struct keeping k = { .membership = &only, .member = { .tgid = tgid, .start = start }, .how = ENDED };

	bpf_loop(KINDS, leave_one, &k, 0);
	return 0;
}

__noinline int end_member(__u32 tgid, __u64 start, __u32 group)
{
	struct ending e = { .subject = { .member = { .tgid = tgid, .start = start } } };

	end_config(&e, LIMITFS_GROUP | group, false);
	return 0;
}

/* A process is no longer in a group; user space has taken it from `memberships` before. */
SEC("?syscall")
int leave(struct leaving *argument)
{
	struct leaving a = *argument;

	end_member(a.tgid, a.start, a.group);
	if (SUMS)
		end_shares(a.tgid, a.start, a.group);
	return 0;
}

#endif
