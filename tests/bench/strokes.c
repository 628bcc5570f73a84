/*
 * What hooks cost whom: reads "NAME COUNT" lines, does NAME COUNT times, prints nanoseconds for one. With the
 * argument "cpu", nanoseconds of CPU, its own and its children's: what others do meanwhile does not count.
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static void open_hot(void) { close(open("/dev/null", O_RDONLY)); }

/* A name that is not in the dentry cache: looked up on disk each time. */
static void open_cold(void)
{
	static unsigned long next;
	char name[64];
	int fd;

	snprintf(name, sizeof name, "/var/tmp/limitfs-bench-%d-%lu", getpid(), next++);
	fd = open(name, O_RDWR | O_CREAT | O_EXCL, 0600);
	close(fd);
	unlink(name);
}

static void dup_close(void) { close(dup(0)); }

static void get_ppid(void) { syscall(SYS_getppid); }

static void fork_exit(void)
{
	pid_t pid = fork();

	if (!pid)
		_exit(0);
	waitpid(pid, NULL, 0);
}

static void fork_exec(void)
{
	pid_t pid = vfork();

	if (!pid) {
		execl("/bin/true", "true", (char *)NULL);
		_exit(1);
	}
	waitpid(pid, NULL, 0);
}

static void page_fault(void)
{
	enum { PAGES = 64 };
	char *area = mmap(NULL, PAGES * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	madvise(area, PAGES * 4096, MADV_NOHUGEPAGE);
	for (int i = 0; i < PAGES; i++)
		area[i * 4096] = 1;
	munmap(area, PAGES * 4096);
}

static const struct { const char *name; void (*stroke)(void); } strokes[] = {
	{ "open_hot", open_hot },   { "open_cold", open_cold }, { "dup_close", dup_close },
	{ "getppid", get_ppid },    { "fork_exit", fork_exit }, { "page_fault", page_fault },
	{ "fork_exec", fork_exec },
};

static double cpu(int whose)
{
	struct rusage used;

	getrusage(whose, &used);
	return (used.ru_utime.tv_sec + used.ru_stime.tv_sec) * 1e9 + (used.ru_utime.tv_usec + used.ru_stime.tv_usec) * 1e3;
}

static double now(int in_cpu)
{
	struct timespec t;

	if (in_cpu)
		return cpu(RUSAGE_SELF) + cpu(RUSAGE_CHILDREN);

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e9 + t.tv_nsec;
}

int main(int argc, char **argv)
{
	int in_cpu = argc > 1 && !strcmp(argv[1], "cpu");
	char name[32];
	long count;

	while (scanf("%31s %ld", name, &count) == 2)
		for (size_t i = 0; i < sizeof strokes / sizeof *strokes; i++)
			if (!strcmp(name, strokes[i].name)) {
				double begun = now(in_cpu);

				for (long n = 0; n < count; n++)
					strokes[i].stroke();
				printf("%.1f\n", (now(in_cpu) - begun) / count);
				fflush(stdout);
			}
	return 0;
}
