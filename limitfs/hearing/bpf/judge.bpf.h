/* SPDX-License-Identifier: GPL-2.0 OR MIT */
/*
 * Thresholds, hysteresis and the decision "crossed", for all programs.
 *
 * Who includes this defines before:
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
 */
#ifndef LIMITFS_JUDGE_H
#define LIMITFS_JUDGE_H

/* Other processors may turn a state between measuring and turning. */
#define ROUNDS 64
#define SHARE_ROUNDS 4

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, LIMITFS_CONFIGS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
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

/*
 * For sums: what each process had when it was last counted; `watch` holds the
 * kind. An event tells only the new value of its own process, so the sum grows
 * by the difference. User space adds the processes that were not touched yet
 * with BPF_NOEXIST, and their values to `control.base`: nobody counts twice.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, LIMITFS_STATES);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct member);
	__type(value, __s64);
} shares SEC(".maps");

/* A wake-up with details; what counts is in `states`. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, LIMITFS_RING);
} records SEC(".maps");

volatile struct control control;

static const struct state fresh;

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
};

static __s64 measure(struct task_struct *task, __u32 kind);
static void bounds(struct task_struct *task, __u32 kind, struct range *r);

/*
 * BPF_CORE_READ() where it is not on the way of every event: for each pointer
 * that is followed directly the verifier searches all types of the kernel, and
 * that is 2 ms of loading each.
 */
static __always_inline __u64 start_of(struct task_struct *task)
{
	return task->group_leader->start_boottime / LIMITFS_TICK;
}

static __always_inline void describe(struct subject *s, struct task_struct *task)
{
	s->tid = BPF_CORE_READ(task, pid);
	s->uid = BPF_CORE_READ(task, real_cred, euid.val);
	bpf_probe_read_kernel_str(s->comm, sizeof(s->comm), &task->comm);
}

__noinline int ring(const struct subject *s, __u32 what, __s64 value, __u64 flips)
{
	struct record *r;

	if (!s)
		return 0;
	r = bpf_ringbuf_reserve(&records, sizeof(*r), 0);
	if (!r) {
		__sync_fetch_and_add(&control.dropped, 1);
		return 0;
	}
	r->time = bpf_ktime_get_ns();
	r->value = value;
	r->flips = flips;
	r->start = s->member.start;
	r->watch = s->member.watch;
	r->what = what;
	r->tgid = s->member.tgid;
	r->tid = s->tid;
	r->uid = s->uid;
	r->unused = 0;
	__builtin_memcpy(r->comm, s->comm, sizeof(r->comm));
	bpf_ringbuf_submit(r, 0);
	return 1;
}

/*
 * The functions that are not static are verified once, by themselves, instead
 * of once for each path to each call: that is 50 ms instead of seconds to load.
 * They must take it that a pointer is NULL.
 */

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
		__sync_fetch_and_add(&control.full, 1);
	return st;
}

static __always_inline __u64 flips_of(const struct state *st)
{
	return st ? *(volatile const __u64 *)&st->flips : 0;
}

/*
 * Take `value` in, measured while the state was at `flips` or later. True: the
 * state turned, by this or by another processor, so measure again.
 */
__noinline int take(struct state *st, const struct levels *l, const struct subject *s, __u64 flips, __s64 value)
{
	__s64 before;

	if (!st || !l || !s)
		return 0;
	before = __sync_lock_test_and_set(&st->value, value);
	if (value > st->peak)
		st->peak = value;
	/* The first value of a process that is new is news as well. */
	if (l->change ? before == value && (flips || st->told) : !turns(l, flips, value))
		return 0;
	if (__sync_val_compare_and_swap(&st->flips, flips, flips + 1) != flips)
		return 1;
	/* Before the record: who reads the record finds the state told. */
	st->told = 1;
	if (!ring(s, LIMITFS_CROSSED, value, flips + 1))
		__sync_fetch_and_add(&st->lost, 1);
	return 1;
}

static __always_inline bool is_last(struct task_struct *task)
{
	/* do_exit() has counted this thread out already. */
	return BPF_CORE_READ(task, signal, live.counter) == 0;
}

/*
 * What goes from round to round and from watch to watch. The loops are
 * bpf_loop() (since 5.17): the verifier looks at each body once.
 */
struct turning {
	struct task_struct *task;
	struct subject *subject;
	struct state *state;
	struct levels levels;
	__u32 kind;
};

struct judging {
	struct task_struct *task;
	const struct config *config;
	struct subject subject;
	bool gone;
};

/* 1 ends the loop. */
static long judge_round(__u32 index, struct turning *t)
{
	/* First the state, then the value: what was counted once is not counted again. */
	__u64 flips = flips_of(t->state);
	__s64 value = measure(t->task, t->kind);

	if (turns(&t->levels, flips, value)) {
		/* What ends has ended for good: no state may come after that. */
		if (is_last(t->task))
			return 1;
		/* Only now, for it costs more than all the rest. */
		if (!t->subject->tid)
			describe(t->subject, t->task);
		/* A state is made when it first turns. */
		if (!t->state)
			t->state = state_of(&t->subject->member);
	}
	if (!t->state)
		return 1;
	return !take(t->state, &t->levels, t->subject, flips, value);
}

static __always_inline void judge_watch(struct judging *j, const struct watch *w)
{
	struct turning t = { .task = j->task, .subject = &j->subject, .kind = w->kind };
	struct range r = {};
	__u64 flips;

	j->subject.member.watch = w->id;
	resolve(&t.levels, w, limit_of(j->task, w));
	t.state = bpf_map_lookup_elem(&states, &j->subject.member);
	flips = flips_of(t.state);
	bounds(j->task, w->kind, &r);
	if (turns(&t.levels, flips, r.low) || turns(&t.levels, flips, r.high))
		bpf_loop(ROUNDS, judge_round, &t, 0);
}

static long judge(__u32 index, struct judging *j)
{
	if (index >= LIMITFS_WATCHES)
		return 1;
	if (!(j->config->watches[index].flags & LIMITFS_SUM))
		judge_watch(j, &j->config->watches[index]);
	return 0;
}

/* Bring the share of one process in the sum of a kind up to date. */
static long add_up(__u32 kind, struct judging *j)
{
	struct member m = { .watch = kind, .tgid = j->subject.member.tgid, .start = j->subject.member.start };
	__s64 value, before, zero = 0;
	__s64 *share;
	int i;

	if (!(control.sums & (1U << (kind & 31))))
		return 0;
	share = bpf_map_lookup_elem(&shares, &m);
	if (!share && !j->gone && !is_last(j->task)) {
		bpf_map_update_elem(&shares, &m, &zero, BPF_NOEXIST);
		share = bpf_map_lookup_elem(&shares, &m);
		if (!share)
			__sync_fetch_and_add(&control.full, 1);
	}
	if (!share)
		return 0;
	/* Again where it changed: another processor may have put in a newer value meanwhile. */
	for (i = 0; i < SHARE_ROUNDS; i++) {
		value = j->gone ? 0 : measure(j->task, kind);
		before = __sync_lock_test_and_set(share, value);
		if (before == value)
			break;
		__sync_fetch_and_add(&control.total[kind & (LIMITFS_KINDS - 1)], value - before);
	}
	if (j->gone)
		bpf_map_delete_elem(&shares, &m);
	return 0;
}

static long sum_round(__u32 index, struct turning *t)
{
	__u32 kind = t->kind & (LIMITFS_KINDS - 1);
	__u64 flips = flips_of(t->state);
	__s64 value = control.total[kind] + control.base[kind];

	if (!t->state || !turns(&t->levels, flips, value))
		return 1;
	describe(t->subject, t->task);
	return !take(t->state, &t->levels, t->subject, flips, value);
}

/* Judge the sum over all processes; the task is who changed it. */
static long judge_sum(__u32 index, struct judging *j)
{
	struct subject s = {};
	struct turning t = { .task = j->task, .subject = &s };
	const struct watch *w;

	if (index >= LIMITFS_WATCHES)
		return 1;
	w = &j->config->watches[index];
	if (!(w->flags & LIMITFS_SUM))
		return 0;
	t.kind = w->kind;
	s.member.watch = w->id;
	resolve(&t.levels, w, 0);
	t.state = state_of(&s.member);
	bpf_loop(ROUNDS, sum_round, &t, 0);
	return 0;
}

static __always_inline void judge_sums(struct judging *j)
{
	if (!control.sums)
		return;
	bpf_loop(LIMITFS_KINDS, add_up, j, 0);
	/* No watch yet while user space still counts the present. */
	if (j->config)
		bpf_loop(j->config->count, judge_sum, j, 0);
}

/* Something of `task` has changed, or may have. */
static __always_inline void look(struct task_struct *task)
{
	struct judging j = { .task = task };
	__u32 key = task->tgid;
	bool every = control.every;

	j.config = bpf_map_lookup_elem(&configs, &key);
	if (!j.config && !every)
		return;
	j.subject.member.tgid = key;
	j.subject.member.start = start_of(task);
	if (j.config && j.config->start == j.subject.member.start)
		bpf_loop(j.config->count, judge, &j, 0);
	if (!every)
		return;
	key = LIMITFS_EVERY;
	j.config = bpf_map_lookup_elem(&configs, &key);
	if (j.config)
		bpf_loop(j.config->count, judge, &j, 0);
	judge_sums(&j);
}

/* One watch on a process that has ended. */
static long end_one(__u32 index, struct judging *j)
{
	struct subject *s = &j->subject;
	const struct watch *w;
	struct state *st;

	if (index >= LIMITFS_WATCHES)
		return 1;
	w = &j->config->watches[index];
	if (w->flags & LIMITFS_SUM)
		return 0;
	s->member.watch = w->id;
	st = bpf_map_lookup_elem(&states, &s->member);
	/* Over all processes, only those that user space knows are worth waking it. */
	if (!j->config->start && (!st || !st->told))
		return 0;
	if (ring(s, LIMITFS_GONE, st ? st->value : 0, flips_of(st))) {
		bpf_map_delete_elem(&states, &s->member);
		return 0;
	}
	st = state_of(&s->member);
	if (st)
		st->gone = 1;
	return 0;
}

/* `task` is the last thread of its process, and ends. */
static __always_inline void end(struct task_struct *task)
{
	struct judging j = { .task = task, .gone = true };
	__u32 key = LIMITFS_EVERY;

	j.subject.member.tgid = task->tgid;
	j.subject.member.start = start_of(task);
	describe(&j.subject, task);
	j.config = control.every ? bpf_map_lookup_elem(&configs, &key) : NULL;
	if (j.config)
		bpf_loop(j.config->count, end_one, &j, 0);
	judge_sums(&j);
	key = task->tgid;
	j.config = bpf_map_lookup_elem(&configs, &key);
	if (!j.config || j.config->start != j.subject.member.start)
		return;
	bpf_loop(j.config->count, end_one, &j, 0);
	bpf_map_delete_elem(&configs, &key);
}

static __always_inline void plant(struct seed *a, const struct watch *w)
{
	struct subject s = { .member = a->member };
	struct state *st = state_of(&s.member);
	struct levels l;

	a->error = 2;
	if (!st)
		return;
	a->error = 0;
	resolve(&l, w, a->limit);
	st->told = 1;
	if (l.change && !st->flips)
		st->value = a->value;
	if (flips_of(st) != a->flips)
		a->error = 3;
	else if (!l.change)
		take(st, &l, &s, a->flips, a->value);
	a->flips = flips_of(st);
}

/*
 * User space has read a value of a member: at arming, and after records were
 * lost. It turns the state as an event would. The value may be out of date by
 * then, so user space reads again afterwards, until it reads the same.
 */
SEC("syscall")
int seed(struct seed *argument)
{
	/* A copy: the verifier wants plain offsets into the argument. */
	struct seed a = *argument;
	struct config *c = bpf_map_lookup_elem(&configs, &a.config);
	__u32 i;

	a.error = 1;
	if (c)
		for (i = 0; i < LIMITFS_WATCHES && i < c->count; i++)
			if (c->watches[i].id == a.member.watch)
				plant(&a, &c->watches[i]);
	argument->flips = a.flips;
	argument->error = a.error;
	return 0;
}

#endif
