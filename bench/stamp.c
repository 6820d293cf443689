/* Appends CLOCK_MONOTONIC in nanoseconds to the file argv[1] as soon as main runs, then waits. */
#include <stdio.h>
#include <time.h>
#include <unistd.h>

int main(int argc, char **argv) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  FILE *file = argc > 1 ? fopen(argv[1], "a") : NULL;
  if (!file) return 2;
  fprintf(file, "%ld%09ld %d\n", (long)now.tv_sec, now.tv_nsec, (int)getpid());
  fclose(file);
  for (;;) pause();
}
