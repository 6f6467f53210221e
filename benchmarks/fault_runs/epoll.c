/* Preloaded into the processes of a trial: epoll_wait sleeps a little where it is called over and over.

   Gloo polls for data that has come before anyone asked for it, so a process that the others are ahead of spins, and takes the cores
   from them. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/epoll.h>
#include <time.h>

enum { SPINS = 20, CALL_NS = 60000, SLEEP_NS = 300000 };

static long long nanoseconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1000000000LL + now.tv_nsec;
}

int epoll_wait(int epoll, struct epoll_event *events, int count, int timeout) {
  static int (*waits)(int, struct epoll_event *, int, int);
  static __thread long long last;
  static __thread int spins;
  if (!waits) waits = dlsym(RTLD_NEXT, "epoll_wait");
  spins = nanoseconds() - last < CALL_NS ? spins + 1 : 0;
  if (spins > SPINS) nanosleep(&(struct timespec){.tv_nsec = SLEEP_NS}, NULL);
  last = nanoseconds();
  return waits(epoll, events, count, timeout);
}
