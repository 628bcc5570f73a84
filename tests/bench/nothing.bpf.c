// SPDX-License-Identifier: GPL-2.0 OR MIT
/* What a hook costs that does nothing: on what a descriptor passes when it comes, and when it goes. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

char LICENSE[] SEC("license") = "Dual MIT/GPL";

#define NOTHING(kind, function)		\
	SEC("?" #kind "/" #function)	\
	int kind##_##function(void *ctx)	\
	{				\
		return 0;		\
	}

NOTHING(fentry, fd_install)
NOTHING(fexit, close_fd)
NOTHING(fexit, file_close_fd)
