// Preloaded into an agent: its clocks are those of the kernel plus what a file says, two 64-bit numbers of nanoseconds
// for the wall clock and for the monotonic ones. Whoever writes to the file makes the clocks jump.
//
// Waits that name a point in time are given to the kernel by its own clock.

#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
#include <dlfcn.h>

#define SECOND 1000000000LL
#define WALL_CLOCK_FROM 1000000000LL  // seconds: no monotonic clock is that old

static const volatile int64_t nothing[2];
static const volatile int64_t* shifts = nothing;

__attribute__((constructor)) static void map_shifts(void) {
  const char* path = getenv("SHIFTED_CLOCK");
  const int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
  if (file < 0) return;
  void* mapped = mmap(NULL, sizeof nothing, PROT_READ, MAP_SHARED, file, 0);
  close(file);
  if (mapped != MAP_FAILED) shifts = mapped;
}

static int64_t shift_of(clockid_t clock) {
  switch (clock) {
    case CLOCK_REALTIME:
    case CLOCK_REALTIME_COARSE:
      return shifts[0];
    case CLOCK_MONOTONIC:
    case CLOCK_MONOTONIC_COARSE:
    case CLOCK_MONOTONIC_RAW:
    case CLOCK_BOOTTIME:
      return shifts[1];
    default:
      return 0;
  }
}

static struct timespec shifted(struct timespec when, int64_t by) {
  const int64_t total = when.tv_sec * SECOND + when.tv_nsec + by;
  return (struct timespec){total > 0 ? total / SECOND : 0, total > 0 ? total % SECOND : 0};
}

int clock_gettime(clockid_t clock, struct timespec* now) {
  const int failed = (int)syscall(SYS_clock_gettime, clock, now);
  if (!failed) *now = shifted(*now, shift_of(clock));
  return failed;
}

time_t time(time_t* out) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (out) *out = now.tv_sec;
  return now.tv_sec;
}

int gettimeofday(struct timeval* out, void* zone) {
  (void)zone;
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  *out = (struct timeval){now.tv_sec, now.tv_nsec / 1000};
  return 0;
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

int sem_clockwait(sem_t* sem, clockid_t clock, const struct timespec* until) {
  const struct timespec real = shifted(*until, -shift_of(clock));
  return NEXT(sem_clockwait)(sem, clock, &real);
}

int sem_timedwait(sem_t* sem, const struct timespec* until) {
  const struct timespec real = shifted(*until, -shift_of(CLOCK_REALTIME));
  return NEXT(sem_timedwait)(sem, &real);
}

int pthread_cond_clockwait(pthread_cond_t* cond, pthread_mutex_t* mutex, clockid_t clock, const struct timespec* until) {
  const struct timespec real = shifted(*until, -shift_of(clock));
  return NEXT(pthread_cond_clockwait)(cond, mutex, clock, &real);
}

int pthread_cond_timedwait(pthread_cond_t* cond, pthread_mutex_t* mutex, const struct timespec* until) {
  const clockid_t clock = until->tv_sec >= WALL_CLOCK_FROM ? CLOCK_REALTIME : CLOCK_MONOTONIC;
  const struct timespec real = shifted(*until, -shift_of(clock));
  return NEXT(pthread_cond_timedwait)(cond, mutex, &real);
}

int clock_nanosleep(clockid_t clock, int flags, const struct timespec* until, struct timespec* left) {
  const struct timespec real = shifted(*until, flags & TIMER_ABSTIME ? -shift_of(clock) : 0);
  return NEXT(clock_nanosleep)(clock, flags, &real, left);
}
