/* What nvml.c and ggml_card.cpp have in common: the cards that do not exist, and who uses them.
 *
 * The file that NVML_STUB names is the test's; it is read anew each time:
 *
 *     driver 560.35.03
 *     epoch 1                                       another number: the driver was loaded anew
 *     card UUID TOTAL FREE USED UTILIZATION NAME    bytes; utilization -1: not supported
 *     overhead BYTES                                what the driver takes for each process
 *     work BYTES                                    what its pool needs beyond what the graph does
 *     linger MILLISECONDS                           so long is memory taken after its owner's end
 *     no-data                                       memory is counted, not kept; nothing is computed
 *     mig NUMBER [UUID TOTAL FREE USED NAME]        that card is partitioned, and has this instance
 *     error FUNCTION CODE                           the NVML function fails with this code
 *     delay FUNCTION MILLISECONDS                   the NVML function takes so long
 *
 * FREE and USED are without the processes of ggml_card.cpp. Those stand in the file beside it, whose
 * name ends in ".processes" and which each of them changes under a lock:
 *
 *     process PID STARTED UUID BYTES GONE_AT_MS     STARTED as in /proc/PID/stat; 0: it lives
 *
 * A process that is gone, or a zombie, has given its memory back: `linger` milliseconds after the
 * first look that found it gone. Then its line goes too. Where memory lingers, one that ends by
 * itself keeps its weights and its cache so long as well.
 */

#ifndef CARD_H
#define CARD_H

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { CARDS_MAX = 8, PROCESSES_MAX = 128 };

typedef struct {
    char uuid[96], name[96];
    unsigned long long total, free, used;
    int utilization;
} card;

typedef struct {
    char driver[80];
    int epoch, count, linger_ms, no_data;
    unsigned long long overhead, work;
    card cards[CARDS_MAX];
} card_file;

typedef struct {
    long pid;
    unsigned long long started, bytes, gone_at_ms;
    char uuid[96];
} card_user;

typedef struct {
    int file, count, changed;
    card_user users[PROCESSES_MAX];
} card_users;

/* 0 where there is no file: the driver is not loaded. `other` sees the lines not known here. */
static int card_read(card_file *found, void (*other)(const char *line, void *context), void *context)
{
    char line[512];
    const char *path = getenv("NVML_STUB");
    FILE *file = path ? fopen(path, "re") : NULL;
    memset(found, 0, sizeof *found);
    if (!file)
        return 0;
    while (fgets(line, sizeof line, file)) {
        card *next = &found->cards[found->count < CARDS_MAX ? found->count : 0];
        if (found->count < CARDS_MAX &&
            sscanf(line, "card %95s %llu %llu %llu %d %95[^\n]", next->uuid, &next->total,
                   &next->free, &next->used, &next->utilization, next->name) == 6)
            found->count++;
        else if (!strcmp(line, "no-data\n"))
            found->no_data = 1;
        else if (sscanf(line, "epoch %d", &found->epoch) != 1 &&
                 sscanf(line, "driver %79[^\n]", found->driver) != 1 &&
                 sscanf(line, "overhead %llu", &found->overhead) != 1 &&
                 sscanf(line, "work %llu", &found->work) != 1 &&
                 sscanf(line, "linger %d", &found->linger_ms) != 1 && other)
            other(line, context);
    }
    fclose(file);
    return 1;
}

/* When the process began, in clock ticks after boot; 0: it is gone or a zombie. */
static unsigned long long card_started(long pid)
{
    char path[64], stat[1024], state = 'Z';
    unsigned long long started = 0;
    snprintf(path, sizeof path, "/proc/%ld/stat", pid);
    FILE *file = fopen(path, "re");
    if (!file)
        return 0;
    size_t length = fread(stat, 1, sizeof stat - 1, file);
    stat[length] = 0;
    fclose(file);
    const char *after = strrchr(stat, ')');
    if (!after ||
        sscanf(after + 1, " %c %*d %*d %*d %*d %*d %*u %*u %*u %*u %*u %*u %*u %*d %*d %*d %*d "
                          "%*d %*d %llu", &state, &started) != 2)
        return 0;
    return state == 'Z' || state == 'X' ? 0 : started;
}

static unsigned long long card_now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (unsigned long long)now.tv_sec * 1000 + (unsigned long long)now.tv_nsec / 1000000;
}

/* Locks, reads, and forgets who is gone for long enough. Always followed by `card_users_close`. */
static void card_users_open(card_users *found, int linger_ms)
{
    char path[4096], line[512];
    const char *state = getenv("NVML_STUB");
    memset(found, 0, sizeof *found);
    snprintf(path, sizeof path, "%s.processes", state ? state : "/nonexistent/");
    found->file = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (found->file < 0)
        return;
    flock(found->file, LOCK_EX);
    FILE *file = fdopen(dup(found->file), "r");
    while (file && fgets(line, sizeof line, file) && found->count < PROCESSES_MAX) {
        card_user *user = &found->users[found->count];
        if (sscanf(line, "process %ld %llu %95s %llu %llu", &user->pid, &user->started, user->uuid,
                   &user->bytes, &user->gone_at_ms) != 5)
            continue;
        if (!user->gone_at_ms && card_started(user->pid) != user->started) {
            user->gone_at_ms = card_now_ms();
            found->changed = 1;
        }
        if (user->gone_at_ms && card_now_ms() >= user->gone_at_ms + (unsigned)linger_ms)
            found->changed = 1;
        else
            found->count++;
    }
    if (file)
        fclose(file);
}

static void card_users_close(card_users *found)
{
    if (found->file < 0)
        return;
    if (found->changed) {
        FILE *file = ftruncate(found->file, 0) == 0 ? fdopen(dup(found->file), "w") : NULL;
        if (file) {
            rewind(file);
            for (int i = 0; i < found->count; i++) {
                const card_user *user = &found->users[i];
                fprintf(file, "process %ld %llu %s %llu %llu\n", user->pid, user->started,
                        user->uuid, user->bytes, user->gone_at_ms);
            }
            fclose(file);
        }
    }
    close(found->file); /* and with it the lock goes */
}

/* What all of them use on this card. */
static unsigned long long card_users_bytes(const card_users *found, const char *uuid)
{
    unsigned long long bytes = 0;
    for (int i = 0; i < found->count; i++)
        if (!strcmp(found->users[i].uuid, uuid))
            bytes += found->users[i].bytes;
    return bytes;
}

#endif
