// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * fds: open descriptors of a process, exactly.
 *
 * The kernel keeps no count, so it is taken from the bitmap of open
 * descriptors of the files_struct after everything that may have changed it.
 * Two sets of hooks tell when; user space loads the first that loads:
 *
 *   fentry or kprobe on the functions of the descriptor table: costs only
 *	those who open and close;
 *   sys_exit: the exit of every system call of every process.
 *
 * Fork, exec and exit are heard apart, in both.
 *
 * Not heard at once, but with the next event of the process: a descriptor that
 * a seccomp supervisor puts into it (sys_exit only).
 */
#include "kernel.h"
#include <asm/unistd.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include <bpf/bpf_core_read.h>
#include "limitfs.h"

#define FIRST_KIND LIMITFS_FDS
#define LAST_KIND LIMITFS_FDS
#define SUMS true
#include "judge.bpf.h"

char LICENSE[] SEC("license") = "Dual MIT/GPL";

#define WORD_BITS 64
#define CHUNK 8 /* words that are read at once, on the stack */

struct tally {
	const unsigned long *open_fds;
	const unsigned long *full_fds_bits;
	__u32 words;
	__u32 count;
};

/* A bit of full_fds_bits stands for a word of open_fds without a gap. */
static __always_inline bool is_full(const struct tally *t, __u32 from)
{
	__u64 full = 0;

	bpf_probe_read_kernel(&full, sizeof(full), t->full_fds_bits + from / WORD_BITS);
	return ((full >> (from % WORD_BITS)) & ((1U << CHUNK) - 1)) == (1U << CHUNK) - 1;
}

static long tally_chunk(__u32 index, struct tally *t)
{
	__u32 i, from = index * CHUNK, words = t->words - from, size;
	__u64 chunk[CHUNK];

	if (words > CHUNK)
		words = CHUNK;
	if (words == CHUNK && is_full(t, from)) {
		t->count += CHUNK * WORD_BITS;
		return 0;
	}
	size = words * sizeof(*chunk);
	/* The verifier of 6.1 does not see this by itself, and the compiler must not take it away. */
	barrier_var(size);
	if (size > sizeof(chunk))
		return 1;
	if (bpf_probe_read_kernel(chunk, size, t->open_fds + from))
		return 1;
	for (i = 0; i < CHUNK && i < words; i++)
		if (chunk[i])
			t->count += __builtin_popcountll(chunk[i]);
	return 0;
}

/* Not static: see judge.bpf.h. */
__noinline int tally(const struct tally *table)
{
	struct tally t;
	__u64 word = 0;

	if (!table)
		return 0;
	t = *table;
	if (t.words == 1) {
		bpf_probe_read_kernel(&word, sizeof(word), t.open_fds);
		return __builtin_popcountll(word);
	}
	bpf_loop((t.words + CHUNK - 1) / CHUNK, tally_chunk, &t, 0);
	return t.count;
}

/* Nearly always it is the current task, whose memory can be read directly. */
static __always_inline bool find_table(struct task_struct *task, struct tally *t)
{
	struct fdtable *table;

	if (is_current((__u64)task)) {
		task = bpf_get_current_task_btf();
		if (!task->files)
			return false;
		table = task->files->fdt;
		t->open_fds = table->open_fds;
		t->full_fds_bits = table->full_fds_bits;
		t->words = table->max_fds / WORD_BITS;
		return true;
	}
	table = BPF_CORE_READ(task, files, fdt);
	if (!table)
		return false;
	t->open_fds = BPF_CORE_READ(table, open_fds);
	t->full_fds_bits = BPF_CORE_READ(table, full_fds_bits);
	t->words = BPF_CORE_READ(table, max_fds) / WORD_BITS;
	return true;
}

static __always_inline __s64 measure(struct task_struct *task, __u32 kind)
{
	struct tally t = {};

	return find_table(task, &t) ? tally(&t) : 0;
}

static __always_inline void bounds(struct task_struct *task, __u32 kind, struct range *r)
{
	struct tally t = {};

	if (find_table(task, &t))
		r->high = t.words * WORD_BITS;
}

static __always_inline bool is_alone(void)
{
	struct files_struct *files = bpf_get_current_task_btf()->files;

	return files && files->count.counter == 1;
}

/* Through all processes. */
struct walk {
	struct files_struct *files;	/* of whoever has this table */
	__u64 first;
	__u64 at;	/* a task_struct */
};

static long look_at_next(__u32 index, struct walk *w)
{
	struct task_struct *at = (struct task_struct *)w->at;
	struct list_head *next = BPF_CORE_READ(at, tasks.next);

	at = (void *)next - bpf_core_field_offset(struct task_struct, tasks);
	w->at = (__u64)at;
	if (!next || w->at == w->first)
		return 1;
	if (BPF_CORE_READ(at, files) == w->files)
		look_as(bpf_get_current_task(), w->at, BPF_CORE_READ(at, tgid), 0);
	return 0;
}

/*
 * The table of the current process has changed, or may have. By CLONE_FILES
 * without CLONE_THREAD other processes may have the same one: that is so rare
 * that those who do it pay for a walk through all processes.
 */
static __always_inline void look_at_table(struct task_struct *task)
{
	struct files_struct *files = task->files;
	struct walk w = { .files = files };

	if (!files)
		return;
	look();
	/* A thread that ends has left the second before the first. Kernel threads share one, and are no processes. */
	if (files->count.counter <= task->signal->live.counter || task->flags & PF_KTHREAD)
		return;
	w.first = w.at = process_number(task);
	bpf_loop(NUMBERS, look_at_next, &w, 0);
}

/* The functions of the descriptor table. Their names differ between kernels, so each is tried. */

#define HOOK(kind, function)						\
	SEC("?" #kind "/" #function)					\
	int kind##_##function(void *ctx)				\
	{								\
		look_at_table(bpf_get_current_task_btf());		\
		return 0;						\
	}

/* The bit is set before, in alloc_fd(); dup2() and its like go past fd_install(). */
HOOK(fentry, fd_install)
HOOK(fexit, put_unused_fd)
HOOK(fexit, replace_fd)
HOOK(fexit, ksys_dup3)
HOOK(fexit, __x64_sys_dup2)
HOOK(fexit, __x64_sys_dup3)
HOOK(fexit, __ia32_sys_dup2)
HOOK(fexit, __ia32_sys_dup3)
HOOK(fexit, __arm64_sys_dup3)
HOOK(fexit, close_fd)
HOOK(fexit, __close_fd)
HOOK(fexit, file_close_fd)
HOOK(fexit, close_fd_get_file)
/* io_uring: before 6.8, and since. */
HOOK(fexit, __close_fd_get_file)
HOOK(fexit, io_close)
HOOK(fexit, __close_range)
HOOK(fexit, __x64_sys_close_range)
HOOK(fexit, __ia32_sys_close_range)
HOOK(fexit, __arm64_sys_close_range)

/* For the same functions by kprobe and kretprobe: one program, attached to each. */
SEC("?kprobe")
int table(void *ctx)
{
	look_at_table(bpf_get_current_task_btf());
	return 0;
}

/*
 * The system calls after which a process may have more or fewer descriptors.
 * Failed ones too: while openat(2) fails, its descriptor is there for a moment,
 * and another thread may have counted it.
 */

/* Younger than some headers; the same number everywhere. */
#define NR_OPEN_TREE_ATTR 467

#define SYSCALLS 512

static const __u8 changes[SYSCALLS] = {
#ifdef __NR_open
	[__NR_open] = 1,
#endif
#ifdef __NR_creat
	[__NR_creat] = 1,
#endif
	[__NR_openat] = 1,
	[__NR_openat2] = 1,
	[__NR_open_by_handle_at] = 1,
	[__NR_open_tree] = 1,
	[NR_OPEN_TREE_ATTR] = 1,
	[__NR_fsopen] = 1,
	[__NR_fsmount] = 1,
	[__NR_fspick] = 1,
	[__NR_mq_open] = 1,
	[__NR_close] = 1,
	[__NR_close_range] = 1,
	[__NR_dup] = 1,
#ifdef __NR_dup2
	[__NR_dup2] = 1,
#endif
	[__NR_dup3] = 1,
	[__NR_fcntl] = 1,		/* F_DUPFD */
#ifdef __NR_pipe
	[__NR_pipe] = 1,
#endif
	[__NR_pipe2] = 1,
	[__NR_socket] = 1,
	[__NR_socketpair] = 1,
	[__NR_accept] = 1,
	[__NR_accept4] = 1,
	[__NR_recvmsg] = 1,		/* SCM_RIGHTS, SCM_PIDFD */
	[__NR_recvmmsg] = 1,
	[__NR_getsockopt] = 1,		/* SO_PEERPIDFD */
#ifdef __NR_eventfd
	[__NR_eventfd] = 1,
#endif
	[__NR_eventfd2] = 1,
#ifdef __NR_epoll_create
	[__NR_epoll_create] = 1,
#endif
	[__NR_epoll_create1] = 1,
#ifdef __NR_signalfd
	[__NR_signalfd] = 1,
#endif
	[__NR_signalfd4] = 1,
	[__NR_timerfd_create] = 1,
#ifdef __NR_inotify_init
	[__NR_inotify_init] = 1,
#endif
	[__NR_inotify_init1] = 1,
	[__NR_fanotify_init] = 1,
	[__NR_read] = 1,		/* of fanotify and userfaultfd */
	[__NR_readv] = 1,
	[__NR_userfaultfd] = 1,
	[__NR_memfd_create] = 1,
#ifdef __NR_memfd_secret
	[__NR_memfd_secret] = 1,
#else
	[447] = 1,
#endif
	[__NR_pidfd_open] = 1,
	[__NR_pidfd_getfd] = 1,
	[__NR_clone] = 1,		/* CLONE_PIDFD */
	[__NR_clone3] = 1,
	[__NR_unshare] = 1,		/* CLONE_FILES: no longer changed by others */
	[__NR_ioctl] = 1,		/* drivers, namespaces, seccomp, KVM, DMA buffers ... */
	[__NR_perf_event_open] = 1,
	[__NR_bpf] = 1,
	[__NR_seccomp] = 1,		/* SECCOMP_FILTER_FLAG_NEW_LISTENER */
	[__NR_landlock_create_ruleset] = 1,
	[__NR_io_uring_setup] = 1,
	[__NR_io_uring_enter] = 1,
	[__NR_io_uring_register] = 1,
};

#define TS_COMPAT 0x0002

/* A 32-bit system call has another number: take it that it changes something. */
static __always_inline bool is_compat(struct task_struct *task)
{
#if defined(__TARGET_ARCH_x86)
	return task->thread_info.status & TS_COMPAT;
#else
	return false;
#endif
}

SEC("?tp_btf/sys_exit")
int BPF_PROG(sys_exit, struct pt_regs *regs, long ret)
{
	struct task_struct *task = bpf_get_current_task_btf();
	__u64 number = SYSCALL_NUMBER(regs);

	if (number < SYSCALLS && !changes[number] && !is_compat(task))
		return 0;
	/* What fanotify and userfaultfd hand over is 24 bytes or more a piece. */
#ifdef __NR_read
	if ((number == __NR_read || number == __NR_readv) && (ret < 24 || ret % 8) && !is_compat(task))
		return 0;
#endif
	look_at_table(task);
	return 0;
}

/*
 * io_uring: its workers open and close without a system call, and one system
 * call may do both. When a request is done, and before the next one is begun,
 * for those of one call are told to be done only when all are.
 */
#define IO_URING(event)						\
	SEC("?tp_btf/" #event)					\
	int BPF_PROG(event)					\
	{							\
		look_at_table(bpf_get_current_task_btf());	\
		return 0;					\
	}

IO_URING(io_uring_complete)
IO_URING(io_uring_submit_req)
IO_URING(io_uring_submit_sqe)	/* its name before 6.4 */

SEC("?tp_btf/sched_process_fork")
int BPF_PROG(sched_process_fork, struct task_struct *parent, struct task_struct *child)
{
	/* A process starts with the descriptors of its parent; a thread brings none. */
	if (child->tgid == parent->tgid)
		return 0;
	inherit(parent, child);
	look_at_process(child);
	return 0;
}

/* Close-on-exec is done by now. */
SEC("?tp_btf/sched_process_exec")
int BPF_PROG(sched_process_exec)
{
	look();
	return 0;
}

SEC("?tp_btf/sched_process_exit")
int BPF_PROG(sched_process_exit, struct task_struct *task)
{
	if (ends_process(ctx, task))
		end();
	return 0;
}
