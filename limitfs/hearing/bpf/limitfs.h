/* SPDX-License-Identifier: GPL-2.0 OR MIT */
/*
 * What the kernel programs and user space say to each other. layout.py says
 * it once more for ctypes: change both.
 */
#ifndef LIMITFS_H
#define LIMITFS_H

/* Watches on one process, or over all processes. */
#define LIMITFS_WATCHES 16

/* Members of `states`; one that crosses when it is full is counted in `full`. */
#define LIMITFS_STATES 65536

/* Processes that are watched by number. */
#define LIMITFS_CONFIGS 16384

/* Bytes; a record is 80 with its header. The counters live in the maps. */
#define LIMITFS_RING (256 * 1024)

/* ns in a clock tick of /proc/PID/stat; USER_HZ is 100 on all that run BPF. */
#define LIMITFS_TICK 10000000

/* A share is in billionths of the member's limit. */
#define LIMITFS_SHARE 1000000000

#define LIMITFS_COMM 16

/* The key in `configs` of what is watched on every process. */
#define LIMITFS_EVERY 0

enum limitfs_kind {
	LIMITFS_FDS,		/* descriptors */
	LIMITFS_MEMORY,		/* pages */
	LIMITFS_SHARED,		/* pages */
	LIMITFS_SWAP,		/* pages */
	LIMITFS_THREADS,	/* threads */
	LIMITFS_KINDS = 8,	/* a power of two, for the verifier */
};

enum limitfs_flag {
	LIMITFS_DOWN = 1 << 0,		/* less is worse */
	LIMITFS_STRICT = 1 << 1,	/* >, <; only of use with a share */
	LIMITFS_CHANGE = 1 << 2,	/* every new value is of interest */
	LIMITFS_SUM = 1 << 3,		/* of all processes together */
	LIMITFS_ENTER_SHARE = 1 << 4,	/* `enter` is a share */
	LIMITFS_LEAVE_SHARE = 1 << 5,	/* `leave` is a share */
};

/*
 * One condition. Upward: alarm from `enter` on, clear again from `leave` down
 * (leave < enter); downward the other way round. In units of the kind.
 */
struct watch {
	__u32 id;
	__u32 flags;
	__u32 kind;
	__u32 rlimit;	/* RLIMIT_* that a share is of */
	__s64 enter;
	__s64 leave;
};

/* What is watched on one process, or on every process. */
struct config {
	__u64 start;	/* ticks after boot, a number used again is another process; 0: every */
	__u32 count;
	__u32 unused;
	struct watch watches[LIMITFS_WATCHES];
};

/* A watch and the process that it is about; both 0 for a sum. */
struct member {
	__u32 watch;
	__u32 tgid;
	__u64 start;	/* ticks after boot */
};

struct state {
	__u64 flips;	/* crossings either way: odd in alarm; (flips + 1) / 2 alarms */
	__s64 value;	/* when last counted exactly, in units of the kind */
	__s64 peak;	/* highest such value */
	__u64 lost;	/* records that the ring did not take */
	__u32 told;	/* user space has heard of this member */
	__u32 gone;	/* it has ended, and the ring did not take that */
};

enum limitfs_what {
	LIMITFS_CROSSED,
	LIMITFS_GONE,
	LIMITFS_FORK,
	LIMITFS_EXEC,
	LIMITFS_EXIT,
};

/* What happened. `tgid`, `tid`: numbers of the initial PID namespace. */
struct record {
	__u64 time;	/* ns, CLOCK_MONOTONIC */
	__s64 value;	/* in units of the kind; FORK: parent; EXIT: peak of memory, pages */
	__u64 flips;	/* as in the state; EXIT: peak of virtual memory, pages */
	__u64 start;	/* ticks after boot */
	__u32 watch;	/* FORK, EXEC, EXIT: 0; EXIT: exit code as wait(2) has it */
	__u32 what;
	__u32 tgid;	/* whose value it is; 0 for a sum */
	__u32 tid;	/* who made it so; 0: unknown */
	__u32 uid;	/* of tid, effective */
	__u32 unused;
	char comm[LIMITFS_COMM];	/* of tid */
};

/* The argument of the program `seed`: a value that user space has read. */
struct seed {
	struct member member;
	__s64 value;	/* in units of the kind */
	__u64 flips;	/* in: of the state before the value was read; out: now */
	__s64 limit;	/* of the member, for shares; 0: none */
	__u32 config;	/* the key in `configs` */
	__u32 error;	/* out: 1 no such watch, 2 no room, 3 turned meanwhile: read again */
};

/* In .bss, mapped by user space. */
struct control {
	__u32 every;	/* not 0: there is something to hear of every process */
	__u32 sums;	/* bit k: kind k is added up over all processes */
	__u32 births;	/* FORK, EXEC and EXIT records are wanted */
	__u32 margin;	/* pages that the common part of a memory counter may be off */
	__u32 processors;	/* possible ones */
	__u32 unused;
	__u64 dropped;	/* records that the ring did not take */
	__u64 full;	/* crossings for which there was no room in `states` */
	__s64 total[LIMITFS_KINDS];	/* the part of the sum that the kernel counted */
	__s64 base[LIMITFS_KINDS];	/* the part that user space counted */
};

#endif
