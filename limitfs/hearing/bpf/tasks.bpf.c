// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * threads: threads of a process, exactly; and the lives of processes: fork,
 * exec, and exit with the peak of memory, so that a process that was born,
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

#define FIRST_KIND LIMITFS_THREADS
#define LAST_KIND LIMITFS_PROCESSES
#define SUMS true
#include "judge.bpf.h"

char LICENSE[] SEC("license") = "Dual MIT/GPL";

static __always_inline __s64 measure(struct task_struct *task, __u32 kind)
{
	int live = BPF_CORE_READ(task, signal, live.counter);

	return kind == LIMITFS_PROCESSES ? live > 0 : live;
}

static __always_inline void bounds(struct task_struct *task, __u32 kind, struct range *r)
{
	r->low = r->high = measure(task, kind);
}

static __always_inline bool is_alone(void)
{
	return true;
}

/* The name is that of the process, as /proc/PID/comm has it, whichever thread this is. */
static __always_inline void record_life(struct task_struct *task, __u32 what, __u32 status, __s64 value)
{
	struct task_struct *process = BPF_CORE_READ(task, group_leader);
	struct record *r;

	if (!(control.lives & 1 << what))
		return;
	r = new_record(what, value, 0);
	if (!r)
		return;
	r->start = start_of(task);
	r->watch = status;
	r->tgid = BPF_CORE_READ(task, tgid);
	r->tid = BPF_CORE_READ(task, pid);
	r->uid = BPF_CORE_READ(task, real_cred, uid.val);
	r->parent = BPF_CORE_READ(task, real_parent, tgid);
	bpf_probe_read_kernel_str(r->comm, sizeof(r->comm), &process->comm);
	bpf_ringbuf_submit(r, 0);
}

SEC("?tp_btf/sched_process_fork")
int BPF_PROG(sched_process_fork, struct task_struct *parent, struct task_struct *child)
{
	if (child->tgid != parent->tgid)
		record_life(child, LIMITFS_FORK, 0, 0);
	inherit(parent, child);
	look_at_process(child);
	return 0;
}

/* The other threads of the process have ended before. */
SEC("?tp_btf/sched_process_exec")
int BPF_PROG(sched_process_exec, struct task_struct *task)
{
	record_life(task, LIMITFS_EXEC, 0, 0);
	look();
	return 0;
}

/* Peaks, in pages, of processes that are about to end: from where their memory is still there to where it is told. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, LIMITFS_CONFIGS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, __s64);
} ending SEC(".maps");

/*
 * The highest mark is kept only up to the last unmapping; the counters may
 * have grown since, and are read here as the kernel reads them for rusage,
 * without asking every processor.
 */
static __always_inline __s64 peak_of(struct mm_struct *mm)
{
	__s64 now = COMMON(mm, MM_FILEPAGES) + COMMON(mm, MM_ANONPAGES) + COMMON(mm, MM_SHMEMPAGES);
	__s64 mark = mm->hiwater_rss;

	return now > mark ? now : mark;
}

static __always_inline void record_exit(struct task_struct *task)
{
	struct mm_struct *mm = task->mm;
	int status = BPF_CORE_READ(task, signal, group_exit_code);
	__u32 key = task->tgid;
	__s64 peak, *before;

	if (!status)
		status = BPF_CORE_READ(task, group_leader, exit_code);
	before = bpf_map_lookup_elem(&ending, &key);
	if (mm)
		peak = peak_of(mm);
	else if (before)
		peak = *before;
	else
		/* What is left of it includes the programs before the last exec. */
		peak = BPF_CORE_READ(task, signal, maxrss);
	if (before)
		bpf_map_delete_elem(&ending, &key);
	record_life(task, LIMITFS_EXIT, status, peak);
}

SEC("?tp_btf/sched_process_exit")
int BPF_PROG(sched_process_exit, struct task_struct *task)
{
	if (!is_last(task)) {
		look();
		return 0;
	}
	record_exit(task);
	end();
	return 0;
}

/*
 * Before 6.16 sched_process_exit comes after the memory is gone, and after the
 * thread's joiner was woken, who may have made another one by then. This comes
 * before.
 */
SEC("?fentry/taskstats_exit")
int BPF_PROG(fentry_taskstats_exit, struct task_struct *task)
{
	struct mm_struct *mm = task->mm;
	__u32 key = task->tgid;
	__s64 peak;

	if (!is_last(task)) {
		look();
	} else if (control.lives & 1 << LIMITFS_EXIT && mm) {
		peak = peak_of(mm);
		bpf_map_update_elem(&ending, &key, &peak, BPF_ANY);
	}
	return 0;
}

/* Also between hierarchies of version 1, and of a single thread there: it is looked up who is where now. */
SEC("?tp_btf/cgroup_attach_task")
int BPF_PROG(record_move, struct cgroup *to, const char *path, struct task_struct *task)
{
	record_life(task, LIMITFS_MOVE, 0, 0);
	return 0;
}

/* All of a cpuset of version 1 that has lost its last processor, one after the other. */
SEC("?tp_btf/cgroup_transfer_tasks")
int BPF_PROG(record_transfer, struct cgroup *to, const char *path, struct task_struct *task)
{
	record_life(task, LIMITFS_MOVE, 0, 0);
	return 0;
}
