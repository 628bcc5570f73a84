/*
 * Ways to a descriptor, to memory and to an end that Python does not know: `ways NAME` says "ready", or "no: why"
 * where this kernel has no such way; then it reads counts, goes that way and straight back as often, and says "done",
 * after the numbers of the processes that were born.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <linux/nsfs.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static void no(const char *what)
{
	printf("no: %s: %s\n", what, strerror(errno));
	exit(0);
}

static long must(long result, const char *what)
{
	if (result < 0) {
		perror(what);
		exit(1);
	}
	return result;
}

/* ioctl(2) */

static int opener;

static void begin_ioctl(void)
{
	opener = must(open("/proc/self/ns/net", O_RDONLY), "open");
}

static void by_ioctl(void)
{
	close(must(ioctl(opener, NS_GET_USERNS), "NS_GET_USERNS"));
}

static void begin_terminal(void)
{
	opener = posix_openpt(O_RDWR | O_NOCTTY);
	if (opener < 0)
		no("/dev/ptmx");
	must(unlockpt(opener), "unlockpt");
}

static void by_terminal(void)
{
	close(must(ioctl(opener, TIOCGPTPEER, O_RDWR | O_NOCTTY), "TIOCGPTPEER"));
}

/* pidfd_getfd(2) */

static void begin_pidfd_getfd(void)
{
	opener = must(syscall(SYS_pidfd_open, getpid(), 0), "pidfd_open");
}

static void by_pidfd_getfd(void)
{
	close(must(syscall(SYS_pidfd_getfd, opener, 0, 0), "pidfd_getfd"));
}

/* A second process with the same table of descriptors. */

static int orders[2], reports[2];

static void begin_partner(unsigned long flags)
{
	char byte;

	must(pipe(orders), "pipe");
	must(pipe(reports), "pipe");
	if (must(syscall(SYS_clone, flags | SIGCHLD, 0, 0, 0, 0), "clone"))
		return;
	prctl(PR_SET_PDEATHSIG, SIGKILL); /* the pipe does not end while it is in the table of both */
	while (read(orders[0], &byte, 1) == 1) {
		close(must(dup(0), "dup"));
		must(write(reports[1], &byte, 1), "write");
	}
	_exit(0);
}

static void begin_shared(void) { begin_partner(CLONE_FILES); }

static void begin_unshared(void) { begin_partner(0); }

static void by_partner(void)
{
	char byte = 0;

	must(write(orders[1], &byte, 1), "write");
	must(read(reports[0], &byte, 1), "read");
}

static void begin_birth(void)
{
	for (int i = 0; i < 3000; i++)
		must(dup(0), "dup");
}

/* A process that is born with the table of its parent. */
static void by_birth(void)
{
	pid_t child = must(syscall(SYS_clone, CLONE_FILES | SIGCHLD, 0, 0, 0, 0), "clone");

	if (!child)
		_exit(0);
	waitpid(child, NULL, 0);
	printf("%d ", child);
}

/* Memory that a child fills and gives back: its parent's, or its own copy. */

enum { FILLED = 512 << 12 };

static char *filled, stack[64 << 10];

static void begin_fill(void)
{
	filled = mmap(NULL, FILLED, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (filled == MAP_FAILED)
		no("mmap");
	madvise(filled, FILLED, MADV_NOHUGEPAGE);
}

static int fill(void *unused)
{
	(void)unused;
	memset(filled, 1, FILLED);
	madvise(filled, FILLED, MADV_DONTNEED);
	_exit(0);
}

static void fill_in_child(int flags)
{
	waitpid(must(clone(fill, stack + sizeof stack, flags | SIGCHLD, NULL), "clone"), NULL, 0);
}

static void by_fill_shared(void) { fill_in_child(CLONE_VM); }

static void by_fill_vfork(void) { fill_in_child(CLONE_VM | CLONE_VFORK); }

static void by_fill_copy(void) { fill_in_child(0); }

/* A process whose threads end all at once. */

enum { THREADS = 4 };

static pthread_barrier_t together;

static void *wait_for_the_end(void *unused)
{
	(void)unused;
	pthread_barrier_wait(&together);
	for (;;)
		pause();
}

static void by_threads(void)
{
	pid_t child = must(fork(), "fork");
	pthread_t thread;

	if (!child) {
		pthread_barrier_init(&together, NULL, THREADS + 1);
		for (int i = 0; i < THREADS; i++)
			pthread_create(&thread, NULL, wait_for_the_end, NULL);
		pthread_barrier_wait(&together);
		_exit(7);
	}
	waitpid(child, NULL, 0);
	printf("%d ", child);
}

static void begin_nothing(void) {}

/* System calls of 32 bits */

#if defined(__x86_64__)
static char *low; /* an address that 32 bits hold */

static long int80(long number, long a, long b, long c)
{
	long result;

	__asm__ volatile("int $0x80"
			 : "=a"(result)
			 : "a"(number), "b"(a), "c"(b), "d"(c)
			 : "memory", "r8", "r9", "r10", "r11");
	errno = result < 0 ? -result : 0;
	return result < 0 ? -1 : result;
}

enum { OPEN32 = 5, CLOSE32 = 6, GETPID32 = 20, DUP2_32 = 63, DUP3_32 = 330, CLOSE_RANGE32 = 436 };

static void begin_int80(void)
{
	pid_t child = fork();
	int status;

	if (!child)
		_exit(int80(GETPID32, 0, 0, 0) != getpid());
	waitpid(child, &status, 0);
	errno = ENOSYS;
	if (status)
		no("int $0x80");
	low = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
	if (low == MAP_FAILED)
		no("MAP_32BIT");
	strcpy(low, "/dev/null");
}

static void by_int80(void)
{
	must(int80(CLOSE32, must(int80(OPEN32, (long)low, O_RDONLY, 0), "open"), 0, 0), "close");
}

static void by_int80_dup2(void)
{
	must(int80(DUP2_32, 0, 500, 0), "dup2");
	must(int80(CLOSE_RANGE32, 500, 600, 0), "close_range");
}

static void by_int80_dup3(void)
{
	must(int80(DUP3_32, 0, 500, O_CLOEXEC), "dup3");
	must(int80(CLOSE32, 500, 0, 0), "close");
}
#else
static void begin_int80(void)
{
	errno = ENOSYS;
	no("int $0x80");
}

static void by_int80(void) {}
static void by_int80_dup2(void) {}
static void by_int80_dup3(void) {}
#endif

/* io_uring(7) */

enum { ENTRIES = 8 };

static struct {
	int fd;
	unsigned flags;
	unsigned *sq_tail, *sq_mask, *sq_array, *sq_flags, *cq_head, *cq_tail, *cq_mask;
	struct io_uring_sqe *sqes;
	struct io_uring_cqe *cqes;
} ring;

static char *map_ring(size_t size, off_t offset)
{
	char *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring.fd, offset);

	if (at == MAP_FAILED)
		no("mmap of io_uring");
	return at;
}

static void begin_ring(unsigned flags)
{
	struct io_uring_params p = { .flags = flags, .sq_thread_idle = 60000 };
	char *sq, *cq;

	ring.fd = syscall(SYS_io_uring_setup, ENTRIES, &p);
	if (ring.fd < 0)
		no("io_uring_setup");
	ring.flags = flags;
	sq = map_ring(p.sq_off.array + p.sq_entries * sizeof(unsigned), IORING_OFF_SQ_RING);
	cq = map_ring(p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe), IORING_OFF_CQ_RING);
	ring.sqes = (void *)map_ring(p.sq_entries * sizeof(struct io_uring_sqe), IORING_OFF_SQES);
	ring.sq_tail = (void *)(sq + p.sq_off.tail);
	ring.sq_mask = (void *)(sq + p.sq_off.ring_mask);
	ring.sq_flags = (void *)(sq + p.sq_off.flags);
	ring.sq_array = (void *)(sq + p.sq_off.array);
	ring.cq_head = (void *)(cq + p.cq_off.head);
	ring.cq_tail = (void *)(cq + p.cq_off.tail);
	ring.cq_mask = (void *)(cq + p.cq_off.ring_mask);
	ring.cqes = (void *)(cq + p.cq_off.cqes);
}

static void push(struct io_uring_sqe request)
{
	unsigned tail = *ring.sq_tail, at = tail & *ring.sq_mask;

	ring.sqes[at] = request;
	ring.sq_array[at] = at;
	__atomic_store_n(ring.sq_tail, tail + 1, __ATOMIC_RELEASE);
}

/* Have what was pushed done; the result of the last. */
static int done(unsigned count)
{
	unsigned flags = IORING_ENTER_GETEVENTS, head = *ring.cq_head;
	int result = -1;

	if (ring.flags & IORING_SETUP_SQPOLL) {
		__atomic_thread_fence(__ATOMIC_SEQ_CST);
		if (__atomic_load_n(ring.sq_flags, __ATOMIC_ACQUIRE) & IORING_SQ_NEED_WAKEUP)
			flags |= IORING_ENTER_SQ_WAKEUP;
	}
	for (unsigned submit = count; __atomic_load_n(ring.cq_tail, __ATOMIC_ACQUIRE) - head < count; submit = 0)
		must(syscall(SYS_io_uring_enter, ring.fd, submit, count, flags, NULL, 0), "io_uring_enter");
	for (; count--; head++)
		result = must(ring.cqes[head & *ring.cq_mask].res, "io_uring");
	__atomic_store_n(ring.cq_head, head, __ATOMIC_RELEASE);
	return result;
}

static void push_open(unsigned flags)
{
	push((struct io_uring_sqe){ .opcode = IORING_OP_OPENAT, .flags = flags, .fd = AT_FDCWD,
				    .addr = (unsigned long)"/dev/null", .open_flags = O_RDONLY });
}

static void push_close(int fd, unsigned flags)
{
	push((struct io_uring_sqe){ .opcode = IORING_OP_CLOSE, .flags = flags, .fd = fd });
}

static void begin_uring(void) { begin_ring(0); }

static void begin_uring_polled(void) { begin_ring(IORING_SETUP_SQPOLL); }

static void by_uring(void)
{
	push_open(0);
	push_close(done(1), 0);
	done(1);
}

/* By a worker thread of the kernel. */
static void by_uring_worker(void)
{
	push_open(IOSQE_ASYNC);
	push_close(done(1), IOSQE_ASYNC);
	done(1);
}

/* Both in one system call: the descriptor will be the lowest that is free. */
static void both(unsigned flags)
{
	static int next;

	if (!next) {
		next = must(dup(0), "dup");
		close(next);
		by_uring(); /* the kernel knows the path now, and opens it at once */
	}
	push_open(flags);
	push_close(next, 0);
	done(2);
}

static void by_uring_batch(void) { both(0); }

static void by_uring_linked(void) { both(IOSQE_IO_LINK); }

static const struct {
	const char *name;
	void (*begin)(void);
	void (*once)(void);
} ways[] = {
	{ "ioctl", begin_ioctl, by_ioctl },
	{ "terminal", begin_terminal, by_terminal },
	{ "pidfd_getfd", begin_pidfd_getfd, by_pidfd_getfd },
	{ "shared", begin_shared, by_partner },
	{ "unshared", begin_unshared, by_partner },
	{ "birth", begin_birth, by_birth },
	{ "fill_shared", begin_fill, by_fill_shared },
	{ "fill_vfork", begin_fill, by_fill_vfork },
	{ "fill_copy", begin_fill, by_fill_copy },
	{ "threads", begin_nothing, by_threads },
	{ "int80", begin_int80, by_int80 },
	{ "int80_dup2", begin_int80, by_int80_dup2 },
	{ "int80_dup3", begin_int80, by_int80_dup3 },
	{ "io_uring", begin_uring, by_uring },
	{ "io_uring_worker", begin_uring, by_uring_worker },
	{ "io_uring_polled", begin_uring_polled, by_uring },
	{ "io_uring_batch", begin_uring, by_uring_batch },
	{ "io_uring_linked", begin_uring, by_uring_linked },
};

int main(int argc, char **argv)
{
	size_t way = 0;
	long count;

	setvbuf(stdout, NULL, _IOLBF, 0);
	while (argc < 2 || strcmp(argv[1], ways[way].name))
		if (++way == sizeof ways / sizeof *ways)
			return 2;
	ways[way].begin();
	puts("ready");
	while (scanf("%ld", &count) == 1) {
		while (count-- > 0)
			ways[way].once();
		puts("done");
	}
	return 0;
}
