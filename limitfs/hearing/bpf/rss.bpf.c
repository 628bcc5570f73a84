// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * memory, shared, swap: pages of a process, exactly.
 *
 * kmem:rss_stat fires after each change of a counter (since 6.2; before, after
 * some 64 to 128 changes of a thread, which is as exact as /proc is there).
 * Since 6.2 the counters are percpu_counters: their common part alone can be
 * off by a batch per processor, and asking every processor at each page fault
 * is dear. So the common part is taken with a margin, and the processors are
 * asked only while a level lies within it.
 */
#include "kernel.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include <bpf/bpf_core_read.h>
#include "limitfs.h"

#define FIRST_KIND LIMITFS_MEMORY
#define LAST_KIND LIMITFS_SWAP
#define SUMS false
#include "judge.bpf.h"

char LICENSE[] SEC("license") = "Dual MIT/GPL";

#define PROCESSORS 1024

/* What is to be added to a per-processor address, found by `find_processors`. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, PROCESSORS);
	__type(key, __u32);
	__type(value, __u64);
} offsets SEC(".maps");

/* Its own place on each processor tells where others are. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} anchor SEC(".maps");

struct bpf_array {
	void *pptrs[1];
} __attribute__((preserve_access_index));

struct processors {
	__u32 count;	/* in: possible ones */
	__u32 found;	/* out */
};

static long find_processor(__u32 cpu, struct processors *p)
{
	__u64 base = 0, offset, array = number_of(&anchor);
	__u32 zero = 0;
	void *here;

	bpf_probe_read_kernel(&base, sizeof(base),
			      (void *)(array + bpf_core_field_offset(struct bpf_array, pptrs)));
	here = bpf_map_lookup_percpu_elem(&anchor, &zero, cpu);
	if (!base || !here)
		return 1;
	offset = number_of(here) - base;
	if (bpf_map_update_elem(&offsets, &cpu, &offset, BPF_ANY))
		return 1;
	p->found++;
	return 0;
}

/* The kernel's own table, __per_cpu_offset, is not a symbol on every kernel. */
SEC("syscall")
int find_processors(struct processors *argument)
{
	struct processors p = *argument;

	if (bpf_core_type_exists(struct mm_rss_stat))
		p.found = p.count;	/* atomics: nobody has to be asked */
	else
		bpf_loop(p.count, find_processor, &p, 0);
	argument->found = p.found;
	return 0;
}

struct counting {
	__u64 counters;		/* per-processor address */
	__s64 sum;
};

static long ask_processor(__u32 cpu, struct counting *c)
{
	__u64 *offset = bpf_map_lookup_elem(&offsets, &cpu);
	int part = 0;

	if (!offset)
		return 1;
	bpf_probe_read_kernel(&part, sizeof(part), (void *)(c->counters + *offset));
	c->sum += part;
	return 0;
}

/* A negative sum is a page that was counted on one processor and not yet off another. */
static __always_inline __s64 positive(__s64 value)
{
	return value > 0 ? value : 0;
}

#define PARTS(address) (bpf_core_type_exists(struct mm_rss_stat) ? 0 : (__u64)(address))

/* One counter of a task. A macro, as an index into what the kernel has must be a constant. */
#define COUNTER(name, which)							\
	static __always_inline struct counting name(struct task_struct *task)	\
	{									\
		struct counting c = {};						\
		struct mm_struct *mm;						\
										\
		if (is_current((__u64)task)) {					\
			mm = bpf_get_current_task_btf()->mm;			\
			if (mm) {						\
				c.sum = COMMON(mm, which);			\
				c.counters = PARTS(mm->rss_stat[which].counters);	\
			}							\
			return c;						\
		}								\
		mm = BPF_CORE_READ(task, mm);					\
		if (mm) {							\
			c.sum = COMMON_AT(mm, which);				\
			c.counters = PARTS(BPF_CORE_READ(mm, rss_stat[which].counters));	\
		}								\
		return c;							\
	}

COUNTER(file_pages, MM_FILEPAGES)
COUNTER(anonymous_pages, MM_ANONPAGES)
COUNTER(swap_entries, MM_SWAPENTS)
COUNTER(shared_pages, MM_SHMEMPAGES)

static __always_inline __s64 exactly(struct counting c)
{
	if (c.counters)
		bpf_loop(control.processors, ask_processor, &c, 0);
	return positive(c.sum);
}

static __always_inline __s64 measure(struct task_struct *task, __u32 kind)
{
	if (kind == LIMITFS_SHARED)
		return exactly(shared_pages(task));
	if (kind == LIMITFS_SWAP)
		return exactly(swap_entries(task));
	return exactly(file_pages(task)) + exactly(anonymous_pages(task)) +
	       exactly(shared_pages(task));
}

static __always_inline void bounds(struct task_struct *task, __u32 kind, struct range *r)
{
	__s64 margin = bpf_core_type_exists(struct mm_rss_stat) ? 0 : control.margin;
	__s64 about;

	if (kind == LIMITFS_SHARED) {
		about = shared_pages(task).sum;
	} else if (kind == LIMITFS_SWAP) {
		about = swap_entries(task).sum;
	} else {
		about = file_pages(task).sum + anonymous_pages(task).sum +
			shared_pages(task).sum;
		margin *= 3;
	}
	r->low = positive(about - margin);
	r->high = positive(about + margin);
}

static __always_inline bool is_alone(void)
{
	return true;
}

/*
 * Whether this is a process, and has this memory. While fork makes one, its
 * numbers and its leader are still its parent's; exec fills memory that nobody
 * has yet.
 */
static __always_inline bool has(struct task_struct *task, struct mm_struct *mm)
{
	return BPF_CORE_READ(task, mm) == mm && BPF_CORE_READ(task, signal, pids[PIDTYPE_TGID]);
}

/*
 * The current process, if the memory is its own, and the one to whom the
 * kernel counts it: another one with reclaim, and where processes share it
 * (vfork, CLONE_VM). Of more than two that share it the others hear nothing:
 * all processes would have to be searched at each page fault.
 */
SEC("?tp_btf/rss_stat")
int BPF_PROG(rss_stat, struct mm_struct *mm)
{
	struct task_struct *task = bpf_get_current_task_btf(), *owner;
	bool own = task->mm == mm;

	if (own)
		look();
	/* Without CONFIG_MEMCG nobody knows. */
	if (!bpf_core_field_exists(mm->owner))
		return 0;
	owner = mm->owner;
	if (!owner || (own && owner->tgid == task->tgid))
		return 0;
	/* Once more, as a number. */
	owner = BPF_CORE_READ(mm, owner);
	if (has(owner, mm))
		look_as(own ? bpf_get_current_task() : (__u64)owner, (__u64)owner, BPF_CORE_READ(owner, tgid), 0);
	return 0;
}

/* Its memory was copied before, by its parent; what it has is its own from here. */
SEC("?tp_btf/sched_process_fork")
int BPF_PROG(sched_process_fork, struct task_struct *parent, struct task_struct *child)
{
	inherit(parent, child);
	if (control.wide && child->tgid != parent->tgid)
		look_at_process(child);
	return 0;
}

SEC("?tp_btf/sched_process_exit")
int BPF_PROG(sched_process_exit, struct task_struct *task)
{
	if (ends_process(ctx, task))
		end();
	return 0;
}
