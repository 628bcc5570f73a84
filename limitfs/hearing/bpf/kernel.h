/* SPDX-License-Identifier: GPL-2.0 OR MIT */
/*
 * The few members of kernel structures that the programs read, found at load
 * through BTF (CO-RE). A whole vmlinux.h would say the same three times as
 * slowly. Trap: an array in such a structure that is indexed by a variable
 * takes the stride given here, so the element must be as large as the
 * kernel's.
 */
#ifndef LIMITFS_KERNEL_H
#define LIMITFS_KERNEL_H

#include <linux/types.h>
#include <linux/bpf.h>
#include <stdbool.h>

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

typedef struct {
	int counter;
} atomic_t;

typedef struct {
	__s64 counter;
} atomic64_t;

/* x86; TS_COMPAT in `status` is set while a 32-bit system call runs. */
struct thread_info {
	unsigned int status;
};

struct kuid {
	unsigned int val;
};

struct cred {
	struct kuid uid;
	struct kuid euid;
};

struct rlimit {
	unsigned long rlim_cur;
	unsigned long rlim_max;
};

struct list_head {
	struct list_head *next;
};

struct signal_struct {
	atomic_t live;
	struct list_head thread_head;
	void *pids[2];
	struct rlimit rlim[16];
	unsigned long maxrss;
	int group_exit_code;
};

struct fdtable {
	unsigned int max_fds;
	unsigned long *open_fds;
	unsigned long *full_fds_bits;
};

struct files_struct {
	atomic_t count;
	struct fdtable *fdt;
};

struct percpu_counter {
	__s64 count;
	int *counters;
};

struct task_struct;

struct mm_struct {
	unsigned long hiwater_rss;
	unsigned long hiwater_vm;
	unsigned long total_vm;
	struct task_struct *owner;
	struct percpu_counter rss_stat[4];
};

/* Before 6.2 the counters were atomics. */
struct mm_rss_stat {
	atomic64_t count[4];
};

struct mm_struct___atomic {
	struct mm_rss_stat rss_stat;
};

struct kernfs_node {
	__u64 id;
};

struct cgroup;

struct cgroup_subsys_state {
	struct cgroup *cgroup;
	struct cgroup_subsys_state *parent;
};

struct cgroup_root {
	int hierarchy_id;
};

struct cgroup {
	struct cgroup_subsys_state self;
	int level;
	struct kernfs_node *kn;
	struct cgroup_root *root;
};

struct css_set {
	struct cgroup *dfl_cgrp;
};

struct task_struct {
	struct thread_info thread_info;
	unsigned int flags;
	int exit_code;
	int pid;
	int tgid;
	struct list_head tasks;
	struct list_head thread_node;
	struct task_struct *group_leader;
	struct task_struct *real_parent;
	struct mm_struct *mm;
	struct files_struct *files;
	struct signal_struct *signal;
	const struct cred *real_cred;
	struct css_set *cgroups;
	__u64 start_boottime;
	char comm[16];
};

#if defined(__TARGET_ARCH_x86)
struct pt_regs {
	long orig_ax;
};
#define SYSCALL_NUMBER(regs) ((regs)->orig_ax)
#elif defined(__TARGET_ARCH_arm64)
struct pt_regs {
	int syscallno;
};
#define SYSCALL_NUMBER(regs) ((regs)->syscallno)
#elif defined(__TARGET_ARCH_riscv)
struct pt_regs {
	long a7;
};
#define SYSCALL_NUMBER(regs) ((regs)->a7)
#else
struct pt_regs {
	long unused;
};
/* Unknown: no number, so every system call is taken to change something. */
#define SYSCALL_NUMBER(regs) (-1)
#endif

#pragma clang attribute pop

/* Since 6.16 it says whether this was the last thread of its process. */
typedef void (*btf_trace_sched_process_exit___last)(void *data, struct task_struct *task, bool last);

#define PF_EXITING 0x00000004
#define PF_KTHREAD 0x00200000

/* enum in pid_types.h */
#define PIDTYPE_TGID 1

/* enum in mm_types_task.h */
#define MM_FILEPAGES 0
#define MM_ANONPAGES 1
#define MM_SWAPENTS 2
#define MM_SHMEMPAGES 3

/*
 * A counter of an mm_struct that the verifier knows, without what each
 * processor keeps for itself. The atomics of old are none that it lets follow.
 */
#define COMMON(mm, which)									\
	(bpf_core_type_exists(struct mm_rss_stat) ?						\
		BPF_CORE_READ((struct mm_struct___atomic *)(mm), rss_stat.count[which].counter) :	\
		(mm)->rss_stat[which].count)

/* The same where its address is a number to the verifier. */
#define COMMON_AT(mm, which)									\
	(bpf_core_type_exists(struct mm_rss_stat) ?						\
		BPF_CORE_READ((struct mm_struct___atomic *)(mm), rss_stat.count[which].counter) :	\
		BPF_CORE_READ(mm, rss_stat[which].count))

#endif
