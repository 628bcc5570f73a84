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

/* Others of the process live on. */
#define NOT_LAST (-1)

/*
 * Threads that are about to end, before 6.16: of the last one of a process the
 * peak of memory, in pages, from where the memory is still there to where it
 * is told.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, LIMITFS_CONFIGS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);	/* tid */
	__type(value, __s64);
} ending SEC(".maps");

/*
 * The highest mark is kept only up to the last unmapping; the counters may
 * have grown since, and are read here as the kernel reads them for rusage,
 * without asking every processor.
 */
static __always_inline __s64 peak_of(struct task_struct *task)
{
	struct mm_struct *mm = task->mm;
	__s64 now, mark;

	/* What is left of it includes the programs before the last exec. */
	if (!mm)
		return BPF_CORE_READ(task, signal, maxrss);
	now = COMMON(mm, MM_FILEPAGES) + COMMON(mm, MM_ANONPAGES) + COMMON(mm, MM_SHMEMPAGES);
	mark = mm->hiwater_rss;
	return now > mark ? now : mark;
}

static __always_inline void record_exit(struct task_struct *task, __s64 peak)
{
	int status = BPF_CORE_READ(task, signal, group_exit_code);

	if (!status)
		status = BPF_CORE_READ(task, group_leader, exit_code);
	record_life(task, LIMITFS_EXIT, status, peak);
}

SEC("?tp_btf/sched_process_exit")
int BPF_PROG(sched_process_exit, struct task_struct *task)
{
	__u32 key = task->pid;
	__s64 peak = NOT_LAST, *before = bpf_map_lookup_elem(&ending, &key);

	if (before) {
		peak = *before;
		bpf_map_delete_elem(&ending, &key);
	} else if (ends_process(ctx, task)) {
		peak = peak_of(task);
	}
	if (peak == NOT_LAST) {
		look();
		return 0;
	}
	record_exit(task, peak);
	end();
	return 0;
}

/*
 * Before 6.16 sched_process_exit comes after the memory is gone, and after the
 * thread's joiner was woken, who may have made another one by then. This comes
 * before, and is told which is the last.
 */
SEC("?fentry/taskstats_exit")
int BPF_PROG(fentry_taskstats_exit, struct task_struct *task, int last)
{
	__u32 key = task->pid;
	__s64 peak = last ? peak_of(task) : NOT_LAST;

	if (bpf_core_type_exists(btf_trace_sched_process_exit___last))
		return 0;
	if (!(control.lives & 1 << LIMITFS_EXIT) && !concerns(task->tgid))
		return 0;
	if (!last)
		look();
	bpf_map_update_elem(&ending, &key, &peak, BPF_ANY);
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
