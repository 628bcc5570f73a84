/* SPDX-License-Identifier: GPL-2.0 OR MIT */
/*
 * What the kernel programs and user space say to each other. layout.py says
 * it once more for ctypes: change both.
 */
#ifndef LIMITFS_H
#define LIMITFS_H

/* Watches in one scope. */
#define LIMITFS_WATCHES 16

/* Members of `states`; one that crosses when it is full is counted in `full`. */
#define LIMITFS_STATES 65536

/* Scopes in which something is watched. */
#define LIMITFS_CONFIGS 16384

/* Cgroups that have processes. */
#define LIMITFS_CONTAINERS 16384

/* Of a cgroup, the ancestors that are scopes, with itself and the root. */
#define LIMITFS_DEPTH 16

/* Groups that one process is in. */
#define LIMITFS_GROUPS 8

/* Bits that tell which processes may be watched; a power of two. */
#define LIMITFS_MARKS 65536

/* Bytes; a record is 80 with its header. The counters live in the maps. */
#define LIMITFS_RING (256 * 1024)

/* ns in a clock tick of /proc/PID/stat; USER_HZ is 100 on all that run BPF. */
#define LIMITFS_TICK 10000000

/* A share is in billionths of the member's limit. */
#define LIMITFS_SHARE 1000000000

#define LIMITFS_COMM 16

/*
 * A scope: some processes about whom something is asked. A number:
 *   a cgroup's id: the processes in it and below; that is the inode of its
 *	directory in the unified hierarchy;
 *   EVERY: all processes, which is the root of that hierarchy;
 *   PROCESS | tgid: one process;
 *   GROUP | number: those that user space says;
 *   EVERY_CGROUP: each cgroup below the root, for sums.
 */
#define LIMITFS_EVERY 1ULL
#define LIMITFS_GROUP (1ULL << 62)
#define LIMITFS_PROCESS (1ULL << 63)
#define LIMITFS_EVERY_CGROUP (LIMITFS_PROCESS | LIMITFS_GROUP)

/* In `control.wide`: what there is to hear beyond single processes. */
enum limitfs_wide {
	LIMITFS_WIDE_EVERY = 1 << 0,	/* each process */
	LIMITFS_WIDE_CGROUPS = 1 << 1,	/* each process of some cgroup */
	LIMITFS_WIDE_GROUPS = 1 << 2,	/* there are groups */
	LIMITFS_WIDE_SUMS = 1 << 3,	/* some kind is added up */
	LIMITFS_WIDE_TOTALS = 1 << 4,	/* the sum of each cgroup */
};

enum limitfs_kind {
	LIMITFS_FDS,		/* descriptors */
	LIMITFS_MEMORY,		/* pages */
	LIMITFS_SHARED,		/* pages */
	LIMITFS_SWAP,		/* pages */
	LIMITFS_THREADS,	/* threads */
	LIMITFS_PROCESSES,	/* 1 until the process has ended */
	LIMITFS_KINDS = 8,	/* a power of two, for the verifier */
};

enum limitfs_flag {
	LIMITFS_DOWN = 1 << 0,		/* less is worse */
	LIMITFS_STRICT = 1 << 1,	/* >, <; only of use with a share */
	LIMITFS_CHANGE = 1 << 2,	/* every new value is of interest */
	LIMITFS_SUM = 1 << 3,		/* of the scope's processes together */
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

/* What is watched in one scope. */
struct config {
	__u64 start;	/* of a process: ticks after boot, as its number may be used again; else 0 */
	__u32 count;
	__u32 unused;
	struct watch watches[LIMITFS_WATCHES];
};

/* A watch and whom it is about: a process, or the total of a scope. */
struct member {
	__u32 watch;	/* 0: only who it is */
	__u32 tgid;	/* 0 for a total */
	__u64 start;	/* ticks after boot; for a total its scope */
};

/*
 * What one process adds to the totals of the scopes that it is in: of its
 * cgroup and all above, or of one group. The value is one word, so that it can
 * be exchanged at once: above the low half of the cgroup's id (1 for a group),
 * below how much; 0 when the process has left or ended.
 */
struct share {
	__u32 ledger;	/* 0: adds nothing, but tells where a member was last */
	__u32 tgid;
	__u64 start;	/* ticks after boot */
	__u64 group;	/* 0: its cgroup */
};

/* The sum over the shares in a scope. */
struct total {
	__u32 ledger;
	__u32 unused;
	__u64 scope;
};

/* A cgroup, by the low half of its id, with its ancestors: these never change. */
struct container {
	__u64 leaf;	/* the whole id */
	__u32 count;
	__u32 unused;
	__u64 scopes[LIMITFS_DEPTH];	/* from the root down to itself */
};

/* The groups that a process is in. */
struct membership {
	__u32 groups[LIMITFS_GROUPS];	/* 0: none; numbers begin with 1 */
	__u32 seen;	/* `look_at` has found the process alive */
};

struct state {
	__u64 flips;	/* crossings either way: odd in alarm; (flips + 1) / 2 alarms */
	__s64 value;	/* when last counted exactly, in units of the kind */
	__s64 peak;	/* of a process: highest such value */
	__u32 told;	/* user space has heard of this member */
	__u32 gone;	/* enum limitfs_ending; else 0 */
};

/* How it is told that a member has ended. */
enum limitfs_ending {
	LIMITFS_ENDS = 1,	/* by a record: it is in the ring, or is tried just now */
	LIMITFS_UNTOLD,		/* by this only: the ring did not take that */
};

enum limitfs_what {
	LIMITFS_CROSSED,
	LIMITFS_GONE,
	LIMITFS_FORK,
	LIMITFS_EXEC,
	LIMITFS_EXIT,
	LIMITFS_FULL,	/* a map takes no more, see `control.full` */
	LIMITFS_MOVE,	/* a process belongs to another cgroup now, of whichever hierarchy */
	LIMITFS_WAKE,	/* only `time` and `what` are true: see `control.dropped` */
};

/* What happened. `tgid`, `tid`: numbers of the initial PID namespace. */
struct record {
	__u64 time;	/* ns, CLOCK_MONOTONIC */
	__s64 value;	/* in units of the kind; GONE: its peak; EXIT: peak of memory, pages */
	__u64 flips;	/* as in the state */
	__u64 start;	/* ticks after boot; for a total its scope */
	__u32 watch;	/* FORK, EXEC, MOVE: 0; EXIT: exit code as wait(2) has it */
	__u32 what;
	__u32 tgid;	/* whose value it is; 0 for a total */
	__u32 tid;	/* who made it so; 0: unknown */
	__u32 uid;	/* of tid, effective; FORK, EXEC, EXIT, MOVE: real */
	__u32 parent;	/* FORK, EXEC, EXIT, MOVE */
	char comm[LIMITFS_COMM];	/* of tid */
};

/* The argument of the program `plant`: the total of `scope` is to be judged by what is watched in `config`. */
struct planting {
	__u64 config;
	__u64 scope;
	__u32 watch;	/* the first that is new */
	__u32 unused;
};

/* The argument of the program `leave`: that process is no longer in that group. */
struct leaving {
	__u32 tgid;
	__u32 group;
	__u64 start;
};

/* In .bss, mapped by user space. */
struct control {
	__u32 wide;	/* of enum limitfs_wide; 0: only single processes are watched */
	__u32 lives;	/* 1 << FORK, EXEC, EXIT, MOVE: such records are wanted */
	__u32 margin;	/* pages that the common part of a memory counter may be off */
	__u32 processors;	/* possible ones */
	__u32 pid;	/* for `look_at`: of one process only; 0: of all */
	__u32 plant;	/* for `look_at`: from this watch on user space looks for itself what turned */
	__u64 start;	/* for `look_at`: of `pid` */
	__u32 seen;	/* by `look_at`: processes that are alive */
	__u32 wanted;	/* for `look_at`: it is to begin */
	__u32 ledgers[LIMITFS_KINDS];	/* of the kinds that are added up, never the same number twice; else 0 */
	__u32 unused;
	__u32 zero;	/* for what the verifier must not know */
	__u64 dropped;	/* records that the ring did not take */
	__u64 full;	/* states, shares and totals that had no room */
	__u64 heard;	/* of those, how many user space knows of */
	__u32 marks[LIMITFS_MARKS / 32];	/* by process number: nothing is watched on one whose bit is clear */
};

#endif
