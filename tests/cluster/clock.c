// A clock that is wrong by as many seconds as /dev/shm/clock says, for the processes that preload this.
#define _GNU_SOURCE
#include <stdio.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long wrong;

__attribute__((constructor)) static void look(void) {
  FILE *file = fopen("/dev/shm/clock", "r");
  if (file && fscanf(file, "%ld", &wrong) != 1) wrong = 0;
  if (file) fclose(file);
}

int clock_gettime(clockid_t which, struct timespec *now) {
  int failed = (int)syscall(SYS_clock_gettime, which, now);
  if (!failed && (which == CLOCK_REALTIME || which == CLOCK_REALTIME_COARSE)) now->tv_sec += wrong;
  return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
  struct timespec here;
  (void)zone;
  int failed = clock_gettime(CLOCK_REALTIME, &here);
  if (!failed) *now = (struct timeval){here.tv_sec, here.tv_nsec / 1000};
  return failed;
}

time_t time(time_t *to) {
  struct timespec here;
  clock_gettime(CLOCK_REALTIME, &here);
  if (to) *to = here.tv_sec;
  return here.tv_sec;
}
