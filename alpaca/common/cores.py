"""How many cores this process may use."""

import os

# macOS has no affinity mask. os.cpu_count() counts the machine's cores, of which a job may have a few.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
