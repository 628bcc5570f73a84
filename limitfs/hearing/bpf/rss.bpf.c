// SPDX-License-Identifier: GPL-2.0 OR MIT
/*
 * memory, shared, swap: pages of a process, exactly.
 *
 * kmem:rss_stat fires after each change of a counter (since 6.2; before, and
 * with per-thread counting, after each 64 to 128 changes, which is also as
 * good as /proc is there). Since 6.2 the counters are percpu_counters: their
 * common part alone can be off by a batch per processor, and asking every
 * processor at each fault is dear. So the common part is taken with a margin,
 * and the processors are asked only while the level lies within it.
 */
#include "kernel.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include <bpf/bpf_core_read.h>
#include "limitfs.h"
#include "judge.bpf.h"

char LICENSE[] SEC("license") = "Dual MIT/GPL";

/* enum in mm_types_task.h */
#define MM_FILEPAGES 0
#define MM_ANONPAGES 1
#define MM_SWAPENTS 2
#define MM_SHMEMPAGES 3

/* Written by user space before loading. */
const volatile struct {
	__u32 processors;	/* possible ones */
} machine = { 1 };

/* Where a per-processor address lies on each processor; index 0 is used only. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} anchor SEC(".maps");
