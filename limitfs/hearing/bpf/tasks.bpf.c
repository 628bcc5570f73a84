// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * threads: threads of a process, exactly; and the lives of processes: fork,
 * exec, and exit with the peaks of memory, so that a process that was born,
 * was large and died within a millisecond is still known.
 *
 * signal->live is what do_exit() counts down first; nr_threads, which /proc
 * shows, follows when the thread is released.
 */
#include "kernel.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include <bpf/bpf_core_read.h>
#include "limitfs.h"
#include "judge.bpf.h"

char LICENSE[] SEC("license") = "Dual MIT/GPL";

static __s64 measure(struct task_struct *task, __u32 kind)
{
	return BPF_CORE_READ(task, signal, live.counter);
}

static void bounds(struct task_struct *task, __u32 kind, struct range *r)
{
	r->low = r->high = measure(task, kind);
}

static __always_inline void record_life(struct task_struct *task, __u32 what, __u32 status, __s64 value, __u64 extra)
{
	struct subject s = {};

	if (!control.births)
		return;
	describe(&s, task);
	s.member.watch = status;
	s.member.tgid = task->tgid;
	s.member.start = start_of(task);
	ring(&s, what, value, extra);
}

SEC("?tp_btf/sched_process_fork")
int BPF_PROG(sched_process_fork, struct task_struct *parent, struct task_struct *child)
{
	if (child->tgid != parent->tgid)
		record_life(child, LIMITFS_FORK, 0, parent->tgid, 0);
	look(child);
	return 0;
}

/* The other threads of the process have ended before. */
SEC("?tp_btf/sched_process_exec")
int BPF_PROG(sched_process_exec, struct task_struct *task)
{
	record_life(task, LIMITFS_EXEC, 0, 0, 0);
	look(task);
	return 0;
}

/*
 * The highest mark is kept only up to the last unmapping; the counters may
 * have grown since, and are read here as the kernel reads them for rusage,
 * without asking every processor.
 */
#define COMMON(mm, which)									\
	(bpf_core_type_exists(struct mm_rss_stat) ?						\
		BPF_CORE_READ((struct mm_struct___atomic *)(mm), rss_stat.count[which].counter) :	\
		BPF_CORE_READ(mm, rss_stat[which].count))

static __always_inline void record_exit(struct task_struct *task)
{
	struct mm_struct *mm = BPF_CORE_READ(task, mm);
	int status = BPF_CORE_READ(task, signal, group_exit_code);
	__s64 memory, peak, virtual = 0, total;

	if (!status)
		status = BPF_CORE_READ(task, group_leader, exit_code);
	if (mm) {
		memory = COMMON(mm, 0) + COMMON(mm, 1) + COMMON(mm, 3);
		peak = BPF_CORE_READ(mm, hiwater_rss);
		total = BPF_CORE_READ(mm, total_vm);
		virtual = BPF_CORE_READ(mm, hiwater_vm);
		if (peak < memory)
			peak = memory;
		if (virtual < total)
			virtual = total;
	} else {
		/* Before 6.16 the memory is gone by now; this includes the programs before the last exec. */
		peak = BPF_CORE_READ(task, signal, maxrss);
	}
	record_life(task, LIMITFS_EXIT, status, peak, virtual);
}

SEC("?tp_btf/sched_process_exit")
int BPF_PROG(sched_process_exit, struct task_struct *task)
{
	if (!is_last(task)) {
		look(task);
		return 0;
	}
	record_exit(task);
	end(task);
	return 0;
}

/*
 * Before 6.16 sched_process_exit comes after the thread's joiner was woken, who
 * may have made another one by then. This comes before.
 */
SEC("?fentry/taskstats_exit")
int BPF_PROG(fentry_taskstats_exit, struct task_struct *task)
{
	look(task);
	return 0;
}
