/*
 * Many idle processes, a few in each cgroup: crowd COUNT CGROUP... enters each cgroup and leaves COUNT children there.
 * Prints their numbers in one line. "stir RATE SECONDS" on standard input has them open and close a file and touch
 * some memory, one after the other, RATE times a second; "done" is printed then. All of them end with its input.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PAGES = 64 };

static pid_t *children;
static size_t born;

/* What a process does that stays far from its threshold. */
static void move(void)
{
	char *area = mmap(NULL, PAGES * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	close(open("/dev/null", O_RDONLY));
	for (int i = 0; i < PAGES; i++)
		area[i * 4096] = 1;
	munmap(area, PAGES * 4096);
}

static void live(const sigset_t *stirred)
{
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	for (;;)
		if (sigwaitinfo(stirred, NULL) == SIGUSR1)
			move();
}

static void enter(const char *cgroup)
{
	char path[4096];
	int fd;

	snprintf(path, sizeof path, "%s/cgroup.procs", cgroup);
	fd = open(path, O_WRONLY);
	if (fd < 0 || write(fd, "0", 1) != 1) {
		perror(path);
		exit(1);
	}
	close(fd);
}

static void end_children(void)
{
	for (size_t i = 0; i < born; i++)
		kill(children[i], SIGKILL);
	while (wait(NULL) > 0)
		;
}

static void stir(long rate, long seconds)
{
	const struct timespec pause = { .tv_nsec = 1000000000 / rate };

	for (long n = 0; n < rate * seconds; n++) {
		kill(children[n % born], SIGUSR1);
		nanosleep(&pause, NULL);
	}
}

int main(int argc, char **argv)
{
	long count = argc > 2 ? atol(argv[1]) : 0, rate, seconds;
	sigset_t stirred;

	sigemptyset(&stirred);
	sigaddset(&stirred, SIGUSR1);
	sigprocmask(SIG_BLOCK, &stirred, NULL);
	children = calloc(argc * count + 1, sizeof *children);
	atexit(end_children);
	for (int i = 2; i < argc; i++) {
		enter(argv[i]);
		for (long n = 0; n < count; n++) {
			pid_t pid = fork();

			if (pid < 0) {
				perror("fork");
				return 1;
			}
			if (!pid)
				live(&stirred);
			children[born++] = pid;
		}
	}
	for (size_t i = 0; i < born; i++)
		printf("%d ", children[i]);
	printf("\n");
	fflush(stdout);
	while (scanf(" stir %ld %ld", &rate, &seconds) == 2) {
		stir(rate, seconds);
		printf("done\n");
		fflush(stdout);
	}
	return 0;
}
